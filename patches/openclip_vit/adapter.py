"""open_clip's image towers: its own vision transformer, and trunks of other backends that it wraps.

The text tower is built from the same block class: towers are found by the class of the tower, never by that of a block.
A new block class is one row in `BLOCKS`, a new attention class one row in `ATTENTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from vtok.core.tracker import TokenTracker
from vtok.cost.encoder import TowerCost
from vtok.errors import UnsupportedModelError
from vtok.patches import find_adapters
from vtok.patches.macs import block_cost, linear_macs, position_macs
from vtok.patches.module_swap import swap_class
from vtok.patches.openclip_vit.attention import OpenClipAttention, TorchAttention, added_mask, excluding_mask
from vtok.patches.pooling import DenseOutputs, PoolBias, plain, weighted_mean
from vtok.patches.protocol import Adapter, Attend, Block, BlockSpec, Example, Tower, look_up, own_forward, qualified_name
from vtok.patches.stems import ConvStem

_PRE_NORM: dict[str, Any] = {"attn": "attn", "pre1": ("ln_1",), "pre2": ("ln_2",), "post2": ("ls_2",)}

BLOCKS: dict[str, BlockSpec] = {
    "open_clip.transformer.CustomResidualAttentionBlock": BlockSpec(
        **_PRE_NORM, post1=("ln_attn", "ls_1"), args=("attn_mask",), own_mask=excluding_mask, padding_mask=excluding_mask
    ),
    "open_clip.transformer.ResidualAttentionBlock": BlockSpec(
        **_PRE_NORM, post1=("ls_1",), args=("k_x", "v_x", "attn_mask"), own_mask=added_mask, padding_mask=added_mask
    ),
}

ATTENTIONS: dict[str, Attend] = {
    "open_clip.transformer.Attention": OpenClipAttention(),
    "torch.nn.modules.activation.MultiheadAttention": TorchAttention(),
}

_NATIVE = {"open_clip.transformer.VisionTransformer": True}
_WRAPPERS = {"open_clip.timm_model.TimmModel": ("trunk", "head")}  # tower of another backend, and what open_clip puts after it
_REFUSED = {
    "open_clip.modified_resnet.ModifiedResNet": "",
    **{wrapper: child for wrapper, (child, _) in _WRAPPERS.items()},
}


class OpenClipTower(DenseOutputs):
    """Mixin for open_clip's vision transformer: average pooling over reduced tokens."""

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, upstream = self._vtok_run.current.final, cast(Any, super())
        pooled, tokens = upstream._global_pool(x)
        if state is None or plain(state) or self.attn_pool is not None or self.pool_type != "avg":
            return pooled, tokens  # an attention pool hands on its queries, which are not tokens
        return weighted_mean(x, state, state.num_prefix), tokens


class OpenClipAdapter:
    """Adapter for open_clip."""

    supported = "open_clip's VisionTransformer (CLIP, CoCa, with every pooling) and its TimmModel around a supported timm model"

    def towers(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sequence[Tower]:
        found, refused = [], []
        for path, module in model.named_modules():
            if look_up(module, _NATIVE):
                found.append(_tower(path, module, input_size))
            elif look_up(module, _WRAPPERS) and (inner := _wrapped(module, input_size)):
                found.append(replace(inner[1], path=path, module=module))
            elif look_up(module, _REFUSED) is not None:
                refused.append((path, module))
        if refused and not found:
            path, module = refused[0]
            inside = look_up(module, _REFUSED)
            kind = type(module).__name__ + (f" around a {type(getattr(module, inside)).__name__}" if inside else "")
            raise UnsupportedModelError(
                f"the image tower {path or 'itself'} is a {kind}, which vtok cannot patch; supported: {self.supported}"
            )
        return found

    def attach(self, tower: Tower, run: TokenTracker) -> None:
        visual: Any = tower.module
        if (inner := _inner(tower)) is not None:
            adapter, trunk = inner
            return adapter.attach(trunk, run)
        for pool in _token_pools(visual):
            hook = PoolBias(run, "key_padding_mask", drop_prefix=False)
            pool.attn.register_forward_pre_hook(hook, with_kwargs=True)
        visual.conv1.register_forward_hook(ConvStem(run))
        visual._vtok_run = run
        swap_class(visual, OpenClipTower)

    def cost(self, tower: Tower) -> TowerCost:
        visual: Any = tower.module
        if (inner := _inner(tower)) is not None:
            adapter, trunk = inner
            cost = adapter.cost(trunk)
            return replace(cost, head=cost.head + linear_macs(getattr(visual, _names(visual)[1])))
        once, per_token, rows = _pool_macs(visual)
        proj = 0 if visual.proj is None else visual.proj.numel()
        if rows is None:  # no pooling: every token is projected
            per_token += proj
        averages = visual.attn_pool is None and visual.pool_type == "avg"
        return TowerCost(
            tower.grid[0] * tower.grid[1] * position_macs(visual.conv1),
            tuple(block_cost(b) for b in tower.blocks),
            once + proj * (rows or 0),
            per_token,
            weighted_mean=visual.transformer.width if averages else 0,
            unpooled=tower.num_prefix,
        )

    def examples(self) -> Sequence[Example]:
        from vtok.patches.openclip_vit.examples import EXAMPLES

        return EXAMPLES


def _tower(path: str, visual: Any, input_size: tuple[int, int, int] | None) -> Tower:
    own = (visual.conv1.in_channels, *visual.image_size)
    if input_size is not None and tuple(input_size) != own:
        raise UnsupportedModelError(
            f"this {type(visual).__name__} takes images of {own}, got input_size={tuple(input_size)}; open_clip fits the "
            "position embedding when a model is made: open_clip.create_model(..., force_image_size=...)"
        )
    blocks = tuple(_block(i, block) for i, block in enumerate(visual.transformer.resblocks))
    if not blocks:
        raise UnsupportedModelError(f"{type(visual).__name__} has no blocks left to patch")
    return Tower(
        path=path,
        module=visual,
        blocks=blocks,
        num_prefix=1,
        has_cls=True,
        width=visual.transformer.width,
        input_size=own,
        grid=tuple(visual.grid_size),
    )


def _block(index: int, block: Any) -> Block:
    spec = look_up(block, BLOCKS)
    if spec is None:
        raise UnsupportedModelError(
            f"block {index} is a {qualified_name(type(block))}, which vtok cannot patch; known: " + ", ".join(sorted(BLOCKS))
        )
    attend = look_up(block.attn, ATTENTIONS)
    if attend is None:
        raise UnsupportedModelError(
            f"block {index} attends with {qualified_name(type(block.attn))}, which vtok does not know; known: "
            + ", ".join(sorted(ATTENTIONS))
        )
    if getattr(block.attn, "scaled_cosine", False):
        raise UnsupportedModelError(
            f"block {index} uses scaled cosine attention, which open_clip itself cannot run; supported: "
            + OpenClipAdapter.supported
        )
    spec = replace(spec, seq_first=not getattr(block.attn, "batch_first", True))
    return Block(block, spec, attend, own_forward(block, BLOCKS), own_forward(block.attn, ATTENTIONS))


def _names(module: nn.Module) -> tuple[str, str]:
    """(tower, what follows): names of a wrapper's children."""
    names: tuple[str, str] = look_up(module, _WRAPPERS) or ("", "")
    return names


def _wrapped(module: nn.Module, input_size: tuple[int, int, int] | None) -> tuple[Adapter, Tower] | None:
    """The tower inside a wrapper with the adapter that knows it."""
    trunk = getattr(module, _names(module)[0])
    towers = ((adapter, tower) for _, adapter in find_adapters(trunk) for tower in adapter.towers(trunk, input_size))
    return next((found for found in towers if found[1].module is trunk), None)


def _inner(tower: Tower) -> tuple[Adapter, Tower] | None:
    return _wrapped(tower.module, tower.input_size) if look_up(tower.module, _WRAPPERS) else None


def _token_pools(visual: Any) -> list[Any]:
    """Attention pools that look at tokens; the second of two in cascade looks at the first one's queries."""
    pools = [visual.attn_pool] if visual.attn_pool is not None else []
    if pools and visual.attn_pool_contrastive is not None and visual.attn_pool_type == "parallel":
        pools.append(visual.attn_pool_contrastive)
    return pools


def _pool_macs(visual: Any) -> tuple[int, int, int | None]:
    """MACs of the pools (fixed, per token), and how many rows are projected in the end, `None` = all tokens."""
    if visual.attn_pool is None:
        return 0, 0, None if visual.pool_type == "none" else 1
    once = per_token = 0
    for pool in _token_pools(visual):
        fixed, each = _query_macs(pool)
        once, per_token = once + fixed, per_token + each
    if visual.attn_pool_contrastive is None:
        return once, per_token, len(visual.attn_pool.query) if visual.pool_type == "none" else 1
    if visual.attn_pool_type == "cascade":
        fixed, each = _query_macs(visual.attn_pool_contrastive)
        once += fixed + each * len(visual.attn_pool.query)
    return once, per_token, len(visual.attn_pool_contrastive.query)


def _query_macs(pool: Any) -> tuple[int, int]:
    """MACs of an `AttentionalPooler` (fixed, per token that it looks at)."""
    queries, width = pool.query.shape
    keys_and_values = width * (pool.attn.kdim + pool.attn.vdim)
    return 2 * queries * width * width, keys_and_values + 2 * queries * width
