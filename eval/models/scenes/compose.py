"""Scenes: ten little things on coloured plates, at random places over a photograph.

Shapes: pictures are 224 x 224 RGB; a patch of the encoder is 14 x 14 pixels, so a plate covers 4 to 16 of 256 patches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from vtok.eval.models.scenes.album import NAMES, Album, load_album

SIZE, GRID, PATCH = 224, 4, 14
CELL = SIZE // GRID
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 26),
    "yellow": (247, 220, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 70, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOUR_NAMES = tuple(COLOURS)
THINGS_PER_SCENE = (8, 10)
PLATE = (36, 48)  # side in pixels, from .. to
SPRITE = 0.76  # side of the little picture, as a share of the plate's
_JITTER, _CONTRAST, _SMOOTH = 14, 70, 4


@dataclass(frozen=True)
class Thing:
    """A little thing on its plate."""

    name: int  # index into `NAMES`
    colour: int  # of its plate, index into `COLOUR_NAMES`
    box: tuple[int, int, int]  # left, top, side in pixels
    cell: tuple[int, int]  # row and column of the loose grid


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows; no two things have one name."""

    image: Image.Image
    things: tuple[Thing, ...]


def draw_scene(split: str, number: int) -> Scene:
    """The scene of that number in `"train"` or `"test"`: always the same."""
    album, draw = load_album(split), random.Random(f"{split} {number}")
    image = _background(album, draw)
    cells = list(product(range(GRID), range(GRID)))
    count = draw.randint(*THINGS_PER_SCENE)
    things = []
    for name, cell in zip(draw.sample(range(len(NAMES)), count), draw.sample(cells, count)):
        side = draw.randint(*PLATE)
        left, top = (place * CELL + draw.randint(0, CELL - side) for place in reversed(cell))
        sprite = draw.choice(album.sprites[name])
        if album.varied:
            sprite = _shifted(sprite, draw)
        colour = draw.choice(_apart(_mean(sprite)))
        _paste(image, sprite, colour, left, top, side, draw)
        things.append(Thing(name, colour, (left, top, side), cell))
    return Scene(image, tuple(things))


def _background(album: Album, draw: random.Random) -> Image.Image:
    """A stretch of a photograph, in other light."""
    photograph = draw.choice(album.photographs)
    if album.varied:
        photograph = _recoloured(photograph, draw)
    side = draw.randint(120, SIZE)
    left, top = draw.randint(0, SIZE - side), draw.randint(0, SIZE - side)
    image = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Color):
        image = kind(image).enhance(draw.uniform(0.6, 1.3))
    return image


def _apart(mean: np.ndarray) -> list[int]:
    """Colours of plates on which a little picture of that mean colour can be seen."""
    return [c for c, rgb in enumerate(COLOURS.values()) if float(np.linalg.norm(mean - np.array(rgb))) > _CONTRAST]


def _mean(sprite: Image.Image) -> np.ndarray:
    """Mean colour of what is not transparent, [3]."""
    pixels = np.asarray(sprite, np.float64)
    weight = pixels[..., 3:]
    return (pixels[..., :3] * weight).sum((0, 1)) / weight.sum()


def _recoloured(photograph: Image.Image, draw: random.Random) -> Image.Image:
    """The same with its colour channels in another order, at times mixed with a plain colour."""
    image = Image.merge("RGB", draw.sample(photograph.split(), 3))
    if draw.random() < 0.3:
        plain = Image.new("RGB", image.size, tuple(draw.randint(0, 255) for _ in range(3)))
        image = Image.blend(image, plain, draw.uniform(0.3, 1.0))
    return image


def _shifted(sprite: Image.Image, draw: random.Random) -> Image.Image:
    """The same in other colours and light."""
    hue, saturation, value = sprite.convert("RGB").convert("HSV").split()
    shift, gain, light = draw.choice((0, 0, draw.randint(-128, 127))), draw.uniform(0.5, 1.3), draw.uniform(0.7, 1.15)
    hue = hue.point([(v + shift) % 256 for v in range(256)])
    saturation, value = (
        band.point([min(255, round(v * by)) for v in range(256)]) for band, by in ((saturation, gain), (value, light))
    )
    shifted = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return Image.merge("RGBA", (*shifted.split(), sprite.getchannel("A")))


def _paste(image: Image.Image, sprite: Image.Image, colour: int, left: int, top: int, side: int, draw: random.Random) -> None:
    """One plate with its little picture."""
    rgb = tuple(max(0, min(255, v + draw.randint(-_JITTER, _JITTER))) for v in COLOURS[COLOUR_NAMES[colour]])
    mask = Image.new("L", (side * _SMOOTH, side * _SMOOTH), 0)
    radius = draw.choice((0.18, 0.5)) * side * _SMOOTH
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * _SMOOTH - 1, side * _SMOOTH - 1), radius, fill=255)
    image.paste(rgb, (left, top), mask.resize((side, side), Image.Resampling.BOX))
    small = round(SPRITE * side)
    if draw.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC)
    sprite = sprite.resize((small, small), Image.Resampling.LANCZOS)
    image.paste(sprite, (left + (side - small) // 2, top + (side - small) // 2), sprite)
