"""Closed-form costs of Hugging Face vision-language models: tower, connector, LLM, and what an image of a stated size is to it.

A family is one row in `VISION`. Towers that encoder methods can patch are priced as these are; the packed towers of Qwen-VL,
which read all images as one sequence, have a closed form of their own here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vtok.core.prompt import View
from vtok.cost.encoder import Estimate, Row, estimate
from vtok.cost.prefill import LayerCost, LLMCost, StatedImage, VisionCost
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.patches.decoder.masks import window_of
from vtok.patches.decoder.pass_state import TowerCall
from vtok.patches.hf_vision.adapter import HfAdapter
from vtok.patches.hf_vision.tables import TOWERS
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.tower_bridge import Joint
from vtok.patches.macs import linear_macs, position_macs
from vtok.patches.protocol import look_up


@dataclass(frozen=True)
class VisionSpec:
    """The vision side of one class of models.

    Attributes:
        tower: path of the tower.
        connector: paths of what runs once for every feature; linear layers inside are priced.
        weights: paths of bare matrices that every feature is multiplied with.
        per_view: (model, patches of a view that reach the connector) -> features of it.
        image: (model, size or `None`) -> what an image is.
        packed: whether the tower reads all images as one sequence.
    """

    tower: str = "vision_tower"
    connector: tuple[str, ...] = ("multi_modal_projector",)
    weights: tuple[str, ...] = ()
    per_view: Callable[[Any, int], int] = lambda model, patches: patches
    image: Callable[[VisionSpec, Any, tuple[int, int, int] | None], StatedImage] | None = None
    packed: bool = False


# What an image is.
def _vision_config(model: Any) -> Any:
    return model.config.vision_config


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _native(model: Any) -> tuple[int, int, int]:
    config = _vision_config(model)
    return (getattr(config, "num_channels", 3), *_pair(config.image_size))


def _patches(model: Any, size: tuple[int, int, int]) -> tuple[int, int]:
    rows, columns = _pair(_vision_config(model).patch_size)
    return size[1] // rows, size[2] // columns


def _prefix_left(model: Any, prefix: int) -> int:
    """What is left of the tokens in front of the patches when features reach the connector (SigLIP loses its first patch)."""
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    return prefix - 1 if strategy == "default" else prefix


def _square(start: int, n: int) -> View:
    side = math.isqrt(n)
    return View(start, side, side) if side * side == n else View(start, 1, n)


def _prefix(model: Any, spec: VisionSpec) -> int:
    tower = look_up(model.get_submodule(spec.tower), TOWERS)
    return 0 if tower is None else tower.num_prefix


def _features(spec: VisionSpec, model: Any, patches: int) -> int:
    return spec.per_view(model, patches + _prefix_left(model, _prefix(model, spec)))


def whole_image(spec: VisionSpec, model: Any, size: tuple[int, int, int] | None) -> StatedImage:
    """One view of a fixed size."""
    native = _native(model)
    if size is not None and tuple(size) != native:
        raise ConfigError(
            f"{type(model).__name__} reads images of {native[1]} x {native[2]} pixels with {native[0]} channels, whatever size "
            f"they had; input_size={tuple(size)} is another: leave it out, and count tiles as images"
        )
    rows, columns = _patches(model, native)
    return StatedImage(native, 1, (1, rows, columns), (_square(0, _features(spec, model, rows * columns)),))


def any_resolution(spec: VisionSpec, model: Any, size: tuple[int, int, int] | None) -> StatedImage:
    """LLaVA-NeXT and LLaVA-OneVision: an overview and crops, with padding removed and a newline token behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    channels, side, _ = native = _native(model)
    size = size or (channels, 2 * side, 2 * side)
    config = model.config
    rows, columns = _patches(model, native)
    crops = get_anyres_image_grid_shape(size[1:], config.image_grid_pinpoints, side)
    here, there = crops[0] * rows, crops[1] * columns
    if size[2] / size[1] > there / here:
        pad = (here - int(round(size[1] * (there / size[2]), 7))) // 2
        here -= 2 * pad
    else:
        pad = (there - int(round(size[2] * (here / size[1]), 7))) // 2
        there -= 2 * pad
    most = getattr(config, "vision_aspect_ratio", None)
    if most is not None:
        ratio = math.sqrt(here * there / (int(most.rpartition("_")[2]) * rows**2))
        if ratio > 1.1:
            here, there = int(here // ratio), int(there // ratio)
    overview = _square(0, _features(spec, model, rows * columns))._replace(overview=True)
    layout = (overview, View(overview.stop, here, there + 1, newline=True))
    return StatedImage(size, crops[0] * crops[1] + 1, (1, rows, columns), layout)


def packed_image(spec: VisionSpec, model: Any, size: tuple[int, int, int] | None) -> StatedImage:
    """Qwen-VL: patches of an image of any size, whole groups of them."""
    config = _vision_config(model)
    size = size or (getattr(config, "in_channels", 3), 448, 448)
    unit = config.patch_size * config.spatial_merge_size
    rows, columns = (max(1, round(side / unit)) for side in size[1:])
    merge = config.spatial_merge_size
    return StatedImage(size, 1, (1, rows * merge, columns * merge), (View(0, rows, columns),))


def _shuffled(model: Any, patches: int) -> int:
    return patches // model.config.scale_factor**2


def _downsampled(model: Any, patches: int) -> int:
    return round(patches * model.config.downsample_ratio**2)


def _pooled(model: Any, patches: int) -> int:
    return int(model.config.mm_tokens_per_image)


def _merged(model: Any, patches: int) -> int:
    return patches // _vision_config(model).spatial_merge_size ** 2


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_IDEFICS = VisionSpec("vision_model", ("connector",), per_view=_shuffled)
_QWEN = VisionSpec("visual", ("visual.merger",), per_view=_merged, image=packed_image, packed=True)

VISION: dict[str, VisionSpec] = {
    _in("gemma3") + "Gemma3Model": VisionSpec(weights=("multi_modal_projector.mm_input_projection_weight",), per_view=_pooled),
    _in("idefics3") + "Idefics3Model": _IDEFICS,
    _in("internvl") + "InternVLModel": VisionSpec(per_view=_downsampled),
    _in("llava") + "LlavaModel": VisionSpec(),
    _in("llava_next") + "LlavaNextModel": VisionSpec(image=any_resolution),
    _in("llava_onevision") + "LlavaOnevisionModel": VisionSpec(image=any_resolution),
    _in("paligemma") + "PaliGemmaModel": VisionSpec(),
    _in("qwen2_5_vl") + "Qwen2_5_VLModel": _QWEN,
    _in("qwen2_vl") + "Qwen2VLModel": _QWEN,
    _in("qwen3_vl") + "Qwen3VLModel": VisionSpec(
        "visual", ("visual.merger", "visual.deepstack_merger_list"), per_view=_merged, image=packed_image, packed=True
    ),
    _in("smolvlm") + "SmolVLMModel": _IDEFICS,
}


def tower_of(vlm: VLM) -> nn.Module | None:
    """The vision tower, whether its costs are known or not."""
    spec = look_up(vlm.module, VISION)
    return None if spec is None else vlm.module.get_submodule(spec.tower)


def vision_spec(vlm: VLM) -> VisionSpec:
    """The row of a model.

    Raises:
        UnsupportedModelError: the model or its tower is one whose cost vtok has no closed form for.
    """
    spec = look_up(vlm.module, VISION)
    if spec is None:
        raise UnsupportedModelError(
            f"what {vlm.info.name} costs is not known in closed form, so that no plan and no FLOPs budget can be made for it; "
            "pass the method's own parameters, and measure it with vtok.eval.benchmarks.flops.count_macs"
        )
    tower = vlm.module.get_submodule(spec.tower)
    if not spec.packed and look_up(tower, TOWERS) is None:
        raise UnsupportedModelError(
            f"the cost of {type(tower).__name__}, the vision tower of {vlm.info.name}, is not known in closed form; measure it "
            "with vtok.eval.benchmarks.flops.count_macs"
        )
    return spec


def stated_image(vlm: VLM, size: tuple[int, int, int] | None) -> StatedImage:
    """What an image of a size (channels, height, width) is to a model; `None` = the default size.

    Raises:
        ConfigError: the model cannot read that size.
        UnsupportedModelError: see `vision_spec`.
    """
    spec = vision_spec(vlm)
    return (spec.image or whole_image)(spec, vlm.module, size)


def stated_calls(vlm: VLM, image: StatedImage, images: int) -> list[TowerCall]:
    """The calls of the tower that so many such images cause."""
    if vision_spec(vlm).packed:
        return [TowerCall((images * math.prod(image.grid),), torch.tensor([image.grid] * images))]
    return [TowerCall((images * image.views, *_native(vlm.module)))]


def vision_cost(vlm: VLM, calls: Sequence[TowerCall], seen: Estimate | None = None, joint: Joint | None = None) -> VisionCost:
    """The vision side of a prompt.

    Args:
        vlm: the model.
        calls: of its tower.
        seen: of one view of a tower that reduces tokens itself; `None` = it does not.
        joint: how the model takes what that tower yields.

    Raises:
        UnsupportedModelError: see `vision_spec`.
    """
    spec = vision_spec(vlm)
    return _packed(spec, vlm.module, calls) if spec.packed else _viewed(spec, vlm, calls, seen, joint)


def patches_left(vlm: VLM, seen: Estimate | None, joint: Joint | None) -> int | None:
    """Patches of a view that a tower which reduces tokens hands to the connector; `None` = all of them."""
    if seen is None or joint is None or not joint.connector or not joint.state:
        return None
    assert vlm.tower is not None
    return round(seen.rows[joint.state - 1].tokens_out) - vlm.tower.num_prefix


def features_left(vlm: VLM, patches: int) -> int:
    """Features of a view that the connector makes of so many patches."""
    return _features(vision_spec(vlm), vlm.module, patches)


def _viewed(spec: VisionSpec, vlm: VLM, calls: Sequence[TowerCall], seen: Estimate | None, joint: Joint | None) -> VisionCost:
    adapter, model = HfAdapter(), vlm.module
    tower = vlm.tower or adapter.towers(model.get_submodule(spec.tower))[0]
    info = tower.info
    left = patches_left(vlm, seen, joint)
    if seen is None:
        seen = estimate(adapter.cost(tower), {}, info.num_prefix + info.num_patches, info.num_prefix)
    views = sum(call.shape[0] for call in calls)
    features = _features(spec, model, info.num_patches if left is None else left)
    rows = tuple(Row(r.block, r.place, r.tokens_in, r.tokens_out, views * r.macs, views * r.reduction_macs) for r in seen.rows)
    connector = views * features * _connector(spec, model)
    return VisionCost(rows, views, views * seen.macs, views * seen.reduction_macs, connector, seen.exact)


def _connector(spec: VisionSpec, model: Any) -> int:
    """MACs of one feature."""
    bare = sum(model.get_parameter(path).numel() for path in spec.weights)
    return bare + sum(linear_macs(model.get_submodule(path)) for path in spec.connector if not spec.weights)


def _packed(spec: VisionSpec, model: Any, calls: Sequence[TowerCall]) -> VisionCost:
    """All patches run through every block together; attention stays within a frame, or within windows of a frame."""
    tower, config = model.get_submodule(spec.tower), _vision_config(model)
    sizes = [tuple(map(int, image)) for call in calls if call.grid is not None for image in call.grid.tolist()]
    patches = sum(math.prod(size) for size in sizes)
    full = sum(frames * (rows * columns) ** 2 for frames, rows, columns in sizes)
    whole = getattr(config, "fullatt_block_indexes", None)
    windows = full if whole is None else sum(frames * _window_pairs(config, rows, columns) for frames, rows, columns in sizes)
    found: list[Row] = []
    for i, block in enumerate(tower.blocks):
        pairs = full if whole is None or i in whole else windows
        macs = patches * linear_macs(block) + pairs * 2 * block.attn.qkv.in_features
        found.append(Row(i, None, patches, patches, macs, 0.0))
    stem = patches * position_macs(tower.patch_embed.proj)
    connector = _merged(model, patches) * _connector(spec, model)
    return VisionCost(tuple(found), 1, stem + sum(row.macs for row in found), 0.0, connector)


def _window_pairs(config: Any, rows: int, columns: int) -> int:
    """(query, key) pairs of a frame whose windows of groups are filled up row by row."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size  # groups of patches along a window
    heights, widths = ([min(side, n // merge - at) for at in range(0, n // merge, side)] for n in (rows, columns))
    return sum((h * w * merge * merge) ** 2 for h in heights for w in widths)


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
