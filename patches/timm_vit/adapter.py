"""timm's plain vision transformers: which blocks, heads and towers vtok knows.

A new block class is one row in `BLOCKS`, a new attention class one row in `ATTENTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtok.core.tracker import TokenTracker
from vtok.cost.encoder import TowerCost
from vtok.errors import UnsupportedModelError
from vtok.patches.macs import block_cost, linear_macs, position_macs, shape_only_macs
from vtok.patches.module_swap import swap_class
from vtok.patches.padding import by_pairs
from vtok.patches.pooling import HeadPooledTrunk, PatchedTrunk, PoolBias
from vtok.patches.protocol import Attend, Block, BlockSpec, Example, Tower, look_up, own_forward, qualified_name
from vtok.patches.stems import ImageStem, grid_of
from vtok.patches.timm_vit.attention import (
    TimmAttention,
    TimmBeitAttention,
    TimmDiffAttention,
    TimmParallelBlock,
    beit_bias,
)

_MASK: dict[str, Any] = {"args": ("attn_mask", "is_causal"), "padding_mask": by_pairs}
_PRE_NORM: dict[str, Any] = {"attn": "attn", "pre1": ("norm1",), "pre2": ("norm2",)}
_POST_NORM: dict[str, Any] = {"attn": "attn", "post1": ("norm1", "drop_path1"), "post2": ("norm2", "drop_path2")}
_GAMMA: dict[str, Any] = {"post1": ("gamma_1", "drop_path1"), "post2": ("gamma_2", "drop_path2")}
_EVA: dict[str, Any] = {**_MASK, "args": ("rope", *_MASK["args"]), "rope": "rope"}

BLOCKS: dict[str, BlockSpec] = {
    "timm.models.vision_transformer.Block": BlockSpec(
        **_PRE_NORM, post1=("ls1", "drop_path1"), post2=("ls2", "drop_path2"), **_MASK
    ),
    "timm.models.vision_transformer.ResPostBlock": BlockSpec(**_POST_NORM, **_MASK),
    "timm.models.vision_transformer.ParallelScalingBlock": BlockSpec(attn="", **_MASK),
    "timm.models.eva.EvaBlock": BlockSpec(**_PRE_NORM, **_GAMMA, **_EVA),
    "timm.models.eva.EvaBlockPostNorm": BlockSpec(**_POST_NORM, **_EVA),
    "timm.models.beit.Block": BlockSpec(
        **_PRE_NORM, **_GAMMA, args=("shared_rel_pos_bias",), mask="shared_rel_pos_bias", own_mask=beit_bias
    ),
}

ATTENTIONS: dict[str, Attend] = {
    "timm.layers.attention.Attention": TimmAttention(),
    "timm.layers.attention.AttentionRope": TimmAttention(),
    "timm.layers.diff_attention.DiffAttention": TimmDiffAttention(),
    "timm.models.beit.Attention": TimmBeitAttention(),
    "timm.models.eva.EvaAttention": TimmAttention(),
    "timm.models.vision_transformer.Attention": TimmAttention(),  # where older timm kept it
    "timm.models.vision_transformer.ParallelScalingBlock": TimmParallelBlock(),
}

_REFUSED_POOLS = {
    "AttentionPoolPrr": "its attention pool (prr) takes no mask, so it cannot weigh merged tokens",
}


class TimmAdapter:
    """Adapter for timm."""

    supported = (
        "timm's plain ViTs: VisionTransformer (DeiT, DINOv2, SigLIP, hybrids ...), Eva (EVA-02, DINOv3 ...), Beit, "
        "NaFlexVit with image input"
    )

    def towers(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sequence[Tower]:
        found = []
        for path, module in model.named_modules(remove_duplicate=True):
            stack = getattr(module, "blocks", None)
            if isinstance(stack, (nn.Sequential, nn.ModuleList)) and _is_timm(module) and hasattr(module, "num_prefix_tokens"):
                found.append(self._tower(path, module, stack, input_size))
        return found

    def _tower(self, path: str, module: Any, stack: Any, input_size: tuple[int, int, int] | None) -> Tower:
        name = type(module).__name__
        blocks = tuple(_block(name, i, block) for i, block in enumerate(stack))
        if not blocks:
            raise UnsupportedModelError(f"{name} has no blocks left to patch")
        size = input_size or _native_size(module)
        embeds = getattr(module, "embeds", None)  # NaFlexVit keeps its stem and class token there
        return Tower(
            path=path,
            module=module,
            blocks=blocks,
            num_prefix=module.num_prefix_tokens,
            has_cls=getattr(embeds if embeds is not None else module, "cls_token", None) is not None,
            width=module.embed_dim,
            input_size=size,
            grid=_grid(module, size),
            blind_pool=_blind_pool(module),
        )

    def attach(self, tower: Tower, run: TokenTracker) -> None:
        trunk: Any = tower.module
        attn_pool: Any = getattr(trunk, "attn_pool", None)
        if type(attn_pool).__name__ == "AttentionPoolLatent":
            hook = PoolBias(run, "attn_mask", drop_prefix=not _pool_sees_prefix(trunk))
            attn_pool.register_forward_pre_hook(hook, with_kwargs=True)
        _patch_embed(trunk).register_forward_pre_hook(ImageStem(run))
        trunk._vtok_run = run
        pools = hasattr(trunk, "pool") or hasattr(trunk, "_pool")
        swap_class(trunk, PatchedTrunk if pools else HeadPooledTrunk)

    def cost(self, tower: Tower) -> TowerCost:
        trunk: Any = tower.module
        patches = tower.grid[0] * tower.grid[1]
        head, per_token = 0, 0
        attn_pool = getattr(trunk, "attn_pool", None)
        if attn_pool is not None:
            head, per_token = _pool_macs(attn_pool, 0 if _pool_sees_prefix(trunk) else tower.num_prefix)
        heads = linear_macs(trunk.head) + linear_macs(getattr(trunk, "head_dist", None))
        if trunk.global_pool or attn_pool is not None:
            head += heads
        else:  # no pooling: the classifier runs on every token
            per_token += heads
        averages = attn_pool is None and trunk.global_pool in ("avg", "avgmax")
        return TowerCost(
            _stem_macs(trunk, tower, patches),
            tuple(block_cost(b) for b in tower.blocks),
            head,
            per_token,
            weighted_mean=trunk.num_features if averages else 0,
            unpooled=0 if getattr(trunk, "pool_include_prefix", False) else tower.num_prefix,
        )

    def examples(self) -> Sequence[Example]:
        from vtok.patches.timm_vit.examples import EXAMPLES

        return EXAMPLES


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)


def _block(tower: str, index: int, block: nn.Module) -> Block:
    spec = look_up(block, BLOCKS)
    if spec is None:
        raise UnsupportedModelError(
            f"block {index} of {tower} is a {qualified_name(type(block))}, which vtok cannot patch; "
            f"supported: {TimmAdapter.supported}"
        )
    attention = spec.attention(block)
    attend = look_up(attention, ATTENTIONS)
    if attend is None:
        raise UnsupportedModelError(
            f"block {index} of {tower} attends with {qualified_name(type(attention))}, which vtok does not know; known: "
            + ", ".join(sorted(ATTENTIONS))
        )
    return Block(block, spec, attend, own_forward(block, BLOCKS), own_forward(attention, ATTENTIONS))


def _patch_embed(trunk: Any) -> Any:
    return trunk.embeds if hasattr(trunk, "embeds") else trunk.patch_embed


def _native_size(trunk: Any) -> tuple[int, int, int]:
    """The input size the model was built for."""
    embed = _patch_embed(trunk)
    size = getattr(embed, "img_size", None)
    if size is None:  # built for any size: take the one its configuration names, else that of its position embedding
        config = getattr(trunk, "pretrained_cfg", None) or {}
        grid = getattr(embed, "pos_embed_grid_size", None)
        if config.get("input_size"):
            size = config["input_size"][-2:]
        else:
            size = [n * p for n, p in zip(grid, embed.patch_size)] if grid else (224, 224)
    return (_in_chans(embed), int(size[0]), int(size[1]))


def _in_chans(embed: Any) -> int:
    if hasattr(embed, "backbone"):
        conv = next(m for m in embed.backbone.modules() if isinstance(m, nn.Conv2d))
        return conv.in_channels
    if hasattr(embed.proj, "in_features"):
        return embed.proj.in_features // (embed.patch_size[0] * embed.patch_size[1])
    return embed.proj.in_channels


def _grid(trunk: Any, size: tuple[int, int, int]) -> tuple[int, int]:
    rows, columns = grid_of(_patch_embed(trunk), size[1:])
    return int(rows), int(columns)


def _pool_sees_prefix(trunk: Any) -> bool:
    """Whether attention pooling is shown the prefix tokens; Eva always shows them."""
    return getattr(trunk, "pool_include_prefix", look_up(trunk, {"timm.models.eva.Eva": True}) is True)


def _blind_pool(trunk: Any) -> str | None:
    attn_pool = getattr(trunk, "attn_pool", None)
    if attn_pool is None:
        return None
    if getattr(attn_pool, "pos_embed", None) is not None:
        return "its attention pool adds a position embedding by row, so rows cannot be removed"
    if type(attn_pool).__name__ == "AttentionPoolLatent":
        return None
    return _REFUSED_POOLS.get(type(attn_pool).__name__, f"its attention pool ({type(attn_pool).__name__}) is unknown to vtok")


def _pool_macs(attn_pool: Any, skipped: int) -> tuple[int, int]:
    """(fixed, per token) MACs of an attention pool; `skipped` tokens in front are not shown to it."""
    if type(attn_pool).__name__ != "AttentionPoolLatent":
        return 0, 0
    width = attn_pool.num_heads * attn_pool.head_dim
    per_token = linear_macs(attn_pool.kv) + 2 * attn_pool.latent_len * width
    once = linear_macs(attn_pool) - linear_macs(attn_pool.kv)
    return attn_pool.latent_len * once - skipped * per_token, per_token


def _stem_macs(trunk: Any, tower: Tower, patches: int) -> int:
    embed = _patch_embed(trunk)
    if hasattr(embed, "backbone"):
        return shape_only_macs(embed, tower.input_size)  # a convolutional stem
    return patches * position_macs(embed.proj)
