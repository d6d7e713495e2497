"""Moving rows of token tensors. B batch, N rows in, M rows out, C width, P prefix tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(t: Tensor, rows: Tensor) -> Tensor:
    """`t[b, rows[b, m]]`: [B, N] or [B, N, C] and [B, M] -> [B, M] or [B, M, C].

    Whole rows are copied through a flat `index_select`; a `gather` with an expanded index would look every element up.
    """
    if t.ndim == 2:
        return t.gather(1, rows)
    batch, n = t.shape[:2]
    return t.reshape(batch * n, t.shape[2]).index_select(0, flat_rows(rows, n)).view(*rows.shape, t.shape[2])


def flat_rows(rows: Tensor, n: int) -> Tensor:
    """Row numbers [B, M] within images of n rows -> row numbers [B M] of the flattened batch."""
    return (rows + torch.arange(0, rows.shape[0] * n, n, device=rows.device)[:, None]).flatten()


def prefix_rows(batch: int, num_prefix: int, device: torch.device) -> Tensor:
    """[B, P]: rows 0 .. P-1 of every image."""
    return torch.arange(num_prefix, device=device).expand(batch, num_prefix)


def with_prefix(patch_rows: Tensor, num_prefix: int) -> Tensor:
    """Patch rows [B, M], counted without the prefix -> rows [B, P + M] of the whole sequence, the prefix first."""
    if num_prefix == 0:
        return patch_rows
    return torch.cat([prefix_rows(patch_rows.shape[0], num_prefix, patch_rows.device), patch_rows + num_prefix], 1)


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
    rows = rows.scatter(1, place, torch.arange(n, device=chosen.device).expand(batch, n))[:, :width]
    valid = torch.arange(width, device=chosen.device) < chosen.sum(-1, keepdim=True)
    return rows, valid
