"""Greedy choice under a determinantal point process: tokens of high quality that are unlike each other.

Shapes: B images, n tokens, d feature width, k tokens chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32
from vtok.ops.diversity import all_at_once, all_with_all, all_with_all_macs, rows_of
from vtok.ops.matching import unit

_RANK = 1e-4  # of the largest entry of the kernel's diagonal: below it no direction is left; rows in fp32 are off by up to 1e-5
_ABOVE_ZERO = 1e-6  # in the numerator of a scaled similarity
NEAR = 1e-5  # of the best: what is closer counts as equal; copies (newline tokens) differ by the rounding of their batch


@torch.no_grad()
def greedy_dpp(features: Tensor, quality: Tensor, k: int, kernel: Tensor | None = None) -> Tensor:
    """Greedy maximum a posteriori of the kernel diag(q) S diag(q), S the cosines of the features (Chen et al., NeurIPS 2018).

    The next token is the one that adds most to the determinant; what each would add is carried along by a row of the
    incremental Cholesky factor a step. A step needs one row of the kernel: few of them are made one by one, k n (d + k / 2)
    multiply-accumulates and no n x n matrix, many at once (see `all_at_once`), about n (n d + k k) / 2. No host
    synchronisation. Once the tokens taken span all the others (copies, or k above the rank), the rest is filled up by falling
    quality. Equal values: the lowest token number.

    Args:
        features: [B, n, d], in at least fp32 here; a zero row is taken last.
        quality: [B, n] >= 0.
        k: at most n.
        kernel: [B, n, n], the kernel itself, where it is known; of the features only their shape counts then.

    Returns:
        [B, k] int64 in order of choice.
    """
    x = at_least_fp32(features) if kernel is not None else unit(features)
    left = quality.to(x.dtype, copy=True)  # of the tokens that are not taken
    batch, n, width = x.shape
    # 1 for every row that is not zero: the squares of rounded unit rows would rank what is equal
    gain = left.square() * ((x != 0).any(2) if kernel is None else kernel.diagonal(dim1=1, dim2=2) > 0)
    least = _RANK * gain.amax(1, keepdim=True)
    x = x * left[..., None] if kernel is None else x
    if kernel is None and all_at_once(n, k):
        kernel = all_with_all(x)
    factor, order = x.new_zeros(batch, k, n), []
    for step in range(k):
        spent = gain.amax(1, keepdim=True) <= least
        last = _first_of_best(torch.where(spent, left, gain))
        order.append(last)
        if step + 1 == k:
            break
        if kernel is None:
            row = torch.bmm(x.gather(1, last[..., None].expand(-1, -1, width)), x.transpose(1, 2)).squeeze(1)  # [B, n]
        else:
            row = rows_of(kernel, last)
        if step:
            done = factor[:, :step]
            known = done.gather(2, last[:, None].expand(-1, step, -1)).transpose(1, 2)
            row = torch.baddbmm(row[:, None], known, done, alpha=-1).squeeze(1)
        best = gain.gather(1, last).clamp_min(torch.finfo(x.dtype).tiny)
        row = row * best.rsqrt().masked_fill(spent, 0)
        factor[:, step] = row
        gain.addcmul_(row, row, value=-1)
        gain.scatter_(1, last, float("-inf"))
        left.scatter_(1, last, float("-inf"))
    return torch.cat(order, 1)


def greedy_dpp_macs(n: int, k: int, width: int) -> int:
    """Multiply-accumulates of `greedy_dpp` for an image."""
    rows = all_with_all_macs(n, width) if all_at_once(n, k) else (k - 1) * n * width
    return rows + n * math.comb(k - 1, 2)


def _first_of_best(value: Tensor) -> Tensor:
    """[B, 1]: the lowest place in [B, n] of what is as large as the largest, which is no less than 0."""
    best = value.amax(1, keepdim=True)
    return (value >= best - NEAR * best).view(torch.uint8).argmax(1, keepdim=True)


def scaled(similarity: Tensor, sign: int = 1, joint: bool = False) -> Tensor:
    """Quality in (0, 1] from a similarity (CDPruner, arXiv:2506.10967, eq. 3): sign times similarity less its minimum, divided
    by its range; 1 where all are alike.

    Args:
        similarity: [B, n].
        sign: 1 or -1.
        joint: take minimum and maximum over the whole batch.

    Returns:
        [B, n].
    """
    score = sign * similarity
    over = (0, 1) if joint else (1,)
    low, high = score.amin(over, keepdim=True), score.amax(over, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (score - low + _ABOVE_ZERO) / spread.where(spread > 0, 1), 1.0)


def balanced(relevance: Tensor, theta: float | None) -> Tensor:
    """exp(theta r / (2 (1 - theta))), or r itself without theta."""
    return relevance if theta is None else (relevance * (theta / (2 * (1 - theta)))).exp()
