"""Questions about scenes, each about one little thing among many, with an answer of one word."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vtok.eval.models.assets import asset
from vtok.eval.models.scenes.album import NAMES
from vtok.eval.models.scenes.compose import COLOUR_NAMES, Thing, draw_scene

KINDS = ("color", "thing", "present", "count")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# What is asked for stands last, where the answer is read from: with a question mark behind it training took far longer.
_TEXTS = {
    "color": "what color is behind the {}",
    "thing": "what is on the plate that is {}",
    "present": "is there any {}",
    "count": "how many plates are {}",
}
WORDS = (
    *sorted({word.strip("{}") for text in _TEXTS.values() for word in text.split()} - {""}),
    "no",
    "yes",
    *NUMBERS,
    *COLOUR_NAMES,
    *NAMES,
)

TEST_SCENES = 160  # numbers 0, 1, ... of the test split
CALIBRATION_SCENES = range(1_000_000, 1_000_080)  # of the training split, which training does not reach
BLIND = "scenes/blind-answers.json"
Asked = tuple[str, str]  # question, answer


def questions_about(things: Sequence[Thing], draw: random.Random) -> dict[str, list[Asked]]:
    """All that can be asked, kind -> questions; as many "no" as "yes", and colours of every number as often as can be."""
    found: dict[str, list[Asked]] = {kind: [] for kind in KINDS}
    plates = Counter(thing.colour for thing in things)
    for thing in things:
        name, colour = NAMES[thing.name], COLOUR_NAMES[thing.colour]
        found["color"].append((_TEXTS["color"].format(name), colour))
        if plates[thing.colour] == 1:
            found["thing"].append((_TEXTS["thing"].format(colour), name))
        found["present"].append((_TEXTS["present"].format(name), "yes"))
    shown = {thing.name for thing in things}
    absent = draw.sample([i for i in range(len(NAMES)) if i not in shown], min(len(things), len(NAMES) - len(shown)))
    found["present"] += [(_TEXTS["present"].format(NAMES[i]), "no") for i in absent]
    by_number: dict[int, list[int]] = {}
    for colour_index in range(len(COLOUR_NAMES)):
        by_number.setdefault(plates[colour_index], []).append(colour_index)
    fewest = min(len(colours) for colours in by_number.values()) + 1
    for number, colours in by_number.items():
        for i in draw.sample(colours, min(fewest, len(colours))):
            found["count"].append((_TEXTS["count"].format(COLOUR_NAMES[i]), NUMBERS[number]))
    return found


def blind_answers_of_scenes() -> dict[str, str]:
    """Text of a question -> its most frequent answer in training, the best that can be said without the picture."""
    return json.loads(asset(BLIND).read_text(encoding="utf-8"))


class AskedOf(NamedTuple):
    """A question about the scene of a split with this number."""

    text: str
    answer: str
    scene: int
    kind: str


def one_of_each(split: str, numbers: Iterable[int]) -> list[AskedOf]:
    """A question of every kind about each scene, as far as there is one; of those about a presence every second is a "no"."""
    found = []
    for number in numbers:
        draw = random.Random(f"questions {split} {number}")
        for kind, asked in questions_about(draw_scene(split, number).things, draw).items():
            if kind == "present":
                wanted = ("yes", "no")[number % 2]
                asked = [one for one in asked if one[1] == wanted]
            if asked:
                found.append(AskedOf(*draw.choice(asked), number, kind))
    return found
