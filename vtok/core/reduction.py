"""A `Plan` says which tokens stay and which are folded into them; `apply_plan` is the only code that moves tokens.

Shapes: B batch, N tokens in, M tokens out, R tokens folded away, C width, N0 tokens that entered block 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.core.tokens import TokenState, at_least_fp32
from vtok.errors import StateError
from vtok.ops.rows import flat_rows, take_rows


class Plan(NamedTuple):
    """What happens to N tokens. Pruning has no `src`.

    Attributes:
        keep: [B, M] int64, the rows that stay, in output order: prefix first, the rest in the order the method defines.
        src: [B, R] int64, input rows that are folded away; `None` = none.
        dst: [B, R] int64, output row (0 .. M-1) that each `src` row is folded into.
        weight: [B, R], weight of each `src` row in the mean; `None` = its size. Kept rows weigh their size.
        valid: [B, M] bool, False = padding row; `None` = all real.
        use_size: False makes plain means: every row weighs one and no sizes are recorded.
        folds: [B, R] bool, False = this `src` row fills up an image that folds fewer, and goes nowhere; `None` = all real.
        near: [B, M, K] int64, input rows that every kept row takes in on top of itself, undivided; `None` = none.
        near_weight: [B, M, K], weight of each of them; 0 = it is not taken in.
        remake: makes what the kept rows become [B, M, C] of the N tokens [B, N, C], for methods that do it in another way than
            the above, which is then left out; `None` = it follows from the above.
        counts: real rows of every image, where the host knows them and they come first; `None` = ask `valid`.
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    weight: Tensor | None = None
    valid: Tensor | None = None
    use_size: bool = True
    folds: Tensor | None = None
    near: Tensor | None = None
    near_weight: Tensor | None = None
    remake: Callable[[Tensor], Tensor] | None = None
    counts: tuple[int, ...] | None = None

    @property
    def changes(self) -> bool:
        """Whether kept rows become something else than copies."""
        return self.src is not None or self.near is not None or self.remake is not None


class Fold(NamedTuple):
    """Which tokens stay in front of a layer of an LLM, where some of those that leave go on inside ones that stay.

    Attributes:
        keep: [B, L] bool.
        into: [B, L] int64, the place (0 .. L-1) of a token that stays, whose hidden state becomes the plain mean of all tokens
            that name it, itself being one of them unless it names another place, to which it moves; -1 = not folded.
    """

    keep: Tensor
    into: Tensor


def folded(x: Tensor, into: Tensor) -> Tensor:
    """[B, L, D]: x [B, L, D] with every token that others are folded into replaced by the mean, taken in at least fp32."""
    named = into >= 0
    place = into.clamp_min(0)
    wide = at_least_fp32(x)
    count = torch.zeros_like(into).scatter_add(1, place, named.long())
    total = torch.zeros_like(wide).scatter_add(1, place[..., None].expand_as(wide), wide * named[..., None])
    return torch.where((count > 0)[..., None], (total / count.clamp_min(1)[..., None]).to(x.dtype), x)


def apply_plan(x: Tensor, state: TokenState, plan: Plan) -> tuple[Tensor, TokenState]:
    """Moves the tokens and everything known about them.

    A destination becomes the weighted mean of itself and its sources, written as `x_d + sum_s w_s / W * (x_s - x_d)`, W the
    total weight: rows that nothing is folded into are copied untouched, and only R rows are computed. Means are taken in at
    least fp32 and cast back.

    Args:
        x: [B, N, C].
        state: of these N tokens.
        plan: made for them.

    Returns:
        (x [B, M, C], state of the M tokens).
    """
    size = state.size
    if plan.remake is not None:
        out = plan.remake(x).to(x.dtype)
        size = None if size is None else size.gather(1, plan.keep)
    elif plan.src is None:
        out = take_rows(x, plan.keep) if plan.near is None else _taken_in(x, plan)
        size = None if size is None else size.gather(1, plan.keep)
    else:
        out, size = _fold(x, size if plan.use_size else None, plan)
    index = plan.keep if state.index is None else state.index.gather(1, plan.keep)
    keep = plan.valid
    if keep is None and state.keep is not None:
        keep = state.keep.gather(1, plan.keep)
    group = None if state.group is None else _follow(state.group, plan, x.shape[1])
    return out, state._replace(index=index, size=size, keep=keep, group=group, counts=plan.counts)


def _fold(x: Tensor, size: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    assert plan.src is not None and plan.dst is not None
    out = at_least_fp32(take_rows(x, plan.keep))
    if size is None:
        stay, go = out.new_ones(plan.keep.shape), out.new_ones(plan.src.shape)
    else:
        stay, go = size.gather(1, plan.keep), size.gather(1, plan.src)
    weight = go if plan.weight is None else plan.weight.to(go.dtype)
    if plan.folds is not None:
        go, weight = go * plan.folds, weight * plan.folds
    size = stay.scatter_add(1, plan.dst, go)
    total = size if plan.weight is None else stay.scatter_add(1, plan.dst, weight)
    share = (weight / total.gather(1, plan.dst)).to(out.dtype)
    rows, dst = out.view(-1, out.shape[2]), flat_rows(plan.dst, out.shape[1])
    delta = at_least_fp32(take_rows(x, plan.src)).view(-1, out.shape[2]) - rows.index_select(0, dst)
    rows.index_add_(0, dst, delta.mul_(share.view(-1, 1)))
    return out.to(x.dtype), size if plan.use_size else None


def _taken_in(x: Tensor, plan: Plan) -> Tensor:
    """Kept rows plus the weighted sum of their neighbours; rows without any are copied untouched."""
    assert plan.near is not None and plan.near_weight is not None
    kept = take_rows(x, plan.keep)
    out = at_least_fp32(kept)
    for near, weight in zip(plan.near.unbind(-1), plan.near_weight.to(out.dtype).unbind(-1)):  # one neighbour at a time
        out = torch.addcmul(out, weight[..., None], at_least_fp32(take_rows(x, near)))
    return torch.where((plan.near_weight != 0).any(-1)[..., None], out.to(x.dtype), kept)


def _follow(group: Tensor, plan: Plan, n: int) -> Tensor:
    """Where each original token is after the plan."""
    batch, m = plan.keep.shape
    moved = group.new_full((batch, n), -1)
    rows = torch.arange(m, device=group.device).expand(batch, m)
    if plan.valid is not None:  # a padding row repeats some real row: it must not claim that row's tokens
        moved = torch.cat([moved, moved[:, :1]], 1)
        moved = moved.scatter(1, plan.keep.where(plan.valid, n), rows)[:, :n]
    else:
        moved = moved.scatter(1, plan.keep, rows)
    if plan.src is not None and plan.dst is not None:
        if plan.folds is None:
            moved = moved.scatter(1, plan.src, plan.dst)
        else:  # folds that go nowhere are written to a column of their own
            moved = torch.cat([moved, moved[:, :1]], 1).scatter(1, plan.src.where(plan.folds, n), plan.dst)[:, :n]
    return torch.where(group < 0, group, moved.gather(1, group.clamp_min(0)))


def unmerge(x: Tensor, state: TokenState, fill: float = 0.0) -> Tensor:
    """Gives every original token the features of the token it ended in, in the original order.

    Args:
        x: [B, N, C] features of the reduced tokens.
        state: their state, made under `trace=True`.
        fill: value for tokens that were dropped.

    Returns:
        [B, N0, C].

    Raises:
        StateError: the run kept no map from original to reduced tokens, or left other tokens than these.
    """
    if state.group is None:
        if state.trivial:
            return x
        raise StateError("this run kept no token map; patch with trace=True to undo a reduction")
    if state.index is not None and x.shape[:2] != state.index.shape:
        raise StateError(
            f"the last forward pass left [images, tokens] = {list(state.index.shape)} tokens, got {list(x.shape[:2])}; "
            "pass what leaves the last block, prefix included"
        )
    out = take_rows(x, state.group.clamp_min(0))
    return out.masked_fill((state.group < 0)[..., None], fill)
