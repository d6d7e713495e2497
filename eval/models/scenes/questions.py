"""Questions about scenes, each about one little thing among many, with an answer of one word."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from vtok.eval.models import asked
from vtok.eval.models.asked import Asked, AskedOf, words_of
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
WORDS = (*words_of(_TEXTS), "no", "yes", *NUMBERS, *COLOUR_NAMES, *NAMES)
TEST_SCENES = 160  # numbers 0, 1, ... of the test split
CALIBRATION_SCENES = range(1_000_000, 1_000_080)  # of the training split, which training does not reach
BLIND = "scenes/blind-answers.json"


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


def one_of_each(split: str, numbers: Iterable[int]) -> list[AskedOf]:
    """A question of every kind about each scene, as far as there is one; of those about a presence every second is a "no"."""
    return asked.one_of_each(split, numbers, lambda number, draw: questions_about(draw_scene(split, number).things, draw))
