"""Images that came padded to one length: whose rows are padding, and plans that leave padding out.

A method sees images of one length at a time, without their padding, so it decides for an image what it would decide for that
image alone; nothing real is ever folded into padding or the other way round. That needs to know how many real tokens an image
has: one host synchronisation a block, for padded input only.

Shapes: B batch, N tokens in, M tokens out, R folded rows, n real tokens of an image, G images that have n.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.config import Reducer
from vtok.ops.rows import take_rows
from vtok.reduction import Plan
from vtok.state import AttentionView, Site, TokenState


def key_padding(mask: Tensor | None, n: int) -> Tensor | None:
    """Rows that are real, if an attention mask says that some are not and says nothing else.

    Args:
        mask: [B, N], [B, 1, N, N] or [B, 1, 1, N]; bool or integer (nonzero = attend), or additive (0 = attend).
        n: number of tokens, N.

    Returns:
        [B, N] bool, False = padding; `None` if there is no mask, no padding, or a mask that is more than padding.
    """
    if mask is None or mask.shape[-1] != n or mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        return None
    if mask.ndim == 2 or not mask.is_floating_point():
        sees, clear = mask.bool(), torch.ones((), dtype=torch.bool, device=mask.device)
    else:
        sees = mask == 0
        clear = (sees | (mask <= torch.finfo(mask.dtype).min / 2)).all()  # a bias is no padding
    rows = sees if mask.ndim == 2 else sees[:, 0, 0]
    alike = (sees == (rows if mask.ndim == 2 else rows[:, None, None])).all()
    if torch.compiler.is_compiling():  # no value can be asked for: an encoder's mask is then taken to be padding
        return rows
    return rows if bool(clear & alike & ~rows.all()) else None


class _Part(NamedTuple):
    """The plan of the images `who` [G], which have `n` real tokens each: rows are those of the padded sequence."""

    who: Tensor
    plan: Plan


def plan_without_padding(
    reducer: Reducer, x: Tensor, state: TokenState, view: AttentionView, at: Site, spare: bool = False
) -> Plan | None:
    """What a method decides for every image as if it were not padded.

    Args:
        reducer: the method; its plans may leave no padding of their own.
        x: [B, N, C].
        state: of these tokens, with `keep`.
        view: of the block.
        at: where.
        spare: keep one row of padding at the end, which what follows the tower gives to all patches that are padding.

    Returns:
        A plan for the padded batch: real tokens first in every image, then padding; `None` if nothing changes.
    """
    assert state.keep is not None
    real = torch.ones_like(state.keep) if state.real is None else state.real
    images: dict[tuple[int, int], list[int]] = defaultdict(list)
    for image, lengths in enumerate(torch.stack([state.keep.sum(1), real.sum(1)], 1).tolist()):  # the one host synchronisation
        images[lengths[0], lengths[1]].append(image)
    order = state.keep.logical_not().long().argsort(dim=1, stable=True)  # real rows first
    parts, changes = [], False
    for (n, n0), members in images.items():
        who = torch.tensor(members, device=x.device)
        rows = order[who, :n]
        alone = _real_state(state, who, rows, n0 if state.real is not None else state.length)
        plan = reducer.plan(take_rows(x[who], rows), alone, _real_view(view, who, rows), at)
        changes = changes or plan is not None
        if plan is None:
            plan = Plan(torch.arange(n, device=x.device).expand(len(members), n))
        src = None if plan.src is None else rows.gather(1, plan.src)
        parts.append(_Part(who, plan._replace(keep=rows.gather(1, plan.keep), src=src)))
    return _joined(parts, order, spare) if changes else None


def _real_state(state: TokenState, who: Tensor, rows: Tensor, length: int) -> TokenState:
    index = rows if state.index is None else state.index[who].gather(1, rows)
    if state.real is not None:  # where the tokens would be had the image come without padding
        index = (state.real[who].cumsum(1) - 1).gather(1, index)
    size = None if state.size is None else state.size[who].gather(1, rows)
    return TokenState(state.num_prefix, length, index, size)


def _real_view(view: AttentionView, who: Tensor, rows: Tensor) -> AttentionView:
    def real(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[who].gather(2, rows[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

    bias = view.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        bias = (bias[who] if bias.shape[0] > 1 else bias.expand(len(who), -1, -1, -1)).transpose(2, 3)
        bias = bias.gather(2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])).transpose(2, 3)
        if bias.shape[2] > 1:  # one row a query
            bias = bias.gather(2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
    return AttentionView(real(view.q), real(view.k), real(view.k_rot), real(view.v), view.scale, bias)


def _joined(parts: list[_Part], order: Tensor, spare: bool) -> Plan:
    """One plan for the batch; shorter images are filled up with rows that are marked as padding and folds that go nowhere."""
    batch = len(order)
    longest = max(p.plan.keep.shape[1] for p in parts) + spare
    most = max(0 if p.plan.src is None else p.plan.src.shape[1] for p in parts)
    keep = order[:, -1:].repeat(1, longest)
    valid = torch.zeros_like(keep, dtype=torch.bool)
    src, dst = order[:, -1:].repeat(1, most), torch.zeros_like(order[:, :1]).repeat(1, most)
    folds, weight = torch.zeros_like(src, dtype=torch.bool), None
    for who, plan in parts:
        keep[who, : plan.keep.shape[1]] = plan.keep
        valid[who, : plan.keep.shape[1]] = True
        if plan.src is None or plan.dst is None:
            continue
        r = plan.src.shape[1]
        src[who, :r], dst[who, :r], folds[who, :r] = plan.src, plan.dst, True
        if plan.weight is not None:
            weight = plan.weight.new_zeros(batch, most) if weight is None else weight
            weight[who, :r] = plan.weight
    if most == 0:
        return Plan(keep, valid=valid)
    use_size = all(p.plan.use_size for p in parts if p.plan.src is not None)
    return Plan(keep, src, dst, weight, valid, use_size, folds)
