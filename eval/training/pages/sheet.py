"""Prints the words of `vtok.eval.models.pages` in fonts that come with matplotlib: `python -m vtok.eval.training.pages.sheet
--export assets`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vtok.eval.models.pages.print import CELL, NAMES, SHEET, rows_of_sheet


def make_sheet() -> Image.Image:
    """How dark every word is in every font and size: a row a font and size, a place a word."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    width, height = CELL
    rows = rows_of_sheet()
    sheet = Image.new("L", (width * len(NAMES), height * len(rows)), 0)
    for row, (name, size) in enumerate(rows):
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), size)
        for i, word in enumerate(NAMES):
            place = Image.new("L", CELL, 0)
            ImageDraw.Draw(place).text((1, height - 5), word, fill=255, font=font, anchor="ls")
            box = place.getbbox()
            if box is None or box[2] == width or box[1] == 0 or box[3] == height:
                raise ValueError(f"{word} in {name} at {size} pixels does not fit into {CELL}")
            sheet.paste(place, (i * width, row * height))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--export", type=Path, required=True, help="vtok's assets/")
    path = parser.parse_args().export / SHEET
    path.parent.mkdir(parents=True, exist_ok=True)
    make_sheet().save(path, optimize=True)


if __name__ == "__main__":
    main()
