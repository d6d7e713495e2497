"""ToDRE's stage 1: which visual tokens of an image stay (arXiv:2505.18757v2, section 4.1).

Shapes: B images, n visual tokens, d feature width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from vtok.errors import ConfigError, shown
from vtok.ops.diversity import greedy_diverse
from vtok.ops.selection import kept_tokens

__all__ = ["SELECTORS", "k_center_select", "kept_tokens", "max_sum_select"]


def max_sum_select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Greedy max-sum diversification (eqs. 4 to 7, algorithm 1): next comes the token least similar to the sum of those taken.

    Two near-identical outliers are both taken: nothing here protects against duplicates (`k_center_select` does). Similarities
    are cosines in at least fp32; in half precision the order changes. Of equal sums the lowest token number wins.

    Args:
        features: [B, n, d], after the connector, as the language model reads them.
        k: tokens to keep, the pivot included: one number, or one per image ([B]). Tensors cost one host synchronisation,
            numbers none.
        pivot: [B] int64 (or one number for all), the token that each image starts from; a valid one.
        valid: [B, n] bool, False = padding, which is never chosen; `None` = all real.

    Returns:
        [B, k] int64 in order of choice, the pivot first; the largest k where they differ. -1 fills up images that keep fewer
        or have fewer valid tokens. Sort it before rotary positions are attached.

    Raises:
        ConfigError: shapes do not fit, k is not in 1 .. n, or pivot is a number outside the image.
    """
    return _select(features, k, pivot, valid, "sum")


def k_center_select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Farthest-point traversal (greedy k-center): next comes the token whose nearest taken one is farthest, by cosine.

    The abstract of the paper's first version names k-center, its second defines max-sum; the two keep different tokens. With
    another first token it is also the loop of DivPrune (Alvar et al., CVPR 2025). Arguments, result and errors as in
    `max_sum_select`.
    """
    return _select(features, k, pivot, valid, "max")


SELECTORS = {"max_sum": max_sum_select, "k_center": k_center_select}


def _select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None, criterion: str
) -> Tensor:
    if features.ndim != 3 or not features.is_floating_point():
        raise ConfigError(f"features must be floating [B, n, d], got {features.dtype} {list(features.shape)}")
    batch, n, _ = features.shape
    if valid is not None and (valid.shape != (batch, n) or valid.dtype != torch.bool):
        raise ConfigError(f"valid must be bool [{batch}, {n}], got {valid.dtype} {list(valid.shape)}")
    most, counts = _counts(k, batch, n, features.device)
    if not isinstance(pivot, Tensor):
        if not 0 <= operator.index(pivot) < n:
            raise ConfigError(f"pivot={pivot} is no token of an image of {n}; pass 0 to {n - 1}")
        pivot = torch.full((batch,), operator.index(pivot), device=features.device)
    if pivot.shape != (batch,) or pivot.dtype != torch.int64:
        raise ConfigError(f"pivot must be int64 [{batch}], one per image; got {pivot.dtype} {list(pivot.shape)}")
    order, _ = greedy_diverse(features, most, pivot, valid, criterion)
    if counts is None:
        return order
    return order.masked_fill(torch.arange(most, device=order.device) >= counts[:, None], -1)


def _counts(k: int | Sequence[int] | Tensor, batch: int, n: int, device: torch.device) -> tuple[int, Tensor | None]:
    """The largest count, and the count of every image ([B]; `None` = the same for all)."""
    values = k.tolist() if isinstance(k, Tensor) else k
    try:
        counts = [operator.index(c) for c in values] if isinstance(values, Sequence) else [operator.index(values)] * batch
    except TypeError:
        raise ConfigError(f"k counts tokens: a whole number, or one per image; got {shown(k)}") from None
    if len(counts) != batch:
        raise ConfigError(f"k lists {len(counts)} counts for {batch} images; pass one number, or one per image")
    least, most = min(counts, default=1), max(counts, default=1)
    if not 1 <= least <= most <= n:
        raise ConfigError(f"k must be 1 to {n}, the number of tokens; got {most if most > n else least}")
    return most, None if least == most else torch.tensor(counts, device=device)
