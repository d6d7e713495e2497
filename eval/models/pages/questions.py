"""Questions about pages, each about one printed word, with an answer of one word."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from vtok.eval.models import asked
from vtok.eval.models.asked import Asked, AskedOf, words_of
from vtok.eval.models.pages.compose import INK_NAMES, QUARTERS, Word, draw_page
from vtok.eval.models.pages.print import NAMES

KINDS = ("color", "word", "present", "under", "over")
# What is asked for stands last, where the answer is read from, as in the questions about scenes.
_TEXTS = {
    "color": "what color is {}",
    "word": "what word is {}",
    "present": "is there {}",
    "under": "what is under {}",
    "over": "what is over {}",
}
WORDS = (*words_of(_TEXTS), "nothing", "no", "yes", *INK_NAMES, *NAMES)
TEST_PAGES = 128  # numbers 0, 1, ... of the test split
CALIBRATION_PAGES = range(1_000_000, 1_000_080)  # of the training split, which training does not reach
BLIND = "pages/blind-answers.json"


def word_over(words: Sequence[Word], word: Word) -> Word | None:
    """The word on the line above, in the same column, if there is one."""
    line, column = word.place
    found = [other for other in words if other.place == (line - 1, column)]
    return found[0] if found else None


def questions_about(words: Sequence[Word], draw: random.Random) -> dict[str, list[Asked]]:
    """All that can be asked, kind -> questions; as many "no" as "yes"."""
    found: dict[str, list[Asked]] = {kind: [] for kind in KINDS}
    inks = Counter(word.ink for word in words)
    for word in words:
        name, ink = NAMES[word.name], INK_NAMES[word.ink]
        found["color"].append((_TEXTS["color"].format(name), ink))
        if inks[word.ink] == 1:
            found["word"].append((_TEXTS["word"].format(ink), name))
        found["present"].append((_TEXTS["present"].format(name), "yes"))
        over = word_over(words, word)
        if over is not None:
            found["over"].append((_TEXTS["over"].format(name), NAMES[over.name]))
            found["under"].append((_TEXTS["under"].format(NAMES[over.name]), name))
    shown = {word.name for word in words}
    absent = draw.sample([i for i in range(len(NAMES)) if i not in shown], len(words))
    found["present"] += [(_TEXTS["present"].format(NAMES[i]), "no") for i in absent]
    return found


def density(number: int) -> int:
    """How many quarters of the page with this number are not blank."""
    return number % QUARTERS + 1


def one_of_each(split: str, numbers: Iterable[int]) -> list[AskedOf]:
    """A question of every kind about each page, as far as there is one; of those about a presence every second is a "no"."""
    return asked.one_of_each(split, numbers, lambda n, draw: questions_about(draw_page(split, n).words, draw), QUARTERS)
