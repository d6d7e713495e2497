"""The patched block of a packed vision tower: upstream's own code until something has left, and where nothing happens.

Shapes: N patches of the sequence, S rows, U units of the longest row, m patches of a unit, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok.core.tokens import AttentionView, Place, TokenState
from vtok.errors import StateError
from vtok.patches.block import ReducingBlock, chain
from vtok.patches.hf_packed.attention import PackedAttention, attended
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
        state = run.enter(link.index, x, self.training).on(x.device)
        if state.entered is None:
            raise StateError(
                f"a {type(self).__name__} of a patched vision tower was called by itself: which patches are one image is known "
                "where the tower is called"
            )
        if link.site is None and state.untouched:
            out = super(ReducingBlock, self).forward(x, cu_seqlens, position_embeddings, **kwargs)
        else:
            out, state = self._packed(x, state, cu_seqlens, position_embeddings)
        run.leave(link.index, state, out)
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
        x = x + chain(self, spec.post1, attn.proj(attended(attend, attn, p, state, ends, link.run.prop_attn, dtype)))
        place = None if link.site is None else link.site.place
        if place is Place.BLOCK_MID:
            x, state = self._reduced(x, state, p, m)
        x = x + chain(self, spec.post2, getattr(self, spec.mlp)(chain(self, spec.pre2, x)))
        if place is Place.BLOCK_END:
            x, state = self._reduced(x, state, p, m)
        return x, state

    def _reduced(self, x: Tensor, state: TokenState, p: Projected, m: int) -> tuple[Tensor, TokenState]:
        """The sequence [N, C] without the units that leave or merge here."""
        link, counts = self._vtok, counts_of(state)
        attend: Any = link.attend
        attn = link.spec.attention(self)
        keys = None
        if "k" in link.needs:
            keys = attend.keys(attn, to_rows(p.k.detach().unflatten(0, (-1, m)), counts))
        rows = to_rows(x.unflatten(0, (-1, m)).flatten(1), counts)
        view = AttentionView(None, keys, keys, None, attend.scale(attn), None)
        plan = link.decide(rows, state, view)
        if plan is None:
            return x, state
        rows, state = link.move(rows, state, plan)
        return to_sequence(rows, counts_of(state)).unflatten(1, (m, -1)).flatten(0, 1), state
