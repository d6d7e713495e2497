"""What the blocks of a vision tower attended to while a vision-language model encoded images.

Hooks keep what enters the blocks that a method asked for, while the model's own `get_image_features` runs, and leave it on what
that returns: generate() encodes images before it reads the prompt. Nothing else is kept; queries and keys are worked out from
it when a method looks at them, by the descriptions of the encoder adapters.

Shapes: V views (crops, tiles, frames) of all images, N tokens that enter a block, C width, H heads, D head dim.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.errors import StateError
from vtok.patches.block import Link, chain
from vtok.patches.padded import key_padding
from vtok.patches.precision import as_now
from vtok.patches.protocol import Attend, BlockSpec, Tower
from vtok.patches.swap import Hook, Mixin, put_on
from vtok.prompt import TowerBlock
from vtok.state import AttentionView, TokenState, gather_positions, log_size_bias

_SEEN, _TAPS = "_vtok_tower", "_vtok_taps"


@dataclass(frozen=True)
class Caught:
    """What entered a block.

    Attributes:
        block: the module.
        spec: its anatomy.
        attend: how its attention is called.
        num_prefix: tokens in front of the patches.
        x: [V, N, C].
        kwargs: the other arguments.
        autocast: as it was when the block ran.
        state: of the tokens, if the tower is patched itself.
        prop_attn: whether attention sees the sizes of merged tokens then.
        output: [V, N, C], what left the block.
    """

    block: Any
    spec: BlockSpec
    attend: Attend
    num_prefix: int
    x: Tensor
    kwargs: dict[str, Any]
    autocast: Callable[[], AbstractContextManager]
    state: TokenState | None = None
    prop_attn: bool = False
    output: Tensor | None = None

    def of(self, rows: Sequence[int]) -> TowerBlock:
        """For some of the views."""
        state = self._state(list(rows))
        return TowerBlock(
            self.num_prefix,
            state.keep,
            functools.partial(self._view, list(rows), state),
            lambda views: self.of([rows[i] for i in views]),
            state.index,
            state.length,
            None if self.output is None else functools.partial(self.output.__getitem__, list(rows)),
        )

    def _state(self, rows: list[int]) -> TokenState:
        state = self.state
        if state is None:
            n = self.x.shape[1]
            state = TokenState(self.num_prefix, n, keep=key_padding(self.kwargs.get(self.spec.mask), n))
        index, size, keep = (None if t is None else t[rows] for t in (state.index, state.size, state.keep))
        return TokenState(self.num_prefix, state.length, index, size, keep)

    def _view(self, rows: list[int], state: TokenState) -> AttentionView:
        attention: Any = self.spec.attention(self.block)
        with torch.no_grad(), self.autocast():
            rope = gather_positions(self.kwargs.get(self.spec.rope) if self.spec.rope else None, state)
            h = chain(self.block, self.spec.pre1, self.x[rows])
            p = self.attend.project(attention, h, rope)
            bias = log_size_bias(state, h.dtype, self.prop_attn)
        return AttentionView(p.q, p.k, p.k_rot, p.v, self.attend.scale(attention), bias)


class Seen(NamedTuple):
    """What is left on encoded images.

    Attributes:
        blocks: number -> what entered it.
        call: other arguments of `get_image_features` than pixels: sizes of images and the like.
        images: their features [n, D], by which they are found again after generate() has repeated them for beams.
    """

    blocks: dict[int, Caught]
    call: dict[str, Any]
    images: list[Tensor]

    @property
    def num_views(self) -> int:
        """V."""
        return next(len(caught.x) for caught in self.blocks.values())

    def original(self, images: Sequence[Tensor]) -> list[int]:
        """Which of the encoded images each of these is.

        Raises:
            StateError: one of them is none of those.
        """
        if len(images) == len(self.images):
            return list(range(len(images)))
        found: list[int] = []
        for x in images:
            after = found[-1] + 1 if found else 0
            order = [*range(after, len(self.images)), *range(after)]
            same = (i for i in order if x.shape == self.images[i].shape and torch.equal(x, self.images[i]))
            number = next(same, None)
            if number is None:
                raise StateError(
                    f"mm_encoder_outputs holds {len(images)} images, some of which are none of the {len(self.images)} that "
                    "were encoded; pass what get_image_features returned, or pixels"
                )
            found.append(number)
        return found


class TowerTaps:
    """Which blocks are looked at, and what this thread has caught in them. Shared by the hooks of one model."""

    def __init__(self, blocks: Sequence[int]):
        self.blocks = tuple(blocks)
        self._local = threading.local()

    @property
    def _stack(self) -> list[dict[int, Caught]]:
        return self._local.__dict__.setdefault("stack", [])

    @contextmanager
    def watching(self) -> Iterator[dict[int, Caught]]:
        """Catches what enters the blocks in this thread."""
        self._stack.append({})
        try:
            yield self._stack[-1]
        finally:
            self._stack.pop()

    def catch(self, number: int, caught: Callable[[], Caught]) -> None:
        if self._stack:
            self._stack[-1][number] = caught()

    def catch_output(self, number: int, output: Tensor) -> None:
        if self._stack and number in self._stack[-1]:
            self._stack[-1][number] = replace(self._stack[-1][number], output=output.detach())

    def hook(self, tower: Tower) -> list[Any]:
        """Hooks the blocks; returns handles."""
        handles: list[Any] = []
        for i in self.blocks:
            block = tower.blocks[i]
            tap = BlockTap(self, i, block.spec, block.attend, tower.num_prefix)
            handles.append(block.module.register_forward_pre_hook(tap, with_kwargs=True))
            handles.append(block.module.register_forward_hook(OutputTap(self, i, block.spec.seq_first)))
        return handles

    @contextmanager
    def on(self, tower: Tower | None) -> Iterator[None]:
        """The blocks are hooked for a while. Without blocks nothing is."""
        handles = self.hook(tower) if tower is not None else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:  # what a thread holds is neither copied nor pickled
        return {"blocks": self.blocks}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(saved["blocks"])  # type: ignore[misc]


class BlockTap(Hook):
    """Hands what enters a block to `TowerTaps`."""

    def __init__(self, taps: TowerTaps, number: int, spec: BlockSpec, attend: Attend, num_prefix: int):
        self.taps, self.number, self.spec, self.attend, self.num_prefix = taps, number, spec, attend, num_prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.taps.catch(self.number, lambda: self._caught(module, *args, **kwargs))

    def _caught(self, module: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Caught:
        kwargs = {**dict(zip(self.spec.args, args)), **kwargs}
        x = kwargs.pop("hidden_states") if x is None else x
        x = x.transpose(0, 1) if self.spec.seq_first else x
        link: Any = module.__dict__.get("_vtok")  # of a method inside the tower
        state, prop = None, False
        if isinstance(link, Link) and link.index > 0:
            state, prop = link.run.current.states[link.index], link.run.prop_attn
        return Caught(module, self.spec, self.attend, self.num_prefix, x.detach(), kwargs, as_now(x.device.type), state, prop)


class OutputTap(Hook):
    """Hands what leaves a block to `TowerTaps`."""

    def __init__(self, taps: TowerTaps, number: int, seq_first: bool):
        self.taps, self.number, self.seq_first = taps, number, seq_first

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self.taps.catch_output(self.number, x.transpose(0, 1) if self.seq_first else x)


class WatchedModel(Mixin):
    """Put in front of the class of a vision-language model: what it encodes carries what its tower saw."""

    @property
    def get_image_features(self) -> Callable[..., Any]:
        return watched(super().get_image_features, self.__dict__[_TAPS])  # type: ignore[misc]

    @property
    def get_video_features(self) -> Callable[..., Any]:
        return watched(super().get_video_features, self.__dict__[_TAPS])  # type: ignore[misc]


def install(model: Any, tower: Tower, blocks: Sequence[int]) -> None:
    """Makes a model watch some blocks of its tower whenever it encodes images."""
    taps = TowerTaps(blocks)
    model.__dict__[_TAPS] = taps
    taps.hook(tower)
    put_on(model, WatchedModel)


def watched(function: Callable[..., Any], taps: TowerTaps) -> Callable[..., Any]:
    """`get_image_features` with the same signature, leaving what the tower saw on what it returns."""

    @functools.wraps(function)
    def encode(*args: Any, **kwargs: Any) -> Any:
        with taps.watching() as blocks:
            output = function(*args, **kwargs)
        if hasattr(output, "pooler_output"):  # not a tuple
            named = {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}
            call = {name: value for name, value in named.items() if not name.startswith("pixel_values")}
            output.__dict__[_SEEN] = Seen(blocks, call, list(output.pooler_output))
        return output

    return encode


def seen(output: Any, blocks: Sequence[int]) -> Seen:
    """What the tower saw of encoded images.

    Raises:
        StateError: nothing was kept: somebody encoded them before the model was patched, or with another model.
    """
    found: Seen | None = getattr(output, "__dict__", {}).get(_SEEN)
    if found is None or not set(blocks) <= set(found.blocks):
        raise StateError(
            "mm_encoder_outputs was encoded before vtok patched the model, and the method looks at the attention of its vision "
            "tower; pass pixels, or encode the images with the patched model"
        )
    return found


def merge_call(kwargs: Mapping[str, Any], found: Seen) -> dict[str, Any]:
    """Keywords of the model's call, with those that generate() used up when it encoded the images."""
    return {**found.call, **{name: value for name, value in kwargs.items() if value is not None}}
