"""Row numbers, and moving rows of token tensors. B batch, N rows in, M rows out, C width, P prefix tokens.

On a CPU a pass over one image feels every small operation: row numbers that depend on nothing but lengths are made once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEPT: dict[tuple[Any, ...], Tensor] = {}
_MOST = 1024  # lengths come by the dozen; a caller with ever new ones starts over
_LONGEST = 2**15  # numbers of one that is kept
_transforms = torch._C._functorch.peek_interpreter_stack  # of torch.func that are running; `None` = none


def constant(like: Tensor, make: Callable[..., Tensor], *numbers: int | float) -> Tensor:
    """`make(*numbers, device=...)` on the device of a tensor, for reading only.

    Kept for plain tensors of a CPU. Elsewhere it is made anew: a tensor of a trace, of a captured graph, of a transform of
    torch.func or of a fake mode must not outlive it.

    Args:
        like: says where.
        make: a function that returns the same for the same numbers.
        numbers: its arguments.
    """
    if type(like) is not Tensor or not like.is_cpu or _traced() or _transforms() is not None:
        return make(*numbers, device=like.device)
    key = (make, *numbers)
    found = _KEPT.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not serve a pass with gradients
            found = make(*numbers, device=like.device)
        if type(found) is Tensor and found.numel() <= _LONGEST:
            if len(_KEPT) >= _MOST:
                _KEPT.clear()
            _KEPT[key] = found
    return found


def _traced() -> bool:
    """Whether operations are recorded, to be run with other numbers of images."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def ramp(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    """`torch.arange(start, stop, step)` on the device of a tensor: see `constant`."""
    return constant(like, torch.arange, start, stop, step)


def take_rows(t: Tensor, rows: Tensor) -> Tensor:
    """`t[b, rows[b, m]]`: [B, N] or [B, N, C] and [B, M] -> [B, M] or [B, M, C].

    Whole rows are copied through a flat `index_select`; a `gather` with an expanded index would look every element up.
    """
    if t.ndim == 2:
        return t.gather(1, rows)
    batch, n, width = t.shape
    if batch == 1 and not torch.jit.is_tracing():  # nothing to flatten: at one image every operation counts
        return t.index_select(1, rows[0])
    return t.reshape(batch * n, width).index_select(0, flat_rows(rows, n)).view(*rows.shape, width)


def flat_rows(rows: Tensor, n: int) -> Tensor:
    """Row numbers [B, M] within images of n rows -> row numbers [B M] of the flattened batch."""
    batch = rows.shape[0]
    alone = batch == 1 and not torch.jit.is_tracing()
    return rows[0] if alone else (rows + ramp(0, batch * n, n, rows)[:, None]).flatten()


def prefix_rows(batch: int, num_prefix: int, like: Tensor) -> Tensor:
    """[B, P]: rows 0 .. P-1 of every image, on the device of a tensor."""
    return ramp(0, num_prefix, 1, like).expand(batch, num_prefix)


def with_prefix(patch_rows: Tensor, num_prefix: int) -> Tensor:
    """Patch rows [B, M], counted without the prefix -> rows [B, P + M] of the whole sequence, the prefix first."""
    if num_prefix == 0:
        return patch_rows
    return torch.cat([prefix_rows(patch_rows.shape[0], num_prefix, patch_rows), patch_rows + num_prefix], 1)


def rows_where(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of the True entries, in order, padded: no host synchronisation, fixed shape.

    Args:
        chosen: [B, n] bool.
        width: columns of the result; entries beyond it are lost.

    Returns:
        (positions [B, width] int64, 0 where padded; valid [B, width] bool).
    """
    batch, n = chosen.shape
    place = (chosen.cumsum(-1) - 1).where(chosen, width).clamp_max(width)  # column `width` collects what is not chosen
    rows = torch.zeros(batch, width + 1, dtype=torch.int64, device=chosen.device)
    rows = rows.scatter(1, place, ramp(0, n, 1, chosen).expand(batch, n))[:, :width]
    valid = ramp(0, width, 1, chosen) < chosen.sum(-1, keepdim=True)
    return rows, valid
