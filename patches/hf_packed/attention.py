"""Attention of packed vision towers, called by its parts: within rows, or within windows of them, with the sizes of units.

Shapes: N patches of the sequence, S rows, W windows, M units of a window, U units of the longest row, m patches of a unit,
H heads, D head dim, C width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.tokens import TokenState, log_size_bias
from vtok.patches.hf_packed.units import Run, Windows, both_runs, counts_of, places, real, to_rows, to_sequence, windows
from vtok.patches.module_swap import own_class
from vtok.patches.protocol import Attend, Projected


class PackedAttention(Attend):
    """`qkv`, rotary positions, a kernel for every segment, `proj`: a "token" here is a unit of m patches.

    A method sees queries, keys and values of a unit's patches side by side (`AttentionView.parts`).
    """

    late: ClassVar[tuple[str, ...]] = ("proj",)

    def unit(self, attn: Any) -> int:
        """Patches of a unit, m."""
        return attn.config.spatial_merge_size**2

    def window(self, attn: Any) -> int:
        """Units of a whole window, M; 0 = the tower has none."""
        side = getattr(attn.config, "window_size", 0) // attn.config.spatial_merge_size // attn.config.patch_size
        return side * side

    def heads(self, attn: Any) -> tuple[int, int]:
        """(H, m D): width of what a method sees of a unit."""
        return attn.num_heads, self.unit(attn) * attn.head_dim

    def scale(self, attn: Any) -> float:
        return attn.scaling

    def dropout(self, attn: Any) -> float:
        return attn.attention_dropout

    def pair_macs(self, attn: Any) -> int:
        """Of a pair of units."""
        return 2 * self.unit(attn) ** 2 * attn.num_heads * attn.head_dim

    def project(self, attn: Any, h: Tensor, rope: Any) -> Projected:
        """h [N, C] -> four of [N, H, D]."""
        q, k, v = attn.qkv(h).unflatten(1, (3, attn.num_heads, -1)).unbind(1)
        turn = sys.modules[own_class(attn).__module__].apply_rotary_pos_emb_vision
        turned, k_rot = turn(q, k, *rope)
        return Projected(turned, k, k_rot, v)

    def side_by_side(self, attn: Any, t: Tensor, counts: Sequence[int]) -> Tensor:
        """Of patches [N, H, D] -> of units [S, H, U, m D]."""
        return to_rows(t.unflatten(0, (-1, self.unit(attn))), counts).permute(0, 3, 1, 2, 4).flatten(3)


def attended(
    attend: PackedAttention,
    attn: Any,
    p: Projected,
    seen: TokenState,
    asking: TokenState,
    ends: Tensor,
    sizes: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Attention within segments: [queries, C].

    Args:
        attend: of the module.
        attn: the module.
        p: queries, keys and values [patches, H, D].
        seen: of the units whose keys and values these are.
        asking: of the units whose queries these are: the same, or those that are left of them.
        ends: where the segments of this block end among the units that entered the first block; as many as rows = the rows.
        sizes: whether attention sees the sizes of units.
        dtype: of the attention.
    """
    m, device = attend.unit(attn), p.q.device
    kept, counts = counts_of(asking), counts_of(seen)
    bias = log_size_bias(seen if seen.counts is None else seen._replace(keep=None), dtype, sizes)  # [S, 1, 1, U]
    drop = attend.dropout(attn) if attn.training else 0.0
    if len(ends) != len(counts):
        slots = windows(places(seen, device), ends, attend.window(attn), real(seen))
        own = slots if asking is seen else windows(places(asking, device), ends, attend.window(attn), real(asking))
        return _in_windows(p, slots, own, None if bias is None else to_sequence(bias[:, 0, 0], counts), m, attn.scaling, drop)
    parts = []
    for keys, queries in both_runs(counts, kept):
        q, k, v = (_segments(t, run, m) for t, run in ((p.q, queries), (p.k_rot, keys), (p.v, keys)))
        mask = None
        if bias is not None:
            mask = bias[keys.first : keys.first + keys.rows, :, :, : keys.length].repeat_interleave(m, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=attn.scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _segments(t: Tensor, run: Run, m: int) -> Tensor:
    """[patches, H, D] -> [rows, H, patches of each, D] of equally long rows."""
    here = t[run.start * m : (run.start + run.rows * run.length) * m]
    return here.unflatten(0, (run.rows, run.length * m)).transpose(1, 2)


def _in_windows(p: Projected, slots: Windows, own: Windows, bias: Tensor | None, m: int, scale: float, drop: float) -> Tensor:
    """Attention within windows whose units may have left: their slots stay empty, and hide from the others. bias [units]."""
    places = ((p.q, own), (p.k_rot, slots), (p.v, slots))
    q, k, v = (where.spread(t.unflatten(0, (-1, m))).flatten(1, 2).transpose(1, 2) for t, where in places)
    shown = p.q.new_zeros(len(slots.slot)) if bias is None else bias
    mask = slots.spread(shown, torch.finfo(shown.dtype).min).repeat_interleave(m, 1)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    return own.collect(out.transpose(1, 2).flatten(2).unflatten(1, (-1, m))).flatten(0, 1)


def unit_bias(state: TokenState, ends: Tensor, dtype: torch.dtype, sizes: bool) -> Tensor | None:
    """What attention adds to the logits of units, as methods see it: [S, 1, 1 or U, U]; `None` = nothing.

    Args:
        state: of the units.
        ends: see `attended`.
        dtype: of the attention.
        sizes: whether it sees sizes.
    """
    bias, counts = log_size_bias(state, dtype, sizes), counts_of(state)
    if len(ends) == len(counts):
        return bias
    window = to_rows(torch.searchsorted(ends, places(state, ends.device), right=True), counts)
    apart = window[:, :, None] != window[:, None]
    if state.keep is not None:
        apart = apart & state.keep[:, :, None]  # no row may be without a key
    bias = torch.zeros((), dtype=dtype, device=ends.device) if bias is None else bias
    return bias.expand(len(counts), 1, 1, window.shape[1]).masked_fill(apart[:, None], float("-inf"))
