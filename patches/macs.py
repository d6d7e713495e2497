"""Closed-form costs of modules, from the shapes of their weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vtok.cost.encoder import BlockCost
from vtok.patches.protocol import Block


def linear_macs(module: nn.Module | None) -> int:
    """MACs per token of all linear layers in `module` (quantised and adapted ones too: any with in_ and out_features)."""
    if module is None:
        return 0
    layers: list[Any] = [m for m in module.modules() if _is_linear(m)]
    outer = [m for m in layers if any(_is_linear(inner) for inner in m.modules() if inner is not m)]  # adapters around a layer
    return sum(layer.in_features * layer.out_features for layer in layers if layer not in outer)


def position_macs(layer: Any) -> int:
    """MACs of a linear layer, convolution or table for one row or position that it returns, from its sizes: the weight itself
    may be packed (quantised)."""
    if _is_linear(layer):
        return layer.in_features * layer.out_features
    if hasattr(layer, "kernel_size"):
        return layer.out_channels * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return layer.weight.numel()


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def block_cost(block: Block) -> BlockCost:
    """MACs of one block."""
    attn, attend = block.attention, block.attend
    per_pair = attend.pair_macs(attn)
    if block.spec.whole:
        return BlockCost(linear_macs(block.module), 0, per_pair, 0, whole=True)
    late = sum(linear_macs(getattr(attn, name, None)) for name in attend.late)
    mlp = getattr(block.module, block.spec.mlp)
    bare = sum(getattr(attn, name).numel() for name in attend.weights)
    return BlockCost(linear_macs(attn) - late + bare, late, per_pair, linear_macs(mlp))


def shape_only_macs(module: nn.Module, input_size: tuple[int, int, int]) -> int:
    """MACs of the convolutions and linear layers in `module`, by a pass over fake tensors: shapes flow, nothing is computed."""
    from torch._subclasses import FakeTensorMode

    total = 0

    def count(layer: Any, args: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += position_macs(layer) * (output.numel() // output.shape[1 if isinstance(layer, nn.Conv2d) else -1])

    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    weight = next(module.parameters())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            module(torch.empty(1, *input_size, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return total
