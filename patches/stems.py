"""Hooks on what turns images into patches: the grid that a call's patches fill, whatever size the model was built for.

A tower announces it to its `TokenTracker`, and block 0 takes it over with the tokens (`TokenState.grid`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.tracker import TokenTracker
from vtok.errors import UnsupportedModelError
from vtok.patches.module_swap import Hook


def grid_of(embed: Any, size: Any) -> tuple[int, int]:
    """(rows, columns) of patches that a timm embedding makes of an image of (height, width)."""
    if getattr(embed, "grid_size", None) and tuple(size) == tuple(embed.img_size or ()):
        return tuple(embed.grid_size)
    if hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size(size))
    return size[0] // embed.patch_size[0], size[1] // embed.patch_size[1]


class StemHook(Hook):
    """Base of these hooks."""

    def __init__(self, run: TokenTracker):
        self.run = run


class ImageStem(StemHook):
    """Forward pre-hook of a timm embedding, which is given images [B, C, H, W]."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if isinstance(args[0], torch.fx.Proxy):
            raise UnsupportedModelError(
                "torch.fx's symbolic tracing cannot follow a model as vtok patched it; use torch.compile or torch.export, or "
                "call vtok.unpatch(model) first"
            )
        if not isinstance(args[0], Tensor) or args[0].ndim != 4:
            raise UnsupportedModelError("vtok patches image input [B, C, H, W]; packed NaFlex input is not supported")
        self.run.announce(grid_of(module, args[0].shape[2:]))


class ConvStem(StemHook):
    """Forward hook of a convolution that makes one token of every position of what it returns, [B, C, rows, columns]."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.run.announce((output.shape[-2], output.shape[-1]))


class UnmaskedImages(StemHook):
    """Forward pre-hook of a tower: under tracing, where no value can be asked for, transformers makes a mask of every call; if
    the caller gave images alone, that mask hides nothing."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = sum(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        self.run.unmasked = torch.compiler.is_compiling() and given == 1


class UnmaskedImagesEnd(StemHook):
    """Forward hook of a tower: what is known of a call's masks says nothing of blocks that are called without the tower."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.run.unmasked = False


class StatedStem(StemHook):
    """Forward pre-hook of an embedding that is told the (rows, columns) of every image, as SigLIP2's is."""

    def __init__(self, run: TokenTracker, parameter: str, position: int):
        super().__init__(run)
        self.parameter, self.position = parameter, position

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shapes = kwargs[self.parameter] if self.parameter in kwargs else args[self.position]
        self.run.announce(torch.as_tensor(shapes))
