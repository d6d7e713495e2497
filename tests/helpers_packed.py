"""Packed vision towers (the Qwen-VL family) by hand: one image at a time, unit by unit, attention as an explicit matrix."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index
from vlm_zoo import EXAMPLES, build

from vtok.testing import generic_models

PACKED = [name for name in EXAMPLES if name.startswith("Qwen")]
GENERIC = ["qwen3_vl_moe", "qwen3_5"]  # without a row; their towers are Qwen3-VL's and one like it without taps
SIZES = [[1, 8, 8], [1, 4, 8], [1, 6, 10], [1, 8, 8]]  # frames, rows, columns of patches; windows have 4 x 4, some are cut off


def deep(name: str, depth: int = 4) -> Any:
    """An example whose tower has more blocks, all different; windows in the even ones, taps behind blocks 0 and 2."""
    model = copy.deepcopy(_generic(name)) if name in GENERIC else build(name)
    tower = model.model.visual
    torch.manual_seed(3)
    while len(tower.blocks) < depth:
        block = copy.deepcopy(tower.blocks[0])
        for p in block.parameters():
            p.data += 0.1 * torch.randn_like(p)
        tower.blocks.append(block)
    if hasattr(tower, "fullatt_block_indexes"):
        tower.fullatt_block_indexes = tower.config.fullatt_block_indexes = [1, 3]
    if hasattr(tower, "deepstack_visual_indexes"):
        taps = [0, 2][: len(tower.deepstack_merger_list)]
        tower.deepstack_visual_indexes = tower.config.deepstack_visual_indexes = taps
    return model.eval()


@functools.cache
def _generic(name: str) -> Any:
    return generic_models.build(name)


def images(model: Any, sizes: list[list[int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """(pixels, grid_thw)."""
    grid, weight = torch.tensor(sizes), model.model.visual.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid.prod(1).sum()), weight[0].numel(), generator=generator).to(weight.dtype), grid


def encoded(model: Any, pixels: Tensor, grid: Tensor) -> list[list[Tensor]]:
    """For the merger and each tap: features [n, D] of every image."""
    out = model.model.get_image_features(pixels, grid, return_dict=True)
    return [list(out.pooler_output), *(list(x) for x in getattr(out, "deepstack_features", None) or ())]


class Encoder(nn.Module):
    """What a tower makes of images, as one tensor."""

    def __init__(self, model: Any, taps: bool = True):
        super().__init__()
        self.model, self.taps = model, taps

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        planes = encoded(self.model, *x)
        return torch.stack([torch.cat(plane) for plane in (planes if self.taps else planes[:1])])


def by_hand(tower: Any, pixels: Tensor, size: list[int], r: list[int]) -> tuple[dict[int, Tensor], list[dict[int, Tensor]]]:
    """ToMe in the tower on one frame: (place of a unit in raster order -> its visual token, the same for each tap)."""
    grid, config = torch.tensor([size]), tower.config
    merge = config.spatial_merge_size
    m = merge**2
    x = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        x = x + _learned(tower, grid).to(x.dtype)
    position = get_vision_position_ids(grid, merge)
    cos, sin = tower.rotary_pos_emb(x, position)
    order, windows = torch.arange(len(x) // m), None
    if hasattr(tower, "fullatt_block_indexes"):
        order, ends = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        windows = torch.bucketize(torch.arange(len(order)), ends[1:] // m, right=True).tolist()
    x, cos, sin = (t.unflatten(0, (-1, m))[order] for t in (x, cos, sin))
    units = [{"x": x[i], "at": i, "members": [i]} for i in range(len(order))]
    taps: list[list[Tensor]] = []
    deep = getattr(tower, "deepstack_visual_indexes", [])
    for number, block in enumerate(tower.blocks):
        whole = windows is None or number in tower.fullatt_block_indexes
        keys = _attend(block, units, cos, sin, None if whole else windows)
        if number < len(r):
            units = _merge(units, keys, r[number])
        for unit in units:
            unit["x"] = unit["x"] + block.mlp(block.norm2(unit["x"]))
        if number in deep:
            seen = [torch.empty(0)] * len(order)
            for unit in units:
                feature = tower.deepstack_merger_list[deep.index(number)](unit["x"])[0]
                for i in unit["members"]:
                    seen[i] = feature
            taps.append(seen)
    tokens = {int(order[u["at"]]): tower.merger(u["x"])[0] for u in units}
    planes = [{int(order[u["at"]]): torch.stack([tap[i] for i in u["members"]]).mean(0) for u in units} for tap in taps]
    return tokens, planes


def _learned(tower: Any, grid: Tensor) -> Tensor:
    """Learned positions of the patches, as the tower makes them."""
    caught: list[Tensor] = []
    handle = tower.rotary_pos_emb.register_forward_pre_hook(lambda module, args: caught.append(args[0].clone()))
    weight = tower.patch_embed.proj.weight
    zeros = torch.zeros(int(grid.prod()), weight[0].numel(), dtype=weight.dtype)
    with torch.no_grad():
        tower(zeros, grid)
        handle.remove()
        return caught[0] - tower.patch_embed(zeros)


def _attend(block: Any, units: list[dict[str, Any]], cos: Tensor, sin: Tensor, windows: list[int] | None) -> Tensor:
    """Adds what units attend to; returns their keys before rotation [units, m, H, D]."""
    attn = block.attn
    x = torch.stack([u["x"] for u in units])
    n, m, _ = x.shape
    q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
    at = [u["at"] for u in units]
    turn = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
    q_rot, k_rot = turn(q.flatten(0, 1), k.flatten(0, 1), cos[at].flatten(0, 1), sin[at].flatten(0, 1))
    logits = torch.einsum("qhd,khd->hqk", q_rot, k_rot) * attn.scaling
    size = torch.tensor([float(len(u["members"])) for u in units]).repeat_interleave(m)
    logits = logits + size.log()
    if windows is not None:
        here = torch.tensor([windows[i] for i in at]).repeat_interleave(m)
        logits = logits.masked_fill(here[:, None] != here, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.flatten(0, 1)).flatten(1)
    for unit, change in zip(units, attn.proj(out).unflatten(0, (n, m))):
        unit["x"] = unit["x"] + change
    return k


def _merge(units: list[dict[str, Any]], keys: Tensor, r: int) -> list[dict[str, Any]]:
    """ToMe's matching, pair by pair; a unit's key is those of its patches side by side, summed over heads."""
    metric = keys.sum(2).flatten(1)
    metric = metric / metric.norm(dim=1, keepdim=True)
    a, b = range(0, len(units), 2), range(1, len(units), 2)
    best = {i: max(b, key=lambda j: float(metric[i] @ metric[j])) for i in a}
    gone = sorted(a, key=lambda i: -float(metric[i] @ metric[best[i]]))[: min(r, len(units) // 2)]
    total = {j: [units[i] for i in gone if best[i] == j] for j in b}
    rest = sorted((i for i in a if i not in gone), key=lambda i: -float(metric[i] @ metric[best[i]]))
    found = [units[i] for i in rest]
    for j in b:
        parts = [units[j], *total[j]]
        weight = sum(len(u["members"]) for u in parts)
        mean = sum(u["x"] * len(u["members"]) for u in parts) / weight
        found.append({"x": mean, "at": units[j]["at"], "members": [i for u in parts for i in u["members"]]})
    return found


def unit_probs(tower: Any, number: int, state: Any, view: Any, size: list[int]) -> Tensor:
    """[1, H, U, U]: attention of a block, patch by patch, made one of units."""
    q, k = (t.unflatten(3, (view.parts, -1)).flatten(2, 3) for t in (view.q, view.k_rot))
    logits = q @ k.transpose(2, 3) * view.scale
    if hasattr(tower, "fullatt_block_indexes") and number not in tower.fullatt_block_indexes:
        grid, config = torch.tensor([size]), tower.config
        order, ends = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        window = torch.bucketize(torch.arange(len(order)), ends[1:] // view.parts, right=True)
        here = window if state.index is None else window[state.index[0]]
        here = here.repeat_interleave(view.parts)
        logits = logits.masked_fill(here[:, None] != here, float("-inf"))
    probs = logits.softmax(-1).unflatten(3, (-1, view.parts)).sum(4)
    return probs.unflatten(2, (-1, view.parts)).mean(3)
