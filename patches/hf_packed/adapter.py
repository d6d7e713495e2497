"""Adapter for the vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 (with their mixtures of experts).

They run the patches of all images as one sequence, whole images or windows attend to themselves, and at the end squares of
patches merge to visual tokens. Methods act on these squares (units), see `PackedBlock`: an image is a row of units, decided for
as if it came alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtok.core.tracker import TokenTracker
from vtok.cost.encoder import BlockCost, TowerCost
from vtok.errors import UnsupportedModelError
from vtok.patches.hf_packed.attention import PackedAttention
from vtok.patches.hf_packed.block import PackedBlock
from vtok.patches.hf_packed.units import first_state
from vtok.patches.macs import linear_macs, position_macs
from vtok.patches.module_swap import Hook
from vtok.patches.protocol import Block, BlockSpec, Example, Tower, look_up, own_forward, qualified_name

_SIDE = 448  # pixels of the image for which numbers are stated where no size is: half an edge of a photograph


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_BLOCK = BlockSpec(attn="attn", pre1=("norm1",), pre2=("norm2",), rope="position_embeddings", mixin=PackedBlock)
_ATTEND = PackedAttention()

TOWERS: dict[str, str] = {  # -> path of the blocks
    _in("qwen2_vl") + "Qwen2VisionTransformerPretrainedModel": "blocks",
    _in("qwen2_5_vl") + "Qwen2_5_VisionTransformerPretrainedModel": "blocks",
    _in("qwen3_vl") + "Qwen3VLVisionModel": "blocks",
    _in("qwen3_vl_moe") + "Qwen3VLMoeVisionModel": "blocks",
    _in("qwen3_5") + "Qwen3_5VisionModel": "blocks",
    _in("qwen3_5_moe") + "Qwen3_5MoeVisionModel": "blocks",
}
BLOCKS: dict[str, BlockSpec] = {
    _in("qwen2_vl") + "Qwen2VLVisionBlock": _BLOCK,
    _in("qwen2_5_vl") + "Qwen2_5_VLVisionBlock": _BLOCK,
    _in("qwen3_vl") + "Qwen3VLVisionBlock": _BLOCK,
    _in("qwen3_vl_moe") + "Qwen3VLMoeVisionBlock": _BLOCK,
    _in("qwen3_5") + "Qwen3_5VisionBlock": _BLOCK,
    _in("qwen3_5_moe") + "Qwen3_5MoeVisionBlock": _BLOCK,
}
# Models that take what the merger at the end of such a tower returns as their visual tokens, and nothing else of it.
HOLDERS = frozenset(
    {
        _in("qwen2_vl") + "Qwen2VLModel",
        _in("qwen2_5_vl") + "Qwen2_5_VLModel",
        _in("qwen3_vl") + "Qwen3VLModel",
        _in("qwen3_vl_moe") + "Qwen3VLMoeModel",
        _in("qwen3_5") + "Qwen3_5Model",
        _in("qwen3_5_moe") + "Qwen3_5MoeModel",
        _in("cosmos3_omni") + "Cosmos3OmniModel",
    }
)
PRECOMPUTED = ("cu_seqlens", "cu_window_seqlens", "window_index")  # of a caller, who may have cut images in another way


class PackedAdapter:
    """Adapter for towers that read all images as one sequence; they are known inside vision-language models alone."""

    supported = "the vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5"

    def towers(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sequence[Tower]:
        return [
            self.tower(path, module, input_size)
            for path, module in model.named_modules(remove_duplicate=True)
            if look_up(module, TOWERS) is not None
        ]

    def tower(self, path: str, module: Any, input_size: tuple[int, int, int] | None = None) -> Tower:
        """A tower, described for images of a size (channels, height, width); default 448 x 448.

        Raises:
            UnsupportedModelError: it is none of those that are known, or its blocks are not.
        """
        name = type(module).__name__
        layers = look_up(module, TOWERS)
        if layers is None:
            raise UnsupportedModelError(f"{name} runs the patches of all images as one sequence, and its blocks are not known")
        blocks = tuple(_block(name, i, block) for i, block in enumerate(module.get_submodule(layers)))
        if not blocks:
            raise UnsupportedModelError(f"{name} has no blocks left to patch")
        config = module.config
        size = input_size or (getattr(config, "in_channels", 3), _SIDE, _SIDE)
        rows, columns = (max(1, round(side / (config.patch_size * config.spatial_merge_size))) for side in size[1:])
        unit = _ATTEND.unit(blocks[0].attention)
        width = unit * int(cast(Any, blocks[0].attention).qkv.in_features)
        return Tower(path, module, blocks, 0, False, width, size, (rows, columns), parts=unit, varies=True)

    def attach(self, tower: Tower, run: TokenTracker) -> None:
        tower.module.register_forward_pre_hook(Frames(run), with_kwargs=True)

    def cost(self, tower: Tower) -> TowerCost:
        """Of a unit as token, at the tower's grid of units. Attention within windows costs what it did before units left:
        their slots stay empty."""
        module: Any = tower.module
        config, unit = module.config, _ATTEND.unit(tower.blocks[0].attention)
        pairs, blocks = window_pairs(config, *tower.grid), []
        whole = range(len(tower.blocks)) if pairs == math.prod(tower.grid) ** 2 else config.fullatt_block_indexes
        for i, block in enumerate(tower.blocks):
            attn, mlp = cast(Any, block.attention), cast(Any, block.module).mlp
            each, out, pair = unit * linear_macs(attn.qkv), unit * linear_macs(attn.proj), _ATTEND.pair_macs(attn)
            fixed = 0 if i in whole else pairs * pair
            blocks.append(BlockCost(each, out, pair if i in whole else 0, unit * linear_macs(mlp), fixed=fixed))
        return TowerCost(math.prod(tower.grid) * unit * position_macs(module.patch_embed.proj), tuple(blocks), 0)

    def examples(self) -> Sequence[Example]:
        return ()  # they are those of the families


def lone_tower(model: Any, beside: set[nn.Module]) -> tuple[Tower | None, str]:
    """The one such tower of a vision-language model, and why single tokens of it cannot be looked into.

    Args:
        model: the model.
        beside: modules where no tower is looked for (those of the LLM).

    Returns:
        (the tower, `None` if there is none or it cannot be patched; why, "" = there is none).
    """
    named = model.named_modules()
    found = [(path, module) for path, module in named if module not in beside and look_up(module, TOWERS) is not None]
    if len(found) != 1:
        return None, ""
    path, module = found[0]
    why = f"{type(module).__name__} runs the patches of all images as one sequence, cut where images end"
    if HOLDERS.isdisjoint(qualified_name(cls) for cls in type(model).__mro__):
        return None, f"{why}, and {type(model).__name__} is not known to take its visual tokens as they leave it"
    try:
        return PackedAdapter().tower(path, module), why
    except UnsupportedModelError as error:
        return None, str(error)


def sized(tower: Tower, grid: tuple[int, int]) -> Tower:
    """A tower described for images of another grid of units."""
    config: Any = tower.module.config
    side = config.patch_size * config.spatial_merge_size
    return replace(tower, grid=grid, input_size=(tower.input_size[0], grid[0] * side, grid[1] * side))


def raster_places(tower: Tower, grid: tuple[int, int]) -> Tensor:
    """[U] int64: where each unit of an image of so many rows and columns of units lies in it, in the order of the sequence."""
    config: Any = tower.module.config
    place = torch.arange(math.prod(grid))
    if not hasattr(config, "window_size"):
        return place
    side = config.window_size // config.spatial_merge_size // config.patch_size
    y, x = place // grid[1], place % grid[1]
    window = y // side * grid[1] + x // side  # rising as windows come, if not by one
    return (window * side * side + y % side * side + x % side).argsort()


def window_pairs(config: Any, rows: int, columns: int) -> int:
    """(query, key) pairs of units of an image whose windows are filled up row by row; all pairs, if its tower has none."""
    if not hasattr(config, "window_size"):
        return (rows * columns) ** 2
    side = config.window_size // config.spatial_merge_size // config.patch_size
    heights, widths = ([min(side, n - at) for at in range(0, n, side)] for n in (rows, columns))
    return sum((h * w) ** 2 for h in heights for w in widths)


def _block(tower: str, index: int, block: Any) -> Block:
    spec = look_up(block, BLOCKS)
    if spec is None or not all(hasattr(block.attn, name) for name in ("qkv", "proj", "scaling")):
        raise UnsupportedModelError(f"block {index} of {tower} holds a {qualified_name(type(block))}, which vtok cannot patch")
    return Block(block, spec, _ATTEND, own_forward(block, BLOCKS))


class Frames(Hook):
    """Forward pre-hook of a tower: says which units are one image, or one frame of a video, before the first block runs."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [name for name in PRECOMPUTED if kwargs.get(name) is not None]
        if given:
            raise UnsupportedModelError(
                f"{', '.join(given)} of a caller say how images are cut, which a patched {type(module).__name__} must know "
                "itself; leave them out: they follow from grid_thw"
            )
        if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise UnsupportedModelError(
                f"output_attentions=True has nothing to return for a patched {type(module).__name__}, whose blocks attend step "
                "by step. Unpatch first"
            )
        grid: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        pixels: Tensor = args[0] if args else kwargs["hidden_states"]
        merge = module.config.spatial_merge_size
        sizes = [(h // merge, w // merge) for t, h, w in grid.tolist() for _ in range(t)]
        counts = [rows * columns for rows, columns in sizes]
        grids = [(1, count) for count in counts] if hasattr(module.config, "window_size") else sizes  # in the order of windows
        self.run.announce_rows(first_state(counts, pixels.device, self.run.trace, grids))
