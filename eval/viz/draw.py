"""Draws token maps: one picture a stage, a sheet of all stages, a GIF that runs through them.

Shapes: a view is a rectangle of `rows` x `columns` patches of an image; its map [rows * columns] int says which patches share a
token (equal numbers) and which have none (-1).
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import ConfigError, brief
from vtok.eval.viz.overlay import legend, outlines, paint
from vtok.writing import write

SIDE = 256  # pixels of the longer side of a drawn view, at least
FORMATS = (".png", ".gif")
_LINE_ON_DARK, _LINE_ON_LIGHT = 0.7, 0.4  # opacity of white and of black outlines
_SHEET_COLUMNS = 6
_HEADING, _LETTERS_PER_INCH, _LINE_HEIGHT = 10, 11, 0.17  # points of a sheet's heading, and what it takes of the sheet (inches)
_STRIP = 26  # pixels of the caption of a frame


@dataclass(frozen=True)
class View:
    """What a grid of patches shows.

    Attributes:
        picture: [H, W, 3] in [0, 1], as the model saw it.
        grid: (rows, columns) of patches.
        name: of the view where there are several, "" otherwise.
    """

    picture: np.ndarray
    grid: tuple[int, int]
    name: str = ""

    def enlarged(self, side: int = SIDE) -> np.ndarray:
        """[H, W, 3] of at least `side` pixels, a whole number of them a patch."""
        from PIL import Image

        patch = max(-(-side // max(self.grid)), 2)
        size = (self.grid[1] * patch, self.grid[0] * patch)
        pixels = Image.fromarray((255 * np.clip(self.picture, 0, 1)).round().astype(np.uint8))
        grows = size[0] >= pixels.width and size[1] >= pixels.height
        return np.asarray(pixels.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)) / 255

    def draw(self, groups: np.ndarray | None, side: int = SIDE) -> np.ndarray:
        """[H, W, 3]: the view under a map, merged patches outlined; the picture itself without one."""
        pixels = self.enlarged(side)
        if groups is None:
            return pixels
        painted = paint(pixels, groups, self.grid)
        patch = painted.shape[0] // self.grid[0]
        width = max(patch // 16, 1)
        for (x0, y0), (x1, y1) in outlines(_merged(groups), self.grid):
            top, left = int(y0 * patch), int(x0 * patch)
            rows = slice(top, int(y1 * patch) if x0 == x1 else top + width)
            columns = slice(left, left + width if x0 == x1 else int(x1 * patch))
            _mark(painted[rows, columns])
        return painted


@dataclass(frozen=True)
class Stage:
    """The tokens at one place of a model.

    Attributes:
        name: of the place, e.g. "block 3" or "decoder layer 4".
        maps: one a view; `None` = nothing has happened to it yet.
        tokens: that are left of the patches.
    """

    name: str
    maps: tuple[np.ndarray | None, ...]
    tokens: int


@dataclass(frozen=True)
class TokenMaps:
    """What a method did to one image, place by place.

    Attributes:
        title: model and method.
        views: of the image: one, or an overview and its crops, or tiles.
        stages: in the order of the model.
        patches: tokens that the image had at first, prefix tokens left out.
        answer: what a vision-language model said, `None` for encoders.
        notes: what a reader should know.
    """

    title: str
    views: tuple[View, ...]
    stages: tuple[Stage, ...]
    patches: int
    answer: str | None = None
    notes: tuple[str, ...] = ()

    def draw(self, stage: Stage | None = None, side: int = SIDE) -> np.ndarray:
        """[H, W, 3] in [0, 1]: all views side by side under one stage (default: as they are)."""
        maps = (None,) * len(self.views) if stage is None else stage.maps
        drawn = [view.draw(groups, side) for view, groups in zip(self.views, maps)]
        height, columns = max(one.shape[0] for one in drawn), _columns(len(drawn))
        width = max(one.shape[1] for one in drawn)
        padded = [np.pad(o, ((0, height - o.shape[0]), (0, width - o.shape[1]), (0, 0)), constant_values=1.0) for o in drawn]
        padded += [np.ones((height, width, 3))] * (-len(padded) % columns)
        gap = max(width // 24, 4)
        lines = [_beside(padded[i : i + columns], gap, 1) for i in range(0, len(padded), columns)]
        return _beside(lines, gap, 0)

    def caption(self, stage: Stage) -> str:
        """ "block 3: 120 of 196 patches"."""
        return f"{stage.name}: {stage.tokens} of {self.patches}"

    def image(self, stage: Stage | None = None, side: int = SIDE) -> Any:
        """The same as a PIL image."""
        from PIL import Image

        return Image.fromarray((255 * self.draw(stage, side)).round().astype(np.uint8))

    def save(self, path: str | os.PathLike) -> Path:
        """Writes a sheet of all stages (.png) or an animation (.gif); returns the path.

        Raises:
            ConfigError: the ending is another one, or nothing can be written there.
        """
        target = Path(path)
        if target.suffix.lower() not in FORMATS:
            raise ConfigError(f"token maps are written as {' or '.join(FORMATS)}, got {brief(path)!r}")
        data = self.png() if target.suffix.lower() == ".png" else self.gif()
        return write(target, data)

    def png(self) -> bytes:
        """The sheet: the image, then every stage, six a line."""
        from matplotlib.figure import Figure  # without pyplot, whose backend belongs to the caller

        panels = self._panels()
        columns = min(_SHEET_COLUMNS, len(panels))
        lines = -(-len(panels) // columns)
        aspect = panels[0][0].width / panels[0][0].height
        width = 2.1 * aspect * columns
        heading = _wrapped(_heading(self), width)
        more = len(heading) - len(_heading(self))
        figure = Figure(figsize=(width, 2.45 * lines + 0.5 + more * _LINE_HEIGHT), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (picture, words) in zip(axes.flat, panels):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(words, fontsize=8)
        figure.suptitle("\n".join(heading), fontsize=_HEADING, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def gif(self, milliseconds: int = 500) -> bytes:
        """The animation: the image, then every stage with its name under it, the last one four times as long."""
        from PIL import Image, ImageDraw, ImageFont

        font, frames = ImageFont.load_default(size=13), []
        for picture, words in self._panels():
            frame = Image.new("RGB", (picture.width, picture.height + _STRIP), "white")
            frame.paste(picture)
            ImageDraw.Draw(frame).text((6, picture.height + 5), words, fill="black", font=font)
            frames.append(frame)
        buffer = io.BytesIO()
        times = [2 * milliseconds, *[milliseconds] * (len(frames) - 2), 4 * milliseconds]
        frames[0].save(
            buffer, "GIF", save_all=True, append_images=frames[1:], duration=times[: len(frames)], loop=0, disposal=1
        )
        return buffer.getvalue()

    def _panels(self) -> list[tuple[Any, str]]:
        """(picture, words) of the image and of every stage."""
        return [(self.image(), "image"), *((self.image(stage), self.caption(stage)) for stage in self.stages)]

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.png()


def _merged(groups: np.ndarray) -> np.ndarray:
    """The same map with one number for all patches that live on alone or not at all: lines around each would hide the image."""
    names, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    alone = (sizes == 1) | (names < 0)
    return np.where(alone[place.reshape(-1)], -1, groups)


def _mark(part: np.ndarray) -> None:
    """Draws an outline over a few pixels [h, w, 3], in place: white on dark ones, grey on light ones."""
    light = part.mean() > 0.7
    opacity = _LINE_ON_LIGHT if light else _LINE_ON_DARK
    part *= 1 - opacity
    if not light:
        part += opacity


def _heading(maps: TokenMaps) -> list[str]:
    words = legend(one for stage in maps.stages for one in stage.maps)
    answer = [] if maps.answer is None else [f"answer: {maps.answer}"]
    return [maps.title, *([words] if words else []), *answer, *maps.notes]


def _wrapped(lines: Sequence[str], inches: float) -> list[str]:
    """Lines no longer than a sheet is wide; a name that is longer is broken."""
    letters = max(int(inches * _LETTERS_PER_INCH), 12)
    return [part for line in lines for part in textwrap.wrap(line, letters) or [""]]


def _columns(count: int) -> int:
    """Views in a line: all of one or two, else a square."""
    return count if count <= 2 else int(np.ceil(count**0.5))


def _beside(parts: Sequence[np.ndarray], gap: int, axis: int) -> np.ndarray:
    """Pictures in a line or a column with white between them."""
    widths = [(0, gap if i == axis else 0) for i in range(3)]
    spaced = [np.pad(part, widths, constant_values=1.0) for part in parts[:-1]]
    return np.concatenate([*spaced, parts[-1]], axis)
