"""`TokenTracker`: what a patched tower remembers of a forward pass. One `TokenState` per block boundary, indexed, never popped.

Every thread has its own passes. A block that gradient checkpointing computes again during backward finds the pass that it
belongs to by the address of its input, which the checkpoint keeps alive: a newer pass cannot be mistaken for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vtok.core.tokens import Grid, TokenState
from vtok.errors import StateError

_TRAINING_PASSES = 16  # forward passes remembered for a later backward (gradient accumulation, contrastive pairs)


def _address(x: Tensor) -> int:
    return 0 if isinstance(x, FakeTensor) else x.data_ptr()  # fake tensors have no memory


class ForwardState:
    """One forward pass: `states[i]` is the state that enters block i, `states[depth]` what leaves the last block."""

    __slots__ = ("length", "seen", "states")

    def __init__(self, depth: int):
        self.states: list[TokenState | None] = [None] * (depth + 1)
        self.seen: list[int] = [0] * (depth + 1)  # address of the tensor that entered block i
        self.length = 0  # tokens that entered block 0

    @property
    def final(self) -> TokenState | None:
        """What left the last block that ran: not always the last block (blocks may be cut off or a pass stopped early)."""
        for state in reversed(self.states[1:]):
            if state is not None:
                return state
        return None

    def tokens(self, i: int) -> int:
        """Tokens (rows, padding included) that entered block i; `i = depth` for what left the last block."""
        state = self.states[i]
        return self.length if state is None or state.index is None else state.index.shape[1]


class TokenTracker:
    """Shared by all patched blocks of one tower.

    Args:
        depth: number of blocks.
        num_prefix: protected tokens at the front.
        prop_attn: whether attention sees sizes.
        trace: keep the map from original tokens to reduced ones.
        spare: keep one row of padding in images that came padded, although it means nothing.
    """

    def __init__(self, depth: int, num_prefix: int, prop_attn: bool, trace: bool, spare: bool = False):
        self.depth, self.num_prefix, self.prop_attn, self.trace, self.spare = depth, num_prefix, prop_attn, trace, spare
        self.patch: Any = None  # what was asked for (vtok.targets.encoder.Patch)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._passes: dict[int, deque[ForwardState]] = {}  # by thread
        self._resumed: dict[int, tuple[ForwardState, int, int]] = {}  # by thread: pass, next block, address of its input
        self._taps: dict[int, dict[str, Tensor]] = {}  # by thread
        # Compiled graphs trace these: they cannot ask for a thread's name.
        self._traced = ForwardState(self.depth)
        self._traced_taps: dict[str, Tensor] = {}
        self._averaged: dict[int, bool] = {}  # by thread
        self._grids: dict[int, Grid] = {}  # by thread: of images whose patches have not entered block 0 yet
        self._traced_grid: Grid | None = None
        self._starts: dict[int, TokenState] = {}  # by thread: what enters block 0 next, where its input does not show it
        self._traced_start: TokenState | None = None
        self.unmasked = False  # whether the caller of a traced pass gave no tensor but images, which then have no padding
        self._traced_last = False  # whether the last pass was a compiled one

    @property
    def current(self) -> ForwardState:
        """This thread's running or last pass."""
        if torch.compiler.is_compiling() or self._traced_last:
            return self._traced
        passes = self._passes.get(threading.get_ident())
        return passes[-1] if passes else self._traced

    @property
    def taps(self) -> dict[str, Tensor]:
        """What hooks of this thread's running block caught; the block empties it."""
        if torch.compiler.is_compiling():
            return self._traced_taps
        return self._taps.setdefault(threading.get_ident(), {})

    @property
    def averaged(self) -> bool:
        """Whether this thread is inside a head that takes a mean of what the tower returns."""
        return self._averaged.get(self._me(), False)

    @averaged.setter
    def averaged(self, value: bool) -> None:
        self._averaged[self._me()] = value

    def announce(self, grid: Grid) -> None:
        """Notes the patches that the stem has made: they enter block 0 next. For the form see `TokenState.grid`."""
        self._traced_grid = grid  # also where the stem is not compiled and the blocks are
        if not torch.compiler.is_compiling():
            self._grids[threading.get_ident()] = grid

    def announce_rows(self, state: TokenState) -> None:
        """Notes what enters block 0 next, where all images are one sequence: rows and tokens are not those of its input."""
        self._traced_start = state  # also where the tower is not compiled and the blocks are
        if not torch.compiler.is_compiling():
            self._starts[threading.get_ident()] = state

    def _announced_rows(self) -> TokenState | None:
        traced, self._traced_start = self._traced_start, None
        own = None if torch.compiler.is_compiling() else self._starts.pop(threading.get_ident(), None)
        return traced if own is None else own

    def _announced(self, patches: int) -> Grid | None:
        """The grid of the patches that enter block 0; `None` = the stem did not run (somebody called the blocks alone)."""
        traced, self._traced_grid = self._traced_grid, None
        own = None if torch.compiler.is_compiling() else self._grids.pop(threading.get_ident(), None)
        grid = traced if own is None else own
        if isinstance(grid, tuple) and grid[0] * grid[1] != patches:
            return 1, patches  # some were left out on the way (patch dropout)
        return grid

    @staticmethod
    def _me() -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()  # compiled graphs cannot ask for a thread

    def enter(self, i: int, x: Tensor, training: bool) -> tuple[ForwardState, TokenState]:
        """The pass that block i runs in, and the state of the tokens x [B, N, C] that enter it.

        Block 0 opens a pass, whichever entry point was called.

        Raises:
            StateError: block i runs with no pass open, or is computed again for a pass that is no longer known.
        """
        if torch.compiler.is_compiling():
            run = self._traced
            self._traced_last = True
        elif torch._C._current_graph_task_id() != -1:  # inside backward: a checkpoint computes this block again
            return self._resume(i, x)
        else:
            run = self._open(training) if i == 0 else self.current
            run.seen[i] = _address(x)
        start = self._announced_rows() if i == 0 else None
        if start is not None:
            run.length, run.states[0] = start.length, start
        elif i == 0:
            run.length = x.shape[1]
            grid, group = self._announced(x.shape[1] - self.num_prefix), self._identity(x) if self.trace else None
            run.states[0] = TokenState(self.num_prefix, x.shape[1], group=group, grid=grid)
        state = run.states[i]
        if state is None:
            raise StateError(f"block {i} was called although block 0 has not run; a patched tower runs from its first block")
        return run, state

    def seed(self, state: TokenState) -> TokenState:
        """Makes `state` the one that enters block 0 of this thread's pass: some of its tokens are padding."""
        self.current.states[0] = state
        return state

    def leave(self, run: ForwardState, i: int, state: TokenState, x: Tensor) -> None:
        """Records what leaves block i, in the pass that `enter` named."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._resumed[threading.get_ident()] = (run, i + 1, _address(x))
            return
        run.states[i + 1] = state

    def _open(self, training: bool) -> ForwardState:
        me = threading.get_ident()
        run = ForwardState(self.depth)
        self._traced_last = False
        self._taps.pop(me, None)  # of a pass that an error ended inside a block
        passes = self._passes.get(me)
        if passes is None:
            with self._lock:
                alive = {t.ident for t in threading.enumerate()}
                self._passes = {ident: p for ident, p in self._passes.items() if ident in alive}
                passes = self._passes[me] = deque(maxlen=_TRAINING_PASSES)
        if not training:
            passes.clear()
        passes.append(run)
        return run

    def _resume(self, i: int, x: Tensor) -> tuple[ForwardState, TokenState]:
        me, address = threading.get_ident(), _address(x)
        if i > 0 and self._resumed.get(me, (None, 0, 0))[1:] == (i, address):  # follows the block computed just before
            run = self._resumed[me][0]
        else:
            found = next((p for p in self._recent() if p.seen[i] == address), None)
            if found is None:
                raise StateError(
                    f"block {i} is computed again by gradient checkpointing, but its forward pass is not among the last "
                    f"{_TRAINING_PASSES} (or the model was in eval mode, where one is kept); call backward sooner, or do "
                    "not checkpoint"
                )
            run = found
            self._resumed[me] = (run, i, address)
        state = run.states[i]
        assert state is not None
        return run, state

    def _recent(self) -> Iterator[ForwardState]:
        """All known passes, newest first within a thread (backward may run in another thread than forward)."""
        for passes in list(self._passes.values()):
            yield from reversed(passes)

    @staticmethod
    def _identity(x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])

    def __getstate__(self) -> dict[str, Any]:  # tensors of a pass are neither copied nor pickled
        return {name: getattr(self, name) for name in ("depth", "num_prefix", "prop_attn", "trace", "spare", "patch")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._lock = threading.Lock()
        self._forget()
