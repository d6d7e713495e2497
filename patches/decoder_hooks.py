"""Hooks that shorten a prompt before the LLM and between its layers, and keep later passes right.

Five places are hooked: the model that merges images into the prompt (before and after), its LLM (before and after), and every
decoder layer (before). No forward is replaced, no kernel changed; what must last from one pass to the next lies on the cache.

Shapes: B rows, L columns of the prompt, M slots after a reduction, Q queries.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import StateError, UnsupportedModelError
from vtok.patches import decoder_masks as masks
from vtok.patches import hf_features as hf
from vtok.patches.decoder_layout import decided, in_order, layout_of
from vtok.patches.decoder_pass import Pass, Pruner, Recorded, TowerCall, recorded
from vtok.patches.decoder_probe import layer_attention
from vtok.patches.decoder_state import (
    PromptState,
    Stage,
    cache_in,
    compact,
    forget,
    remember,
    renumbered,
    restore,
    state_of,
    stored,
    take,
    to_columns,
)
from vtok.patches.precision import full_precision
from vtok.patches.swap import Hook
from vtok.prompt import Entry, Layout
from vtok.reduction import Fold, folded

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PrunerHook(Hook):
    """A hook of one patched model."""

    def __init__(self, pruner: Pruner):
        self.pruner = pruner


class BeforeModel(PrunerHook):
    """Opens a pass; if it reads a prompt with images, encodes them and chooses among their features."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        running = self.pruner.open()
        kwargs = dict(zip(inspect.signature(module.forward).parameters, args), **kwargs)
        cache = cache_in(kwargs)
        running.real = masks.seen_columns(kwargs.get("attention_mask"))
        if state_of(cache) is not None and stored(cache) == 0:
            forget(cache)
        running.state = state_of(cache)
        pruner = self.pruner
        counts = pruner.acts and stored(cache) == 0 and kwargs.get("input_ids") is not None  # to be accounted for alone
        if (pruner.shortens or counts) and hf.carries_images(kwargs):
            kwargs = self._read(module, running, kwargs)
        return (), kwargs

    def _read(self, module: Any, running: Pass, kwargs: dict[str, Any]) -> dict[str, Any]:
        pruner, ids, cache = self.pruner, kwargs.get("input_ids"), cache_in(kwargs)
        if ids is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} got images with inputs_embeds; pass input_ids, which say where the visual tokens are"
            )
        if stored(cache) > 0:
            raise UnsupportedModelError(
                "images were passed with a cache that holds text already; vtok shortens a prompt when it is read as a whole, "
                "from an empty cache (chunked prefill and images in a later turn are not supported)"
            )
        visual = hf.visual_columns(ids, pruner.tokens)
        if not bool(visual.any()):
            return kwargs
        if pruner.shortens:
            _check_text(getattr(module, pruner.spec.text))
        given = kwargs.get("mm_encoder_outputs")
        chosen = hf.choose(module, hf.encode(module, kwargs), pruner.features, pruner.spec, kwargs, pruner.holed)
        keep = hf.kept_columns(ids, pruner.tokens, chosen.rows)
        kwargs = {name: value for name, value in kwargs.items() if name not in hf.PIXELS.values()}
        kwargs["mm_encoder_outputs"] = chosen.outputs
        if keep is None:
            return kwargs
        real = masks.real_columns(kwargs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        running.prunes, running.visual, running.given = True, visual & real, given
        running.state = PromptState(ids.shape[1], real)
        running.state.compact = pruner.compact
        running.features = keep if pruner.features is not None or pruner.holed else None
        running.alive = hf.kept_columns(ids, pruner.tokens, chosen.alive) if pruner.holed else None
        running.layouts = chosen.layouts
        earlier = recorded(given) if cache is None and not _caches(module, kwargs) else None
        running.replays = earlier is not None and earlier.fits(pruner.configs, ids)
        running.plan = earlier if running.replays else Recorded(pruner.configs, ids, {}, {})
        return kwargs


class BeforeTower(PrunerHook):
    """Notes what the vision tower is given, for costs; also when `generate()` encodes the images ahead of the model."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if isinstance(pixels, Tensor):
            self.pruner.watch(TowerCall(tuple(pixels.shape), kwargs.get("grid_thw")))


class AfterModel(PrunerHook):
    """Ends a pass, also one that failed."""

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.pruner.close()


class BeforeText(PrunerHook):
    """Shortens what enters the LLM; for later text, makes mask and positions fit the shortened cache."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        running = self.pruner.current
        cache = cache_in(kwargs)
        if running is None:
            if state_of(cache) is not None and stored(cache) > 0:
                raise StateError(
                    f"{type(module).__name__} was called on its own with a cache that holds a shortened prompt; call the "
                    "vision-language model"
                )
            return None
        state = running.state
        if state is None:
            return None
        state.inside = True
        running.final_norm = getattr(module, "norm", None)
        if running.prunes:
            return self._first(module, args, kwargs, running, state)
        return (args, self._later(kwargs, running, state, cache)) if state.before is not None else None

    def _first(self, text: Any, args: Any, kwargs: dict[str, Any], running: Pass, state: PromptState) -> Call | None:
        x, visual = kwargs["inputs_embeds"], running.visual
        assert visual is not None and running.plan is not None
        column = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        keep = running.features
        if running.replays:
            keep = running.plan.at(0, column)
        elif 0 in self.pruner.layers:
            site, reducer = self.pruner.layers[0]
            with torch.no_grad(), full_precision(x.device.type):
                more = reducer.keep(x.detach(), Layout.whole(visual, state.real), None, site)
            assert not isinstance(more, Fold)  # nothing has been computed yet that could be averaged
            keep = more if keep is None else (keep if more is None else keep & more)
        if keep is None or bool((keep | ~visual).all()):
            return None
        keep = keep | ~visual
        running.plan.keep[0] = keep
        rows, padded = compact(keep & state.real)
        state.before = Stage(rows, rows, padded)
        return args, self._shortened(text, kwargs, x, keep, running, state)

    def _shortened(
        self, text: Any, kwargs: dict[str, Any], x: Tensor, keep: Tensor, running: Pass, state: PromptState
    ) -> dict[str, Any]:
        stage, mask, cache = state.before, kwargs.get("attention_mask"), cache_in(kwargs)
        assert stage is not None
        rows, kind = stage.entry, text.config._attn_implementation
        position = kwargs.get("position_ids")
        if position is None:
            position = torch.arange(x.shape[1], device=x.device)[None]
        if state.compact:
            position = renumbered(position, keep | ~state.real)
        changed: dict[str, Any] = {"inputs_embeds": take(x, rows, 1), "position_ids": take(position, rows, position.ndim - 1)}
        if isinstance(mask, Mapping):
            changed["attention_mask"] = {
                name: masks.gather_mask(m, stage, x, kind, _keys(cache, rows.shape[1], _first_of(cache, name)))
                for name, m in mask.items()
            }
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            changed["attention_mask"] = masks.gather_mask(mask, stage, x, kind, _keys(cache, rows.shape[1], 0))
        else:  # never None: gaps between positions would then be taken for the borders of packed sequences
            changed["attention_mask"] = (rows >= 0).long()
            running.slots_counted = True
        visual = kwargs.get("visual_pos_masks")
        if visual is not None:  # features of deeper tower layers, added to the visual tokens inside the LLM
            stays = (keep & state.real)[visual]
            changed["visual_pos_masks"] = take(visual, rows, 1) & (rows >= 0)
            changed["deepstack_visual_embeds"] = [deep[stays] for deep in kwargs["deepstack_visual_embeds"]]
        return {**kwargs, **changed}

    def _later(self, kwargs: dict[str, Any], running: Pass, state: PromptState, cache: Any) -> dict[str, Any]:
        x = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, queries = x.shape[:2]
        column, total = _slots(running, state, 0, stored(cache), batch, queries, x.device)
        known = (column >= 0) & _real(running, state, total, batch, x.device).gather(1, column.clamp_min(0))
        position = kwargs.get("position_ids")
        if position is None:
            position = column[:1, -queries:]
        if state.compact:
            position = position - state.dropped.to(x.device).repeat_interleave(batch // len(state.real), 0)
        return {**kwargs, "attention_mask": known.long(), "position_ids": position}


class AfterText(PrunerHook):
    """Gives the head as many columns as the caller passed, so that logits, labels and losses have the length of the prompt."""

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        running = self.pruner.current
        if running is None or running.state is None:
            return None
        state = running.state
        state.inside = False
        stage = state.at(len(module.layers) - 1)
        if not running.prunes or stage is None:
            return None
        if isinstance(output, tuple):
            return (restore(output[0], stage, state.length), *output[1:])
        output.last_hidden_state = restore(output.last_hidden_state, stage, state.length)
        return output


class BeforeLayer(PrunerHook):
    """Drops visual tokens in front of a decoder layer, and gives the layer the mask and the positions of what is left."""

    def __init__(self, pruner: Pruner, index: int):
        super().__init__(pruner)
        self.index = index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        running = self.pruner.current
        if running is None or running.state is None:  # text alone, or a checkpoint that computes the layer again
            return None
        state, cache = running.state, cache_in(kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if not running.prunes:
            return args, _later_kwargs(module, self.index, x, kwargs, running, state, cache)
        fitting = _prompt_kwargs(module, self.index, x, kwargs, running, state, cache)
        if self.index == 0 and self.pruner.reads_entry:
            running.entry = Entry(x.detach(), layout_of(x, running, state, state.before))
        self._probe(module, x, fitting, running)
        if self.index > 0 and self.index in self.pruner.layers:
            shorter = self._drop(x, running, state)
            if shorter is not None:
                x = shorter
                fitting = _prompt_kwargs(module, self.index, x, kwargs, running, state, cache)
                self._probe(module, x, fitting, running)  # for decisions in front of later layers
        if cache is not None and state_of(cache) is not state and (state.before is not None or state.between):
            remember(cache, state)
        return ((x, *args[1:]), fitting) if args else ((), {**fitting, "hidden_states": x})

    def _probe(self, module: Any, x: Tensor, kwargs: dict[str, Any], running: Pass) -> None:
        if self.index in self.pruner.probed:
            running.probes[self.index] = layer_attention(
                self.index, module, x.detach(), kwargs, running.final_norm, running.entry
            )

    def _drop(self, x: Tensor, running: Pass, state: PromptState) -> Tensor | None:
        """The tokens that go on [B, M, D]; `None` = all."""
        stage = state.at(self.index)
        layout = layout_of(x, running, state, stage)
        entry = stage.entry if stage is not None and stage is not state.before else in_order(x)
        keep, into = decided(x, layout, *self.pruner.layers[self.index], running)
        if keep is None or bool((keep | ~layout.visual).all()):
            return None
        gone = None if into is None else to_columns(into, layout.column, state.length)
        rows, padded = compact((keep | ~layout.visual) & layout.real)
        left = [t.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, -1) for t in (layout.column, entry)]
        state.between[self.index] = Stage(left[0], left[1], padded, gone)
        return take(x if into is None else folded(x, into), rows, 1)


def _prompt_kwargs(
    layer: Any, index: int, x: Tensor, kwargs: dict[str, Any], running: Pass, state: PromptState, cache: Any
) -> dict[str, Any]:
    """A layer's keywords while the prompt is read: mask, positions and rotary tables of the slots that are left."""
    stage, window = state.at(index), window_of(layer, index)
    recounted = running.slots_counted and window is not None  # the LLM measured its windows in slots
    if stage is None or (stage is state.before and not recounted):
        return kwargs
    mask, tables, position = (kwargs.get(name) for name in ("attention_mask", "position_embeddings", "position_ids"))
    keys = _keys(cache, x.shape[1], index)
    kind = layer.self_attn.config._attn_implementation
    if recounted:
        make: Any = functools.partial(masks.text_mask, stage.column, state.real, x.shape[1], x, kind, keys, 0, window)
    else:
        make = functools.partial(masks.gather_mask, mask, stage, x, kind, keys)
    shared = _once(running, ("mask", id(stage), id(mask), keys, window), mask, make)
    if stage is state.before:
        return {**kwargs, "attention_mask": shared}
    changed: dict[str, Any] = {"attention_mask": shared}
    if tables is not None:
        changed["position_embeddings"] = _once(
            running, ("tables", id(stage), id(tables)), tables, lambda: tuple(take(t, stage.entry, t.ndim - 2) for t in tables)
        )
    if position is not None:
        changed["position_ids"] = take(position, stage.entry, position.ndim - 1)
    return {**kwargs, **changed}


def _later_kwargs(
    layer: Any, index: int, x: Tensor, kwargs: dict[str, Any], running: Pass, state: PromptState, cache: Any
) -> dict[str, Any]:
    """A layer's keywords for later text: the mask by the columns of the slots that this layer's cache holds."""
    stage = state.at(index)
    window = window_of(layer, index)
    sliding = window is not None
    if stage is None or (stage is state.before and not sliding):
        return kwargs
    mask, kind = kwargs.get("attention_mask"), layer.self_attn.config._attn_implementation
    batch, queries = x.shape[:2]
    if mask is None and queries == 1 and not stage.padded and not sliding:
        return kwargs
    masks.check_implementation(kind, sliding)
    count = stored(cache, index)
    keys, offset = cache.get_mask_sizes(queries, index)

    def build() -> Tensor:
        column, total = _slots(running, state, index, count, batch, queries, x.device)
        real = _real(running, state, total, batch, x.device)
        return masks.text_mask(column, real, queries, x, kind, int(keys), int(offset), window)

    return {**kwargs, "attention_mask": _once(running, ("text", id(stage), count, int(keys), int(offset), window), None, build)}


def _once(running: Pass, key: Any, source: Any, make: Any) -> Any:
    """What several layers share is made once a pass; the source is kept alive, so that its id stays its own."""
    if key not in running.memo:
        running.memo[key] = (make(), source)
    return running.memo[key][0]


def _slots(
    running: Pass, state: PromptState, index: int, count: int, batch: int, queries: int, device: torch.device
) -> tuple[Tensor, int]:
    """(columns [B, count + Q] of a layer's slots, the queries last; how many columns prompt and text have together)."""
    stage = state.at(index)
    assert stage is not None
    stage = _once(running, ("stage", id(stage), batch), stage, lambda: stage.to(batch, device))
    total = state.length + count - stage.column.shape[1] + queries
    text = torch.arange(state.length, total, device=device)
    return torch.cat([stage.column, text.expand(batch, -1)], 1), total


def _real(running: Pass, state: PromptState, total: int, batch: int, device: torch.device) -> Tensor:
    """[B, total] bool, False = padding: by the caller's mask, or by what is known of the prompt, all text being real."""
    if running.real is not None and running.real.shape[1] >= total:
        return running.real[:, :total].to(device).expand(batch, -1)
    prompt = state.real.to(device).repeat_interleave(batch // len(state.real), 0)
    return torch.cat([prompt, prompt.new_ones(batch, total - state.length)], 1)


def _keys(cache: Any, queries: int, layer: int) -> int:
    """Key columns that attention sees when a prompt of so many tokens enters a layer."""
    return queries if cache is None else int(cache.get_mask_sizes(queries, layer)[0])


def _first_of(cache: Any, kind: str) -> int:
    """The first layer of a kind, as the keys of a mapping of masks name it."""
    sliding = [] if cache is None else list(cache.is_sliding)
    wanted = kind == "sliding_attention"
    return sliding.index(wanted) if wanted in sliding else 0


def window_of(layer: Any, index: int) -> int | None:
    """Columns that a decoder layer looks back, or `None` = all."""
    config = layer.self_attn.config
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _check_text(text: Any) -> None:
    window = any(window_of(layer, i) is not None for i, layer in enumerate(text.layers))
    masks.check_implementation(text.config._attn_implementation, window)


def _caches(model: Any, kwargs: Mapping[str, Any]) -> bool:
    use = kwargs.get("use_cache")
    return bool(model.config.get_text_config().use_cache if use is None else use)
