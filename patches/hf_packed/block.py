"""The patched block of a packed vision tower: upstream's own code until something has left, and where nothing happens.

Shapes: N patches of the sequence, S rows, U units of the longest row, m patches of a unit, C width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vtok.core.tokens import AttentionView, Place, TokenState
from vtok.errors import StateError
from vtok.ops.rows import take_rows
from vtok.patches.block import ReducingBlock, chain
from vtok.patches.hf_packed.attention import PackedAttention, attended, unit_bias
from vtok.patches.hf_packed.units import counts_of, places, to_rows, to_sequence
from vtok.patches.precision import autocasts
from vtok.patches.protocol import Projected


class PackedBlock(ReducingBlock):
    """Mixin put in front of a block's own class, on one instance.

    What moves, merges or leaves is a unit: all patches that the merger makes one visual token of. Two units merge patch by
    patch, the upper left of one with the upper left of the other; the merged one stands where the unit stood that it was
    merged into, with the rotary positions of that unit, and in blocks that attend within windows it attends in its window.
    """

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        link, x = self._vtok, hidden_states
        run = link.run
        done, state = run.enter(link.index, x, self.training)
        state = state.on(x.device)
        if state.entered is None:
            raise StateError(
                f"a {type(self).__name__} of a patched vision tower was called by itself: which patches are one image is known "
                "where the tower is called"
            )
        if link.site is None and state.untouched:
            out = super(ReducingBlock, self).forward(x, cu_seqlens, position_embeddings, **kwargs)
        else:
            out, state = self._packed(x, state, cu_seqlens, position_embeddings)
        run.leave(done, link.index, state, out)
        return out

    def _packed(self, x: Tensor, state: TokenState, borders: Tensor, rope: Any) -> tuple[Tensor, TokenState]:
        link, spec = self._vtok, self._vtok.spec
        attn: Any = spec.attention(self)
        attend: Any = link.attend
        assert isinstance(attend, PackedAttention)
        m, device = attend.unit(attn), x.device.type
        if state.index is not None:
            here = places(state, x.device)
            rope = tuple(t.unflatten(0, (-1, m)).index_select(0, here).flatten(0, 1) for t in rope)
        p = attend.project(attn, chain(self, spec.pre1, x), rope)
        ends = torch.div(borders[1:], m, rounding_mode="floor").long()
        dtype = torch.get_autocast_dtype(device) if autocasts(device) else p.q.dtype
        place = None if link.site is None else link.site.place
        view = None if place is None else self._view(p, state, ends, dtype)
        asking = state
        if place is Place.BLOCK_PRE:  # units that go attend no more, but still serve as keys and values
            x, asking, q = self._reduced(x, state, view, m, p.q)
            p = p._replace(q=q)
        out = attended(attend, attn, p, state, asking, ends, link.run.prop_attn, dtype)
        x, state = x + chain(self, spec.post1, attn.proj(out)), asking
        if place is Place.BLOCK_MID:
            x, state, _ = self._reduced(x, state, view, m)
        x = x + chain(self, spec.post2, getattr(self, spec.mlp)(chain(self, spec.pre2, x)))
        if place is Place.BLOCK_END:
            x, state, _ = self._reduced(x, state, view, m)
        return x, state

    def _view(self, p: Projected, state: TokenState, ends: Tensor, dtype: torch.dtype) -> AttentionView:
        """What the method asked for, of units."""
        link, counts = self._vtok, counts_of(state)
        attn, attend, needs = link.spec.attention(self), cast(PackedAttention, link.attend), link.needs
        q, k, k_rot, v = (
            attend.side_by_side(attn, t.detach(), counts) if name in needs else None for name, t in zip(("q", "k", "k", "v"), p)
        )
        k_rot = k_rot if "q" in needs else k
        bias = unit_bias(state, ends, dtype, link.run.prop_attn) if "q" in needs else None
        return AttentionView(q, k, k_rot, v, attend.scale(attn), bias, attend.unit(attn))

    def _reduced(
        self, x: Tensor, state: TokenState, view: AttentionView | None, m: int, q: Tensor | None = None
    ) -> tuple[Tensor, TokenState, Any]:
        """The sequence [N, C] without the units that leave or merge here, its state, and the queries [N, H, D] of the rest."""
        link, counts = self._vtok, counts_of(state)
        assert view is not None
        rows = to_rows(x.unflatten(0, (-1, m)).flatten(1), counts)
        plan = link.decide(rows, state, view)
        if plan is None:
            return x, state, q
        rows, left = link.move(rows, state, plan)
        after = counts_of(left)
        if q is not None:
            asked = take_rows(to_rows(q.unflatten(0, (-1, m)).flatten(1), counts), plan.keep)
            q = to_sequence(asked, after).unflatten(1, (m, *q.shape[1:])).flatten(0, 1)
        return to_sequence(rows, after).unflatten(1, (m, -1)).flatten(0, 1), left, q
