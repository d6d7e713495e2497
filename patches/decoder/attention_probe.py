"""Attention of one decoder layer, worked out from that layer's own input and weights; no kernel is changed.

Where attention is made as in Llama, only the queries that are asked for are projected. A layer that does it in its own way (a
norm elsewhere, layers without positions, latent keys) is run again as far as its kernel, which says what it was given.

Shapes: B rows, L columns that enter the layer, R query rows, H heads, D head dim.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.prompt import Entry, LayerAttention
from vtok.patches.decoder import masks
from vtok.patches.decoder.kv_cache import CACHES, take
from vtok.patches.decoder.masks import Mask
from vtok.patches.decoder.text_models import has_own_attention
from vtok.patches.module_swap import leaves
from vtok.patches.precision import as_now

READS = "vtok_reads_queries_and_keys"  # name of the kernel that does, among transformers' attention functions


def why_not(layer: nn.Module) -> str | None:
    """Why the attention of a decoder layer cannot be worked out, or `None` if it can."""
    attention = getattr(layer, "self_attn", None)
    if has_own_attention(attention):
        return None
    needed = ("q_proj", "k_proj", "head_dim", "scaling")
    lacking = [name for name in needed if not hasattr(attention, name)]
    if not hasattr(layer, "input_layernorm"):
        lacking.append("input_layernorm")
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        lacking.append("apply_rotary_pos_emb")
    if hasattr(attention, "sinks"):
        return f"{type(attention).__name__} has attention sinks"
    return f"{type(attention).__name__} has no {', '.join(lacking)}" if lacking else None


def inner_layers(config: Any, text: Any) -> dict[str, Any]:
    """Fields of `VLMInfo`: between which decoder layers tokens may leave, and what decides there.

    Args:
        config: of the vision-language model.
        text: its LLM.
    """
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    named = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    found: dict[str, Any] = {
        "first_layer": max(len(deep), *named, *(getattr(config, "spatial_target_layers", None) or ()), 1),
        "last_layer": min((masks.stored_in(x, i) for i, x in enumerate(text.layers) if masks.shares(x)), default=None),
    }
    attending = tuple(i for i, layer in enumerate(text.layers) if hasattr(layer, "self_attn"))
    if attending and len(attending) < len(text.layers):
        found["attention_layers"] = attending
        if attending[0] + 1 > found["first_layer"]:
            found["first_layer"] = attending[0] + 1
            found["no_earlier"] = "its cache counts tokens by its first layer of attention, which has to hold them all"
    looked_at = [text.layers[i] for i in attending] or text.layers
    found["no_attention"] = next((why for layer in looked_at if (why := why_not(layer))), None)
    return found


def layer_attention(
    index: int,
    layer: Any,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    later: bool = False,
    final_norm: nn.Module | None = None,
    entry: Entry | None = None,
    real: Tensor | None = None,
) -> LayerAttention:
    """Describes what a decoder layer is about to attend to. Called in that layer's own hook.

    Args:
        index: of the layer.
        layer: the module.
        hidden: [B, L, C], its input.
        kwargs: its keyword arguments: `attention_mask` and `position_embeddings` that fit these L columns.
        later: whether it is looked at when the layer has run. Where the layer's weights are gone by then, queries and keys of
            all columns are worked out now.
        final_norm: the last norm of the LLM.
        entry: what entered the LLM.
        real: [B, L] bool, False = padding: positions then count from each row's first real column. `None` = as they are.
    """
    attention, device = layer.self_attn, hidden.device
    mask = kwargs.get("attention_mask")
    mask = mask.to(device) if isinstance(mask, Tensor) else mask
    tables: tuple[Tensor, Tensor] | None = kwargs.get("position_embeddings")  # None: a layer without positions
    if tables is not None:
        tables = tables[0].to(device), tables[1].to(device)
        if real is not None:
            tables = _counted_from(*tables, real.to(device))
    autocast = as_now(hidden.device.type)

    @functools.cache
    def normed() -> Tensor:
        with torch.no_grad(), autocast():
            return layer.input_layernorm(hidden)

    @functools.cache
    def ran() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), autocast():
            return _run(layer, hidden, {**kwargs, "position_embeddings": tables})

    own = has_own_attention(attention)

    def project(rows: Tensor | None) -> Tensor:
        if own:
            q, k = ran()
            return k if rows is None else take(q.transpose(1, 2), rows, 1).transpose(1, 2)
        assert tables is not None
        with torch.no_grad(), autocast():
            return _project(attention, normed(), tables, rows)

    def bias(rows: Tensor) -> Tensor:
        return _bias(mask, rows, hidden.shape[1])

    def norm(x: Tensor) -> Tensor:
        assert final_norm is not None
        with torch.no_grad(), autocast():
            found: Tensor = final_norm(x)
        return found.to(x.device)  # the layers of an LLM may be spread over devices

    softcap = getattr(attention, "attn_logit_softcapping", None)
    read = _settled(project, hidden) if later and leaves(layer) else project
    last = None if final_norm is None else norm
    return LayerAttention(index, attention.scaling, read, bias, softcap, last, entry, device)


def attention_on(attention: LayerAttention | None, device: torch.device) -> LayerAttention | None:
    """Attention of a layer, for decisions on another device."""
    if attention is None or attention.device in (None, device):
        return attention
    project, bias, norm, there = attention.project, attention.bias, attention.final_norm, attention.device

    def there_and_back(rows: Tensor | None) -> Tensor:
        return project(None if rows is None else rows.to(there)).to(device)

    return replace(
        attention,
        project=there_and_back,
        bias=lambda rows: bias(rows.to(there)).to(device),
        final_norm=None if norm is None else lambda x: norm(x).to(device),
        entry=None if attention.entry is None else attention.entry.to(device),
        device=device,
    )


def _settled(project: Callable[[Tensor | None], Tensor], hidden: Tensor) -> Callable[[Tensor | None], Tensor]:
    """The same for when the weights are gone."""
    every = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    q, k = project(every), project(None)
    return lambda rows: k if rows is None else take(q.transpose(1, 2), rows, 1).transpose(1, 2)


def _counted_from(cos: Tensor, sin: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables for positions counted from each row's first real column.

    Padding on the left moves positions where a caller gives none. Attention does not see that, a norm of rotated keys does.

    Args:
        cos: [.., B or 1, L, D].
        sin: the same.
        real: [B, L] bool.
    """
    first = real.to(torch.uint8).argmax(1)[:, None, None]
    batch = (*cos.shape[:-3], len(real), *cos.shape[-2:])
    cos, sin = cos.expand(batch), sin.expand(batch)
    at = first.expand(*batch[:-2], 1, batch[-1])
    start_cos, start_sin = cos.gather(-2, at), sin.gather(-2, at)
    length = torch.hypot(start_cos.float(), start_sin.float()).clamp_min(1e-6).to(cos.dtype)  # some scale their tables
    start_cos, start_sin = start_cos / length, start_sin / length
    return cos * start_cos + sin * start_sin, sin * start_cos - cos * start_sin


class _KernelReachedError(Exception):
    """Ends a layer at its kernel, with what that was given."""

    def __init__(self, q: Tensor, k: Tensor):
        super().__init__()
        self.found = q, k


def _read(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _KernelReachedError(query, key)


class _Reading:
    """A config that names `READS` as its kernel."""

    _attn_implementation = READS

    def __init__(self, config: Any):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _run(layer: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries [B, H, L, D] and keys [B, Hk, L, D] that a layer hands to its kernel.

    A copy of the layer that shares its weights runs, without what others hooked to it and without the cache.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(READS, _read)
    twin, attention = copy.copy(layer), copy.copy(layer.self_attn)
    attention.__dict__["config"] = _Reading(layer.self_attn.config)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        attention.__dict__[name] = {}
    twin.__dict__["_modules"] = {**layer._modules, "self_attn": attention}
    given = {name: None if name in CACHES else value for name, value in kwargs.items() if name != "hidden_states"}
    given = {name: dict(value) if name == "shared_kv_states" and value is not None else value for name, value in given.items()}
    try:
        type(layer).forward(twin, hidden, **given)
    except _KernelReachedError as reached:
        return reached.found
    raise AssertionError(f"{type(layer).__name__} asked no kernel of transformers for its attention")


def _project(attention: Any, x: Tensor, tables: tuple[Tensor, Tensor], rows: Tensor | None) -> Tensor:
    """Queries of some rows, or the keys of all: [B, H, R, D]."""
    linear, name = (attention.k_proj, "k_norm") if rows is None else (attention.q_proj, "q_norm")
    if rows is not None:
        x = take(x, rows, 1)
    heads = linear(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, name, None)
    if norm is not None:
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    cos, sin = tables if rows is None else (take(t, rows, t.ndim - 2) for t in tables)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(heads, heads, cos, sin)[0]


def _bias(mask: Mask, rows: Tensor, length: int) -> Tensor:
    """The layer's mask at some query rows: [B, 1, R, L], 0 or the smallest float."""
    off = torch.finfo(torch.float32).min
    order = torch.arange(length, device=rows.device)
    causal = (order <= rows[:, :, None])[:, None]  # [B, 1, R, L]
    if mask is None:
        return torch.zeros(causal.shape, device=rows.device).masked_fill(~causal, off)
    assert isinstance(mask, Tensor)
    if mask.ndim == 2:  # flash attention
        return torch.zeros(causal.shape, device=rows.device).masked_fill(~(causal & mask[:, None, None].bool()), off)
    chosen = take(mask[:, :1, :, :length].transpose(1, 2), rows, 1).transpose(1, 2)
    if chosen.dtype == torch.bool:
        return torch.zeros(chosen.shape, device=rows.device).masked_fill(~chosen, off)
    return chosen.float().clamp_min(off)
