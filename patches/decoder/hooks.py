"""Hooks that shorten a prompt before the LLM and between its layers, and keep later passes right.

Five places are hooked: the model that merges images into the prompt (before and after), its LLM (before and after), and every
decoder layer (before). No forward is replaced, no kernel changed; what must last from one pass to the next lies on the cache.

Shapes: B rows, L columns of the prompt, M slots after a reduction, Q queries.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import Entry, Layout
from vtok.core.reduction import Fold, folded
from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.decoder import layer_calls, masks, outputs
from vtok.patches.decoder.attention_probe import layer_attention
from vtok.patches.decoder.kv_cache import (
    CACHES,
    PromptState,
    Stage,
    attach_state,
    cache_in,
    cached_length,
    compact,
    detach_state,
    renumbered,
    state_of,
    take,
    to_columns,
    unknown,
    vouch,
)
from vtok.patches.decoder.layer_calls import is_traced_step
from vtok.patches.decoder.layout import decided, in_order, layout_of
from vtok.patches.decoder.pass_state import PassState, Pruner, Recorded, TowerCall
from vtok.patches.decoder.prompts import embedded, packed, riders, turns
from vtok.patches.decoder.text_models import check_kind, check_origin, check_padding, final_norm_of
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.encoded import plain
from vtok.patches.module_swap import Hook, bare, brought
from vtok.patches.precision import full_precision

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PrunerHook(Hook):
    """A hook of one patched model. The one that `leads` is on the model itself, the others on its parts."""

    leads: ClassVar[bool] = False

    def __init__(self, pruner: Pruner):
        self.pruner = pruner


class BeforeModel(PrunerHook):
    """Opens a pass; if it reads a prompt with images, encodes them and chooses among their features."""

    leads: ClassVar[bool] = True

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        kwargs = hf.renamed(dict(zip(inspect.signature(module.forward).parameters, args), **kwargs))
        if is_traced_step(kwargs) and not hf.carries_images(kwargs):
            short = state_of(cache_in(kwargs)) is not None
            if kwargs.get("input_ids") is None and short and self.pruner.has_dropped_tokens:
                raise UnsupportedModelError(
                    "a compiled step cannot tell whether inputs_embeds hold tokens that the patched vision tower dropped; pass "
                    "input_ids, or leave compilation out"
                )
            if kwargs.get("input_ids") is not None or short:
                return (), kwargs
        cache = cache_in(kwargs)
        running = self.pruner.open(cache)
        running.real = masks.seen_columns(kwargs.get("attention_mask"))
        if state_of(cache) is not None and cached_length(cache) == 0:
            detach_state(cache)
        running.state = state_of(cache)
        pruner = self.pruner
        if pruner.shortens:
            check_origin(kwargs, pruner.generates)
        counts = pruner.acts and cached_length(cache) == 0 and kwargs.get("input_ids") is not None  # to be accounted for alone
        if (pruner.shortens or counts) and hf.carries_images(kwargs):
            kwargs = self._read(module, running, kwargs)
        elif pruner.has_dropped_tokens and (holes := embedded.holes_in(kwargs)) is not None:
            masks.check_text(module.get_submodule(pruner.family.text))
            embedded.read(module, pruner, running, kwargs, holes)
        elif pruner.shortens and kwargs.get("input_ids") is None and cached_length(cache) == 0:
            if pruner.encoded:
                hf.refuse_merged(module)
            hf.warn_unseen(module)
        return (), kwargs

    def _read(self, module: Any, running: PassState, kwargs: dict[str, Any]) -> dict[str, Any]:
        pruner, ids, cache = self.pruner, kwargs.get("input_ids"), cache_in(kwargs)
        prompt = kwargs["inputs_embeds"] if ids is None else ids  # by which a prompt is known again
        if ids is None:
            ids = hf.placeholders(module, prompt, pruner.tokens)
        visual = hf.visual_columns(ids, pruner.tokens)
        sample = packed.samples(module, pruner.family, kwargs, *ids.shape) if pruner.shortens else None
        found = [visual.any()] if sample is None else [visual.any(), packed.several(sample)]
        shown, *several = torch.stack(found).tolist()
        if not shown:
            return kwargs
        running.later = cached_length(cache) > 0
        if running.later:
            turns.check(pruner, kwargs)
        if pruner.shortens:
            masks.check_text(module.get_submodule(pruner.family.text))
        given = kwargs.get("mm_encoder_outputs")
        check_kind(kwargs)
        encoded = hf.encode(module, kwargs, hands_on=pruner.family.hands_on)
        chosen = hf.choose(module, encoded, pruner.features, pruner.family, kwargs, pruner.has_dropped_tokens)
        keep = hf.kept_columns(ids, pruner.tokens, chosen.rows)
        kwargs = {name: value for name, value in kwargs.items() if name not in {*hf.PIXELS.values(), hf.COMPRESSED}}
        kwargs["mm_encoder_outputs"] = {modality: plain(output) for modality, output in chosen.outputs.items()}
        if keep is None:
            running.unmatched = True
            return kwargs
        real = masks.real_columns(kwargs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device, running.later)
        running.prunes, running.visual, running.given = True, visual & real, encoded if given is None else given
        running.earlier, running.state = running.state, PromptState(ids.shape[1], real)
        running.state.compact = pruner.compact
        if sample is not None and any(several) and pruner.features is not None:
            packed.check_images(type(module).__name__, chosen.outputs, pruner.tokens, ids, sample, pruner.features.reads_text)
        if any(several) or packed.has_lengths(kwargs):  # lengths that the caller states have to follow the reduction
            running.state.sample = sample
        running.features = keep if pruner.features is not None or pruner.has_dropped_tokens else None
        running.alive = hf.kept_columns(ids, pruner.tokens, chosen.alive) if pruner.has_dropped_tokens else None
        running.layouts = chosen.layouts
        running.lasts = cache is None and not packed.caches(module, kwargs)
        earlier = pruner.recalled(running.given, prompt) if running.lasts else None
        running.replays = earlier is not None and earlier.fits(pruner.configs, prompt)
        running.plan = earlier if running.replays else Recorded(pruner.configs, prompt, {}, {})
        return kwargs


class BeforeTower(PrunerHook):
    """Notes what the vision tower is given, for costs; also when `generate()` encodes the images ahead of the model."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if isinstance(pixels, Tensor):
            self.pruner.watch(TowerCall(tuple(pixels.shape), kwargs.get("grid_thw")))


class AfterModel(PrunerHook):
    """Ends a pass, also one that failed, which has no output."""

    leads: ClassVar[bool] = True

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if is_traced_step(kwargs):
            return
        running = self.pruner.current
        missed = output is not None and running is not None and running.prunes and not running.reached
        unmatched = output is not None and running is not None and running.unmatched
        self.pruner.close(failed=output is None or missed or unmatched)
        if missed:
            hf.refuse_unreached(module, self.pruner.family.text)
        if unmatched:
            hf.refuse_unmatched(module, self.pruner.tokens)


class BeforeText(PrunerHook):
    """Shortens what enters the LLM; for later text, makes mask and positions fit the shortened cache."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if is_traced_step(kwargs):
            return self._traced(args, kwargs)
        running = self.pruner.current
        cache = cache_in(kwargs)
        if running is None:
            if state_of(cache) is not None and cached_length(cache) > 0:
                raise StateError(
                    f"{type(module).__name__} was called on its own with a cache that holds a shortened prompt; call the "
                    "vision-language model"
                )
            if self.pruner.has_dropped_tokens:
                embedded.check_alone(module, kwargs)
            return None
        state = running.state
        if state is None:
            return None
        state.inside = True
        running.final_norm, running.rotary = final_norm_of(module), getattr(module, "rotary_emb", None)
        entered = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        running.reached, running.shape = True, (entered.shape[0], entered.shape[1])
        if running.prunes:
            return self._first(module, args, kwargs, running, state)
        return (args, self._later(kwargs, running, state, cache)) if state.before is not None else None

    def _traced(self, args: Any, kwargs: dict[str, Any]) -> Call | None:
        cache = cache_in(kwargs)
        state = state_of(cache)
        if state is None:
            return None
        x = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        position = kwargs.get("position_ids")
        if position is None:
            first = type(cache).get_seq_length(cache, 0) + state.missing(0)
            position = torch.arange(x.shape[1], device=x.device)[None] + first
        if state.compact:
            position = position - state.now(state.dropped, x.shape[0]).to(x.device)
        state.inside = True
        return args, {**kwargs, "position_ids": position, **riders.whole_pass(kwargs)}

    def _first(self, text: Any, args: Any, kwargs: dict[str, Any], running: PassState, state: PromptState) -> Call | None:
        x = kwargs["inputs_embeds"]
        running.move(x.device)
        visual = running.visual
        assert visual is not None and running.plan is not None
        column = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        keep = running.features
        if running.replays:
            keep = running.plan.at(0, column)
        elif 0 in self.pruner.layers:
            site, reducer = self.pruner.layers[0]
            with torch.no_grad(), full_precision(x.device.type):
                more = packed.keep_of(reducer, x.detach(), Layout.whole(visual, state.real), None, site, state.sample)
            assert not isinstance(more, Fold)  # nothing has been computed yet that could be averaged
            keep = more if keep is None else (keep if more is None else keep & more)
        if running.earlier is None and (keep is None or bool((keep | ~visual).all())):
            return (args, {**kwargs, **riders.whole_pass(kwargs)}) if any(self.pruner.layers) else None
        keep = torch.ones_like(visual) if keep is None else keep | ~visual
        running.plan.keep[0] = keep
        rows, padded = compact(keep & state.real)
        check_padding(text, padded)
        state.before = Stage(rows, rows, padded)
        return args, self._shortened(text, kwargs, x, keep, running, state)

    def _shortened(
        self, text: Any, kwargs: dict[str, Any], x: Tensor, keep: Tensor, running: PassState, state: PromptState
    ) -> dict[str, Any]:
        stage, mask, cache = state.before, kwargs.get("attention_mask"), cache_in(kwargs)
        assert stage is not None
        rows, kind = stage.entry, text.config._attn_implementation
        position = kwargs.get("position_ids")
        position = torch.arange(x.shape[1], device=x.device)[None] if position is None else position.to(x.device)
        if running.later:
            position, mask = turns.placed(text, kwargs, x, running, state)
        if state.compact:
            position = renumbered(position, keep | ~state.real, state.sample)
        changed: dict[str, Any] = {"inputs_embeds": take(x, rows, 1), "position_ids": take(position, rows, position.ndim - 1)}
        if running.later:
            changed["attention_mask"] = mask
        elif isinstance(mask, Mapping):
            masks.check_kinds(mask)
            changed["attention_mask"] = {
                name: masks.gather_mask(m, stage, x, kind, masks.keys_of(cache, rows.shape[1], masks.first_of(cache, name)))
                for name, m in mask.items()
            }
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            changed["attention_mask"] = masks.gather_mask(mask, stage, x, kind, masks.keys_of(cache, rows.shape[1], 0))
        elif state.sample is not None and not masks.is_flash(kind):
            allowed = packed.block_mask(packed.of_columns(state.sample, stage.column))
            changed["attention_mask"] = masks.formed(allowed, x, kind, masks.keys_of(cache, rows.shape[1], 0), None)
            running.slots_counted = True
        else:  # never None: gaps between positions would then be taken for the borders of packed sequences
            changed["attention_mask"] = (rows >= 0).long()
            running.slots_counted = True
        if state.sample is not None and masks.is_flash(kind):
            changed |= {"attention_mask": None, **packed.lengths(packed.of_columns(state.sample, stage.column))}
        rest = {name: value for name, value in kwargs.items() if name not in changed and name not in CACHES}
        count = int(running.visual.sum()) if running.visual is not None and not running.embedded else 0
        changed |= riders.shortened(text, rest, x, rows, keep & state.real, count) | riders.whole_pass(kwargs)
        return {**kwargs, **changed}

    def _later(self, kwargs: dict[str, Any], running: PassState, state: PromptState, cache: Any) -> dict[str, Any]:
        x = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, queries = x.shape[:2]
        column, total = running.slots(state, 0, cached_length(cache), batch, queries, x.device)
        known = (column >= 0) & running.real_columns(state, total, batch, x.device).gather(1, column.clamp_min(0))
        position = kwargs.get("position_ids")
        if position is None:
            position = column[:1, -queries:]
        if state.compact:
            position = position - state.now(state.dropped, batch).to(x.device)
        return {**kwargs, "attention_mask": known.long(), "position_ids": position, **riders.whole_pass(kwargs)}


class AfterText(PrunerHook):
    """Gives the head as many columns as the caller passed, so that logits, labels and losses have the length of the prompt."""

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = cache_in(kwargs)
        if is_traced_step(kwargs):
            state = state_of(cache)
            if state is None:
                return None
            state.inside = False
            return outputs.whole(module, output, state, False)
        running = self.pruner.current
        if running is None or running.state is None:
            return None
        state = running.state
        state.inside = False
        if running.prunes and state_of(cache) is state and layer_calls.can_trace(module, cache, state):
            state.tables = layer_calls.slot_tables(state, cache)
        return outputs.whole(module, output, state, running.prunes, running.turn)


class BeforeLayer(PrunerHook):
    """Drops visual tokens in front of a decoder layer, and gives the layer the mask and the positions of what is left."""

    def __init__(self, pruner: Pruner, index: int):
        super().__init__(pruner)
        self.index = index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        cache = cache_in(kwargs)
        if is_traced_step(kwargs):
            known = state_of(cache)
            return None if known is None else (args, layer_calls.of_traced_step(module, self.index, kwargs, known))
        running = self.pruner.current
        if self.index == 0 and running is not None and unknown(cache) and cached_length(cache) == 0:
            vouch(cache)
        if running is None or running.state is None:  # text alone, or a checkpoint that computes the layer again
            return None
        state = running.state
        x = args[0] if args else kwargs["hidden_states"]
        if not running.prunes:
            return args, layer_calls.of_later_text(module, self.index, x, kwargs, running, state, cache)
        if running.turn is not None:
            return args, layer_calls.of_turn(module, self.index, x, kwargs, running, state, cache)
        if len(args) > 1:  # a tensor may have one entry a column: by its name it is told from the others
            taken = inspect.signature(type(bare(module)).forward).parameters.values()
            names = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
            if len(names) < len(args) - 1:
                raise UnsupportedModelError(
                    f"decoder layer {self.index} is a {type(module).__name__}, which takes arguments without names, so that "
                    "vtok cannot tell what they are; take that wrapper off the layer"
                )
            args, kwargs = args[:1], {**dict(zip(names, args[1:])), **kwargs}
        fitting = layer_calls.of_prompt(module, self.index, x, kwargs, running, state, cache)
        x = brought(module, x)
        running.move(x.device)
        if self.index == 0 and self.pruner.reads_entry:
            running.entry = Entry(x.detach(), layout_of(x, running, state, state.before))
        self._probe(module, x, fitting, running, state)
        if self.index > 0 and self.index in self.pruner.layers:
            shorter = self._drop(x, running, state)
            if shorter is not None:
                x = shorter
                fitting = layer_calls.of_prompt(module, self.index, x, kwargs, running, state, cache)
                self._probe(module, x, fitting, running, state)  # for decisions in front of later layers
        if cache is not None and state_of(cache) is not state and (state.before is not None or state.between):
            attach_state(cache, state)
        return ((x,), fitting) if args else ((), {**fitting, "hidden_states": x})

    def _probe(self, module: Any, x: Tensor, kwargs: dict[str, Any], running: PassState, state: PromptState) -> None:
        if self.index in self.pruner.probed:
            real = layout_of(x, running, state, state.at(self.index)).real
            later = self.index in self.pruner.probed_later
            running.probes[self.index] = layer_attention(
                self.index, module, x.detach(), kwargs, later, running.final_norm, running.entry, real
            )

    def _drop(self, x: Tensor, running: PassState, state: PromptState) -> Tensor | None:
        """The tokens that go on [B, M, D]; `None` = all."""
        stage = state.at(self.index)
        layout = layout_of(x, running, state, stage)
        entry = stage.entry if stage is not None and stage is not state.before else in_order(x)
        keep, into = decided(x, layout, *self.pruner.layers[self.index], running, state.sample)
        if keep is None or bool((keep | ~layout.visual).all()):
            return None
        gone = None if into is None else to_columns(into, layout.column, state.length)
        rows, padded = compact((keep | ~layout.visual) & layout.real)
        left = [t.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, -1) for t in (layout.column, entry)]
        state.between[self.index] = Stage(left[0], left[1], padded, gone)
        return take(x if into is None else folded(x, into), rows, 1)
