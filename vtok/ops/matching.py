"""Bipartite matching of similar tokens: pure functions of a metric.

Shapes: B batch, N tokens, P prefix tokens, a and b tokens on the two sides, d metric width, R merged pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32, row_blocks
from vtok.ops.rows import prefix_rows, ramp


def unit(t: Tensor) -> Tensor:
    """Rows of length one, in at least fp32; a zero row stays zero (ToMe's own code would make it NaN)."""
    t = at_least_fp32(t)
    return t / torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(1e-12)


def best_partner(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For every unit vector a [B, a, d] the largest cosine to any of b [B, b, d], and where: ([B, a], [B, a]).

    Many rows are compared block by block: memory grows as a + b then, not as a x b.
    """
    other = b.transpose(1, 2)
    found = [torch.bmm(rows, other).max(-1) for rows in row_blocks(a, b.shape[1])]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([best.values for best in found], -1), torch.cat([best.indices for best in found], -1)


def bipartite_pairs(n: int, r: int, num_prefix: int) -> int:
    """Pairs that can be merged: r, but never more than half of the patches."""
    return max(0, min(r, (n - num_prefix) // 2))


def bipartite_sides(n: int, num_prefix: int) -> tuple[int, int]:
    """Patches on the two sides of ToMe's matching: at even and at odd positions of n tokens, the prefix counted."""
    return (n + 1) // 2 - (num_prefix + 1) // 2, n // 2 - num_prefix // 2


def bipartite_soft_matching(metric: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """ToMe's bipartite soft matching (Bolya et al., ICLR 2023; steps 4 to 9 of the algorithm).

    Tokens alternate between A (even positions) and B (odd positions), prefix tokens included; prefix tokens neither merge
    nor receive. The r tokens of A with the most similar partner in B are folded into it. Output order: prefix, the rest of A
    (ascending; by falling similarity where there is no prefix), B.

    Args:
        metric: [B, N, d], compared by cosine.
        r: tokens to remove; capped at half of the patches.
        num_prefix: P.

    Returns:
        (keep [B, N-R], src [B, R], dst [B, R]) as in a `Plan`, or `None` if nothing can be merged.
    """
    batch, n, _ = metric.shape
    r = bipartite_pairs(n, r, num_prefix)
    if r == 0:
        return None
    first_a, first_b = (num_prefix + 1) // 2, num_prefix // 2  # members of A and B that are prefix tokens
    m = unit(metric)
    score, partner = best_partner(m[:, 2 * first_a :: 2], m[:, 2 * first_b + 1 :: 2])
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rows = torch.add(ramp(2 * first_a, 2 * first_a + 1, 1, m), order, alpha=2)
    src, rest = rows.split((r, order.shape[1] - r), 1)
    if num_prefix:
        rest = rest.sort(-1).values
    odd = ramp(2 * first_b + 1, n, 2, m).expand(batch, -1)
    keep = torch.cat([prefix_rows(batch, num_prefix, m), rest, odd], 1)
    return keep, src, partner.gather(1, order[:, :r]) + (num_prefix + rest.shape[1])
