"""The reference encoder that was really pretrained: a DINOv2 ViT-S/14 from PyPI, with a head for clip art and a dense one.

What was measured on it: assets/docs/results/dinov2.md in the repository.
"""

from vtok.eval.models.dinov2.model import (
    REFERENCE_DINOV2,
    SIZE,
    Saliency,
    load_clip_art,
    load_dinov2,
    load_hf_dinov2,
    load_saliency,
    normalise,
)
from vtok.eval.models.dinov2.weights import installed

__all__ = [
    "REFERENCE_DINOV2",
    "SIZE",
    "Saliency",
    "installed",
    "load_clip_art",
    "load_dinov2",
    "load_hf_dinov2",
    "load_saliency",
    "normalise",
]
