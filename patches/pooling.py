"""What comes after the blocks must know how many patches a token stands for, and which rows are padding.

Shapes: B batch, N tokens after the last block, P prefix tokens, C width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.tokens import TokenState, at_least_fp32, log_size_bias
from vtok.core.tracker import TokenTracker
from vtok.errors import StateError
from vtok.patches.module_swap import Hook, Mixin

_OFF_GRID = (
    "tokens were reduced, so intermediate outputs no longer fill the patch grid. Ask for output_fmt='NLC'; to get the last "
    "block's tokens back in place, patch with trace=True and call vtok.unmerge on them"
)


class PoolBias(Hook):
    """Forward pre-hook of an attention pool: adds log(size), and -inf on padding, to its logits.

    Args:
        run: of the tower.
        parameter: under which the pool takes an additive [B, 1, 1, N] mask; "key_padding_mask" takes one of [B, N].
        drop_prefix: whether the pool sees the patches alone.
    """

    def __init__(self, run: TokenTracker, parameter: str, drop_prefix: bool):
        self.run, self.parameter, self.drop_prefix = run, parameter, drop_prefix

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        state = self.run.current.final
        bias = None if state is None else log_size_bias(state, args[0].dtype)
        if bias is None or state is None:
            return None
        if self.drop_prefix:
            bias = bias[..., state.num_prefix :]
        return args, {**kwargs, self.parameter: bias[:, 0, 0] if self.parameter == "key_padding_mask" else bias}


def weighted_mean(x: Tensor, state: TokenState, first: int) -> Tensor:
    """Mean of the tokens from row `first` on, each counted as often as it has members: [B, N, C] -> [B, C]."""
    weight = state.size if state.size is not None else at_least_fp32(x.new_ones(x.shape[:2]))
    if state.keep is not None:
        weight = weight * state.keep
    weight = weight[:, first:]
    weight = weight / weight.sum(1, keepdim=True)
    return (weight[:, None] @ at_least_fp32(x[:, first:])).squeeze(1).to(x.dtype)


def real_max(x: Tensor, state: TokenState, first: int) -> Tensor:
    """Maximum over the tokens from row `first` on, padding left out: [B, N, C] -> [B, C]."""
    if state.keep is not None:
        x = x.masked_fill(~state.keep[..., None], float("-inf"))
    return x[:, first:].amax(1)


def pool(x: Tensor, state: TokenState, kind: str, first: int) -> Tensor:
    """timm's "avg", "max" and "avgmax" pooling over tokens that stand for several patches."""
    if kind == "avg":
        return weighted_mean(x, state, first)
    if kind == "max":
        return real_max(x, state, first)
    return 0.5 * (real_max(x, state, first) + weighted_mean(x, state, first))


def plain(state: TokenState) -> bool:
    """Whether every row is one real patch, so that upstream's pooling is right as it is."""
    return state.size is None and state.keep is None


class DenseOutputs(Mixin):
    """Mixin for towers with `forward_intermediates`: feature maps that reduced tokens cannot fill are refused."""

    _vtok_run: TokenTracker

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        upstream: Any = super()
        if torch.compiler.is_compiling():
            return upstream.forward_intermediates(*args, **kwargs)
        call = inspect.signature(upstream.forward_intermediates).bind(*args, **kwargs)
        call.apply_defaults()
        grid, indices = call.arguments["output_fmt"] != "NLC", call.arguments["indices"]
        try:
            out = upstream.forward_intermediates(*args, **kwargs)
        except RuntimeError as error:
            if not grid or not self._off_grid(indices):
                raise
            raise StateError(_OFF_GRID) from error
        self._vtok_left(out)
        if grid and self._off_grid(indices):  # numbers that happen to divide would fill a grid with nonsense
            raise StateError(_OFF_GRID)
        return out

    def _vtok_left(self, out: Any) -> Any:
        """Notes whose tokens these are, for a head that is called later."""
        tokens = out[0] if isinstance(out, tuple) else out
        if isinstance(tokens, Tensor):
            self._vtok_run.remember(tokens, self._vtok_run.current, self._vtok_run.current.final)
        return out

    def _off_grid(self, indices: Any) -> bool:
        """Whether what leaves the last of the wanted blocks (`indices`) is no longer the patch grid, row by row."""
        run = self._vtok_run
        last = run.depth - 1 if indices is None or isinstance(indices, int) else max(i % run.depth for i in indices)
        state = run.current.states[last + 1]
        return state is not None and state.index is not None


class PatchedTrunk(DenseOutputs):
    """Mixin for timm trunks: average and maximum pooling over reduced tokens."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        upstream: Any = super()
        return self._vtok_left(upstream.forward_features(*args, **kwargs))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        upstream: Any = super()
        return self._pool_reduced(x, upstream.pool, pool_type)

    def _pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
        upstream: Any = super()
        return self._pool_reduced(x, upstream._pool, pool_type)

    def _pool_reduced(self, x: Tensor, upstream: Any, pool_type: str | None) -> Tensor:
        state = self._vtok_run.state_of(x)
        kind: Any = self.global_pool if pool_type is None else pool_type
        attends = getattr(self, "attn_pool", None) is not None
        if state is None or plain(state) or attends or kind not in ("avg", "max", "avgmax"):
            return upstream(x, pool_type)
        return pool(x, state, kind, 0 if getattr(self, "pool_include_prefix", False) else state.num_prefix)


class HeadPooledTrunk(PatchedTrunk):
    """Mixin for trunks that average the patches inside `forward_head` (BEiT)."""

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self._vtok_run.state_of(x)
        upstream: Any = super()
        if state is not None and not plain(state) and self.global_pool == "avg":
            mean = weighted_mean(x, state, state.num_prefix)  # handed on as the one patch, whose plain mean it is
            x = torch.cat([x[:, : state.num_prefix], mean[:, None]], 1)
        return upstream.forward_head(x, *args, **kwargs)
