"""What a patched vision-language model knows during one forward pass, and the plan that outlives it where there is no cache.

A plan lies with the images that it was made for (`vtok.patches.hf_vlm.encoded`), or, where somebody else encoded them, with
this thread's call of generate(): neither is lost when others take outputs apart and rebuild them, and both end by themselves.

Shapes: B rows, L columns of the prompt.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.config import MethodConfig
from vtok.core.prompt import Entry, LayerAttention, VLMReducer
from vtok.core.tokens import Site
from vtok.errors import StateError
from vtok.patches.decoder.kv_cache import PromptState, Stage, mark_busy, to_places
from vtok.patches.hf_vlm.encoded import note_of
from vtok.patches.hf_vlm.families import Family
from vtok.patches.hf_vlm.tower.bridge import TowerBridge

_CALLS = 64  # of a vision tower that are remembered for the next prompt
_PLANS = 8  # prompts of one call of generate() that are remembered at a time


class Recorded(NamedTuple):
    """The plan of a prompt, for passes that read it again with more text behind it: generation without a cache.

    Attributes:
        configs: of the methods that made it.
        ids: [B, L] token ids of the prompt.
        keep: decoder layer -> [B, L] bool; 0 = before the LLM.
        into: decoder layer -> [B, L] int64, column that each column was folded into, where a method folds (see `Stage`).
    """

    configs: tuple[MethodConfig, ...]
    ids: Tensor
    keep: dict[int, Tensor]
    into: dict[int, Tensor]

    def fits(self, configs: tuple[MethodConfig, ...], ids: Tensor) -> bool:
        """Whether `ids` [B, >= L] goes on with the prompt."""
        (batch, length), shape = self.ids.shape[:2], ids.shape
        goes_on = ids.ndim == self.ids.ndim and shape[0] == batch and shape[1] > length
        return configs == self.configs and goes_on and torch.equal(ids[:, :length], self.ids)

    def at(self, layer: int, column: Tensor) -> Tensor | None:
        """[B, M] bool for columns [B, M]; what came behind the prompt stays."""
        keep = self.keep.get(layer)
        if keep is None:
            return None
        length = keep.shape[1]
        return keep.to(column.device).gather(1, column.clamp(0, length - 1)) | (column >= length)

    def folds(self, layer: int, column: Tensor) -> Tensor | None:
        """[B, M] int64, places that columns [B, M] are folded into, -1 = none; `None` = nothing is folded there."""
        into = self.into.get(layer)
        return None if into is None else to_places(into, column)


@dataclass
class PassState:
    """One forward pass.

    Attributes:
        prunes: whether it reads a prompt with images.
        real: [B, columns so far] bool from the caller's mask, or `None`.
        state: what the cache remembers, or will.
        earlier: what it remembered of the turns before, where images come in a later one.
        turn: of such a turn alone, once it has been shortened.
        visual: [B, L] bool, if it prunes.
        features: [B, L] bool, False = left by the choice among image features, or merged or dropped in the vision tower before;
            `None` = all stay.
        alive: [B, L] bool, False = merged or dropped in the vision tower; `None` = all left it.
        given: encoded images, those of the caller as they are.
        lasts: whether the plan must last until the prompt is read again, because there is no cache.
        plan: what to record, or what was recorded.
        replays: whether `plan` was made by an earlier pass.
        embedded: whether the prompt came as embeddings, of which only the columns that leave are known to be visual.
        later: whether its images come in a later turn, behind what the cache holds.
        slots_counted: whether the LLM made its masks for the shortened sequence, so that it measures windows in slots.
        probes: decoder layer -> its attention.
        layouts: of the images among whose features a method chose (see `Chosen`).
        memo: masks and tables that several layers share.
        masks: decoder layer -> the mask made for it, for layers that attend to its keys.
        final_norm: the last norm of the LLM.
        rotary: (x, positions) -> rotary tables of the LLM, where it has one function for all layers.
        entry: what entered the LLM, if a method looks at it.
        reached: whether the LLM has been called.
        unmatched: whether placeholders and features of its prompt differ in number, which the model has to refuse.
        shape: (rows, columns) of what it was called with; hidden states of some LLMs have more dimensions.
        cache: that the model was called with.
    """

    prunes: bool = False
    real: Tensor | None = None
    state: PromptState | None = None
    earlier: PromptState | None = None
    turn: PromptState | None = None
    visual: Tensor | None = None
    features: Tensor | None = None
    alive: Tensor | None = None
    given: Mapping[str, Any] | None = None
    lasts: bool = False
    plan: Recorded | None = None
    replays: bool = False
    embedded: bool = False
    later: bool = False
    slots_counted: bool = False
    probes: dict[int, LayerAttention] = field(default_factory=dict)
    layouts: tuple[Any, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)
    final_norm: Any = None
    rotary: Any = None
    entry: Entry | None = None
    reached: bool = False
    unmatched: bool = False
    shape: tuple[int, int] | None = None
    cache: Any = None

    def move(self, device: torch.device) -> None:
        """The layers of an LLM may be spread over devices: what is known of the prompt goes along with its hidden states."""
        if self.state is None or self.visual is None or (self.visual.device == device == self.state.real.device):
            return
        self.state.move(device)
        self.visual = self.visual.to(device)
        self.features = None if self.features is None else self.features.to(device)
        self.alive = None if self.alive is None else self.alive.to(device)
        self.memo.clear()

    def once(self, key: Any, source: Any, make: Callable[[], Any]) -> Any:
        """What several layers share is made once a pass; the source is kept alive, so that its id stays its own."""
        if key not in self.memo:
            self.memo[key] = (make(), source)
        return self.memo[key][0]

    def slots(
        self, state: PromptState, index: int, count: int, batch: int, queries: int, device: torch.device
    ) -> tuple[Tensor, int]:
        """For text behind a shortened prompt: (columns [B, count + Q] of the slots of a layer, the queries last; how many
        columns prompt and text have together).

        Raises:
            StateError: the cache has other rows than it had, or somebody changed single layers of it.
        """
        stage = state.at(index)
        assert stage is not None
        if self.turn is not None and state is self.state:  # which holds the queries already
            if count + queries != stage.column.shape[1]:
                raise StateError(
                    f"decoder layer {index} of the cache holds {count} tokens, other than its first layer; somebody changed "
                    "layers of the cache: read the prompt anew"
                )
            return stage.column.to(device), state.length
        behind = count - stage.column.shape[1]
        if behind < 0 or behind != self.once("behind", None, lambda: behind):
            raise StateError(
                f"decoder layer {index} of the cache holds {count} tokens, which is not what vtok left of the prompt and as "
                "many more as in earlier layers; somebody changed layers of the cache: read the prompt anew"
            )
        column = self.once(("column", id(stage), device), stage, lambda: state.now(stage.column, batch).to(device))
        total = state.length + behind + queries
        text = torch.arange(state.length, total, device=device)
        return torch.cat([column, text.expand(batch, -1)], 1), total

    def real_columns(self, state: PromptState, total: int, batch: int, device: torch.device) -> Tensor:
        """[B, total] bool, False = padding: by the caller's mask, or by what is known of the prompt, all text being real."""
        if self.real is not None and self.real.shape[1] >= total:
            return self.real[:, :total].to(device).expand(batch, -1)
        prompt = state.now(state.real, batch).to(device)
        return torch.cat([prompt, prompt.new_ones(batch, total - state.length)], 1)


class Counts(NamedTuple):
    """What the last prompt of a thread was shortened to; tensors are read only when somebody asks.

    Attributes:
        visual: [B, L] bool.
        real: [B, L] bool.
        stages: decoder layer -> stage, 0 = before the LLM.
        layouts: of the images among whose features a method chose (see `Chosen`).
        calls: of the vision tower since the prompt before.
        alive: [B, L] bool, False = merged or dropped in the vision tower; `None` = all left it.
    """

    visual: Tensor
    real: Tensor
    stages: dict[int, Stage]
    layouts: tuple[Any, ...] = ()
    calls: tuple[TowerCall, ...] = ()
    alive: Tensor | None = None


class TowerCall(NamedTuple):
    """One call of a vision tower.

    Attributes:
        shape: of the pixels: [views, C, H, W], or [patches, values of one] for towers that read all images as one sequence.
        grid: [images, 3] (frames, rows, columns) of patches, for the latter.
        ends: where images and frames end in the sequence that entered, in patches, if some had left before; else `None`.
        windows: the same of windows, if its blocks have some.
    """

    shape: tuple[int, ...]
    grid: Tensor | None = None
    ends: Tensor | None = None
    windows: Tensor | None = None


class Pruner:
    """Shared by the hooks of one vision-language model. Passes belong to their thread; all else never changes.

    Args:
        family: of the model.
        tokens: modality -> id of its placeholder.
        features: what chooses among image features, if anything does.
        layers: decoder layer -> (site, reducer); 0 = before the LLM.
        compact: whether tokens are renumbered after what was dropped.
        configs: what was asked for.
        path: of the model.
        tower: what is patched into the vision tower (vtok.targets.encoder.Patch), or `None`.
        joint: how the model takes what that tower yields; `None` if the tower is as it was.
        trace: whether the tower keeps the map from patches to tokens for the user.
        pixels: what chooses among the patches in front of the vision tower, if anything does.
    """

    def __init__(
        self,
        family: Family,
        tokens: dict[str, int],
        features: VLMReducer | None,
        layers: dict[int, tuple[Site, VLMReducer]],
        compact: bool,
        configs: tuple[MethodConfig, ...],
        path: str,
        tower: Any = None,
        joint: TowerBridge | None = None,
        trace: bool = False,
        pixels: VLMReducer | None = None,
    ):
        self.pixels = pixels
        self.family, self.tokens, self.features, self.layers = family, tokens, features, layers
        self.compact, self.configs, self.path = compact, configs, path
        self.tower, self.joint, self.trace = tower, joint, trace
        probed = [(r.probe(site), site.index) for site, r in layers.values() if "attention" in r.needs]
        self.probed = frozenset(layer for layer, _ in probed)
        self.probed_later = frozenset(layer for layer, index in probed if layer != index)  # read when that layer has run
        self.reads_entry = any("embeddings" in r.needs for _, r in layers.values())
        self.budget: Any = None  # what a FLOPs budget was turned into (vtok.cost.budget.Budget)
        self._local = threading.local()

    @property
    def has_dropped_tokens(self) -> bool:
        """Whether visual tokens are missing that the vision tower merged or dropped, or that left in front of it."""
        return self.pixels is not None or (self.joint is not None and bool(self.joint.connector))

    @property
    def shortens(self) -> bool:
        """Whether prompts get shorter."""
        return self.features is not None or bool(self.layers) or self.has_dropped_tokens

    @property
    def acts(self) -> bool:
        """Whether there is anything to do or to account for."""
        return self.shortens or self.joint is not None

    @property
    def _stack(self) -> list[PassState]:
        return self._local.__dict__.setdefault("stack", [])

    @property
    def current(self) -> PassState | None:
        """This thread's running pass."""
        return self._stack[-1] if self._stack else None

    def open(self, cache: Any) -> PassState:
        mark_busy(cache, True)
        self._stack.append(PassState(cache=cache))
        return self._stack[-1]

    def close(self, failed: bool = False) -> None:
        """Ends this thread's running pass. Of one that failed nothing is told: its counts are those of half a pass."""
        if not self._stack:
            return
        ended = self._stack.pop()
        mark_busy(ended.cache, False)
        state = ended.state
        if state is not None:
            state.inside = False
        if failed:
            self._calls.clear()
            self._local.__dict__.pop("last", None)
            return
        if not ended.prunes or state is None:
            return
        if ended.plan is not None and ended.lasts and not ended.replays:
            self._record(ended.given, ended.plan)
        assert ended.visual is not None
        before = {} if state.before is None else {0: state.before}
        calls = tuple(self._calls)
        self._calls.clear()
        if ended.embedded or ended.later:  # what was read before is not known, or would be missing from the costs
            return
        stages = {**before, **state.between}
        self._local.__dict__["last"] = Counts(ended.visual, state.real, stages, ended.layouts, calls, ended.alive)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """This thread generates an answer: plans of its prompts last until that is done."""
        self._answers.append(deque(maxlen=_PLANS))
        try:
            yield
        finally:
            self._answers.pop()

    @property
    def generates(self) -> bool:
        """Whether generate() runs in this thread."""
        return bool(self._answers)

    @property
    def _answers(self) -> list[deque[Recorded]]:
        return self._local.__dict__.setdefault("answers", [])

    def _plans(self, outputs: Mapping[str, Any] | None) -> list[deque[Recorded]]:
        """Where plans lie: with encoded images, and with the running call of generate()."""
        notes = (note_of(output) for output in (outputs or {}).values())
        return [note.plans for note in notes if note is not None] + self._answers[-1:]

    def recalled(self, outputs: Mapping[str, Any] | None, ids: Tensor) -> Recorded | None:
        """The plan of an earlier pass over the prompt that `ids` goes on with, or `None`."""
        return next((plan for plans in self._plans(outputs) for plan in plans if plan.fits(self.configs, ids)), None)

    def _record(self, outputs: Mapping[str, Any] | None, plan: Recorded) -> None:
        for plans in self._plans(outputs)[:1]:
            plans.append(plan)

    @property
    def entered(self) -> list[Tensor | None]:
        """Units of patches [U] bool that entered each running call of this thread's vision tower; `None` = all."""
        return self._local.__dict__.setdefault("entered", [])

    @property
    def _calls(self) -> deque[TowerCall]:
        return self._local.__dict__.setdefault("calls", deque(maxlen=_CALLS))

    def watch(self, call: TowerCall) -> None:
        """Remembers what this thread's vision tower was given, until the prompt that it belongs to has been read."""
        self._calls.append(call)

    @property
    def encoded(self) -> bool:
        """Whether this thread's vision tower has run since the last prompt with images was read."""
        return bool(self._calls)

    @property
    def last(self) -> Counts | None:
        """This thread's last prompt with images."""
        return self._local.__dict__.get("last")

    def __getstate__(self) -> dict[str, Any]:  # passes are neither copied nor pickled
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._local = threading.local()
