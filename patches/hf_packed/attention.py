"""Attention of packed vision towers, called by its parts: within rows, or within windows of them, with the sizes of units.

Shapes: N patches of the sequence, S rows, W windows, M units of a window, U units of the longest row, m patches of a unit,
H heads, D head dim, C width.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.tokens import TokenState, log_size_bias
from vtok.patches.hf_packed.units import Windows, counts_of, places, real, runs, to_sequence, windows
from vtok.patches.module_swap import own_class
from vtok.patches.protocol import Attend, Projected, TapSpec


class PackedAttention(Attend):
    """`qkv`, rotary positions, a kernel for every segment, `proj`: a "token" here is a unit of m patches.

    A method sees the keys of a unit's patches side by side; what looks at queries is refused: it needs one probability for a
    pair of tokens, and a pair of units has m x m.
    """

    taps: ClassVar[dict[str, TapSpec]] = {"k": TapSpec("qkv")}
    splits: ClassVar[bool] = False
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

    def keys(self, attn: Any, k: Tensor) -> Tensor:
        """[S, U, m, H, D] -> [S, H, U, m D]."""
        return k.permute(0, 3, 1, 2, 4).flatten(3)


def attended(
    attend: PackedAttention, attn: Any, p: Projected, state: TokenState, ends: Tensor, sizes: bool, dtype: torch.dtype
) -> Tensor:
    """Attention within segments: [N, C].

    Args:
        attend: of the module.
        attn: the module.
        p: queries, keys and values [N, H, D].
        state: of the units.
        ends: where the segments of this block end among the units that entered the first block; as many as rows = the rows.
        sizes: whether attention sees the sizes of units.
        dtype: of the attention.
    """
    counts, m = counts_of(state), attend.unit(attn)
    bias = log_size_bias(state if state.counts is None else state._replace(keep=None), dtype, sizes)  # [S, 1, 1, U]
    drop = attend.dropout(attn) if attn.training else 0.0
    if len(ends) != len(counts):
        inside = windows(places(state, p.q.device), ends, attend.window(attn), real(state))
        return _in_windows(p, inside, None if bias is None else to_sequence(bias[:, 0, 0], counts), m, attend.scale(attn), drop)
    parts = []
    for run in runs(counts):
        here = slice(run.start * m, (run.start + run.rows * run.length) * m)
        q, k, v = (t[here].unflatten(0, (run.rows, run.length * m)).transpose(1, 2) for t in (p.q, p.k_rot, p.v))
        mask = None
        if bias is not None:
            mask = bias[run.first : run.first + run.rows, :, :, : run.length].repeat_interleave(m, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=attend.scale(attn))
        parts.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_windows(p: Projected, inside: Windows, bias: Tensor | None, m: int, scale: float, drop: float) -> Tensor:
    """Attention within windows whose units may have left: their slots stay empty, and hide from the others. bias [units]."""
    q, k, v = (inside.spread(t.unflatten(0, (-1, m))).flatten(1, 2).transpose(1, 2) for t in (p.q, p.k_rot, p.v))
    shown = p.q.new_zeros(len(inside.slot)) if bias is None else bias
    mask = inside.spread(shown, torch.finfo(shown.dtype).min).repeat_interleave(m, 1)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    return inside.collect(out.transpose(1, 2).flatten(2).unflatten(1, (-1, m))).flatten(0, 1)
