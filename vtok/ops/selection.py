"""Choosing among scored tokens, with a count, a draw or a threshold of its own for every row of a batch.

Shapes: B batch, n scored tokens. `valid` [B, n] bool: tokens outside are never chosen and shift nothing; `None` = all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_tokens(n: int, keep: float | None = None, keep_tokens: int | None = None) -> int:
    """How many of n tokens stay: max(1, round(n keep)), halves to the even number, or `keep_tokens` where there are as many."""
    if keep_tokens is not None:
        return min(n, keep_tokens)
    return n if keep is None else min(n, max(1, round(n * keep)))


def kept_of_parts(sizes: Sequence[int], keep: float) -> list[int]:
    """How many stay of every part of something, the same share of each as far as whole numbers go: together `kept_tokens` of
    all of it, whatever the parts round to by themselves. Small parts may keep none.
    """
    total, kept = kept_tokens(sum(sizes), keep), 0
    counts, seen = [], 0
    for size in sizes:
        seen += size
        counts.append(round(total * seen / sum(sizes)) - kept)
        kept += counts[-1]
    return counts


def kept_counts(n: Tensor, keep: float | None = None, keep_tokens: int | None = None) -> Tensor:
    """`kept_tokens` of every row, without host synchronisation: n [B] int64 -> [B] int64; 0 of none."""
    if keep_tokens is not None:
        return n.clamp_max(keep_tokens)
    if keep is None:
        return n
    return torch.minimum(n, (n.double() * keep).round().long().clamp_min(1))


def top(score: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores of each row, [.., n] -> [.., count], highest first; of equals the first."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]


def distinct(chosen: Tensor, n: int) -> Tensor:
    """As many different places, rising: those that were chosen, and for each that was chosen again the first that was not.

    Args:
        chosen: [B, k] int64, numbers below n >= k.
        n: places.

    Returns:
        [B, k] int64.
    """
    taken = torch.zeros(len(chosen), n, device=chosen.device).scatter(1, chosen, 1.0)
    return top(taken, chosen.shape[1]).sort(1).values


def largest(score: Tensor, count: Tensor, valid: Tensor | None = None) -> Tensor:
    """The `count` [B] highest scores of each row [B, n], as a mask [B, n]; of equal scores the first."""
    if valid is not None:
        lowest = float("-inf")
        score = score.clamp_min(torch.finfo(score.dtype).min).masked_fill(~valid, lowest)  # below whatever a token may score
        count = torch.minimum(count, valid.sum(-1))
    order = score.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(score.shape[-1], device=score.device) < count[:, None]
    return torch.zeros_like(first).scatter(-1, order, first)


def weighted_draw(p: Tensor, count: Tensor, u: Tensor, valid: Tensor | None = None) -> Tensor:
    """Draws `count` tokens of each row one after the other without putting any back, each with a chance in proportion to `p`.

    The tokens of largest log(u) / p have that law (Efraimidis, Spirakis 2006), and a larger count only adds tokens.

    Args:
        p: [B, n] >= 0; what has none is drawn last.
        count: [B] int64.
        u: [B, n], independent and uniform in (0, 1).
        valid: see above.

    Returns:
        [B, n] bool.
    """
    key = u.log() / p
    return largest(key.clamp_min(torch.finfo(key.dtype).min), count, valid)


def quantiles(score: Tensor, at: Sequence[float], valid: Tensor | None = None) -> list[Tensor]:
    """Quantiles of each row, interpolated linearly: `score` [B, n] -> one [B] for every entry of `at` (in [0, 1]).

    Unlike `torch.quantile`, it leaves tokens out and has no limit on the number of entries.
    """
    last = torch.full_like(score[:, 0], score.shape[-1] - 1, dtype=torch.int64)
    if valid is not None:
        score, last = score.masked_fill(~valid, float("inf")), (valid.sum(-1) - 1).clamp_min(0)
    ordered = score.sort(-1).values
    found = []
    for share in at:
        place = last.to(score.dtype) * share
        below = place.floor().long()
        low, high = (ordered.gather(-1, i[:, None])[:, 0] for i in (below, torch.minimum(below + 1, last)))
        found.append(torch.lerp(low, high, place - below))
    return found


def iqr_fence(score: Tensor, factor: float = 1.5, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quartiles and Tukey's upper fence of each row [B, n]: (Q1, Q3, Q3 + factor (Q3 - Q1)), each [B]."""
    q1, q3 = quantiles(score, (0.25, 0.75), valid)
    return q1, q3, q3 + factor * (q3 - q1)


def upper_outliers(score: Tensor, factor: float = 1.5, valid: Tensor | None = None) -> Tensor:
    """[B, n] bool: tokens strictly above the fence of their own row."""
    above = score > iqr_fence(score, factor, valid)[2][:, None]
    return above if valid is None else above & valid
