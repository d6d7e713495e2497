"""What the blocks of a vision tower attended to while a vision-language model encoded images.

Hooks keep what enters the blocks that a method asked for, while the model's own `get_image_features` runs, and note it on what
that returns (`vtok.patches.hf_vlm.encoded`): generate() encodes images before it reads the prompt. Nothing else is kept;
queries and keys are worked out from it when a method looks at them, by the descriptions of the encoder adapters.

Shapes: V views (crops, tiles, frames) of all images, N tokens that enter a block, C width, H heads, D head dim.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.prompt import TowerBlock
from vtok.core.tokens import AttentionView, TokenState, gather_positions, log_size_bias
from vtok.errors import StateError
from vtok.patches.block import Link, chain
from vtok.patches.hf_vlm.encoded import Note, note_of, noted
from vtok.patches.hf_vlm.generic.outputs import feature_list
from vtok.patches.hf_vlm.tower.bridge import feature_block
from vtok.patches.module_swap import Hook, Mixin, brought, leaves, remove_hooks, swap_class, weights_of
from vtok.patches.padding import padding_of
from vtok.patches.precision import as_now
from vtok.patches.protocol import Attend, BlockSpec, Tower
from vtok.patches.transaction import to_the_end

_TAPS = "_vtok_taps"


@dataclass(frozen=True)
class Entered:
    """What entered a block, whose queries and keys are worked out from it when somebody looks at them.

    Attributes:
        block: the module.
        spec: its anatomy.
        attend: how its attention is called.
        x: [V, N, C].
        kwargs: the other arguments.
        autocast: as it was when the block ran.
        prop_attn: whether attention sees the sizes of merged tokens, if the tower is patched itself.
    """

    block: Any
    spec: BlockSpec
    attend: Attend
    x: Tensor
    kwargs: dict[str, Any]
    autocast: Callable[[], AbstractContextManager]
    prop_attn: bool

    def view(self, rows: Sequence[int] | slice, state: TokenState) -> AttentionView:
        """Of some views, whose tokens `state` describes."""
        attention: Any = self.spec.attention(self.block)
        with torch.no_grad(), self.autocast():
            rope = gather_positions(self.kwargs.get(self.spec.rope) if self.spec.rope else None, state)
            h = chain(self.block, self.spec.pre1, self.x[rows])
            p = self.attend.project(attention, h, rope)
            bias = log_size_bias(state, h.dtype, self.prop_attn)
        return AttentionView(p.q, p.k, p.k_rot, p.v, self.attend.scale(attention), bias)


@dataclass(frozen=True)
class Caught:
    """What a block of the tower attended to.

    Attributes:
        num_prefix: tokens in front of the patches.
        count: V.
        state: of the tokens of all views.
        source: what entered the block, or, settled, its queries, keys and values.
        output: [V, N, C], what left the block.
    """

    num_prefix: int
    count: int
    state: TokenState
    source: Entered | AttentionView
    output: Tensor | None = None

    def of(self, rows: Sequence[int], device: torch.device) -> TowerBlock:
        """For some of the views, on the device of their features."""
        state = self._rows(list(rows))
        return TowerBlock(
            self.num_prefix,
            None if state.keep is None else state.keep.to(device),
            lambda: _each(self._view(list(rows), state), lambda t: t.to(device)),
            lambda views: self.of([rows[i] for i in views], device),
            None if state.index is None else state.index.to(device),
            state.length,
            None if self.output is None else functools.partial(_rows_on, self.output, list(rows), device),
        )

    def settled(self) -> Caught:
        """The same without the block, whose weights may leave, and which is not to be pickled."""
        if isinstance(self.source, AttentionView):
            return self
        return replace(self, source=self.source.view(slice(None), self.state))

    def _rows(self, rows: list[int]) -> TokenState:
        index, size, keep = (None if t is None else t[rows] for t in (self.state.index, self.state.size, self.state.keep))
        return TokenState(self.num_prefix, self.state.length, index, size, keep)

    def _view(self, rows: list[int], state: TokenState) -> AttentionView:
        if isinstance(self.source, Entered):
            return self.source.view(rows, state)
        return _each(self.source, lambda t: t[rows] if len(t) == self.count else t)

    def __reduce__(self) -> Any:  # neither copied nor pickled with the tower
        settled = self.settled()
        return Caught, (settled.num_prefix, settled.count, settled.state, settled.source, settled.output)


def _rows_on(x: Tensor, rows: list[int], device: torch.device) -> Tensor:
    return x[rows].to(device)


def _each(view: AttentionView, change: Callable[[Tensor], Tensor]) -> AttentionView:
    """A view with each of its tensors changed."""
    q, k, k_rot, v, bias = (t if t is None else change(t) for t in (view.q, view.k, view.k_rot, view.v, view.bias))
    return AttentionView(q, k, k_rot, v, view.scale, bias)


class TowerTaps:
    """Which blocks are looked at, and what this thread has caught in them. Shared by the hooks of one model."""

    def __init__(self, blocks: Sequence[int], depth: int = 0):
        self.blocks, self.depth = tuple(blocks), depth  # blocks of the tower, once they are hooked
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

    def hook(self, tower: Tower) -> None:
        """Hooks the blocks."""
        self.depth = len(tower.blocks)
        for i in self.blocks:
            block = tower.blocks[i]
            tap = BlockTap(self, i, block.spec, block.attend, tower.num_prefix)
            block.module.register_forward_pre_hook(tap, with_kwargs=True)
            block.module.register_forward_hook(OutputTap(self, i, block.spec.seq_first))

    @contextmanager
    def on(self, tower: Tower | None) -> Iterator[None]:
        """The blocks are hooked for a while. Without blocks nothing is."""
        try:
            if tower is not None:
                self.hook(tower)
            yield
        finally:
            to_the_end(lambda: self._unhook(tower))

    def _unhook(self, tower: Tower | None) -> None:
        for block in () if tower is None else tower.blocks:
            remove_hooks(block.module, self._owns)

    def _owns(self, hook: Any) -> bool:
        return isinstance(hook, (BlockTap, OutputTap)) and hook.taps is self

    def __getstate__(self) -> dict[str, Any]:  # what a thread holds is neither copied nor pickled
        return {"blocks": self.blocks, "depth": self.depth}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(saved["blocks"], saved["depth"])  # type: ignore[misc]  # builds it anew, locks too


class BlockTap(Hook):
    """Hands what enters a block to `TowerTaps`."""

    def __init__(self, taps: TowerTaps, number: int, spec: BlockSpec, attend: Attend, num_prefix: int):
        self.taps, self.number, self.spec, self.attend, self.num_prefix = taps, number, spec, attend, num_prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.taps.catch(self.number, lambda: self._caught(module, *args, **kwargs))

    def _caught(self, module: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Caught:
        kwargs = {**dict(zip(self.spec.args, args)), **kwargs}
        x = kwargs.pop("hidden_states") if x is None else x
        x = brought(module, x.transpose(0, 1) if self.spec.seq_first else x)
        kwargs = {name: brought(module, value) for name, value in kwargs.items()}
        link: Any = module.__dict__.get("_vtok")  # of a method inside the tower
        state, prop, n = None, False, x.shape[1]
        if isinstance(link, Link) and link.index > 0:
            state, prop = link.run.current.states[link.index], link.run.prop_attn
        if state is None:
            of = self.spec.padding_mask
            found = None if of is None else padding_of(of(module, kwargs), n, self.num_prefix)
            keep = None if found is None else found.keep.expand(len(x), -1)
            state = TokenState(self.num_prefix, n, keep=keep)
        state = TokenState(self.num_prefix, state.length, state.index, state.size, state.keep).on(x.device)
        entered = Entered(module, self.spec, self.attend, x.detach(), kwargs, as_now(x.device.type), prop)
        caught = Caught(self.num_prefix, len(x), state, entered)
        return caught.settled() if leaves(module) else caught


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
        return watched(self, super().get_image_features, self.__dict__[_TAPS])  # type: ignore[misc]

    @property
    def get_video_features(self) -> Callable[..., Any]:
        return watched(self, super().get_video_features, self.__dict__[_TAPS])  # type: ignore[misc]


def install(model: Any, tower: Tower | None, blocks: Sequence[int], mixin: type[WatchedModel] = WatchedModel) -> None:
    """Makes a model watch some blocks of its tower, or none, whenever it encodes images, and note it on what it returns."""
    taps = TowerTaps(blocks)
    model.__dict__[_TAPS] = taps
    if tower is not None:
        taps.hook(tower)
    swap_class(model, mixin)


def watched(model: nn.Module, function: Callable[..., Any], taps: TowerTaps) -> Callable[..., Any]:
    """`get_image_features` of a model with the same signature, leaving what the tower saw on what it returns."""

    @functools.wraps(function)
    def encode(*args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}
        _check_layer(model, taps, named.get("vision_feature_layer"))
        with taps.watching() as blocks, weights_of(model):
            output = function(*args, **kwargs)
        if isinstance(output, tuple):
            return output
        call = {name: value for name, value in named.items() if not name.startswith("pixel_values")}
        pixels = named.get("pixel_values")
        if isinstance(pixels, Tensor) and pixels.ndim >= 4:  # [..., C, H, W]
            call["pixel_size"] = tuple(pixels.shape[-2:])
        if isinstance(pixels := named.get("pixel_values_videos"), Tensor):
            call["video_shape"] = tuple(pixels.shape)
        return noted(output, Note(blocks, call, feature_list(output)))

    return encode


def _check_layer(model: Any, taps: TowerTaps, layers: Any) -> None:
    """The block that the features come from, which the method was told to look at, is still the config's."""
    usual = getattr(model.config, "vision_feature_layer", None)
    if layers is None or usual is None or not taps.depth:
        return
    block = feature_block(usual, taps.depth)
    if block in taps.blocks and feature_block(layers, taps.depth) != block:
        raise StateError(
            f"the method looks at block {block} of the vision tower, but with vision_feature_layer={layers} the features come "
            "from another; no other than the config's can be passed to this method: set it in the config first, then patch"
        )


def seen(output: Any, blocks: Sequence[int]) -> Note:
    """What the tower saw of encoded images.

    Raises:
        StateError: nothing was kept: somebody encoded them before the model was patched, or with another model.
    """
    found = note_of(output)
    if found is None or not set(blocks) <= set(found.blocks):
        raise StateError(
            "mm_encoder_outputs does not say what the vision tower saw, whose attention the method looks at: it was encoded "
            "before vtok patched the model, or taken apart since; pass pixels, or all that get_image_features returned"
        )
    return found


def original(note: Note, images: Sequence[Tensor]) -> list[int]:
    """Which of the encoded images each of these is.

    Raises:
        StateError: one of them is none of those.
    """
    if len(images) == len(note.images):
        return list(range(len(images)))
    found: list[int] = []
    for x in images:
        after = found[-1] + 1 if found else 0
        order = [*range(after, len(note.images)), *range(after)]
        same = (i for i in order if x.shape == note.images[i].shape and torch.equal(x, note.images[i].to(x.device)))
        number = next(same, None)
        if number is None:
            raise StateError(
                f"mm_encoder_outputs holds {len(images)} images, some of which are none of the {len(note.images)} that were "
                "encoded; pass what get_image_features returned, or pixels"
            )
        found.append(number)
    return found


def merge_call(kwargs: Mapping[str, Any], found: Note) -> dict[str, Any]:
    """Keywords of the model's call, with those that generate() used up when it encoded the images."""
    return {**found.call, **{name: value for name, value in kwargs.items() if value is not None}}
