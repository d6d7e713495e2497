"""Questions of several kinds about pictures that are drawn by number: what those about scenes and those about pages share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from vtok.eval.models.assets import asset
from vtok.eval.models.reference_vlm import YES_NO

Asked = tuple[str, str]  # question, answer


class AskedOf(NamedTuple):
    """A question about the picture of a split with this number."""

    text: str
    answer: str
    number: int
    kind: str


def words_of(texts: Mapping[str, str]) -> Sequence[str]:
    """Of questions, kind -> text with `{}`, in alphabetical order."""
    return sorted({word.strip("{}") for text in texts.values() for word in text.split()} - {""})


def one_of_each(
    split: str, numbers: Iterable[int], about: Callable[[int, random.Random], Mapping[str, Sequence[Asked]]], turn: int = 1
) -> list[AskedOf]:
    """A question of every kind about each picture, as far as there is one.

    `about`: (number, randomness) -> all that can be asked, kind -> questions. `turn` pictures in a row are asked about a
    presence that is a "yes", then as many about one that is a "no".
    """
    found = []
    for number in numbers:
        draw = random.Random(f"questions {split} {number}")
        for kind, asked in about(number, draw).items():
            if kind == "present":
                asked = [one for one in asked if one[1] == YES_NO[number // turn % 2]]
            if asked:
                found.append(AskedOf(*draw.choice(asked), number, kind))
    return found


def blind_answers_of(name: str) -> dict[str, str]:
    """Text of a question -> its most frequent answer in training, the best that can be said without the picture; bundled."""
    return json.loads(asset(name).read_text(encoding="utf-8"))
