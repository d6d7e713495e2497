"""Closed-form costs of Hugging Face vision-language models: tower, connector, LLM.

What a family costs beside its tower stands in its row (`Family.costs`). Towers are priced as encoders are; those of the Qwen
family, which read all images as one sequence, image by image, each at its own size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vtok.config import Reducer
from vtok.core.tokens import Site
from vtok.cost.encoder import Estimate, Row, estimate
from vtok.cost.prefill import LayerCost, LLMCost, StatedImage, VisionCost
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.masks import window_of
from vtok.patches.decoder.pass_state import TowerCall
from vtok.patches.hf_packed.adapter import sized
from vtok.patches.hf_vision.adapter import HfAdapter
from vtok.patches.hf_vision.tables import TOWERS
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.stated_images import VisionCosts, native_size, vision_config
from vtok.patches.hf_vlm.tower.bridge import TowerBridge
from vtok.patches.macs import linear_macs
from vtok.patches.protocol import look_up

Steps = dict[int, tuple[Site, Reducer]]  # block -> (site, reducer)
FrameCounts = tuple[tuple[int, int], ...]  # units of a frame that enter and leave each block


def vision_tower(vlm: VLM) -> nn.Module:
    """The vision tower, whether its costs are known or not."""
    return vlm.module.get_submodule(vlm.family.tower)


def vision_costs(vlm: VLM) -> VisionCosts:
    """What the row of a model says of its costs.

    Raises:
        UnsupportedModelError: the model or its tower is one whose cost vtok has no closed form for.
    """
    family, tower = vlm.family, vision_tower(vlm)
    if family.costs is None:
        raise UnsupportedModelError(
            f"what {vlm.info.name} costs is not known in closed form, so that no plan and no FLOPs budget can be made for it; "
            "pass the method's own parameters, and measure it with vtok.eval.benchmarks.flops.count_macs"
        )
    if (vlm.tower if family.packed else look_up(tower, TOWERS)) is None:
        raise UnsupportedModelError(
            f"the cost of {type(tower).__name__}, the vision tower of {vlm.info.name}, is not known in closed form; measure it "
            "with vtok.eval.benchmarks.flops.count_macs"
        )
    return family.costs


def stated_image(vlm: VLM, size: tuple[int, int, int] | None) -> StatedImage:
    """What an image of a size (channels, height, width) is to a model; `None` = the default size.

    Raises:
        ConfigError: the model cannot read that size.
        UnsupportedModelError: see `vision_costs`.
    """
    return vision_costs(vlm).image(vlm.module, size, lambda patches: features_left(vlm, patches))


def stated_calls(vlm: VLM, image: StatedImage, images: int) -> list[TowerCall]:
    """The calls of the tower that so many such images cause."""
    if vlm.family.packed:
        return [TowerCall((images * math.prod(image.grid),), torch.tensor([image.grid] * images))]
    return [TowerCall((images * image.views, *native_size(vlm.module)))]


def vision_cost(
    vlm: VLM,
    calls: Sequence[TowerCall],
    seen: Estimate | None = None,
    joint: TowerBridge | None = None,
    steps: Steps | None = None,
    counts: Sequence[FrameCounts] | None = None,
) -> VisionCost:
    """The vision side of a prompt.

    Args:
        vlm: the model.
        calls: of its tower.
        seen: of one view of a tower that reduces tokens itself; `None` = it does not.
        joint: how the model takes what that tower yields.
        steps: what reduces tokens there, by block: a tower that reads all images as one sequence is priced image by image.
        counts: of such a tower: what its last call made of every frame, where that depends on the image.

    Raises:
        UnsupportedModelError: see `vision_costs`.
    """
    costs = vision_costs(vlm)
    return (
        _packed(costs, vlm, calls, steps or {}, counts or ()) if vlm.family.packed else _viewed(costs, vlm, calls, seen, joint)
    )


def patches_left(vlm: VLM, seen: Estimate | None, joint: TowerBridge | None) -> int | None:
    """Patches of a view that a tower which reduces tokens hands to the connector; `None` = all of them."""
    if seen is None or joint is None or not joint.connector or not joint.state:
        return None
    assert vlm.tower is not None
    left = round(seen.rows[joint.state - 1].tokens_out) - vlm.tower.num_prefix
    return left * vision_config(vlm.module).spatial_merge_size ** 2 if vlm.packed else left


def features_left(vlm: VLM, patches: int) -> int:
    """Features of a view that the connector makes of so many patches."""
    row = look_up(vision_tower(vlm), TOWERS)
    prefix = 0 if row is None else row.num_prefix
    if getattr(vlm.module.config, "vision_feature_select_strategy", None) == "default":
        prefix -= 1  # without a class token (SigLIP) the first patch is lost
    return vision_costs(vlm).per_view(vlm.module, patches + prefix)


def _viewed(
    costs: VisionCosts, vlm: VLM, calls: Sequence[TowerCall], seen: Estimate | None, joint: TowerBridge | None
) -> VisionCost:
    adapter, model = HfAdapter(), vlm.module
    tower = vlm.tower or adapter.towers(vision_tower(vlm))[0]
    info = tower.info
    left = patches_left(vlm, seen, joint)
    if seen is None:
        seen = estimate(adapter.cost(tower), {}, info.num_prefix + info.num_patches, info.num_prefix)
    views = sum(call.shape[0] for call in calls)
    features = features_left(vlm, info.num_patches if left is None else left)
    rows = tuple(Row(r.block, r.place, r.tokens_in, r.tokens_out, views * r.macs, views * r.reduction_macs) for r in seen.rows)
    connector = views * features * _connector(costs, model)
    return VisionCost(rows, views, views * seen.macs, views * seen.reduction_macs, connector, seen.exact)


def _connector(costs: VisionCosts, model: Any) -> int:
    """MACs of one feature."""
    bare = sum(model.get_parameter(path).numel() for path in costs.weights)
    return bare + sum(linear_macs(model.get_submodule(path)) for path in costs.modules if not costs.weights)


def _packed(
    costs: VisionCosts, vlm: VLM, calls: Sequence[TowerCall], steps: Steps, counts: Sequence[FrameCounts]
) -> VisionCost:
    """All patches run through every block together; attention stays within a frame, or within windows of a frame, and methods
    act on each frame as if it came alone."""
    model: Any = vlm.module
    merge, joint = vision_config(model).spatial_merge_size, vlm.joint()
    assert vlm.tower is not None
    sizes = [size for call in calls if call.grid is not None for size in call.grid.tolist()]
    grids = [(rows // merge, columns // merge) for t, rows, columns in sizes for _ in range(t)]
    known = [*[None] * (len(grids) - len(counts)), *counts]
    each: list[tuple[int, Estimate]] = []
    for (grid, seen), number in Counter(zip(grids, known)).items():
        cost = vlm.adapter.cost(sized(vlm.tower, grid))
        found = estimate(cost, steps, math.prod(grid), 0, seen)
        each.append((number, found if seen is None else replace(found, exact=True)))
    blocks = []
    for i, block in enumerate(vlm.tower.blocks):
        attend: Any = block.attend  # of a packed tower, which has units
        unit, same = attend.unit(block.attention), [(n, e.rows[i]) for n, e in each]
        entered, left = (unit * sum(n * getattr(row, name) for n, row in same) for name in ("tokens_in", "tokens_out"))
        macs, own = (sum(n * getattr(row, name) for n, row in same) for name in ("macs", "reduction_macs"))
        blocks.append(Row(i, steps[i][0].place if i in steps else None, entered, left, macs, own))
    connector = 0
    for path in costs.modules:
        for tap, state in {joint.connector: joint.state, **joint.taps}.items():
            if tap == path or tap.startswith(f"{path}."):
                features = sum(n * (e.rows[state - 1].tokens_out if state else e.rows[0].tokens_in) for n, e in each)
                connector += round(features) * linear_macs(model.get_submodule(tap))
    whole, deciding = sum(n * e.macs for n, e in each), sum(row.reduction_macs for row in blocks)
    return VisionCost(tuple(blocks), 1, whole, deciding, connector, all(e.exact for _, e in each))


# The language model.
def llm_cost(model: nn.Module, vlm: VLM, dtype: torch.dtype | None = None) -> LLMCost:
    """Closed form of the language model.

    Args:
        model: holds the vision-language model and its language head, if there is one.
        vlm: the model.
        dtype: of the KV cache; `None` = that of the weights.
    """
    text = vlm.text
    dtype = dtype or next(p.dtype for p in text.parameters() if p.is_floating_point())
    layers = tuple(_layer(layer, window_of(layer, i)) for i, layer in enumerate(text.layers))
    owner = next((m for m in model.modules() if m.__dict__.get("_modules", {}).get("model") is vlm.module), None)
    head = getattr(owner, "lm_head", None)
    width = torch.finfo(dtype).bits // 8
    return LLMCost(layers, linear_macs(head), width, str(dtype).removeprefix("torch."))


def _layer(layer: Any, window: int | None) -> LayerCost:
    attention = layer.self_attn
    outputs = {name: linear_out(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")}
    return LayerCost(linear_macs(layer), 2 * outputs["q_proj"], outputs["k_proj"] + outputs["v_proj"], window)


def linear_out(layer: Any) -> int:
    """Columns that a linear layer (or an adapter around one) returns."""
    return int(layer.out_features)
