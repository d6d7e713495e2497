"""A vision-language model in training form: no visual token leaves; from some decoder layers on, tokens are attended less.

What a method would drop in inference gets a bias below zero on its logits, in every later layer, through which gradients reach
whatever decides. Nothing is compiled into the model: hooks come and go with a `with` block, and the model's own masks are added
to, never replaced.

Shapes: B rows, L columns of the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vtok.core.prompt import LayerAttention, Layout
from vtok.errors import ConfigError, StateError, UnsupportedModelError
from vtok.patches import find_vlms
from vtok.patches.decoder import masks
from vtok.patches.decoder.attention_probe import layer_attention
from vtok.patches.decoder.kv_cache import cache_in, cached_length
from vtok.patches.decoder.prompts import packed
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import pruner_of
from vtok.patches.module_swap import Hook


class Soft(Protocol):
    """What decides in one forward pass."""

    @property
    def layers(self) -> Sequence[int]:
        """Decoder layers from which on a new bias holds, rising; the attention of the layer in front of each is read."""
        ...

    def bias(self, layer: int, layout: Layout, attention: LayerAttention, dtype: torch.dtype) -> Tensor:
        """[B, 1, L, L]: what is added to the logits of this layer and of those behind it, until the next of `layers`."""
        ...


S = TypeVar("S", bound=Soft)


@contextmanager
def softened(model: nn.Module, soft: S) -> Iterator[S]:
    """`with softened(model, soft): loss = model(**inputs, labels=labels, use_cache=False).loss`: one forward pass in training
    form. Outside of the block the model is what it was.

    Attention must take an additive mask: `attn_implementation` "sdpa" or "eager". Gradient checkpointing works in its
    non-reentrant form, which is the default of transformers; the reentrant one would lose the gradients of the masks.

    Args:
        model: holds one supported vision-language model, not patched.
        soft: what decides, such as `vtok.methods.atp.reducer.SoftATP`.

    Yields:
        `soft`, which knows after the pass what it decided.

    Raises:
        UnsupportedModelError: no such model, or its attention cannot be read or take a mask.
        ConfigError: the model is patched, or `soft.layers` names layers that it does not have.
        StateError: the block runs several passes, a pass continues an earlier one, or checkpoints are reentrant.
    """
    vlm = _only(model)
    layers = vlm.text.layers
    wrong = [i for i in soft.layers if i not in vlm.info.inner_layers]
    if wrong or not soft.layers:
        raise ConfigError(
            f"tokens of {vlm.info.name} can be gated from the decoder layers {vlm.info.first_layer} to "
            f"{vlm.info.inner_layers.stop - 1} on, got {wrong[0] if wrong else 'none'}"
        )
    run = _Run(vlm, soft)
    handles = [vlm.module.register_forward_pre_hook(_BeforeModel(run), with_kwargs=True)]
    for i in range(min(soft.layers) - 1, len(layers)):
        handles.append(layers[i].register_forward_pre_hook(_BeforeLayer(run, i), with_kwargs=True))
    try:
        yield soft
    finally:
        for handle in handles:
            handle.remove()


def _only(model: nn.Module) -> VLM:
    vlms = find_vlms(model)
    if len(vlms) != 1:
        raise UnsupportedModelError(
            f"the training form takes one vision-language model, {type(model).__name__} holds {len(vlms)}"
        )
    vlm: VLM = vlms[0]
    if pruner_of(vlm) is not None:
        raise ConfigError("the model is patched and would drop tokens that training must see; call vtok.unpatch(model) first")
    if vlm.info.no_attention is not None:
        raise UnsupportedModelError(f"attention of {vlm.info.name}'s decoder layers cannot be read: {vlm.info.no_attention}")
    if vlm.info.attention_layers is not None:
        raise UnsupportedModelError(
            f"gates are added to attention masks, which layers of {vlm.info.name} with a recurrent state or a convolution do "
            "not read: they would see what is to be dropped"
        )
    kind = vlm.text.config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f"gates are added to attention masks, which attn_implementation={kind!r} does not take; use 'sdpa' or 'eager'"
        )
    return vlm


class _Run:
    """One pass: what its prompt holds, and the bias that holds at the moment."""

    def __init__(self, vlm: VLM, soft: Soft):
        self.vlm, self.soft = vlm, soft
        self.layout: Layout | None = None
        self.bias: Tensor | None = None
        self.attention: LayerAttention | None = None
        self._memo: tuple[Any, Any, Tensor] | None = None

    def masked(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """A layer's own mask with the bias on it; layers that share a mask share the sum."""
        if self.bias is None:
            return mask
        if self._memo is None or self._memo[0] is not mask or self._memo[1] is not self.bias:
            self._memo = (mask, self.bias, _additive(mask, x) + self.bias)
        return self._memo[2]


class _BeforeModel(Hook):
    def __init__(self, run: _Run):
        self.run = run

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run, kwargs = self.run, dict(zip(inspect.signature(module.forward).parameters, args), **kwargs)
        if run.layout is not None:
            raise StateError("softened covers one forward pass; open it anew, with a new object that decides, for each")
        ids = kwargs.get("input_ids")
        if ids is None or cached_length(cache_in(kwargs)) > 0:
            raise StateError("the training form reads whole prompts: pass input_ids and no cache that holds text already")
        sample = packed.samples(run.vlm.module, run.vlm.family, kwargs, *ids.shape)
        if sample is not None and bool(packed.several(sample)):
            raise StateError(
                "the training form takes a row for one prompt, but rows hold several samples (their positions start over); "
                "give every sample a row of its own, with an attention_mask"
            )
        visual = hf.visual_columns(ids, run.vlm.tokens)
        real = masks.real_columns(kwargs.get("attention_mask"), len(ids), ids.shape[1], ids.device)
        run.layout = Layout.whole(visual & real, real)


class _BeforeLayer(Hook):
    def __init__(self, run: _Run, index: int):
        self.run, self.index = run, index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, layers = self.run, self.run.soft.layers
        if run.layout is None:
            raise StateError(f"{type(module).__name__} was called on its own; call the vision-language model")
        _check_checkpoints(module)
        x, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        if self.index in layers:
            assert run.attention is not None
            run.bias = run.soft.bias(self.index, run.layout, run.attention, x.dtype)
        kwargs = {**kwargs, "attention_mask": run.masked(mask, x)}
        if self.index + 1 in layers:
            run.attention = layer_attention(self.index, module, x.detach(), kwargs, later=True)
        return args, kwargs


def _check_checkpoints(layer: Any) -> None:
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise StateError(
            "reentrant checkpoints lose the gradients of attention masks, and with them those of the gates; enable them with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def _additive(mask: Tensor | None, x: Tensor) -> Tensor:
    """A layer's mask as numbers [B or 1, 1, L, L] to add to logits; half of the lowest one hides, so that sums stay finite."""
    length, low = x.shape[1], torch.finfo(x.dtype).min / 2
    if mask is None:
        order = torch.arange(length, device=x.device)
        mask = (order <= order[:, None])[None, None]
    if mask.shape[-1] != length:
        raise StateError(f"the training form reads whole prompts: the mask has {mask.shape[-1]} keys for {length} queries")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, low)
    return mask.clamp_min(low)
