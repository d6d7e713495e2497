"""Tensors that depend on nothing but numbers, made once: on a CPU a pass over one image feels every small operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEPT: dict[tuple[Any, ...], Tensor] = {}
_MOST = 4096  # lengths come by the dozen; a caller with ever new ones starts over


def constant(like: Tensor, make: Callable[..., Tensor], *numbers: int | float) -> Tensor:
    """`make(*numbers, device=...)` on the device of a tensor, for reading only.

    Kept for plain tensors of a CPU. Elsewhere it is made anew: a tensor of a trace, of a captured graph or of a fake mode must
    not outlive it.

    Args:
        like: says where.
        make: a function that returns the same for the same numbers.
        numbers: its arguments.
    """
    if type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return make(*numbers, device=like.device)
    key = (make, *numbers)
    found = _KEPT.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not serve a pass with gradients
            found = make(*numbers, device=like.device)
        if type(found) is Tensor:
            if len(_KEPT) >= _MOST:
                _KEPT.clear()
            _KEPT[key] = found
    return found


def ramp(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    """`torch.arange(start, stop, step)` on the device of a tensor: see `constant`."""
    return constant(like, torch.arange, start, stop, step)
