"""Helpers to call an attention module from outside: catching q, k and v, and attending with some of the queries.

Shapes: B batch, N tokens, M kept query rows, H heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.core.tokens import AttentionView, Rope, add_bias
from vtok.core.tracker import TokenTracker
from vtok.errors import StateError
from vtok.ops.rows import take_rows
from vtok.patches.module_swap import Hook
from vtok.patches.protocol import Attend, Projected, TapSpec


class Tap(Hook):
    """Forward hook that keeps a child's output until the block has used it."""

    def __init__(self, run: TokenTracker, name: str):
        self.run, self.name = run, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.run.taps[self.name] = output


def place_taps(attend: Attend, attn: nn.Module, run: TokenTracker, needs: frozenset[str]) -> None:
    """Registers the hooks through which a reducing block sees what its method needs."""
    for name in sorted(needs):
        getattr(attn, attend.taps[name].child).register_forward_hook(Tap(run, name))


def _heads_first(t: Tensor, attend: Attend, tap: TapSpec, attn: nn.Module) -> Tensor:
    """What a tap caught -> [B, H, N, D]."""
    if tap.part is not None:
        t = t[..., tap.part(attn)]
    if tap.layout == "bn(hd)":
        return t.unflatten(-1, (-1, attend.heads(attn)[1])).transpose(1, 2)
    return t.transpose(1, 2) if tap.layout == "bnhd" else t


def tapped_view(
    attend: Attend, attn: nn.Module, run: TokenTracker, bias: Tensor | None, rope: Rope | None, needs: frozenset[str]
) -> AttentionView:
    """The view of a block whose attention ran by itself, from what the hooks caught.

    Raises:
        StateError: a layer that is looked at was replaced, and the hook went with the old one; or it did not run.
    """
    taps = run.taps
    if not torch.compiler.is_compiling():
        _check_taps(attend, attn, needs)
        if missed := sorted({attend.taps[name].child for name in needs if name not in taps}):
            raise StateError(
                f"the forward of this {type(attn).__name__} does not call its {' and '.join(missed)}, which the method looks "
                "at; let it call them, or choose a method that does not look at attention, such as random"
            )
    q, k, v = (_heads_first(taps.pop(n), attend, attend.taps[n], attn) if n in taps else None for n in ("q", "k", "v"))
    k_rot = k
    if q is not None and rope is not None:  # taps lie before the rotation; probabilities need it after
        q = attend.rotate(attn, q, rope)
        k_rot = None if k is None else attend.rotate(attn, k, rope)
    return AttentionView(q, k, k_rot, v, attend.scale(attn), _added(bias, q))


def _added(bias: Tensor | None, q: Tensor | None) -> Tensor | None:
    """A mask as it is added to logits, four axes of it: methods that look at queries need not know the forms it may have."""
    if bias is None or q is None:
        return bias
    bias = bias[(None,) * (4 - bias.ndim)]
    return add_bias(bias, q.new_zeros(())) if bias.dtype == torch.bool else bias


def _check_taps(attend: Attend, attn: nn.Module, needs: frozenset[str]) -> None:
    """A layer that was wrapped still calls the old one, whose hook sees what it makes: without what the wrapper adds."""
    for name in needs:
        child = attend.taps[name].child
        if not any(isinstance(hook, Tap) for hook in getattr(attn, child)._forward_hooks.values()):
            raise StateError(
                f"{child} of a {type(attn).__name__} was replaced after vtok patched the model, which goes on looking at the "
                "old layer. Apply PEFT first, then vtok; or unpatch, change the model, and patch again"
            )


def projected_view(attend: Attend, attn: nn.Module, p: Projected, bias: Tensor | None) -> AttentionView:
    """The view of a block that is computed step by step."""
    return AttentionView(p.q, p.k, p.k_rot, p.v, attend.scale(attn), _added(bias, p.q))


def sdpa(attend: Attend, attn: nn.Module, p: Projected, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """Fused attention of all queries, or of the rows [B, M] of every image, over all keys: [B, N or M, H D]."""
    q, k, v = p.q, p.k_rot, p.v
    if rows is not None:
        heads = q.shape[1]  # side by side as in a row of tokens, of which whole rows are taken
        q = take_rows(q.transpose(1, 2).flatten(2), rows).unflatten(2, (heads, -1)).transpose(1, 2)
        if bias is not None and bias.shape[-2] > 1:  # one row of bias a query
            bias = bias[(None,) * (4 - bias.ndim)]
            bias = bias.expand(rows.shape[0], *bias.shape[1:])
            bias = bias.gather(2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
    if k.shape[1] != q.shape[1]:  # grouped-query attention
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    p_drop = attend.dropout(attn) if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p_drop, scale=attend.scale(attn))
    return out.transpose(1, 2).flatten(2)
