"""Greedy choice under a determinantal point process: tokens of high quality that are unlike each other.

Shapes: B images, n tokens, d feature width, k tokens chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops.matching import unit

_RANK = 1e-4  # of the largest entry of the kernel's diagonal: below it no direction is left; rows in fp32 are off by up to 1e-5
_EQUAL = 1e-5  # of the best: what is closer counts as equal; copies (newline tokens) differ by the rounding of their batch


@torch.no_grad()
def greedy_dpp(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy maximum a posteriori of the kernel diag(q) S diag(q), S the cosines of the features (Chen et al., NeurIPS 2018).

    The next token is the one that adds most to the determinant; what each would add is carried along by a row of the
    incremental Cholesky factor a step: k n (d + k / 2) multiply-accumulates, no n x n matrix, no host synchronisation. Once the
    tokens taken span all the others (copies, or k above the rank), the rest is filled up by falling quality. Equal values: the
    lowest token number.

    Args:
        features: [B, n, d], in at least fp32 here; a zero row is taken last.
        quality: [B, n] >= 0.
        k: at most n.

    Returns:
        [B, k] int64 in order of choice.
    """
    x = unit(features)
    quality = quality.to(x.dtype)
    batch, n, width = x.shape
    # 1 for every row that is not zero: the squares of rounded unit rows would rank what is equal
    gain = quality.square() * (x != 0).any(2)
    least = _RANK * gain.amax(1, keepdim=True)
    factor, order = x.new_zeros(batch, k, n), []
    taken = torch.zeros(batch, n, dtype=torch.bool, device=x.device)
    for step in range(k):
        gain = gain.masked_fill(taken, float("-inf"))
        last = _first_of_best(gain)
        best = gain.gather(1, last)
        spent = best <= least
        last = torch.where(spent, _first_of_best(quality.masked_fill(taken, float("-inf"))), last)
        order.append(last)
        taken = taken.scatter(1, last, True)
        if step + 1 == k:
            break
        row = torch.bmm(x.gather(1, last[..., None].expand(-1, -1, width)), x.transpose(1, 2)).squeeze(1)  # [B, n]
        row = row * quality * quality.gather(1, last)
        if step:
            done = factor[:, :step]
            row = row - torch.bmm(done.gather(2, last[:, None].expand(-1, step, -1)).transpose(1, 2), done).squeeze(1)
        row = (row / best.clamp_min(torch.finfo(x.dtype).tiny).sqrt()).masked_fill(spent, 0)
        factor[:, step] = row
        gain = gain - row.square()
    return torch.cat(order, 1)


def _first_of_best(value: Tensor) -> Tensor:
    """[B, 1]: the lowest place in [B, n] of what is as large as the largest, which is no less than 0."""
    best = value.amax(1, keepdim=True)
    return (value >= best - _EQUAL * best.abs()).to(torch.uint8).argmax(1, keepdim=True)
