"""Which units of patches enter a packed vision tower: what the tower works out of the sizes of images, for those that stay.

The towers of the Qwen-VL family run the patches of all images as one sequence, and take from their caller, if it passes them,
the positions of patches, the borders of what attends to itself (images, frames, windows), the order of windows, and how learned
positions are interpolated. Here these are worked out by transformers' own functions for whole images, and what leaves is taken
out. A unit is the square of patches that the merger makes one visual token of; its patches stand one behind the other.

Shapes: N patches and U units of all images, m patches of a unit, S borders, K units that stay.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.patches.hf_packed.adapter import HOLDERS
from vtok.patches.protocol import look_up, qualified_name


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


# Classes of towers whose forward asks its keywords for everything that is worked out here.
TOWERS: dict[str, bool] = dict.fromkeys(
    (
        _in("qwen2_vl") + "Qwen2VisionTransformerPretrainedModel",
        _in("qwen2_5_vl") + "Qwen2_5_VisionTransformerPretrainedModel",
        _in("qwen3_vl") + "Qwen3VLVisionModel",
        _in("qwen3_vl_moe") + "Qwen3VLMoeVisionModel",
        _in("qwen3_5") + "Qwen3_5VisionModel",
        _in("qwen3_5_moe") + "Qwen3_5MoeVisionModel",
    ),
    True,
)
# What a caller of a tower may have worked out itself, of whole images.
GIVEN = ("position_ids", "cu_seqlens", "cu_window_seqlens", "window_index", "interp_indices", "interp_weights", "max_seqlen")


def tower_of(model: Any) -> nn.Module | None:
    """The packed vision tower of a vision-language model, if its patches can be told apart."""
    return next((child for child in model.children() if look_up(child, TOWERS)), None)


def why_not(model: Any) -> str | None:
    """Why patches cannot leave in front of the vision tower of a model, or `None` if they can."""
    if tower_of(model) is None:
        return "it is none of the Qwen-VL family, whose towers take any patches"
    if HOLDERS.isdisjoint(qualified_name(cls) for cls in type(model).__mro__):  # a projector would hide what is missing
        return f"{type(model).__name__} is not known to take visual tokens as that tower yields them"
    return None


def unit_of(tower: Any) -> int:
    """m."""
    return int(tower.spatial_merge_size) ** 2


def shortened(tower: Any, grid: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(rows of the patches that stay [K m] int64, keywords of the tower for them).

    Costs one host synchronisation.

    Args:
        tower: of a class in `TOWERS`.
        grid: [images, 3] (frames, rows, columns) of patches.
        keep: [U] bool; of every image and frame at least one unit stays.
    """
    from transformers import vision_utils

    m, merge, grid = unit_of(tower), tower.spatial_merge_size, grid.to(keep.device)
    rows = _patches(keep.nonzero()[:, 0], m)
    changed = {
        "position_ids": vision_utils.get_vision_position_ids(grid, merge)[rows],
        "cu_seqlens": _borders(vision_utils.get_vision_cu_seqlens(grid), keep, m),
    }
    if hasattr(tower, "pos_embed"):
        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        changed |= {"interp_indices": taps[rows], "interp_weights": weights[rows]}
    if hasattr(tower, "window_size"):
        index, ends = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        index = index.to(keep.device)
        there = keep[index]
        number = keep.cumsum(0) - 1  # of a unit among those that stay
        left = torch.unique_consecutive(_borders(ends.to(keep.device), there, m))  # a window may have lost all of its units
        changed |= {"window_index": number[index[there]], "cu_window_seqlens": left}
    return rows, changed


def _patches(units: Tensor, m: int) -> Tensor:
    """[K] -> [K m]: the rows of their patches."""
    return (units[:, None] * m + torch.arange(m, device=units.device)).flatten()


def _borders(ends: Tensor, keep: Tensor, m: int) -> Tensor:
    """Borders [S] of segments in patches, once some units [U] are gone; int32, as kernels take them."""
    before = F.pad(keep.cumsum(0), (1, 0))
    return (before[ends.long() // m] * m).int()


def frames_of(grid: Tensor, merge: int) -> list[tuple[int, int, int]]:
    """(frames, rows, columns of units) of every image."""
    return [(t, rows // merge, columns // merge) for t, rows, columns in grid.tolist()]
