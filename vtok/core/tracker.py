"""`TokenTracker`: what a patched tower remembers of a forward pass. One `TokenState` per block boundary, indexed, never popped.

Every thread has its own passes. What leaves a block, or the tower, is known again by identity for as long as somebody holds it,
so that passes may be mixed: two streams block by block, features of many batches and then their heads. Tokens that are not
known again, because somebody changed them on the way, belong to the thread's last pass. A block that gradient checkpointing
computes again during backward finds the pass that it belongs to by the memory of its input, if the checkpoint keeps that alive,
so that no other pass can be mistaken for it; else it follows the block that was computed again just before.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from vtok.core.tokens import Grid, TokenState
from vtok.errors import StateError

_TRAINING_PASSES = 16  # forward passes remembered for a later backward (gradient accumulation, contrastive pairs)


class _Memory(NamedTuple):
    """Where a tensor lies, which means nothing once its storage is gone."""

    address: int
    storage: StorageWeakRef

    @classmethod
    def of(cls, x: Tensor) -> _Memory | None:
        """`None` = fake tensors, and those of torch.func, have no memory of their own."""
        if isinstance(x, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None
        return cls(x.data_ptr(), StorageWeakRef(x.untyped_storage()))


class ForwardState:
    """One forward pass: `states[i]` is the state that enters block i, `states[depth]` what leaves the last block."""

    __slots__ = ("again", "length", "ran", "seen", "states")

    def __init__(self, depth: int, again: bool = False):
        self.states: list[TokenState | None] = [None] * (depth + 1)
        self.seen: list[_Memory | None] = [None] * (depth + 1)  # of the tensor that entered block i
        self.length = 0  # tokens that entered block 0
        self.ran = 0  # the boundary behind the last block that ran
        self.again = again  # whether backward computes this pass again

    def branch(self, i: int) -> ForwardState:
        """A pass of its own that goes on from what entered block i."""
        made = ForwardState(len(self.states) - 1)
        made.length, made.ran = self.length, i
        made.states[: i + 1] = self.states[: i + 1]
        return made

    def saw(self, i: int, memory: _Memory | None) -> bool:
        """Whether what lies there entered block i, and has been kept since."""
        seen = self.seen[i]
        return seen is not None and memory is not None and seen.address == memory.address and not seen.storage.expired()

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


class _Known(NamedTuple):
    """Tokens that left a block or the tower, and what is known of them."""

    tokens: weakref.ref[Tensor]
    run: ForwardState
    state: TokenState


class _Resumed(NamedTuple):
    """The block that backward computed last: its pass, the next block, the backward."""

    run: ForwardState
    block: int
    task: int


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
        self._resumed: dict[int, _Resumed] = {}  # by thread
        self._known: dict[int, _Known] = {}  # by id of the tokens, for as long as they live
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
        resumed = self._resumed.get(threading.get_ident())
        if resumed is not None and resumed.task == torch._C._current_graph_task_id() and resumed.run.states[-1] is not None:
            return resumed.run  # what follows the last block is computed again with it
        passes = self._passes.get(threading.get_ident())
        return passes[-1] if passes else self._traced

    def remember(self, x: Tensor, run: ForwardState, state: TokenState | None) -> None:
        """Notes whose tokens `x` are, for as long as they live."""
        if torch.compiler.is_compiling() or state is None or not isinstance(x, Tensor):
            return
        known, key = self._known, id(x)
        known[key] = _Known(weakref.ref(x, lambda _: known.pop(key, None)), run, state)

    def known_state(self, x: Tensor) -> TokenState | None:
        """The state of tokens that are known again, or `None`."""
        known = self._recall(x)
        return None if known is None else known.state

    def _recall(self, x: Tensor) -> _Known | None:
        found = None if torch.compiler.is_compiling() else self._known.get(id(x))
        return found if found is not None and found.tokens() is x else None

    def state_of(self, x: Tensor) -> TokenState | None:
        """The state of tokens that left the tower; its pass is the current one from now on. `None` = none has run.

        Raises:
            StateError: they are fewer or more than what left the last pass, and no other pass is known to have left them.
        """
        known = self._recall(x)
        if known is not None:
            self._select(known.run)
            return known.state
        state = self.current.final
        if not torch.compiler.is_compiling() and state is not None and (state.size is not None or state.keep is not None):
            self._check_shape(x, state, "what follows the blocks was", "left the last pass")
        return state

    def _select(self, run: ForwardState) -> None:
        """Makes a pass the current one of this thread."""
        if run is self._traced or run.again:
            return
        self._traced_last = False
        passes = self._passes_of(threading.get_ident())
        if not passes or passes[-1] is not run:
            if run in passes:
                passes.remove(run)
            passes.append(run)

    @staticmethod
    def _check_shape(x: Tensor, state: TokenState, who: str, where: str) -> None:
        if x.ndim == 3 and state.index is not None and state.entered is None and x.shape[:2] != state.index.shape[:2]:
            images, tokens = state.index.shape
            raise StateError(
                f"{who} given {x.shape[1]} tokens of {x.shape[0]} images, but {tokens} of {images} {where}; vtok knows of "
                "every token which patches it stands for, so images or tokens cannot be added or taken out on the way"
            )

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

    def enter(self, i: int, x: Tensor, training: bool, given: Tensor | None = None) -> tuple[ForwardState, TokenState]:
        """The pass that block i runs in, and the state of the tokens x [B, N, C] that enter it.

        Block 0 opens a pass, whichever entry point was called. `given`: what the block was called with, where that is not x.

        Raises:
            StateError: block i runs with no pass open, or is computed again for a pass that is no longer known.
        """
        if torch.compiler.is_compiling():
            run = self._traced
            self._traced_last = True
        elif torch._C._current_graph_task_id() != -1:  # inside backward: a checkpoint computes this block again
            return self._resume(i, x, x if given is None else given)
        else:
            known = self._recall(x if given is None else given)
            if i == 0:
                run = self._open(training)
            else:
                run = self.current if known is None else known.run
                stated = run.states[i]
                again = known is not None or (stated is not None and stated.trivial)
                if again and run is not self._traced and run.ran > i:
                    run = run.branch(i)  # what the first way through the later blocks left stays as it is
                self._select(run)
            run.seen[i] = _Memory.of(x)
            if known is not None:
                run.length = known.run.length
                run.states[i] = known.state
                return run, known.state
        if i == 0:
            self._start(run, x)
        elif not torch.compiler.is_compiling() and run is not self._traced and run.states[i] is None:
            run.states[i] = run.states[run.ran]  # blocks in between were left out
        state = run.states[i]
        if state is None:
            raise StateError(f"block {i} was called although block 0 has not run; a patched tower runs from its first block")
        if not torch.compiler.is_compiling() and i > 0:
            if run.ran > i:
                raise StateError(
                    f"block {i} was given tokens of which vtok does not know what they stand for: block {run.ran - 1} ran "
                    "before it, and these are not what a block left. A patched tower runs its blocks in order, on what the "
                    "block before returned"
                )
            self._check_shape(x, state, f"block {i} was", f"left block {run.ran - 1}")
        return run, state

    def _start(self, run: ForwardState, x: Tensor) -> None:
        """Fills in what enters block 0."""
        start = self._announced_rows()
        if start is not None:
            run.length, run.states[0] = start.length, start
            return
        run.length = x.shape[1]
        grid, group = self._announced(x.shape[1] - self.num_prefix), self._identity(x) if self.trace else None
        run.states[0] = TokenState(self.num_prefix, x.shape[1], group=group, grid=grid)

    @staticmethod
    def seed(run: ForwardState, state: TokenState) -> TokenState:
        """Makes `state` the one that enters block 0 of a pass: some of its tokens are padding."""
        run.states[0] = state
        return state

    def leave(self, run: ForwardState, i: int, state: TokenState, x: Tensor) -> None:
        """Records what leaves block i, in the pass that `enter` named."""
        run.states[i + 1] = state
        if torch.compiler.is_compiling():
            return
        if run is not self._traced:  # of which compiled blocks do not say how far it is
            run.ran = i + 1
        self.remember(x, run, state)
        task = torch._C._current_graph_task_id()
        if task != -1:
            self._resumed[threading.get_ident()] = _Resumed(run, i + 1, task)

    def _open(self, training: bool) -> ForwardState:
        me = threading.get_ident()
        run = ForwardState(self.depth)
        self._traced_last = False
        self._taps.pop(me, None)  # of a pass that an error ended inside a block
        passes = self._passes_of(me)
        if not training:
            passes.clear()
        passes.append(run)
        return run

    def _passes_of(self, me: int) -> deque[ForwardState]:
        passes = self._passes.get(me)
        if passes is None:
            with self._lock:
                alive = {t.ident for t in threading.enumerate()}
                self._passes = {ident: p for ident, p in self._passes.items() if ident in alive}
                passes = self._passes[me] = deque(maxlen=_TRAINING_PASSES)
        return passes

    def _resume(self, i: int, x: Tensor, given: Tensor) -> tuple[ForwardState, TokenState]:
        known, last = self._recall(given), self._resumed.get(threading.get_ident())
        if known is not None and known.run.again:  # follows a block that was computed again
            return known.run, known.state
        memory = _Memory.of(x)
        found = next((p for p in self._recent() if p.saw(i, memory)), None)
        if found is not None:
            run = ForwardState(self.depth, again=True)
            run.length, run.states[i] = found.length, found.states[i]
        elif i == 0 and self._begins():  # the stem was computed again, too
            run = ForwardState(self.depth, again=True)
            self._start(run, x)
        elif i > 0 and last is not None and (last.block, last.task) == (i, torch._C._current_graph_task_id()):
            run = last.run  # somebody changed the tokens behind the block that was computed just before
        else:
            raise StateError(
                f"block {i} is computed again by gradient checkpointing, but its forward pass is not among the last "
                f"{_TRAINING_PASSES} (or the model was in eval mode, where one is kept); call backward sooner, or do "
                "not checkpoint"
            )
        state = run.states[i]
        assert state is not None
        self._check_shape(x, state, f"block {i} was", f"left block {i - 1}")
        return run, state

    def _begins(self) -> bool:
        """Whether a stem of this thread has announced what enters block 0 next."""
        me = threading.get_ident()
        return me in self._grids or me in self._starts

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
