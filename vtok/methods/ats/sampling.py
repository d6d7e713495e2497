"""Inverse-transform sampling of scores at fixed points, batched and without a distance matrix.

Shapes: B batch, n scored tokens, K sample points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(points: Tensor, grid: Tensor) -> Tensor:
    """For every point [B, K] the index of the closest entry of an ascending grid [B, n]; ties take the lower index."""
    right = torch.searchsorted(grid, points).clamp_max(grid.shape[-1] - 1)  # first entry >= point
    left = (right - 1).clamp_min(0)
    closer_left = points - grid.gather(-1, left) <= grid.gather(-1, right) - points
    found = torch.where(closer_left, left, right)
    return torch.searchsorted(grid, grid.gather(-1, found))  # of equal entries, the first


def midpoint_samples(score: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """ATS as the paper describes it: K mid-points (2t-1)/2K of [0, 1] are mapped through the inverse of the scores' CDF.

    Args:
        score: [B, n] >= 0.
        k: K, number of sample points.
        valid: [B, n] bool; tokens outside are never chosen and do not shift the others; `None` = all.

    Returns:
        [B, n] bool, True for tokens hit by at least one sample: at most min(K, n), at least one.
    """
    key = score if valid is None else score.masked_fill(~valid, float("inf"))  # padding sorts last
    ordered, order = key.sort(dim=-1, stable=True)
    mass = score if valid is None else score * valid
    cdf = (ordered if valid is None else mass.gather(-1, order)).cumsum(-1)
    total = mass.sum(-1, keepdim=True)
    cdf = cdf / torch.where(total > 0, total, 1)
    if valid is not None:  # out of reach of every sample, whatever the last bits of a parallel sum are
        cdf = cdf.masked_fill(~valid.gather(-1, order), 3.0)
    # Entry j is closest for the samples between the middles to its neighbours; of equal entries the first takes them all. How
    # many of the K lie below a value follows from arithmetic, so a large K costs nothing.
    n = cdf.shape[-1]
    before = F.pad(cdf, (1, 1), value=float("-inf"))  # the entry before each, and one behind the last
    later = F.pad(cdf, (0, 1), value=float("inf")).gather(-1, torch.searchsorted(cdf, cdf, right=True))  # next higher entry
    middle = torch.cat([cdf + later, cdf + before[:, :n]], 1) / 2
    up_to = (middle * k + 0.5).floor().clamp(0, k)  # how many of the points (2t-1)/2K, t = 1 .. K, are <= the middle
    hit = (cdf > before[:, :n]) & (up_to[:, :n] > up_to[:, n:])
    return torch.zeros_like(hit).scatter(-1, order, hit)


def endpoint_samples(score: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """ATS as its authors' code samples: the CDF is stretched to [0, 1] (its first entry becomes 0), and `points` samples run
    from its smallest non-zero value to 1, both included. At least the least significant token is lost each time.

    Args:
        score: [B, n] >= 0, 0 for padding.
        points: number of samples (the original number of patches).

    Returns:
        (order [B, n] token ids by ascending score, hit [B, n] bool in that order).
    """
    order = score.argsort(dim=-1, stable=True)
    cdf = score.gather(-1, order).cumsum(-1)
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / torch.where(high > low, high - low, 1)
    start = cdf.masked_fill(cdf == 0, float("inf")).amin(-1, keepdim=True)
    # The authors build the line in float32 and widen it; building it in float64 would flip borderline samples.
    line = torch.linspace(0, 1, points, device=score.device, dtype=torch.float32).to(score.dtype)
    last = max(1, points - 1)
    samples = start + (line * last - start * torch.arange(points, device=score.device)) / last
    index = nearest(samples.contiguous(), cdf.contiguous())
    hit = torch.zeros_like(order, dtype=torch.bool).scatter(-1, index, True)
    return order, hit
