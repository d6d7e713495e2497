"""Greedy choice of tokens that are unlike each other: max-sum diversification and farthest-point (k-center, max-min) traversal.

Shapes: B images, n tokens, d feature width, k tokens chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtok.ops.matching import unit

_ROWS_AT_ONCE = 256  # tokens that are compared with all others at a time
_WHOLE = 8192  # tokens up to which the cosines of all with all are held: 256 MiB an image
_AS_FAST = 32  # rows of a product of all with all that take as long as one that is made alone, which reads all features for it
# How the similarities to the tokens chosen so far become one number, in place.
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": Tensor.add_, "max": lambda a, b: torch.maximum(a, b, out=a)}
_FIRST = {"sum": 0.0, "max": float("-inf")}  # what they begin with


def all_at_once(n: int, k: int) -> bool:
    """Whether k of the rows that compare n tokens with all others come fastest from one product of all with all.

    A row that is made alone reads the features of all tokens for n d multiply-accumulates; measured on CPUs, and by the
    bandwidth of GPUs, that takes as long as `_AS_FAST` rows of the whole product.
    """
    return n <= _WHOLE and _AS_FAST * k >= n


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


def max_min(features: Tensor, k: int) -> Tensor:
    """Farthest-point traversal from `most_isolated`, DivPrune's choice.

    Up to `_WHOLE` tokens the cosines that say where it starts are kept and serve every step: about n n d / 2
    multiply-accumulates in all. Beyond, n (n + k) d and no n x n matrix.

    Args:
        features: [B, n, d], as in `most_isolated`.
        k: 1 to n.

    Returns:
        [B, k] int64 in order of choice.
    """
    n = features.shape[1]
    if n > _WHOLE:
        return greedy_diverse(features, k, most_isolated(features), criterion="max")[0]
    return max_min_among(all_with_all(unit(features.detach()).nan_to_num()), k)


def max_min_among(cosines: Tensor, k: int) -> Tensor:
    """`max_min`, given the cosines of all with all [B, n, n], which are left as they were."""
    own = cosines.diagonal(dim1=1, dim2=2)
    held = own.clone()
    own.fill_(float("-inf"))
    first = cosines.amax(2).argmin(1)
    own.copy_(held)
    return _traverse(lambda last: rows_of(cosines, last), cosines.new_zeros(cosines.shape[:2]), k, first, "max")[0]


def max_min_macs(n: int, k: int, width: int) -> int:
    """Multiply-accumulates of `max_min` for an image."""
    return all_with_all_macs(n, width) if n <= _WHOLE else (n + k - 1) * n * width


def all_with_all(x: Tensor) -> Tensor:
    """[B, n, n]: products of all rows of x [B, n, d] with each other, those above the diagonal made and mirrored."""
    n = x.shape[1]
    found = x.new_empty(x.shape[0], n, n)
    for first in range(0, n, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, n)
        part = torch.bmm(x[:, first:last], x[:, first:].transpose(1, 2))
        found[:, first:last, first:] = part
        found[:, last:, first:last] = part[:, :, last - first :].transpose(1, 2)
    return found


def all_with_all_macs(n: int, width: int) -> int:
    """Multiply-accumulates of `all_with_all` for an image: about n n d / 2."""
    return sum(min(_ROWS_AT_ONCE, n - first) * (n - first) * width for first in range(0, n, _ROWS_AT_ONCE))


def rows_of(square: Tensor, last: Tensor) -> Tensor:
    """[B, n]: of every square [B, n, n] the row whose number stands in last [B, 1]."""
    return square.gather(1, last[..., None].expand(-1, 1, square.shape[2])).squeeze(1)


def greedy_diverse(
    features: Tensor, k: int, first: Tensor, valid: Tensor | None = None, criterion: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Starts from `first` and takes, k - 1 times, the token whose cosines to all tokens taken have the smallest sum or maximum.

    The sum or maximum is carried along, so that a step is one product of the features with the row taken last: k n d
    multiply-accumulates in all, no n x n matrix, no host synchronisation. Equal values: the lowest token number wins.

    Args:
        features: [B, n, d]; a zero row has cosine 0 with every row, so has one that is not finite. Compared in at least fp32,
            without gradient.
        k: at most n.
        first: [B] int64, where each image starts.
        valid: [B, n] bool, False = padding, which is never returned; `None` = all real.
        criterion: `"sum"` (max-sum diversification) or `"max"` (the token farthest from its nearest chosen one).

    Returns:
        (order [B, k] int64 in order of choice, -1 where an image has no token left (or where `first` is padding);
        score [B, k], the value each token was chosen at: 0 for the first, inf where order is -1).
    """
    x = unit(features.detach()).nan_to_num()
    out = x.new_zeros(x.shape[:2])
    if valid is not None:
        x, out = x.masked_fill(~valid[..., None], 0), out.masked_fill(~valid, float("inf"))

    def row(last: Tensor) -> Tensor:
        taken = x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))  # [B, 1, d]
        return torch.bmm(x, taken.transpose(1, 2)).squeeze(2)

    return _traverse(row, out, k, first, criterion)


def _traverse(row: Callable[[Tensor], Tensor], out: Tensor, k: int, first: Tensor, criterion: str) -> tuple[Tensor, Tensor]:
    """The steps of `greedy_diverse`: what is taken gets infinitely close, and no sum or maximum brings it back.

    Args:
        row: number of a token [B, 1] -> its cosines to all [B, n].
        out: [B, n], inf where a token must not be taken, else 0.
        k, first, criterion: as there.
    """
    combine, last = CRITERIA[criterion], first[:, None]
    order, score = [last], [out.gather(1, last)]
    closeness = out.masked_fill(out == 0, _FIRST[criterion])
    for _ in range(k - 1):
        closeness.scatter_(1, last, float("inf"))
        combine(closeness, row(last))
        best, last = closeness.min(1, keepdim=True)
        order.append(last)
        score.append(best)
    found = torch.cat(score, 1)
    return torch.cat(order, 1).masked_fill(found == float("inf"), -1), found
