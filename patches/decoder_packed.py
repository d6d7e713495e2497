"""Rows that hold several samples one behind the other (packed, or padding-free): where each sample starts, and what follows.

transformers tells the samples of a row apart by positions that start over, and only where it is given no mask. Once tokens are
dropped, positions have gaps, which it would take for borders: borders are therefore read from the caller's positions, once, and
kept as the number of each column's sample.

Shapes: B rows, L columns of the prompt, M slots of a shortened sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import UnsupportedModelError
from vtok.patches.decoder_masks import is_flash
from vtok.patches.hf_features import feature_list

_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def sample_of(
    kwargs: Mapping[str, Any], batch: int, length: int, implementation: str, cached: bool, flat: bool
) -> Tensor | None:
    """Which sample of its row every column belongs to, by the rules of the installed transformers; no host synchronisation.

    Args:
        kwargs: of a call that reads whole prompts.
        batch: B.
        length: L.
        implementation: of attention.
        cached: whether the LLM fills a cache: attention that takes explicit masks then looks for no borders.
        flat: whether the LLM reads borders from positions [B, L] too, not only from the first of four rows [4, B, L].

    Returns:
        [B, L] int64, rising in each row; `None` where transformers would not look for borders. Whether there are any, `several`
        says.
    """
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if any(m is not None for m in mask.values()) if isinstance(mask, Mapping) else mask is not None:
        return None
    flash = is_flash(implementation)
    if flash and has_lengths(kwargs):
        ends = kwargs["cu_seq_lens_q"][1:]
        column = torch.arange(batch * length, device=ends.device, dtype=ends.dtype)
        return torch.searchsorted(ends, column, right=True).view(batch, length)
    if isinstance(position, Tensor) and position.ndim == 3:
        position = position[0] if len(position) == 4 else None
    elif not flat:
        position = None
    if not isinstance(position, Tensor) or position.shape[-1] != length or length < 2:
        return None
    if flash:  # one row alone is flattened, and restarts where positions are lowest
        return (position == position.amin()).cumsum(-1) - 1 if batch == len(position) == 1 else None
    if cached:
        return None
    first = torch.zeros_like(position[:, :1], dtype=torch.bool)
    return torch.cat([first, position.diff(dim=-1) != 1], -1).cumsum(-1).expand(batch, -1)


def has_lengths(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call states the lengths of its samples itself, as flash attention takes them."""
    return all(kwargs.get(name) is not None for name in _VARLEN)


def several(sample: Tensor) -> Tensor:
    """Scalar bool: whether a row holds more than one of the samples [B, L]."""
    return (sample[:, :1] != sample[:, -1:]).any()


def of_columns(sample: Tensor, column: Tensor) -> Tensor:
    """[B, M] int64: samples of columns [B, M] of the prompt, -1 for the padding among them."""
    return sample.to(column.device).gather(1, column.clamp_min(0)).masked_fill(column < 0, -1)


def block_mask(sample: Tensor) -> Tensor:
    """[B, 1, M, M] bool: what every slot sees, itself and what stands in front of it in its sample [B, M]; padding sees padding."""
    order = torch.arange(sample.shape[1], device=sample.device)
    return ((sample[:, :, None] == sample[:, None]) & (order[:, None] >= order))[:, None]


def lengths(sample: Tensor) -> dict[str, Any]:
    """The same [B, M] for flash attention: lengths of the samples of all rows, one behind the other. Synchronises once."""
    first = torch.ones_like(sample, dtype=torch.bool)
    first[:, 1:] = sample[:, 1:] != sample[:, :-1]
    ends = torch.cat([first.flatten().nonzero()[:, 0], first.new_tensor([first.numel()], dtype=torch.int64)]).to(torch.int32)
    longest = int(ends.diff().max())
    return dict(zip(_VARLEN, (ends, ends, longest, longest)))


def check_images(name: str, outputs: Mapping[str, Any], tokens: Mapping[str, int], ids: Tensor, sample: Tensor) -> None:
    """Raises where what a model hands over as one image belongs to several samples, which would compete for tokens.

    Args:
        name: of the model.
        outputs: modality -> encoded images.
        tokens: modality -> id of its placeholder.
        ids: [B, L] of the prompt.
        sample: [B, L].
    """
    for modality, output in outputs.items():
        here = sample[ids == tokens[modality]].split([len(x) for x in feature_list(output)])
        if any(len(part) and bool(part[0] != part[-1]) for part in here):
            raise UnsupportedModelError(
                f"{name} hands over the {modality}s of a whole row as one, but rows hold several samples (their positions start "
                "over), which would compete for tokens; give every sample a row of its own, padded, with an attention_mask"
            )
