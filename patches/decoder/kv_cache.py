"""What a language model's cache remembers of dropped columns, and the gathers that follow from it.

Nothing is computed anew for a shortened sequence: positions, rotary tables and masks are gathered from what the model made for
the long one, so that every scheme of positions and masks stays right.

Shapes: B rows of a batch, L columns of the prompt, E columns that enter the LLM, M slots of a shortened sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.module_swap import mixed_class, rebuilt

if TYPE_CHECKING:
    from transformers.cache_utils import Cache as _Cache  # what `ShortCache` is put in front of
else:
    _Cache = object

_NAME = "_vtok"
WHOLE = "_vtok_whole"
BUSY = "_vtok_busy"
CACHES = ("cache", "past_key_values")  # the keyword since transformers 5.24, and before


class Stage(NamedTuple):
    """One shortening of the sequence. Real slots keep their order and stand on the right, padding on the left.

    Attributes:
        column: [B, M] int64, column of the prompt in each slot, -1 = padding.
        entry: [B, M] int64, the same as a column of the masks and rotary tables that the model makes: of the prompt for what is
            dropped before the LLM, of what enters the LLM (E columns) for what is dropped later.
        padded: whether some slot is padding.
        into: [B, L] int64, column of the prompt that each column was averaged into, itself included, -1 = none; `None` =
            nothing was (see `vtok.core.reduction.Fold`).
    """

    column: Tensor
    entry: Tensor
    padded: bool
    into: Tensor | None = None

    def to(self, device: torch.device) -> Stage:
        """The same on another device."""
        return Stage(
            self.column.to(device), self.entry.to(device), self.padded, None if self.into is None else self.into.to(device)
        )


class PromptState:
    """Lives on the cache that a shortened prompt filled.

    Args:
        length: L.
        real: [B, L] bool, False = padding of the prompt.

    Attributes:
        order: [rows of the cache] int64, the row of the prompt that each of them goes on with, as beams and others who reorder,
            choose or repeat rows have left them; `None` = as the prompt was read.
    """

    def __init__(self, length: int, real: Tensor):
        self.length, self.real = length, real
        self.before: Stage | None = None  # what was dropped before the LLM
        self.between: dict[int, Stage] = {}  # decoder layer -> what was dropped in front of it
        self.compact = False  # whether the tokens behind dropped ones were renumbered
        self.inside = False  # whether the LLM is running: it counts what is stored, everybody else the whole prompt
        self.sample: Tensor | None = None  # [B, L] int64, sample of each column, where a row holds several (decoder_packed)
        self.order: Tensor | None = None
        self.tables: dict[int, Tensor] | None = None  # layer -> column of each slot of a static cache, see `slot_tables`

    def move(self, device: torch.device) -> None:
        """Goes where the LLM goes on."""
        self.real = self.real.to(device)
        self.before = None if self.before is None else self.before.to(device)
        self.between = {layer: stage.to(device) for layer, stage in self.between.items()}
        self.sample = None if self.sample is None else self.sample.to(device)

    def reorder(self, rows: Tensor) -> None:
        """Rows of the cache were gathered: row i is what was row `rows[i]`; bool = those that stay."""
        if self.order is None:
            self.order = torch.arange(len(self.real), device=rows.device)
        self.order = self.order.to(rows.device)[rows]

    def repeat(self, times: int) -> None:
        """Every row of the cache was repeated."""
        rows = len(self.real) if self.order is None else len(self.order)
        self.reorder(torch.arange(rows, device=self.real.device).repeat_interleave(times))

    def now(self, x: Tensor, batch: int) -> Tensor:
        """Something of every row of the prompt [B, ...], for the rows of the cache as they are now: [batch, ...].

        Raises:
            StateError: the cache has another number of rows.
        """
        rows = len(x) if self.order is None else len(self.order)
        if rows != batch:
            raise StateError(f"the cache was made for {rows} rows and is used for {batch}; vtok cannot tell which row is which")
        return x if self.order is None else x[self.order.to(x.device)]

    def at(self, layer: int) -> Stage | None:
        """The stage that holds in a layer."""
        first = max((i for i in self.between if i <= layer), default=None)
        return self.before if first is None else self.between[first]

    def missing(self, layer: int) -> int:
        """Columns of the prompt that a layer does not hold."""
        stage = self.at(layer)
        return 0 if stage is None else self.length - stage.column.shape[1]

    @property
    def dropped(self) -> Tensor:
        """[B, 1] int64: real columns dropped before the LLM."""
        assert self.before is not None
        return (self.real.sum(1) - self._kept(self.before)).unsqueeze(1)

    def anew(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Positions without gaps for what a layer drops: those of as many real slots, from the first that entered the LLM on.

        Args:
            stage: of tokens that were dropped in front of a decoder layer.

        Returns:
            ([B, M] int64, the entered column whose position each slot takes, -1 = padding; [B] int64, by how much later text
            moves down).
        """
        column = torch.arange(self.length, device=self.real.device).expand_as(self.real)
        column = column if self.before is None else self.before.column
        entered = (column >= 0) & self.real.gather(1, column.clamp_min(0))
        order = (~entered).long().argsort(dim=1, stable=True)  # real ones first
        stays = stage.entry >= 0
        slot = order.gather(1, (stays.cumsum(1) - 1).clamp_min(0)).masked_fill(~stays, -1)
        return slot, entered.sum(1) - stays.sum(1)

    def _kept(self, stage: Stage) -> Tensor:
        return ((stage.column >= 0) & self.real.gather(1, stage.column.clamp_min(0))).sum(1)


class _Length:
    """`get_seq_length` of a cache counts dropped columns too, as its caller does; that of its class counts what is stored."""

    def __get__(self, cache: ShortCache | None, owner: type) -> Any:
        own = super(ShortCache, owner).get_seq_length  # type: ignore[misc]
        return own if cache is None else functools.partial(self._whole, cache, own)

    @staticmethod
    def _whole(cache: ShortCache, own: Any, layer_idx: int = 0) -> Any:
        count, state = own(cache, layer_idx), cache.known
        if state.tables is not None and not state.inside:  # a static cache counts in tensors: not to be read on the host
            return count + state.missing(layer_idx)
        return count if state.inside or int(count) == 0 else count + state.missing(layer_idx)


class ShortCache(_Cache):
    """Put in front of the class of a cache that a shortened prompt filled, for as long as it holds one.

    Outside the LLM it counts dropped columns too, and masks are made for the whole prompt; they are replaced inside. What is
    known of the prompt follows the rows of the cache.
    """

    get_seq_length: Any = _Length()

    @property
    def known(self) -> PromptState:
        state: PromptState = self.__dict__[_NAME]
        return state

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        keys, offset = super().get_mask_sizes(query_length, layer_idx)
        state = self.known
        if state.tables is not None and not state.inside:  # a key for every column that a slot can ever hold
            return keys + state.missing(layer_idx), offset
        if state.inside or state.at(layer_idx) is None or cached_length(self, layer_idx) == 0:
            return keys, offset
        return max(int(keys), cached_length(self, layer_idx) + state.missing(layer_idx) + query_length), 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.known.inside:
            raise StateError(
                "this cache holds a prompt that vtok shortened, and only the patched vision-language model that read it can go "
                "on with it: masks and positions would not fit otherwise; call that model, or read the prompt anew"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.known.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.known.reorder(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.known.repeat(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            "this cache holds fewer tokens than its caller counts, because vtok shortened the prompt in it, and cannot be "
            "cropped (assisted decoding does that); generate without an assistant, or shorten the prompt with vtok.prune_inputs"
        )

    def reset(self) -> None:
        detach_state(self)
        self.reset()

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class exists only here: rebuild it from its two parts
        return rebuilt(self)


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, or `None`.

    The store of continuous batching, which holds pages of many requests at once, counts as none: no prompt in it is shortened.
    """
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    return cache if hasattr(cache, "get_seq_length") else None


def state_of(cache: Any) -> PromptState | None:
    """What a cache remembers, or `None`."""
    return getattr(cache, "__dict__", {}).get(_NAME)


def attach_state(cache: Any, state: PromptState) -> None:
    """Puts the state on a cache."""
    detach_state(cache)
    cache.__dict__[_NAME] = state
    cache.__class__ = mixed_class(ShortCache, type(cache))


def detach_state(cache: Any) -> None:
    """Makes a cache an ordinary one again."""
    for name in (_NAME, WHOLE):
        cache.__dict__.pop(name, None)
    if isinstance(cache, ShortCache):
        cache.__class__ = type(cache).__bases__[1]


def mark_busy(cache: Any, busy: bool) -> None:
    """Notes on a cache that a pass which looks at its contents is under way, or has ended."""
    if busy and cache is not None:
        cache.__dict__[BUSY] = True
    elif cache is not None:
        cache.__dict__.pop(BUSY, None)


def cached_length(cache: Any, layer: int = 0) -> int:
    """Slots that a layer of a cache holds."""
    return 0 if cache is None else int(type(cache).get_seq_length(cache, layer))


def unknown(cache: Any) -> bool:
    """Whether nothing is known of what a cache holds."""
    return cache is not None and state_of(cache) is None and not cache.__dict__.get(WHOLE)


def vouch(cache: Any) -> None:
    """Notes on a cache that nothing is missing from it."""
    cache.__dict__[WHOLE] = True


def compact(keep: Tensor) -> tuple[Tensor, bool]:
    """Where the kept columns go.

    Args:
        keep: [B, E] bool.

    Returns:
        (rows [B, M] int64 into E, -1 = padding; whether there is any padding), M the largest number kept.
    """
    count = keep.sum(1)
    least, most = torch.stack([count.amin(), count.amax()]).tolist()  # one host synchronisation, no more
    width = max(most, 1)
    order = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]  # kept ones last, in their order
    slot = torch.arange(width, device=keep.device)
    rows = order.masked_fill(slot < (width - count)[:, None], -1)
    return rows, least != width


def to_columns(into: Tensor, column: Tensor, length: int) -> Tensor:
    """Places that tokens are folded into [B, M] -> the same as columns of the prompt [B, length], -1 = not folded.

    Args:
        into: [B, M] int64, see `vtok.core.reduction.Fold`.
        column: [B, M] int64, of each place, -1 = padding.
        length: columns of the prompt.
    """
    found = into.new_full((len(into), length + 1), -1)
    target = column.gather(1, into.clamp_min(0)).where(into >= 0, -1)
    return found.scatter(1, column.where(column >= 0, length), target)[:, :length]


def to_places(into: Tensor, column: Tensor) -> Tensor:
    """The way back, for the places [B, M] whose columns are given; columns behind the prompt [B, length] are not folded."""
    length = into.shape[1]
    inside = (column >= 0) & (column < length)
    place = torch.arange(column.shape[1], device=column.device).expand_as(column)
    place = torch.zeros(len(into), length + 1, dtype=torch.int64, device=into.device).scatter(
        1, column.where(inside, length), place
    )
    target = into.gather(1, column.clamp(0, length - 1)).where(inside, -1)
    return place.gather(1, target.clamp_min(0)).where(target >= 0, -1)


def take(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Gathers along `dim`, the batch being the dimension in front of it (1 = broadcast); padding repeats row 0.

    Args:
        x: [..., B or 1, E, ...].
        rows: [B, M] int64.
        dim: of E.
    """
    batch, width = rows.shape
    if x.shape[dim - 1] != batch:
        x = x.expand(*x.shape[: dim - 1], batch, *x.shape[dim:])
    view, target = [1] * x.ndim, list(x.shape)
    view[dim - 1], view[dim], target[dim] = batch, width, width
    return x.gather(dim, rows.to(x.device).clamp_min(0).view(view).expand(target))


def restore(x: Tensor, stage: Stage, length: int, sample: Tensor | None = None) -> Tensor:
    """Hidden states at all L columns of the prompt: a dropped column gets those of the nearest kept one in front of it, or of
    the first one kept.

    What follows a dropped token is thereby predicted from the last token that stayed, as if the prompt had been short.

    Args:
        x: [B, M, ...].
        stage: of the M slots.
        length: L.
        sample: [B, L], if a row holds several samples: only columns of the same one count.

    Returns:
        [B, L, ...].
    """
    column = stage.column.to(x.device)
    filled = column >= 0
    batch, width = column.shape
    kept = torch.zeros(batch, length + 1, dtype=torch.int64, device=x.device)
    kept.scatter_(1, column.where(filled, length), 1)  # padding is written to a column of its own
    count, padding = kept[:, :length].cumsum(1), width - filled.sum(1, keepdim=True)
    first = 0 if sample is None else in_front(sample.to(x.device), count)  # where none stands in front, the first one behind
    slot = torch.maximum(count - 1, torch.as_tensor(first, device=x.device))
    return take(x, (slot + padding).clamp_max(width - 1), 1)


def renumbered(position: Tensor, keep: Tensor, sample: Tensor | None = None) -> Tensor:
    """Positions [B or 1, E] without gaps: every token moves down by the columns dropped in front of it. keep [B, E] bool.

    sample [B, E]: if a row holds several samples, those dropped in front of it in its own sample.
    """
    gone = (~keep).long().cumsum(1)
    return position - (gone if sample is None else gone - in_front(sample.to(gone.device), gone))


def in_front(sample: Tensor, count: Tensor) -> Tensor:
    """[B, L]: a rising count [B, L] as it was in front of the first column of each column's sample [B, L]."""
    start = torch.ones_like(sample, dtype=torch.bool)
    start[:, 1:] = sample[:, 1:] != sample[:, :-1]
    before = torch.cat([torch.zeros_like(count[:, :1]), count[:, :-1]], 1)
    return before.masked_fill(~start, 0).cummax(1).values
