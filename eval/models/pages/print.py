"""The printed words that pages are made of, in the fonts that come with matplotlib, from one picture in `assets/`."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from vtok.eval.models.assets import asset

SHEET = "pages/words.png"
CELL = (42, 18)  # width and height in pixels of the place of a word on the sheet
SIZES = (11, 12)  # of print, in pixels
# File of a font, without its ending. Whose print is for training, and whose for tests.
FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif-Bold"),
        *("STIXGeneral", "STIXGeneralBol", "cmss10", "cmr10", "cmb10"),
    ),
    "test": ("DejaVuSerif",),
}
NAMES = (
    *("ant", "bag", "bed", "boat", "book", "bus", "cake", "cat", "coin", "corn", "cup", "desk"),
    *("dog", "door", "drum", "egg", "fish", "fork", "gate", "hat", "jam", "key", "kite", "lamp"),
    *("leaf", "milk", "moon", "nest", "owl", "pie", "ring", "ship"),
)


def rows_of_sheet() -> list[tuple[str, int]]:
    """(font, size) of every row of the sheet."""
    return [(font, size) for fonts in FONTS.values() for font in fonts for size in SIZES]


@cache
def load_print(split: str) -> list[list[np.ndarray]]:
    """How dark the words of `"train"` or `"test"` are: for every font and size, for every name [height, width] uint8, cut to
    what is printed above and below, so that words of one font stand on one line, and at both sides of the word.
    """
    width, height = CELL
    sheet = np.asarray(Image.open(asset(SHEET)).convert("L"))
    found = []
    for row, (font, _) in enumerate(rows_of_sheet()):
        if font not in FONTS[split]:
            continue
        line = sheet[row * height : (row + 1) * height]
        rows = line.any(1).nonzero()[0]
        line = line[rows[0] : rows[-1] + 1]
        words = []
        for i in range(len(NAMES)):
            word = line[:, i * width : (i + 1) * width]
            columns = word.any(0).nonzero()[0]
            words.append(word[:, columns[0] : columns[-1] + 1])
        found.append(words)
    return found
