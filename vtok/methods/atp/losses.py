"""Losses of ATP-LLaVA (Ye et al., CVPR 2025): what makes its thresholds spend a budget of tokens. See `vtok.methods.atp` for
what is known of the paper and what is our interpretation.

Readings: the average of the target loss runs over all decoder layers (a KV cache that shrinks by as much as the tokens fits
that; the reproductions average over the modules: `over="modules"`); that loss is divided by the number of visual tokens,
because in tokens it outweighs the language loss by far (`normalise=False` leaves it in tokens).

Shapes: B samples, M modules; `...` any leading dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.errors import ConfigError, shown
from vtok.methods.atp.scores import Slots

AVERAGES = ("layers", "modules")


class ATPLosses(NamedTuple):
    """Scalars of one batch.

    Attributes:
        extra: lambda_atp `depth` + lambda_target `target`, to be added to the language loss (Eq. 14).
        depth: L_atp (Eq. 12).
        target: L_target (Eq. 13), as a share of the visual tokens or in tokens.
        average: N_avg, tokens.
    """

    extra: Tensor
    depth: Tensor
    target: Tensor
    average: Tensor


def token_counts(gate: Tensor, slots: Slots) -> Tensor:
    """n_m [B]: visual tokens behind a module; soft counts of a gate [B, N], differentiable, or whole ones of a keep mask."""
    return (gate * slots.image).sum(-1)


def depth_loss(counts: Tensor, layers: Sequence[int], total: int | Tensor) -> Tensor:
    """L_atp = sum_m n_m / n_0 l_m (Eq. 12): tokens cost more the deeper they get.

    Args:
        counts: [..., M], tokens behind every module.
        layers: l_m, 0-based, the first decoder layer behind module m.
        total: n_0, visual tokens before pruning, a number or [...].

    Returns:
        [...].
    """
    weight = torch.as_tensor(tuple(layers), dtype=counts.dtype, device=counts.device)
    return (counts * weight).sum(-1) / total


def average_tokens(counts: Tensor, layers: Sequence[int], total: int | Tensor, num_layers: int, over: str = "layers") -> Tensor:
    """N_avg of Eq. 13.

    Args:
        counts: [..., M].
        layers: l_m, rising.
        total: n_0, which the layers in front of the first module see; a number or [...].
        num_layers: depth of the decoder.
        over: `"layers"`, the mean over all decoder layers, or `"modules"`, the mean of `counts`.

    Returns:
        [...], tokens.
    """
    if over not in AVERAGES:
        raise ConfigError(f"over must be one of {', '.join(AVERAGES)}, got {shown(over)}")
    if over == "modules":
        return counts.mean(-1)
    bounds = (*layers, num_layers)
    spans = torch.as_tensor([b - a for a, b in itertools.pairwise(bounds)], dtype=counts.dtype, device=counts.device)
    return (layers[0] * total + (counts * spans).sum(-1)) / num_layers


def atp_loss(
    counts: Tensor,
    layers: Sequence[int],
    total: int | Tensor,
    num_layers: int,
    target_tokens: float = 144,
    lambda_atp: float = 0.05,
    lambda_target: float = 0.2,
    normalise: bool = True,
    over: str = "layers",
) -> ATPLosses:
    """Eq. 12 to 14 for a batch. Counts are averaged over the samples before they are held against the target, so that a sample
    may keep more where another keeps fewer; samples without an image are left out.

    Args:
        counts: [B, M], from `token_counts`.
        layers: l_m, rising.
        total: n_0, a number or [B].
        num_layers: depth of the decoder.
        target_tokens: N_target, the average aimed at (paper: 144 of 576).
        lambda_atp: weight of L_atp (0.05 or 0.01 in the reproductions).
        lambda_target: weight of L_target (0.2 in both).
        normalise: divide L_target by n_0.
        over: see `average_tokens`.
    """
    size = torch.as_tensor(total, dtype=counts.dtype, device=counts.device).expand(counts.shape[0])
    samples = (size > 0).sum()  # the others add nothing to any sum
    some, samples = samples > 0, samples.clamp_min(1)
    depth = depth_loss(counts, layers, size.clamp_min(1)).sum() / samples
    average = average_tokens(counts, layers, size, num_layers, over).sum() / samples
    target = (average - target_tokens).abs() * some
    if normalise:
        target = target / (size.sum() / samples).clamp_min(1)
    return ATPLosses(lambda_atp * depth + lambda_target * target, depth, target, average)
