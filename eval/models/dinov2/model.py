"""The same encoder for timm and for transformers, and the head that draws saliency maps.

Shapes: B images, D = 384 width, a grid of g x g = 16 x 16 patches at 224 px.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.assets import library, load_weights
from vtok.eval.models.dinov2 import weights as stored

REFERENCE_DINOV2 = "reference-dinov2"
SIZE, PATCH, WIDTH, HEADS, DEPTH = 224, 14, 384, 6, 12
HEAD = "clip_art/head.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TABLE = 518 // PATCH  # side of the position table
_TIMM = {  # names of the checkpoint -> timm's
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}
_PARTS = ("query", "key", "value")


def load_dinov2(size: int = SIZE, **extra: Any) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` with these weights, in eval mode, fp32; `model(images)` is the class token's feature.

    `size` of the images in pixels, a multiple of 14; `extra` goes to timm's `create_model`.

    Raises:
        ConfigError: the package with the weights is not installed.
        MissingExtraError: timm is not installed.
    """
    timm = library("timm")
    weights = _resampled(stored.part_weights(stored.ENCODER), size // PATCH)
    model: Any = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0, **extra)
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"encoder.layer.{i}.attention.attention.{part}.{kind}") for part in _PARTS]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    model.load_state_dict({_renamed(name, _TIMM): value for name, value in weights.items()})
    pixels = {"input_size": (3, size, size), "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    model.pretrained_cfg = {**model.pretrained_cfg, **pixels}
    return model.eval()


def load_clip_art() -> nn.Module:
    """`load_dinov2` with the bundled linear classifier of clip art on the class token. Errors are the same."""
    model: Any = load_dinov2()
    weights = load_weights(HEAD)
    model.reset_classifier(len(weights["bias"]))
    model.head.load_state_dict(weights)
    return model.eval()


def load_hf_dinov2(size: int = SIZE) -> nn.Module:
    """transformers' `Dinov2Model` with these weights, in eval mode, fp32. Arguments and errors are those of `load_dinov2`."""
    hub = library("transformers")
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    model: Any = hub.Dinov2Model(hub.Dinov2Config(patch_size=PATCH, image_size=size, **shape))
    known = model.state_dict()
    newer = {f"attention.attention.{old}": f"attention.{new}_proj" for old, new in zip(_PARTS, "qkv")}
    newer["attention.output.dense"] = "attention.o_proj"
    weights = _resampled(stored.part_weights(stored.ENCODER), size // PATCH)
    weights = {name if name in known else _renamed(name, newer): value for name, value in weights.items()}
    weights["embeddings.mask_token"] = torch.zeros_like(known["embeddings.mask_token"])  # of training; no image has one
    model.load_state_dict(weights)
    return model.eval()


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels [B, 3, h, w] -> fp32, as the encoder takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Saliency(nn.Module):
    """The dense head: three transposed convolutions that double the grid, and a map of one value a pixel."""

    def __init__(self, size: int = SIZE):
        super().__init__()
        self.size = size
        widths = (WIDTH, 256, 128, 64)
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, n, D] normalised features of all patches in raster order -> [B, size, size] in (0, 1)."""
        side = round(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)))
        x = F.interpolate(self.final_conv(x), (self.size, self.size), mode="bilinear", align_corners=False)
        return x.sigmoid()[:, 0]


def load_saliency(size: int = SIZE) -> Saliency:
    """The shipped head in eval mode. Raises `ConfigError` if the package with the weights is not installed."""
    head = Saliency(size)
    head.load_state_dict(stored.part_weights(stored.HEAD), strict=False)
    return head.eval()


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def _resampled(weights: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """The same with a position table for side x side patches, resampled as the file itself does: bicubic, not smoothed."""
    table = weights["embeddings.position_embeddings"]
    grid = table[:, 1:].reshape(1, _TABLE, _TABLE, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return {**weights, "embeddings.position_embeddings": torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)}
