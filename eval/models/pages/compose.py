"""Pages: words in small print, in columns and lines, in some of the quarters of a white page; the others are blank.

Shapes: pages are 168 x 168 RGB. A view of 84 x 84 shows a quarter as it is, or the whole page at half its size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from vtok.eval.models.pages.print import NAMES, load_print

SIZE, PATCH, LINES, COLUMNS = 168, 14, 6, 4
LINE, COLUMN = SIZE // LINES, SIZE // COLUMNS
INKS = {
    "black": (20, 20, 20),
    "red": (215, 30, 30),
    "orange": (235, 130, 0),
    "green": (20, 140, 50),
    "blue": (30, 80, 220),
    "purple": (140, 50, 180),
}
INK_NAMES = tuple(INKS)
QUARTERS = 4
WORDS_PER_PAGE = {1: (4, 5), 2: (6, 8), 3: (7, 9), 4: (7, 9)}  # quarters that are not blank -> from .. to
_SHADE, _WIDEST, _SHIFT = 12, 38, 3


@dataclass(frozen=True)
class Word:
    """A printed word."""

    name: int  # index into `NAMES`
    ink: int  # index into `INK_NAMES`
    box: tuple[int, int, int, int]  # left, top, width, height of what is printed, in pixels
    place: tuple[int, int]  # line and column


@dataclass(frozen=True)
class Page:
    """A picture and what it shows; no word is printed twice."""

    image: Image.Image
    words: tuple[Word, ...]


def quarter_of(place: tuple[int, int]) -> int:
    """0 to 3, row by row."""
    return place[0] // (LINES // 2) * 2 + place[1] // (COLUMNS // 2)


def draw_page(split: str, number: int, full: bool = False) -> Page:
    """The page of that number in `"train"` or `"test"`: always the same. Pages 0, 1, 2, 3 have 1, 2, 3, 4 quarters that are
    not blank, and so on; a full one has words everywhere.
    """
    draw = random.Random(f"page {split} {number}")
    filled = number % QUARTERS + 1
    quarters = draw.sample(range(QUARTERS), filled)
    prints = draw.choice(load_print(split))
    count = draw.randint(*WORDS_PER_PAGE[filled])
    if full:
        quarters, count = list(range(QUARTERS)), draw.randint(LINES * COLUMNS // 2, LINES * COLUMNS)
    if split == "train":
        prints = _varied(prints, draw)
    down = draw.choice((0, PATCH))  # words stand in one line of patches
    pixels = np.full((SIZE, SIZE, 3), 255.0)
    words = []
    for name, place in zip(draw.sample(range(len(NAMES)), count), _places(quarters, count, draw)):
        dark = prints[name]
        left = place[1] * COLUMN + draw.randint(0, _SHIFT)
        top = place[0] * LINE + down + draw.randint(0, PATCH - dark.shape[0])
        ink = draw.randrange(len(INKS))
        colour = [max(0, min(255, v + draw.randint(-_SHADE, _SHADE))) for v in INKS[INK_NAMES[ink]]]
        share = dark[..., None] / 255
        area = pixels[top : top + dark.shape[0], left : left + dark.shape[1]]
        area[:] = (1 - share) * area + share * np.array(colour)
        lines = dark.any(1).nonzero()[0]
        words.append(Word(name, ink, (left, top + int(lines[0]), dark.shape[1], int(lines[-1] - lines[0]) + 1), place))
    return Page(Image.fromarray(pixels.round().astype(np.uint8)), tuple(words))


def _varied(prints: list[np.ndarray], draw: random.Random) -> list[np.ndarray]:
    """The same print a little wider or narrower, darker or lighter, so that few fonts teach more."""
    wider, darker = draw.uniform(0.9, 1.08), draw.uniform(0.6, 1.5)
    varied = []
    for word in prints:
        width = min(_WIDEST, max(8, round(word.shape[1] * wider)))
        image = Image.fromarray(word).resize((width, word.shape[0]), Image.Resampling.BICUBIC)
        varied.append(255 * (np.asarray(image) / 255) ** darker)
    return varied


def _places(quarters: list[int], count: int, draw: random.Random) -> list[tuple[int, int]]:
    """Lines and columns of so many words, at least one in each of the quarters."""
    free = [place for place in product(range(LINES), range(COLUMNS)) if quarter_of(place) in quarters]
    while True:
        places = draw.sample(free, count)
        if {quarter_of(place) for place in places} == set(quarters):
            return places
