"""ATP-LLaVA: learned thresholds decide for each prompt which visual tokens stay."""

from vtok.methods.atp.config import ATP, TRAINING
from vtok.methods.atp.scores import (
    Slots,
    check_strides,
    hard_mask,
    min_max,
    next_gate,
    redundancy,
    soft_masks,
    spatial_scores,
    to_grid,
)

__all__ = [
    "ATP",
    "TRAINING",
    "Slots",
    "check_strides",
    "hard_mask",
    "min_max",
    "next_gate",
    "redundancy",
    "soft_masks",
    "spatial_scores",
    "to_grid",
]
