"""The reference models that come with vtok: small, trained on real images by scripts of this package, shipped in `assets/`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok.eval.data import read_idx

VIT_WEIGHTS = "fashion_vit.safetensors"


@dataclass(frozen=True)
class FashionViT:
    """Anatomy of the reference ViT: a plain timm `VisionTransformer`, CLS and 196 patches of 2 x 2 pixels, 1.4 M parameters."""

    img_size: int = 28
    patch_size: int = 2
    in_chans: int = 1
    num_classes: int = 10
    embed_dim: int = 96
    depth: int = 12
    num_heads: int = 3

    def build(self, **extra: Any) -> nn.Module:
        """A freshly initialised model; `extra` goes to timm's constructor (training passes its dropout rates)."""
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**asdict(self), **extra)


def asset(name: str) -> Path:
    """Path of a bundled file; works from a checkout and from an installed wheel."""
    with as_file(files("vtok.assets") / name) as path:
        if not path.is_file():
            raise FileNotFoundError(f"vtok.assets has no {name}: this installation of vtok is incomplete")
        return path


def load_reference_vit() -> nn.Module:
    """The trained reference ViT in eval mode, fp32 (its weights are stored in fp16)."""
    from safetensors.torch import load_file

    model = FashionViT().build()
    model.load_state_dict({k: v.float() for k, v in load_file(asset(VIT_WEIGHTS)).items()})
    return model.eval()


def load_reference_images(split: str = "test") -> tuple[Tensor, Tensor]:
    """Bundled Fashion-MNIST images: `"test"` (all 10,000) or `"calibration"` (1,000 training images kept out of training).

    Returns:
        (images [S, 1, 28, 28] uint8, labels [S] int64).
    """
    prefix = {"test": "t10k", "calibration": "calibration"}[split]
    images = read_idx(asset(f"fashion_mnist/{prefix}-images-idx3-ubyte.gz"))
    labels = read_idx(asset(f"fashion_mnist/{prefix}-labels-idx1-ubyte.gz"))
    return images.unsqueeze(1), labels.long()


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Share of `images` (already normalised) whose highest logit is the label."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(-1) == y).sum()) for x, y in zip(images.split(batch_size), labels.split(batch_size)))
    model.train(was_training)
    return hits / len(labels)
