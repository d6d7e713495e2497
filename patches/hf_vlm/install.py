"""Puts hooks on a vision-language model, finds them again, and shortens inputs without any hook."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config.numbers import check_numbers
from vtok.core.prompt import ImageFeatures, VLMReducer
from vtok.errors import ConfigError, StateError, UnsupportedModelError, VtokError, brief, shown
from vtok.patches.decoder import hooks, masks
from vtok.patches.decoder.kv_cache import cache_in, cached_length, compact, renumbered, take, unknown, vouch
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.decoder.prompts import packed
from vtok.patches.decoder.text_models import check_padding
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.generic.interfaces import vision_arguments
from vtok.patches.hf_vlm.generic.outputs import feature_list, repeatable, short_output
from vtok.patches.hf_vlm.macs import vision_tower
from vtok.patches.hf_vlm.tower import taps as tower_taps
from vtok.patches.module_swap import Mixin, swap_class


class Guard(Mixin):
    """Refuses ways to generate that read a prompt with images in pieces, or together with guesses at its answer.

    What takes tokens back out of a cache that a shortened prompt filled is refused by that cache.
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with _installed(_merging(self)).generating():  # what is decided for a prompt lasts until the answer ends
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        call = next((a for a in (*args, *kwargs.values()) if isinstance(a, Mapping)), {})
        if getattr(generation_config, "prefill_chunk_size", None) is not None and hf.carries_images(call):
            raise UnsupportedModelError(
                "prefill_chunk_size reads a prompt in pieces, but which visual tokens stay is decided on the whole prompt; "
                "leave it out, or shorten the prompt with vtok.prune_inputs"
            )
        self._vouch(input_ids, next((a for a in (*args, *kwargs.values()) if isinstance(a, Mapping)), {}))
        return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _vouch(self, ids: Tensor, call: Mapping[str, Any]) -> None:
        """Nothing can be missing from a cache that holds a conversation without images, whoever filled it."""
        cache = cache_in(call)
        if (
            unknown(cache)
            and 0 < cached_length(cache) < ids.shape[1]
            and not bool(hf.visual_columns(ids, _installed(_merging(self)).tokens).any())
        ):
            vouch(cache)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        model = _merging(self)
        found = (hook.pruner for hook in model._forward_pre_hooks.values() if isinstance(hook, hooks.BeforeModel))
        decides = next((site for pruner in found for site, _ in pruner.layers.values()), None)
        if decides is not None and hf.carries_images(kwargs):
            raise UnsupportedModelError(
                "assisted decoding reads the prompt together with guesses at its answer, which would take part in what is "
                f"decided {decides}; generate without an assistant, or shorten the prompt with vtok.prune_inputs"
            )
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]


class WatchedGuard(Guard, tower_taps.WatchedModel):
    """For a model that has its language head in itself."""


def _merging(generator: Any) -> Any:
    """The module of a model that generates which merges images into the prompt: the one without language head, or itself."""
    return generator.model if isinstance(generator.__dict__["_modules"].get("model"), nn.Module) else generator


def install(model: nn.Module, vlm: VLM, pruner: Pruner) -> None:
    """Hooks the model; nothing is hooked if nothing would be dropped, apart from a marker that carries the configs."""
    vlm.module.register_forward_pre_hook(hooks.BeforeModel(pruner), with_kwargs=True)
    vlm.module.register_forward_hook(hooks.AfterModel(pruner), with_kwargs=True, always_call=True)
    if not pruner.acts:
        return
    if vlm.family.tower and pruner.pixels is None:
        vision_tower(vlm).register_forward_pre_hook(hooks.BeforeTower(pruner), with_kwargs=True)
    text = vlm.text
    text.register_forward_pre_hook(hooks.BeforeText(pruner), with_kwargs=True)
    text.register_forward_hook(hooks.AfterText(pruner), with_kwargs=True)
    for i, layer in enumerate(text.layers):
        layer.register_forward_pre_hook(hooks.BeforeLayer(pruner, i), with_kwargs=True)
    owners = generators(model, vlm) if pruner.shortens else []
    for owner in owners:
        if owner is not vlm.module:
            swap_class(owner, Guard)
    blocks = () if pruner.features is None else pruner.features.tower_blocks
    watched = WatchedGuard if any(owner is vlm.module for owner in owners) else tower_taps.WatchedModel
    tower_taps.install(vlm.module, vlm.tower if blocks else None, blocks, watched)


def generators(model: nn.Module, vlm: VLM) -> list[Any]:
    """The modules that generate text with a vision-language model."""
    here = [m for m in model.modules() if m is vlm.module or m.__dict__.get("_modules", {}).get("model") is vlm.module]
    return [m for m in here if hasattr(m, "_prefill")]


def pruner_of(vlm: VLM) -> Pruner | None:
    """What is installed on a model, or `None`."""
    return _installed(vlm.module)


def _installed(module: Any) -> Any:
    found = module._forward_pre_hooks.values()
    return next((hook.pruner for hook in found if isinstance(hook, hooks.BeforeModel)), None)


class _Witness(VLMReducer):
    """Keeps all tokens, and what it saw of them."""

    def __init__(self, blocks: Sequence[int]):
        self.blocks, self.seen = tuple(blocks), list[ImageFeatures]()

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return self.blocks

    def features(self, images: ImageFeatures) -> None:
        self.seen.append(images)


def calibration_inputs(inputs: Any) -> list[Mapping[str, Any]]:
    """A list of inputs as the processor returns them, out of one or several.

    Raises:
        ConfigError: these are no inputs, or hold no pixels.
    """
    listed = [inputs] if isinstance(inputs, Mapping) or not isinstance(inputs, (list, tuple)) else list(inputs)
    for values in listed:
        if not isinstance(values, Mapping) or "input_ids" not in values or not hf.carries_images(values):
            found = shown(list(values)) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(
                f"calibration takes inputs as the processor returns them, input_ids and pixels, or a list of these; got {found}"
            )
        check_numbers(values, "calibration")
        ids = values["input_ids"]
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            found = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else shown(ids)
            raise ConfigError(f'calibration: input_ids is a tensor [B, N] of whole numbers (return_tensors="pt"), got {found}')
    if not listed:
        raise ConfigError("calibration takes inputs as the processor returns them, or a list of these; the list is empty")
    return listed


@contextmanager
def runs_calibration(vlm: VLM) -> Iterator[None]:
    """Says of what a model raises inside, whatever it is, that the calibration inputs are not what it takes."""
    try:
        yield
    except VtokError:
        raise
    except Exception as error:  # upstream's, of any kind
        raise ConfigError(
            f"{vlm.info.name} cannot run the calibration inputs ({type(error).__name__}: {brief(error)}); pass what it takes"
        ) from error


def observed(vlm: VLM, inputs: Any, blocks: Sequence[int]) -> Iterator[ImageFeatures]:
    """What a method would see of the images of a few inputs, one input after the other.

    Args:
        vlm: the model.
        inputs: as the processor returns them, with pixels; or a list of these.
        blocks: of the vision tower, whose attention it would look at.

    Raises:
        ConfigError: these are no inputs, or hold no pixels.
    """
    for values in calibration_inputs(inputs):
        witness, taps = _Witness(blocks), tower_taps.TowerTaps(blocks)
        with runs_calibration(vlm), torch.no_grad(), taps.on(vlm.tower):
            hf.choose(vlm.module, hf.encode(vlm.module, values, taps), witness, vlm.family, values)
        yield from witness.seen


def _check_numbering(model: Any, ids: Tensor, mask: Tensor, position: Tensor) -> None:
    """Raises if `generate()` of a model drops the positions that its caller passes, and numbers a short prompt anew."""
    given = model.prepare_inputs_for_generation(ids, position_ids=position, attention_mask=mask, is_first_iteration=True)
    if given.get("position_ids") is None:
        raise UnsupportedModelError(
            f"generate() of {type(model).__name__} numbers the tokens of its prompt itself, whatever position_ids say: what "
            "prune_inputs makes of a prompt cannot keep the positions of the long one; use vtok.patch, which can"
        )


def short_inputs(model: Any, vlm: VLM, inputs: Mapping[str, Any], pruner: Pruner, pad: int) -> dict[str, Any]:
    """Inputs of `generate()` or of the model, with the dropped placeholders gone.

    Args:
        model: with the language head, or the bare one.
        vlm: the same, described.
        inputs: as the processor made them.
        pruner: what chooses among image features, and whether positions are numbered anew. What acts in the vision tower is
            installed there already; nothing else is.
        pad: token id for padding.

    Raises:
        ConfigError: there is no prompt, or no image that would belong to it.
        StateError: placeholders and features differ in number, a prompt ends with a dropped token, or rows hold several
            samples and keep positions by which they could not be told apart.
        UnsupportedModelError: rows hold several samples, whose images the model hands over as one.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ConfigError(f"inputs must hold input_ids [rows, columns] as the processor makes them, got {sorted(inputs)}")
    values = hf.renamed(inputs)
    mask = values.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ConfigError(f"attention_mask must be [rows, columns], got shape {list(mask.shape)}")
    if not hf.carries_images(values):
        return values
    (batch, length), kind = ids.shape, vlm.text.config._attn_implementation
    sample = packed.sample_of(values, batch, length, kind, cached=False, family=vlm.family)
    if sample is not None and not bool(packed.several(sample)):
        sample = None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    values["attention_mask"] = real.long() if mask is None else mask
    position = values.get("position_ids")
    if position is None:  # as generate() would number the long prompt
        position = model._prepare_position_ids_for_generation(ids, values)
    reducer, compacted = pruner.features, pruner.compact
    if vlm.family.generic and not compacted:
        _check_numbering(model, ids, values["attention_mask"], position)
    if sample is not None and not compacted:
        raise StateError(
            "rows hold several samples (their positions start over), which the model tells apart by positions without gaps; "
            "pass positions='compact' where the model has it, use vtok.patch, or give every sample a row of its own"
        )
    taps, given = tower_taps.TowerTaps(() if reducer is None else reducer.tower_blocks), {**values, "position_ids": position}
    with torch.no_grad(), taps.on(vlm.tower):
        outputs = hf.encode(vlm.module, values, taps)
        chosen = hf.choose(vlm.module, outputs, reducer, vlm.family, given, pruner.has_dropped_tokens)
    keep = hf.kept_columns(ids, vlm.tokens, chosen.rows)
    if keep is None:
        counts = {m: (int((ids == vlm.tokens[m]).sum()), len(rows)) for m, rows in chosen.rows.items()}
        raise StateError(
            "the prompt and the images do not belong together: "
            + ", ".join(f"{a} {m} placeholders, {b} {m} features" for m, (a, b) in counts.items())
        )
    if sample is not None and reducer is not None:
        packed.check_images(vlm.info.name, chosen.outputs, vlm.tokens, ids, sample, reducer.reads_text)
    last = real.long().cumsum(1).argmax(1, keepdim=True)
    if not compacted and not bool(keep.gather(1, last).all()):
        raise StateError(
            "a prompt ends with a visual token that is dropped, but generate() numbers the answer by the last token: put text "
            "behind the image, or pass positions='compact'"
        )
    rows, padded = compact(keep & real)
    check_padding(vlm.text, padded)
    filled = rows >= 0
    if compacted:
        position = renumbered(position, keep | ~real, sample)
    elif (
        position.ndim == 3 and len(position) == vlm.family.axes + 1
    ):  # the first row says where samples start: gaps were borders
        position = torch.cat([renumbered(position[:1], keep | ~real), position[1:]])
    position = take(position, rows, position.ndim - 1)
    if position.ndim == 2 and sample is None and not masks.is_flash(kind) and bool(filled.all() & (position.diff() != 1).any()):
        warnings.warn(
            "the prompt that prune_inputs made keeps the positions of the long one, gaps and all: generate(use_cache=False) "
            "would take the gaps for borders between samples and answer wrong; generate with the cache (the default), or pass "
            "positions='compact'",
            stacklevel=4,
        )
    short: dict[str, Any] = {
        "input_ids": take(ids, rows, 1).masked_fill(~filled, pad),
        "attention_mask": filled.long() if sample is None else None,  # a mask would hide that rows hold several samples
        "position_ids": position,
        "mm_encoder_outputs": {
            m: short_output(out, chosen.rows[m], len(feature_list(out)) // chosen.images[m])
            for m, out in chosen.outputs.items()
        },
    }
    mixed = [m for m, out in short["mm_encoder_outputs"].items() if not repeatable(out, chosen.images[m])]
    if mixed and batch > 1:
        warnings.warn(
            f"{vlm.info.name} takes the {mixed[0]}s of all prompts as one tensor, and they keep different numbers of tokens: "
            "generate() would mix them up between the prompts of this batch if it repeated them (num_beams, "
            "num_return_sequences); pass prompts one by one for that, or use vtok.patch",
            stacklevel=4,
        )
    if values.get("labels") is not None:
        short["labels"] = take(values["labels"], rows, 1).masked_fill(~filled, -100)
    gone = {"pixel_attention_mask", "image_sizes", "image_grid_thw", "video_grid_thw", "pixel_values_videos", hf.COMPRESSED}
    gone |= vision_arguments(vlm.module)
    for name, value in values.items():  # kinds of tokens, under several names
        if name not in gone | set(short) and isinstance(value, Tensor) and value.shape == ids.shape:
            short[name] = take(value, rows, 1).masked_fill(~filled, 0)
    return {name: value for name, value in values.items() if name not in gone | set(short)} | short
