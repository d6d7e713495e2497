"""Pictures of what a method did to an image: dropped patches turn blue, merged patches share a colour and an outline.

Shapes: G x G patches, N0 = P + G*G original tokens, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import vtok
from vtok.errors import StateError
from vtok.targets.resolve import run_of
from vtok.writing import replacing

_DROPPED = (0.22, 0.30, 0.58)  # colour of dropped patches


def token_groups(model: nn.Module, images: Tensor) -> np.ndarray:
    """Where each patch of each image [B, C, H, W] ended in a model patched with `trace=True`: [B, G*G] int, equal numbers were
    merged, -1 was dropped."""
    run = run_of(model)
    if run is None or not run.trace:
        raise StateError("overlays need the token map; patch with trace=True")
    with torch.inference_mode():
        model(images)
    final = run.current.final
    assert final is not None and final.group is not None
    return final.group[:, run.num_prefix :].cpu().numpy()


def groups_by_block(run: Any) -> Iterator[np.ndarray]:
    """The same behind every block of the last pass, as far as it was traced."""
    for state in run.current.states[1:]:
        if state is None or state.group is None:
            return
        yield state.group[:, run.num_prefix :].cpu().numpy()


def paint(image: np.ndarray, groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Colours one image, [H, W] or [H, W, 3] in [0, 1], by its groups [G*G] on a grid of (rows, columns) patches.

    Returns:
        [H, W, 3]: patches that live on alone keep their pixels, merged ones show the mean of their group under a tint of its
        own, which is that of its first patch from block to block, dropped ones turn blue, on black as on white.
    """
    rgb = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image.copy()
    height, width = rgb.shape[0] // grid[0], rgb.shape[1] // grid[1]
    owner = groups.reshape(grid).repeat(height, 0).repeat(width, 1)
    out = rgb.copy()
    for group in np.unique(groups):
        here = owner == group
        if group < 0:
            out[here] = 0.2 * rgb[here] + 0.8 * np.array(_DROPPED)
        elif (groups == group).sum() > 1:
            tint = np.array(_tint(int(np.flatnonzero(groups == group)[0])))
            out[here] = 0.75 * rgb[here].mean(0) + 0.25 * tint
    return np.clip(out, 0, 1)


def tokens_left(groups: np.ndarray) -> int:
    """Tokens that the patches of a map share."""
    return len(np.unique(groups[groups >= 0]))


def legend(maps: Iterable[np.ndarray | None]) -> str:
    """What colours mean in pictures of these maps [G*G], "dropped patches are blue" for instance; "" where none is drawn on."""
    known = [groups for groups in maps if groups is not None]
    dropped = any((groups < 0).any() for groups in known)
    merged = any(tokens_left(groups) < (groups >= 0).sum() for groups in known)
    words = [*(["dropped patches are blue"] if dropped else []), *(["merged ones share a colour"] if merged else [])]
    return ", ".join(words) if dropped or not merged else "merged patches share a colour"


def outlines(groups: np.ndarray, grid: tuple[int, int]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Edges between patches of different groups, in patch units ((x0, y0), (x1, y1))."""
    g = groups.reshape(grid)
    edges = [((x + 1.0, float(y)), (x + 1.0, y + 1.0)) for y, x in zip(*np.where(g[:, 1:] != g[:, :-1]))]
    edges += [((float(x), y + 1.0), (x + 1.0, y + 1.0)) for y, x in zip(*np.where(g[1:] != g[:-1]))]
    return edges


def _tint(group: int) -> tuple[float, ...]:
    import colorsys

    return colorsys.hsv_to_rgb((group * 0.61803398875) % 1.0, 0.85, 1.0)  # golden angle: neighbours differ


def overlay_sheet(
    model: nn.Module,
    images: Tensor,
    pictures: Sequence[np.ndarray],
    settings: Sequence[tuple[str, Any, dict[str, Any]]],
    path: Path,
    titles: Sequence[str] = (),
    heading: str = "",
) -> None:
    """A sheet with one row an image and one column a method, and the images themselves on the left.

    Args:
        model: unpatched; it is patched for each column and left unpatched.
        images: [B, C, H, W], as the model takes them.
        pictures: the same images to look at, [H, W] or [H, W, 3] in [0, 1].
        settings: (column title, method, parameters).
        titles: of the rows.
        heading: of the sheet; what the colours mean is put behind it.
    """
    columns, maps, size = [], list[np.ndarray](), (images.shape[1], images.shape[2], images.shape[3])
    for title, method, params in settings:
        with vtok.patched(model, method, trace=True, input_size=size, **params):
            groups = token_groups(model, images)
        maps += list(groups)
        side = int(groups.shape[1] ** 0.5)
        grid = (side, groups.shape[1] // side)
        tiles = []
        for picture, own in zip(pictures, groups):
            words = f"{tokens_left(own)} of {groups.shape[1]} patches"
            tiles.append(Tile(paint(picture, own, grid), words, outlines(own, grid), grid))
        columns.append((title, tiles))
    write_sheet([Tile(picture, "") for picture in pictures], columns, path, f"{heading}: {legend(maps)}".strip(": "), titles)


class Tile(NamedTuple):
    """One picture of a sheet, [H, W] or [H, W, 3] in [0, 1], with words under it, and lines on it in units of the patches of a
    grid."""

    pixels: np.ndarray
    words: str
    edges: Sequence[Any] = ()
    grid: tuple[int, int] = (1, 1)


def write_sheet(
    images: Sequence[Tile],
    columns: Sequence[tuple[str, Sequence[Tile]]],
    path: Path,
    heading: str,
    titles: Sequence[str] = (),
    size: tuple[float, float] = (1.7, 1.85),
) -> None:
    """A sheet of pictures as PNG: the images on the left, one a row, then columns (title, one picture a row).

    Args:
        titles: of the rows.
        size: inches of a picture.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure  # without pyplot, whose backend belongs to the caller

    whole = [("image", images), *columns]
    figure = Figure(figsize=(size[0] * len(whole), size[1] * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(whole), squeeze=False)
    for c, (title, tiles) in enumerate(whole):
        axes[0, c].set_title(title, fontsize=10 if not c else 9)
        for axis, tile in zip(axes[:, c], tiles):
            extent = (0, tile.grid[1], tile.grid[0], 0) if tile.edges else None
            axis.imshow(tile.pixels, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            axis.add_collection(LineCollection(tile.edges, colors="white", linewidths=0.35, alpha=0.7))
            axis.set_xlabel(tile.words, fontsize=7)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[:, 0], titles):
        axis.set_ylabel(title, fontsize=9)
    figure.suptitle(heading, fontsize=11)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110)
