"""Pictures of what a method did to an image: dropped patches fade, merged patches share a colour and an outline.

Shapes: G x G patches, N0 = P + G*G original tokens, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vtok
from vtok.errors import StateError
from vtok.targets.resolve import run_of
from vtok.writing import replacing


def token_groups(model: nn.Module, images: Tensor) -> np.ndarray:
    """Where each patch of each image ended: [B, G*G] int, equal numbers were merged, -1 was dropped.

    Args:
        model: patched with `trace=True`.
        images: [B, C, H, W].
    """
    run = run_of(model)
    if run is None or not run.trace:
        raise StateError("overlays need the token map; patch with trace=True")
    with torch.inference_mode():
        model(images)
    final = run.current.final
    assert final is not None
    assert final.group is not None
    return final.group[:, run.num_prefix :].cpu().numpy()


def paint(image: np.ndarray, groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Colours one image by its groups.

    Args:
        image: [H, W] or [H, W, 3] in [0, 1].
        groups: [G*G], from `token_groups`.
        grid: (rows, columns) of patches.

    Returns:
        [H, W, 3]: patches that live on alone keep their pixels, merged ones show the mean of their group under a tint of its
        own, dropped ones fade to dark blue.
    """
    rgb = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image.copy()
    height, width = rgb.shape[0] // grid[0], rgb.shape[1] // grid[1]
    owner = groups.reshape(grid).repeat(height, 0).repeat(width, 1)
    out = rgb.copy()
    for group in np.unique(groups):
        here = owner == group
        if group < 0:
            out[here] = 0.18 * rgb[here] + np.array([0.02, 0.04, 0.16])
        elif (groups == group).sum() > 1:
            tint = np.array(_tint(int(group)))
            out[here] = 0.75 * rgb[here].mean(0) + 0.25 * tint
    return np.clip(out, 0, 1)


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
        path: PNG to write.
        titles: of the rows.
        heading: of the sheet.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    columns = len(settings) + 1
    figure, axes = plt.subplots(
        len(images), columns, figsize=(1.7 * columns, 1.85 * len(images)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for r, picture in enumerate(pictures):
        axes[r, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        if titles:
            axes[r, 0].set_ylabel(titles[r], fontsize=9)
    axes[0, 0].set_title("image", fontsize=10)
    for c, (title, method, params) in enumerate(settings, 1):
        with vtok.patched(model, method, trace=True, input_size=tuple(images.shape[1:]), **params):
            groups = token_groups(model, images)
        side = int(groups.shape[1] ** 0.5)
        grid = (side, groups.shape[1] // side)
        axes[0, c].set_title(title, fontsize=10)
        for r, picture in enumerate(pictures):
            axis = axes[r, c]
            axis.imshow(paint(picture, groups[r], grid), extent=(0, grid[1], grid[0], 0), interpolation="nearest")
            axis.add_collection(LineCollection(outlines(groups[r], grid), colors="white", linewidths=0.35, alpha=0.7))
            left = len(np.unique(groups[r][groups[r] >= 0]))
            axis.set_xlabel(f"{left} of {groups.shape[1]} patches", fontsize=7)
    figure.suptitle(heading, fontsize=11)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110)
    plt.close(figure)
