"""Models by name, for the command line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.eval.data import normalise
from vtok.eval.reference import load_reference_images, load_reference_vit
from vtok.eval.settings import towers
from vtok.eval.tasks.timm_pipeline import Options, create_model

REFERENCE = "reference"


def load_model(
    name: str, pretrained: bool = False, img_size: int | None = None, seed: int = 0, meta: bool = False
) -> nn.Module:
    """`"reference"` for the ViT that comes with vtok, else a timm model (random weights unless `pretrained`, none
    at all with `meta`), in eval mode."""
    if name == REFERENCE:
        return load_reference_vit()
    kwargs = {"img_size": img_size} if img_size else {}
    return create_model(name, Options(pretrained=pretrained, model_kwargs=kwargs, seed=seed), meta).eval()


def sample_images(name: str, model: nn.Module, batch_size: int, seed: int = 0) -> Tensor:
    """[B, C, H, W]: test images for the reference model, else noise of the size that the model was built for."""
    if name == REFERENCE:
        images, _ = load_reference_images("test")
        return normalise(images[:batch_size])
    size = towers(model)[0][1].input_size
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(seed))
