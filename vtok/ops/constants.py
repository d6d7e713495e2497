"""Row numbers that depend on nothing but lengths, made once: on a CPU a pass over one image feels every small operation."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT: dict[tuple[int, int, int], Tensor] = {}
_MOST = 4096  # lengths come by the dozen; a caller with ever new ones starts over


def ramp(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    """`torch.arange(start, stop, step)` on the device of a tensor: for reading only.

    Kept for plain tensors of a CPU. Elsewhere it is made anew: a tensor of a trace, of a captured graph or of a fake mode must
    not outlive it.
    """
    if type(like) is not Tensor or not like.is_cpu or torch.compiler.is_compiling():
        return torch.arange(start, stop, step, device=like.device)
    key = (start, stop, step)
    found = _KEPT.get(key)
    if found is None:
        with torch.inference_mode(False):  # a tensor of inference mode could not serve a pass with gradients
            found = torch.arange(start, stop, step, device="cpu")
        if type(found) is Tensor:
            if len(_KEPT) >= _MOST:
                _KEPT.clear()
            _KEPT[key] = found
    return found
