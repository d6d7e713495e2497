"""Density-peak clustering among nearest neighbours (DPC-KNN), for batches whose rows have different numbers of points.

Shapes: B rows, T points of which some are padding, D width, M clusters at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32


def density_peaks(x: Tensor, clusters: Tensor, most: int, valid: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres are points of high density far from any denser one; every other point goes to its nearest centre.

    Density is exp(-mean of the squared distances to the c nearest points, itself included), c the number of clusters; distance
    is Euclid's over sqrt(D). Of equal densities the first point counts as the denser one, so that nothing is random and copies
    do not all become centres; of equally near centres the one of higher rank wins. Distances are T x T.

    Args:
        x: [B, T, D], compared in at least fp32.
        clusters: [B] int64, how many each row is parted into, at most its points.
        most: M, the largest of these or more.
        valid: [B, T] bool, False = padding.
        noise: [B, T], added to the densities; `None` = nothing.

    Returns:
        (centre [B, M] int64, points that are centres by falling rank, meaningless from `clusters` on;
        home [B, T] int64, the rank of each point's centre).
    """
    x = at_least_fp32(x)
    both = valid[:, :, None] & valid[:, None]
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    near = distance.masked_fill(~both, float("inf")).topk(most, dim=2, largest=False).values.square().cumsum(2)
    last = (clusters - 1).clamp_min(0)[:, None, None].expand(-1, x.shape[1], 1)
    density = -near.gather(2, last)[..., 0] / clusters.clamp_min(1)[:, None]  # its logarithm: it is soon too small for a float
    if noise is not None:
        density = (density.exp() + noise).log()
    first = torch.ones_like(both[0]).tril(-1)  # [i, j]: j stands in front of i
    mine, theirs = density[:, :, None], density[:, None]
    denser = ((theirs > mine) | ((theirs == mine) & first)) & both
    farthest = distance.masked_fill(~both, 0).amax((1, 2), keepdim=True)
    gap = torch.where(denser, distance, farthest).amin(2)
    score = (gap.log() + density).clamp_min(torch.finfo(x.dtype).min).masked_fill(~valid, float("-inf"))
    centre = score.argsort(dim=1, descending=True, stable=True)[:, :most]
    rank = torch.arange(most, device=x.device).expand_as(centre)
    real = rank < clusters[:, None]
    to_centre = distance.gather(1, centre[..., None].expand(-1, -1, x.shape[1]))  # [B, M, T]
    home = to_centre.masked_fill(~real[..., None], float("inf")).argmin(1)
    spare = torch.cat([home, home[:, :1]], 1).scatter(1, centre.where(real, x.shape[1]), rank)
    return centre, spare[:, : x.shape[1]]
