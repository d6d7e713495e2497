"""Images that came padded to one length: whose rows are padding, and plans that leave padding out.

A method sees images of one length at a time, without their padding, so it decides for an image what it would decide for that
image alone; nothing real is ever folded into padding or the other way round. That needs to know how many real tokens an image
has: one host synchronisation a block, for padded input only.

Shapes: B batch, N tokens in, M tokens out, R folded rows, n real tokens of an image, G images that have n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.config import Reducer
from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, Site, TokenState
from vtok.errors import StateError, UnsupportedModelError
from vtok.ops.rows import take_rows

HIDDEN = -1e4  # an additive mask that low hides a key: its probability is zero in every precision


class Padding(NamedTuple):
    """What a mask says of padding.

    Attributes:
        keep: [B, N] bool, False = padding: a token that no other token may attend to.
        alone: whether the mask says nothing else, so that `keep` stands for it.
    """

    keep: Tensor
    alone: bool


def by_rows(block: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask of a transformers layer, where [B, N] says which tokens of each image are real (nonzero = attend)."""
    mask = kwargs.get("attention_mask")
    return mask[:, None, None].bool() if mask is not None and mask.ndim == 2 else mask


def by_pairs(block: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask of a timm block, which is broadcast to [B, H, N, N]: [N, N] says which key each query may attend to."""
    return kwargs.get("attn_mask")


def padding_of(mask: Tensor | None, n: int, num_prefix: int = 0, merges: bool = False) -> Padding | None:
    """Which tokens a mask hides from all others.

    Args:
        mask: broadcastable to [B, H, N, N]; bool or integer (nonzero = attend), or additive.
        n: number of tokens, N.
        num_prefix: P; prefix tokens are no padding.
        merges: whether tokens will be merged.

    Returns:
        `None` if there is no mask, or one that hides no token altogether.

    Raises:
        UnsupportedModelError: tokens will be merged that the mask hides from some tokens and not from others.
    """
    if mask is None or mask.shape[-1] != n:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    sees = (mask > HIDDEN if mask.is_floating_point() else mask.bool()).transpose(0, 1)  # [H, B, N or 1, N]
    shown = sees.any(0)  # to any head
    keep = shown.any(1)
    if shown.shape[1] > 1:  # padding may attend to itself, so that its softmax is not empty
        itself = torch.eye(n, dtype=torch.bool, device=mask.device)
        seen = (shown & ~itself).any(1)
        seen[:, :num_prefix] |= keep[:, :num_prefix]
        clear = (seen[:, :, None] & (shown ^ seen[:, None])).flatten(1).any(1).logical_not() & seen.any(1)
        keep = torch.where(clear[:, None], seen, keep)
    if torch.compiler.is_compiling():  # no value can be asked for
        return Padding(keep, False)
    asking = keep[:, :, None] if shown.shape[1] > 1 else True
    partly = (sees ^ keep[:, None]) & asking  # hidden from some real queries or heads, and not from others
    mixed = biased = partly.any()
    if mask.is_floating_point():
        biased = mixed | ((mask != 0) & sees.transpose(0, 1) & keep[:, None, None]).any()
    hides, more, mixes = torch.stack([~keep.all(), biased, mixed]).tolist()
    if mixes and merges:
        raise UnsupportedModelError(
            "the attention mask hides some tokens from others without hiding them from all, and merged tokens would carry what "
            "it hides across; choose a method that drops tokens (random, uniform, zero_tprune), or mask whole patches"
        )
    return Padding(keep, not more) if hides else None


WORTH = 0.97  # packing is left out where more than this share of the rows is real


class RealRows(NamedTuple):
    """The rows of a padded batch that are real, so that layers that look at one token at a time see these alone.

    Attributes:
        rows: [T] int64, in the batch laid out as one sequence of B N rows.
        batch: B.
        length: N.
    """

    rows: Tensor
    batch: int
    length: int

    def together(self, t: Tensor) -> Tensor:
        """[B, N, C] -> [1, T, C]."""
        return t.flatten(0, 1).index_select(0, self.rows)[None]

    def apart(self, t: Tensor) -> Tensor:
        """[1, T, C] -> [B, N, C], zero on padding."""
        self._check(t.shape[0], t.shape[1])
        out = t.new_zeros(self.batch * self.length, t.shape[-1])
        return out.index_copy(0, self.rows, t[0]).view(self.batch, self.length, -1)

    def heads_apart(self, t: Tensor) -> Tensor:
        """[1, H, T, D] -> [B, H, N, D], zero on padding."""
        self._check(t.shape[0], t.shape[2])
        out = t.new_zeros(self.batch * self.length, t.shape[1], t.shape[3])
        return out.index_copy(0, self.rows, t[0].transpose(0, 1)).unflatten(0, (self.batch, -1)).transpose(1, 2)

    def _check(self, sequences: int, tokens: int) -> None:
        if (sequences, tokens) != (1, len(self.rows)):
            raise StateError(
                f"a layer was given one sequence of {len(self.rows)} tokens, all that are left of {self.batch} images, and "
                f"made {sequences} of {tokens}: it looks at more than one token at a time; pass mode='mask' to ats"
            )


def alone(block: nn.Module, attention: nn.Module) -> bool:
    """Whether the layers of a block may be shown tokens of several images as one sequence: they are such as blocks are built
    of, nobody else looks at them or changes what they do, and none drops whole images.

    Block and attention themselves are left out: in one that is computed step by step, only their layers are called (and
    transformers hooks attention modules to record what they return).
    """
    return all(part is block or part is attention or _plain(part) for part in block.modules())


_BUILT_OF = frozenset({"torch", "timm", "open_clip", "transformers", "peft"})  # layers that look at tokens one by one


def _plain(part: nn.Module) -> bool:
    looked_at = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    return not looked_at and not part.training and type(part).__module__.partition(".")[0] in _BUILT_OF


def real_rows(state: TokenState, length: int) -> RealRows | None:
    """The real rows of images of different lengths, where the host knows these; `None` = not known, or hardly any is padding.

    Under torch.compile they are not told: every other set of lengths would be another graph.
    """
    counts = state.counts
    if counts is None or torch.compiler.is_compiling() or sum(counts) > WORTH * len(counts) * length:
        return None
    on_host: dict[str, Any] = {"device": "cpu"}  # which need not wait for the device
    real = torch.arange(length, **on_host) < torch.tensor(counts, **on_host)[:, None]
    device = None if state.keep is None else state.keep.device
    return RealRows(real.flatten().nonzero()[:, 0].to(device), len(counts), length)


_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


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
    if _exporting():
        raise UnsupportedModelError(
            "a mask says how many patches of each image are real, which a graph of fixed shapes cannot ask for; export the "
            "model on images alone, without a mask"
        )
    real = torch.ones_like(state.keep) if state.real is None else state.real
    images: dict[tuple[int, int], list[int]] = defaultdict(list)
    if state.counts is not None and state.entered is not None:
        lengths = list(zip(state.counts, state.entered))
    else:
        lengths = torch.stack([state.keep.sum(1), real.sum(1)], 1).tolist()  # the one host synchronisation
    for image, (now, entered) in enumerate(lengths):
        images[now, entered].append(image)
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
    if not changes:
        return None
    left = {image: part.plan.keep.shape[1] for part, members in zip(parts, images.values()) for image in members}
    return _joined(parts, order, spare)._replace(counts=tuple(left[image] for image in range(len(lengths))))


def _real_state(state: TokenState, who: Tensor, rows: Tensor, length: int) -> TokenState:
    index = rows if state.index is None else state.index[who].gather(1, rows)
    if state.real is not None and state.grid is None:  # where the tokens would be had the image come without padding
        index = (state.real[who].cumsum(1) - 1).gather(1, index)
    size = None if state.size is None else state.size[who].gather(1, rows)
    grid = state.grid[who] if isinstance(state.grid, Tensor) else state.grid
    return TokenState(state.num_prefix, length, index, size, grid=grid)


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
    return view._replace(q=real(view.q), k=real(view.k), k_rot=real(view.k_rot), v=real(view.v), bias=bias)


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
