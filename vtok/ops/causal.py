"""Some rows of a decoder layer's attention, recomputed from its queries and keys.

Shapes: B prompts, H query heads, Hk key heads (H / Hk queries share a key), N tokens, R query rows, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.ops.rows import rows_where
from vtok.state import at_least_fp32

MAX_PROBS = 1 << 23  # probabilities held at a time; 32 MB in fp32


def causal_probs(q: Tensor, k: Tensor, scale: float, rows: Tensor, real: Tensor) -> Tensor:
    """Attention probabilities of some query rows under a causal mask, in at least fp32.

    Args:
        q: [B, H, N, D], rotated.
        k: [B, Hk, N, D], rotated.
        scale: factor on the logits.
        rows: [B, R] int64, which queries.
        real: [B, N] bool, False = padding, which receives nothing.

    Returns:
        [B, H, R, N]; every row sums to 1 (padding sees itself, so that no row is empty).
    """
    batch, heads, n, width = q.shape
    count = rows.shape[1]
    q = at_least_fp32(q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)))
    k = at_least_fp32(k)
    grouped = q.reshape(batch, k.shape[1], -1, width)  # [B, Hk, H / Hk * R, D]: keys need not be repeated
    logits = ((grouped * scale) @ k.transpose(2, 3)).view(batch, heads, count, n)
    column = torch.arange(n, device=q.device)
    here = rows[..., None]  # [B, R, 1]
    seen = ((column < here) & real[:, None]) | (column == here)
    return logits.masked_fill_(~seen[:, None], float("-inf")).softmax(-1)


def causal_mass(q: Tensor, k: Tensor, scale: float, queries: Tensor, width: int, keys: Tensor, real: Tensor) -> Tensor:
    """Attention that some queries pay to some keys, averaged over heads and summed over the queries.

    Only these rows are computed, a few at a time, so that memory does not grow with R N.

    Args:
        q: [B, H, N, D], rotated.
        k: [B, Hk, N, D], rotated.
        scale: factor on the logits.
        queries: [B, N] bool.
        width: the most queries that a prompt has; further ones are left out.
        keys: [B, N] bool.
        real: [B, N] bool, False = padding.

    Returns:
        [B], in at least fp32.
    """
    batch, heads, n, _ = q.shape
    rows, counted = rows_where(queries, width)
    step = max(1, MAX_PROBS // (batch * heads * n))
    total = at_least_fp32(q.new_zeros(batch))
    for start in range(0, width, step):
        part = slice(start, start + step)
        probs = causal_probs(q, k, scale, rows[:, part], real)
        mass = (probs @ keys.to(probs.dtype)[:, None, :, None]).squeeze(3).mean(1)  # [B, R]
        total = total + (mass * counted[:, part]).sum(-1)
    return total
