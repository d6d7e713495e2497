"""What a language model's cache remembers of dropped columns, and the gathers that follow from it.

Nothing is computed anew for a shortened sequence: positions, rotary tables and masks are gathered from what the model made for
the long one, so that every scheme of positions and masks stays right.

Shapes: B rows of a batch, L columns of the prompt, E columns that enter the LLM, M slots of a shortened sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.errors import StateError, UnsupportedModelError

_NAME = "_vtok"
_STAND_INS = ("get_seq_length", "get_mask_sizes", "crop")


class Stage(NamedTuple):
    """One shortening of the sequence. Real slots keep their order and stand on the right, padding on the left.

    Attributes:
        column: [B, M] int64, column of the prompt in each slot, -1 = padding.
        entry: [B, M] int64, the same as a column of the masks and rotary tables that the model makes: of the prompt for what is
            dropped before the LLM, of what enters the LLM (E columns) for what is dropped later.
        padded: whether some slot is padding.
        into: [B, L] int64, column of the prompt that each column was averaged into, itself included, -1 = none; `None` =
            nothing was (see `vtok.reduction.Fold`).
    """

    column: Tensor
    entry: Tensor
    padded: bool
    into: Tensor | None = None

    def to(self, batch: int, device: torch.device) -> Stage:
        """The same on another device, for a batch in which every row stands `batch / B` times.

        Raises:
            StateError: the batch is no multiple of the one that the prompt had.
        """
        rows = len(self.column)
        if batch % rows:
            raise StateError(f"the cache was made for {rows} rows and is used for {batch}; vtok cannot tell which row is which")
        stage = Stage(self.column.to(device), self.entry.to(device), self.padded)
        if batch == rows:
            return stage
        repeat = batch // rows
        return Stage(stage.column.repeat_interleave(repeat, 0), stage.entry.repeat_interleave(repeat, 0), stage.padded)


class PromptState:
    """Lives on the cache that a shortened prompt filled.

    Args:
        length: L.
        real: [B, L] bool, False = padding of the prompt.
    """

    def __init__(self, length: int, real: Tensor):
        self.length, self.real = length, real
        self.before: Stage | None = None  # what was dropped before the LLM
        self.between: dict[int, Stage] = {}  # decoder layer -> what was dropped in front of it
        self.compact = False  # whether the tokens behind those dropped before the LLM were renumbered
        self.inside = False  # whether the LLM is running: it counts what is stored, everybody else the whole prompt

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

    def _kept(self, stage: Stage) -> Tensor:
        return ((stage.column >= 0) & self.real.gather(1, stage.column.clamp_min(0))).sum(1)


class _Length:
    """Stands in for a cache's `get_seq_length`: outside the LLM it counts dropped columns too, as its caller does."""

    def __init__(self, cache: Any):
        self.cache = cache

    def __call__(self, layer_idx: int = 0) -> Any:
        stored = type(self.cache).get_seq_length(self.cache, layer_idx)
        state = state_of(self.cache)
        if state is None or state.inside or int(stored) == 0:
            return stored
        return stored + state.missing(layer_idx)


class _Sizes:
    """Stands in for a cache's `get_mask_sizes`: outside the LLM, masks are made for the whole prompt, and replaced inside."""

    def __init__(self, cache: Any):
        self.cache = cache

    def __call__(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        keys, offset = type(self.cache).get_mask_sizes(self.cache, query_length, layer_idx)
        state = state_of(self.cache)
        if state is None or state.inside or state.at(layer_idx) is None or stored(self.cache, layer_idx) == 0:
            return keys, offset
        return max(int(keys), stored(self.cache, layer_idx) + state.missing(layer_idx) + query_length), 0


class _NoCrop:
    """Stands in for a cache's `crop`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            "this cache holds a prompt that vtok shortened, by a different number of tokens in different layers, and cannot be "
            "cropped (assisted decoding does that); generate without an assistant, or shorten the prompt with vtok.prune_inputs"
        )


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, or `None`: named `cache` since transformers 5.24, `past_key_values` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def state_of(cache: Any) -> PromptState | None:
    """What a cache remembers, or `None`."""
    return getattr(cache, "__dict__", {}).get(_NAME)


def remember(cache: Any, state: PromptState) -> None:
    """Puts the state on a cache."""
    cache.__dict__.update({_NAME: state, **dict(zip(_STAND_INS, (_Length(cache), _Sizes(cache), _NoCrop())))})


def forget(cache: Any) -> None:
    """Makes a cache an ordinary one again: `reset` empties it, but leaves attributes."""
    for name in (_NAME, *_STAND_INS):
        cache.__dict__.pop(name, None)


def stored(cache: Any, layer: int = 0) -> int:
    """Slots that a layer of a cache holds."""
    return 0 if cache is None else int(type(cache).get_seq_length(cache, layer))


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
        into: [B, M] int64, see `vtok.reduction.Fold`.
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
    return x.gather(dim, rows.clamp_min(0).view(view).expand(target))


def restore(x: Tensor, stage: Stage, length: int) -> Tensor:
    """Hidden states at all L columns of the prompt: a dropped column gets those of the nearest kept one in front of it.

    What follows a dropped token is thereby predicted from the last token that stayed, as if the prompt had been short.

    Args:
        x: [B, M, D].
        stage: of the M slots.
        length: L.

    Returns:
        [B, L, D].
    """
    filled = stage.column >= 0
    batch, width = stage.column.shape
    kept = torch.zeros(batch, length + 1, dtype=torch.int64, device=x.device)
    kept.scatter_(1, stage.column.where(filled, length), 1)  # padding is written to a column of its own
    slot = kept[:, :length].cumsum(1) - 1 + (width - filled.sum(1, keepdim=True))
    return take(x, slot.clamp(0, width - 1), 1)


def renumbered(position: Tensor, keep: Tensor) -> Tensor:
    """Positions [B or 1, E] without gaps: every token moves down by the columns dropped in front of it. keep [B, E] bool."""
    return position - (~keep).long().cumsum(1)
