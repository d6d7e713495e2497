"""The little pictures that scenes are made of, and the photographs behind them, all from `assets/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from vtok.eval.models.assets import asset
from vtok.eval.tasks.pictures import asset_folder

FOLDER = "scenes"
SHEET = 64  # side of a little picture in pixels
# Name of a thing -> the emoji that show it, as code points.
THINGS = {
    "apple": ("1f34e", "1f34f"),
    "bell": ("1f514",),
    "book": ("1f4d5", "1f4d7", "1f4d8", "1f4d9", "1f4d3", "1f4d4"),
    "bus": ("1f68c", "1f68d"),
    "butterfly": ("1f98b",),
    "camera": ("1f4f7", "1f4f8"),
    "cat": ("1f431", "1f63a", "1f63c"),
    "clock": ("1f550", "1f553", "1f557", "1f55a", "23f0"),
    "crown": ("1f451",),
    "cup": ("2615", "1f375"),
    "flower": ("1f33b", "1f33c", "1f338", "1f33a", "1f337"),
    "gift": ("1f381",),
    "glasses": ("1f453", "1f576-fe0f"),
    "guitar": ("1f3b8",),
    "hand": ("270b", "1f590-fe0f", "1f91a"),
    "heart": ("2764-fe0f", "1f49b", "1f49a", "1f499", "1f49c"),
    "house": ("1f3e0", "1f3e1"),
    "mushroom": ("1f344",),
    "scissors": ("2702-fe0f",),
    "skull": ("1f480", "2620-fe0f"),
    "tree": ("1f333", "1f332", "1f384"),
    "umbrella": ("2614", "2602-fe0f"),
}
NAMES = tuple(THINGS)
# Who drew them: whose pictures are for training, and whose for tests.
ARTISTS = {
    "train": ("noto", "noto-v1", "fluent-3d", "fluent-flat", "emojione", "fxemoji", "streamline"),
    "test": ("twemoji",),
}
PHOTOGRAPHS = {
    "train": ("astronaut", "camera", "coins", "face", "grace_hopper", "hubble_deep_field"),
    "test": ("chelsea", "coffee", "rocket"),
}


@dataclass(frozen=True)
class Album:
    """What the scenes of a split are made of."""

    sprites: Sequence[Sequence[Image.Image]]  # for every name in `NAMES` little pictures, RGBA
    photographs: Sequence[Image.Image]  # RGB
    varied: bool  # whether colours are changed at random, so that few pictures teach more


def sheet_name(artist: str) -> str:
    """File in `assets/` with all little pictures of an artist, in the order of `THINGS`, one beside the other."""
    return f"{FOLDER}/{artist}.webp"


@cache
def load_album(split: str) -> Album:
    """Little pictures and photographs of `"train"` or `"test"`; no picture belongs to both."""
    sprites: list[list[Image.Image]] = [[] for _ in NAMES]
    for artist in ARTISTS[split]:
        sheet = Image.open(asset(sheet_name(artist))).convert("RGBA")
        left = 0
        for pictures, codes in zip(sprites, THINGS.values()):
            for _ in codes:
                cut = sheet.crop((left, 0, left + SHEET, SHEET))
                left += SHEET
                if np.asarray(cut)[..., 3].any():  # an artist may lack one
                    pictures.append(cut)
    folder = asset_folder("photographs")
    paths = [path for name in PHOTOGRAPHS[split] for path in sorted(folder.glob(f"{name}-*.jpg"))]
    return Album(sprites, [Image.open(path).convert("RGB") for path in paths], split == "train")
