"""Greedy choice of tokens that are unlike each other: max-sum diversification and farthest-point (k-center, max-min) traversal.

Shapes: B images, n tokens, d feature width, k tokens chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtok.ops.matching import unit

_ROWS_AT_ONCE = 256  # tokens that are compared with all others at a time
# How the similarities to the tokens chosen so far become one number.
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum}


def most_isolated(features: Tensor) -> Tensor:
    """The token whose nearest other one, by cosine, is farthest: where DivPrune starts.

    A block of rows is compared at a time: n n d multiply-accumulates, no n x n matrix. Equal values: the lowest token number.

    Args:
        features: [B, n, d]; a zero row has cosine 0 with every row. Compared in at least fp32, without gradient.

    Returns:
        [B] int64.
    """
    x = unit(features.detach())
    n, nearest, first = x.shape[1], [], 0
    for part in x.split(_ROWS_AT_ONCE, 1):
        cosine = torch.bmm(part, x.transpose(1, 2))  # [B, r, n]
        itself = torch.arange(n, device=x.device) == torch.arange(first, first + part.shape[1], device=x.device)[:, None]
        nearest.append(cosine.masked_fill(itself, float("-inf")).amax(2))
        first += part.shape[1]
    return torch.cat(nearest, 1).argmin(1)


def greedy_diverse(
    features: Tensor, k: int, first: Tensor, valid: Tensor | None = None, criterion: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Starts from `first` and takes, k - 1 times, the token whose cosines to all tokens taken have the smallest sum or maximum.

    The sum or maximum is carried along, so that a step is one product of the features with the row taken last: k n d
    multiply-accumulates in all, no n x n matrix, no host synchronisation. Equal values: the lowest token number wins.

    Args:
        features: [B, n, d]; a zero row has cosine 0 with every row. Compared in at least fp32, without gradient.
        k: at most n.
        first: [B] int64, where each image starts.
        valid: [B, n] bool, False = padding, which is never returned; `None` = all real.
        criterion: `"sum"` (max-sum diversification) or `"max"` (the token farthest from its nearest chosen one).

    Returns:
        (order [B, k] int64 in order of choice, -1 where an image has no token left (or where `first` is padding);
        score [B, k], the value each token was chosen at: 0 for the first, inf where order is -1).
    """
    x = unit(features.detach())
    width, combine = x.shape[-1], CRITERIA[criterion]
    taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else ~valid
    last = first[:, None]
    order, score = [last], [x.new_zeros(last.shape).masked_fill(taken.gather(1, last), float("inf"))]
    closeness = None
    for _ in range(k - 1):
        taken = taken.scatter(1, last, True)
        row = x.gather(1, last[..., None].expand(-1, -1, width))  # [B, 1, d]
        cosine = torch.bmm(x, row.transpose(1, 2)).squeeze(2)
        closeness = cosine if closeness is None else combine(closeness, cosine)
        best, last = closeness.masked_fill(taken, float("inf")).min(1, keepdim=True)
        order.append(last)
        score.append(best)
    found = torch.cat(score, 1)
    return torch.cat(order, 1).masked_fill(found == float("inf"), -1), found
