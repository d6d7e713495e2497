"""Rows that hold several samples one behind the other (packed, or padding-free): where each sample starts, and what follows.

transformers tells the samples of a row apart by positions that start over, and only where it is given no mask. Once tokens are
dropped, positions have gaps, which it would take for borders: borders are therefore read from the caller's positions, once, and
kept as the number of each column's sample.

Shapes: B rows, L columns of the prompt, M slots of a shortened sequence, S samples of a row at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.core.prompt import Entry, LayerAttention, Layout, VLMReducer
from vtok.core.reduction import Fold
from vtok.core.tokens import Site
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.kv_cache import PromptState, Stage, cache_in
from vtok.patches.decoder.masks import is_flash
from vtok.patches.hf_vlm.families import Family
from vtok.patches.hf_vlm.generic.outputs import feature_list

_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def samples(model: Any, family: Family, kwargs: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """`sample_of` a call of a model without language head, described by `family`."""
    text = model.get_submodule(family.text)
    checkpoints = getattr(text, "gradient_checkpointing", False) and text.training and torch.is_grad_enabled()
    cached = cache_in(kwargs) is not None or (caches(model, kwargs) and not checkpoints)
    return sample_of(kwargs, batch, length, text.config._attn_implementation, cached, family)


def caches(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call asks its LLM to fill a cache."""
    use = kwargs.get("use_cache")
    return bool(model.config.get_text_config().use_cache if use is None else use)


def sample_of(
    kwargs: Mapping[str, Any], batch: int, length: int, implementation: str, cached: bool, family: Family
) -> Tensor | None:
    """Which sample of its row every column belongs to, by the rules of the installed transformers; no host synchronisation.

    Args:
        kwargs: of a call that reads whole prompts.
        batch: B.
        length: L.
        implementation: of attention.
        cached: whether the LLM fills a cache: attention that takes explicit masks then looks for no borders.
        family: of the model: whether its LLM reads borders from positions [B, L] too, not only from a row in front of those in
            time, height and width.

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
        position = position[0] if len(position) == family.axes + 1 else None
    elif not family.flat_positions:
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


def anew(state: PromptState, stage: Stage) -> Tensor:
    """[B, M] int64: the entered column whose position each slot of a decoder layer takes, see `PromptState.anew`.

    Raises:
        UnsupportedModelError: a row holds several samples.
    """
    if state.sample is not None:
        raise UnsupportedModelError(
            "positions='compact' numbers what is left between the decoder layers one after the other, but a row holds several "
            "samples; give every sample a row of its own, or use positions='original'"
        )
    return state.anew(stage)[0]


def several(sample: Tensor) -> Tensor:
    """Scalar bool: whether a row holds more than one of the samples [B, L]."""
    return (sample[:, :1] != sample[:, -1:]).any()


def of_columns(sample: Tensor, column: Tensor) -> Tensor:
    """[B, M] int64: samples of columns [B, M] of the prompt, -1 for the padding among them."""
    return sample.to(column.device).gather(1, column.clamp_min(0)).masked_fill(column < 0, -1)


def block_mask(sample: Tensor) -> Tensor:
    """[B, 1, M, M] bool: what every slot sees, itself and what stands in front of it in its sample [B, M]; padding, padding."""
    order = torch.arange(sample.shape[1], device=sample.device)
    return ((sample[:, :, None] == sample[:, None]) & (order[:, None] >= order))[:, None]


def lengths(sample: Tensor) -> dict[str, Any]:
    """The same [B, M] for flash attention: lengths of the samples of all rows, one behind the other. Synchronises once."""
    first = torch.ones_like(sample, dtype=torch.bool)
    first[:, 1:] = sample[:, 1:] != sample[:, :-1]
    ends = torch.cat([first.flatten().nonzero()[:, 0], first.new_tensor([first.numel()], dtype=torch.int64)]).to(torch.int32)
    longest = int(ends.diff().max())
    return dict(zip(_VARLEN, (ends, ends, longest, longest)))


def keep_of(
    reducer: VLMReducer, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site, sample: Tensor | None
) -> Tensor | Fold | None:
    """`VLMReducer.keep`, which takes a row for one prompt, where rows may hold several: each sample is a row to it.

    Args:
        reducer: decides.
        x: [B, M, D], see `VLMReducer.keep`.
        layout: of these columns.
        attention: see there.
        at: the site.
        sample: [B, L] of the prompt's columns; `None` = a row is one prompt.

    Returns:
        As `VLMReducer.keep` does, for the B rows.
    """
    if sample is None:
        return reducer.keep(x, layout, attention, at)
    here = of_columns(sample, layout.column)
    count = int(sample.max()) + 1  # synchronises once
    spread, own = _samples(layout, sample, count)
    apart = None if attention is None else _apart(attention, own, sample, count)
    found = reducer.keep(_spread(x, count), spread, apart, at)

    def together(t: Tensor) -> Tensor:
        """[B, M]: of every column what its own sample says."""
        return t.unflatten(0, (-1, count)).gather(1, here.clamp_min(0)[:, None])[:, 0]

    if isinstance(found, Fold):
        return Fold(together(found.keep), together(found.into))
    return None if found is None else together(found)


def _samples(layout: Layout, sample: Tensor, count: int) -> tuple[Layout, Tensor]:
    """(a layout of B rows as that of their S samples each, [B S, M] bool: columns of each sample)."""
    device = layout.column.device
    here, whole = of_columns(sample, layout.column), sample.to(device)
    number = torch.arange(count, device=device)[:, None]  # [S, 1]
    own, theirs = ((t[:, None] == number).flatten(0, 1) for t in (here, whole))
    visual, real = (_spread(t, count) & own for t in (layout.visual, layout.real))
    column = _spread(layout.column, count).where(own, -1)
    before = _spread(layout.before, count) & theirs
    entered = None if layout.entered is None else _spread(layout.entered, count) & theirs
    return Layout(visual, real, column, layout.length, before, entered), own


def _spread(t: Tensor, count: int) -> Tensor:
    """[B S, ...]: every row S times; of a single row nothing is copied."""
    return t[:, None].expand(-1, count, *t.shape[1:]).flatten(0, 1)


def _apart(attention: LayerAttention, own: Tensor, sample: Tensor, count: int) -> LayerAttention:
    """Attention of B rows as that of their S samples each. own [B S, M] bool: columns of each sample."""

    def project(rows: Tensor | None) -> Tensor:
        if rows is None:
            return _spread(attention.project(None), count)
        found = attention.project(rows.unflatten(0, (-1, count)).flatten(1))  # [B, H, S R, D]
        return found.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)

    def bias(rows: Tensor) -> Tensor:
        found = attention.bias(rows.unflatten(0, (-1, count)).flatten(1))  # [B, 1, S R, M]
        found = found.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
        return found.masked_fill(~own[:, None, None], torch.finfo(found.dtype).min)

    entry = attention.entry
    if entry is not None:
        entry = Entry(_spread(entry.x, count), _samples(entry.layout, sample, count)[0])
    return LayerAttention(attention.layer, attention.scale, project, bias, attention.softcap, attention.final_norm, entry)


def check_images(
    name: str, outputs: Mapping[str, Any], tokens: Mapping[str, int], ids: Tensor, sample: Tensor, reads_text: bool
) -> None:
    """Raises where what a model hands over as one image belongs to several samples, which would compete for tokens, and where a
    method looks at the text of a row, which is that of several samples.

    Args:
        name: of the model.
        outputs: modality -> encoded images.
        tokens: modality -> id of its placeholder.
        ids: [B, L] of the prompt.
        sample: [B, L].
        reads_text: whether the method looks at text.
    """
    if reads_text:
        raise UnsupportedModelError(
            f"the method looks at the text of a prompt, but rows of {name} hold several samples (their positions start over); "
            "give every sample a row of its own, with an attention_mask"
        )
    for modality, output in outputs.items():
        here = sample[ids == tokens[modality]].split([len(x) for x in feature_list(output)])
        if any(len(part) and bool(part[0] != part[-1]) for part in here):
            raise UnsupportedModelError(
                f"{name} hands over the {modality}s of a whole row as one, but rows hold several samples (their positions "
                "start over), which would compete for tokens; give every sample a row of its own, with an attention_mask"
            )
