"""Finding near duplicates: one half of the tokens is compared with the other. Zero-TPrune's S-stage.

Shapes: B batch, n patches, d feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32
from vtok.ops.hashing import splitmix
from vtok.ops.matching import unit
from vtok.ops.rows import take_rows

PARTITIONS = ("seq_u", "seq_i", "alternate", "random")
METRICS = ("cos", "dot", "manhattan", "euclidean", "minkowski3", "minkowski4", "minkowski5", "chebyshev")


def similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """[B, a, d] and [B, b, d] -> [B, a, b], larger = more alike; distances count negative."""
    if metric == "cos":
        return unit(a) @ unit(b).transpose(-1, -2)
    a, b = at_least_fp32(a), at_least_fp32(b)
    if metric == "dot":
        return a @ b.transpose(-1, -2)
    p = {"manhattan": 1.0, "euclidean": 2.0, "chebyshev": float("inf")}.get(metric) or float(metric[-1])
    return -torch.cdist(a, b, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def split_halves(score: Tensor, partition: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The half A that the S-stage may prune and the half B it compares with: score [B, n] -> ([B, n // 2], [B, n - n // 2]).

    The odd token goes to B (the paper does not say).
    """
    n = score.shape[-1]
    half = n // 2
    if partition == "random":
        order = splitmix(torch.arange(n, device=score.device), seed).argsort(stable=True).expand(score.shape[0], n)
        return order[:, :half], order[:, half:]
    order = score.argsort(dim=-1, descending=True, stable=True)
    if partition == "seq_i":
        return order[:, :half], order[:, half:]
    if partition == "alternate":
        return order[:, 1::2], order[:, ::2]
    return order[:, n - half :], order[:, : n - half]


def most_similar(features: Tensor, a: Tensor, b: Tensor, r: int, metric: str) -> Tensor:
    """S-stage (eq. 6): the r members of A whose best match in B is closest.

    Args:
        features: [B, n, d], the keys of all heads side by side.
        a: [B, |A|] patch numbers that may be pruned.
        b: [B, |B|] patch numbers they are compared with.
        r: how many, at most |A|.
        metric: see `METRICS`.

    Returns:
        [B, r] patch numbers.
    """
    best = similarity(take_rows(features, a), take_rows(features, b), metric).amax(-1)
    return a.gather(1, best.argsort(dim=-1, descending=True, stable=True)[:, :r])
