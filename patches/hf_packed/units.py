"""Where the units of a packed sequence are: rows, the sequence itself, windows.

A unit is what the model's merger makes one visual token of: a square of patches that stand one behind the other. A row is what
attends to itself alone, in blocks that see whole images: an image, or a frame of a video.

Shapes: S rows, U units of the longest row, L units of all rows together, one row behind the other, L0 of them before the first
block, m patches of a unit, W windows, M units of the largest window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.tokens import TokenState


class Run(NamedTuple):
    """Rows that stand together and are equally long.

    Attributes:
        first: the first of them.
        rows: how many.
        length: units of each.
        start: units of the sequence in front of them.
    """

    first: int
    rows: int
    length: int
    start: int


def runs(counts: Sequence[int]) -> Iterator[Run]:
    """Rows of so many units, equal neighbours together."""
    first = start = 0
    for length, same in itertools.groupby(counts):
        rows = len(list(same))
        yield Run(first, rows, length, start)
        first, start = first + rows, start + rows * length


def both_runs(counts: Sequence[int], others: Sequence[int]) -> Iterator[tuple[Run, Run]]:
    """Rows that are equally long by two counts, as runs of each."""
    first = start = other = 0
    for (length, less), same in itertools.groupby(zip(counts, others)):
        rows = len(list(same))
        yield Run(first, rows, length, start), Run(first, rows, less, other)
        first, start, other = first + rows, start + rows * length, other + rows * less


def first_state(counts: Sequence[int], device: torch.device, trace: bool, grids: Sequence[tuple[int, int]]) -> TokenState:
    """What enters the first block.

    Args:
        counts: units of every row.
        device: of the sequence.
        trace: whether the map from units to tokens is kept.
        grids: rows and columns of units; one row of all where they are not in raster order.
    """
    longest = max(counts)
    group = torch.arange(longest, device=device).expand(len(counts), longest) if trace else None
    grid = grids[0] if len(set(grids)) == 1 else torch.tensor(grids, device=device)
    state = TokenState(0, longest, group=group, grid=grid, counts=tuple(counts), entered=tuple(counts))
    if min(counts) == longest:
        return state
    real = torch.arange(longest, device=device) < torch.tensor(counts, device=device)[:, None]
    return state._replace(keep=real, real=real)


def counts_of(state: TokenState) -> tuple[int, ...]:
    """Units of every row that the sequence holds: all of a row, padding too, where only the device knows which are real."""
    if state.counts is not None:
        return state.counts
    if state.index is not None:
        return (state.index.shape[1],) * len(state.index)
    assert state.entered is not None
    return (state.length,) * len(state.entered)


def to_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """[L, ...] -> [S, U, ...]; zeros behind shorter rows."""
    longest = max(counts)
    if min(counts) == longest:
        return x.unflatten(0, (len(counts), longest))
    parts = []
    for run in runs(counts):
        part = x[run.start : run.start + run.rows * run.length].unflatten(0, (run.rows, run.length))
        parts.append(F.pad(part, (0, 0) * (x.ndim - 1) + (0, longest - run.length)))
    return torch.cat(parts)


def to_sequence(x: Tensor, counts: Sequence[int]) -> Tensor:
    """[S, U, ...] -> [L, ...]: the first units of every row, one row behind the other."""
    if min(counts) == x.shape[1]:
        return x.flatten(0, 1)
    return torch.cat([x[run.first : run.first + run.rows, : run.length].flatten(0, 1) for run in runs(counts)])


def places(state: TokenState, device: torch.device) -> Tensor:
    """[L] int64: where each unit of the sequence was (0 .. L0-1) before the first block."""
    assert state.entered is not None
    rows = len(state.entered)
    if state.real is None:
        starts = torch.arange(0, rows * state.length, state.length, device=device)[:, None]
        last = torch.full_like(starts, state.length - 1)
    else:
        length = state.real.sum(1, keepdim=True)
        starts, last = length.cumsum(0) - length, length - 1
    index = torch.arange(state.length, device=device).expand(rows, -1) if state.index is None else state.index
    return to_sequence(torch.minimum(index, last) + starts, counts_of(state))  # padding may stand behind the row's own units


def ended_in(state: TokenState, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every unit before the first block, in which unit of the sequence it is now: ([L0] int64, [L0] bool, False = in none).

    `state` was traced.
    """
    assert state.entered is not None and state.group is not None
    counts = counts_of(state)
    length = torch.tensor(counts, device=device)[:, None]
    group = to_sequence(torch.where(state.group < 0, -1, state.group + length.cumsum(0) - length), state.entered)
    return group.clamp_min(0), group >= 0


def real(state: TokenState) -> Tensor | None:
    """[L] bool, False = padding that the sequence holds; `None` = it holds none."""
    if state.keep is None or state.counts is not None:
        return None
    return state.keep.flatten()


class Windows(NamedTuple):
    """Where units stand in windows of equally many slots.

    Attributes:
        slot: [L] int64, window times M plus place in it; W times M for padding, which stands in none.
        number: of windows, W.
        size: slots of each, M.
    """

    slot: Tensor
    number: int
    size: int

    def spread(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[L, ...] -> [W, M, ...]."""
        slots = self.number * self.size
        out = x.new_full((slots + 1, *x.shape[1:]), fill)
        return out.index_copy(0, self.slot, x)[:slots].unflatten(0, (self.number, self.size))

    def collect(self, x: Tensor) -> Tensor:
        """[W, M, ...] -> [L, ...]; anything for padding."""
        return x.flatten(0, 1).index_select(0, self.slot.clamp_max(self.number * self.size - 1))


def windows(place: Tensor, ends: Tensor, size: int, keep: Tensor | None = None) -> Windows:
    """Puts units into the windows that they were in before the first block, without asking the device how many each holds.

    Args:
        place: [L], see `places`.
        ends: [W], where windows end (units, rising), the last at L0.
        size: M.
        keep: [L] bool, False = padding; `None` = all real.
    """
    number = len(ends)
    window = torch.searchsorted(ends, place, right=True)
    if keep is not None:
        window = window.where(keep, number)
    order = window.argsort(stable=True)
    inside = window[order]
    start = torch.searchsorted(inside, torch.arange(number + 1, device=place.device))
    slot = torch.arange(len(place), device=place.device) - start[inside] + inside * size
    return Windows(torch.empty_like(slot).index_copy(0, order, slot.clamp_max(number * size)), number, size)
