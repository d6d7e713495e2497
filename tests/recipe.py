"""Weights and images of the whole-model golden files, made from names alone: nothing is downloaded, nothing is stored.

Every number comes from a splitmix64 stream, mapped to [-1, 1). Only integers and exact binary fractions are involved, so the
values are the same bits on every platform. Two families differ in how a name becomes a seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _stream(seed: int, shape: Sequence[int]) -> Tensor:
    """float64 in [-1, 1), entry i (C order) being number i of the splitmix64 stream of `seed`."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(2.0 * ((z >> np.uint64(11)).astype(np.float64) / 2**53) - 1.0).view(*shape)


def fnv1a(name: str) -> int:
    """64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value


def by_fnv(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers of the ToMe, PiToMe and ATS files."""
    return _stream(fnv1a(name), shape)


def by_crc(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers of the Zero-TPrune model file."""
    return _stream((1000003 * zlib.crc32(name.encode()) * _GAMMA) & _MASK, shape)


def _fan_in_scale(shape: Sequence[int]) -> float:
    return float(np.sqrt(3.0 / int(np.prod(shape[1:]))))


def vit_weight(tag: str, name: str, shape: Sequence[int]) -> Tensor:
    """One parameter of the models `deit_tiny`, `deit_tiny_distilled`, `micro` and `micro_mae`; `tag` names the model."""
    u = by_fnv(f"{tag}/{name}", shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return 1.0 + 0.1 * u
    if len(shape) == 1:
        return 0.05 * u
    if name in ("cls_token", "dist_token", "pos_embed"):
        return 0.3 * u
    return (1.5 if name.endswith("qkv.weight") else 1.0) * _fan_in_scale(shape) * u


def tiny_weight(name: str, shape: Sequence[int]) -> Tensor:
    """One parameter of the tiny ViT on which Zero-TPrune's predecessor was run."""
    u = by_crc(name, shape)
    if len(shape) == 1:
        if "norm" in name.split(".")[-2]:
            return 1.0 + 0.1 * u if name.endswith("weight") else 0.1 * u
        return 0.05 * u
    if name in ("cls_token", "pos_embed"):
        return 0.5 * u
    return (3.0 if ".qkv." in name else 1.0) * _fan_in_scale(shape) * u


def image(tag: str, batch: int, size: int) -> Tensor:
    """Images [batch, 3, size, size] with similar patches in them: a colour for every 32 x 32 pixels, plus pixel noise."""
    coarse = by_fnv(f"{tag}/coarse", (batch, 3, size // 32, size // 32))
    return coarse.repeat_interleave(32, 2).repeat_interleave(32, 3) + 0.25 * by_fnv(f"{tag}/fine", (batch, 3, size, size))


def fill(model: nn.Module, tag: str | None) -> nn.Module:
    """Sets every parameter, in place; `tag` as in `vit_weight`, `None` for the tiny ViT."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tiny_weight(name, parameter.shape) if tag is None else vit_weight(tag, name, parameter.shape))
    return model.eval()
