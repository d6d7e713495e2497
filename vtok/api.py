"""The functions that a user calls. What they act on are `Target`s: none of them asks which kind it has."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtok import serialization as files
from vtok.config import MethodConfig
from vtok.config.numbers import native
from vtok.core import reduction
from vtok.errors import StateError, UnsupportedModelError, VtokError
from vtok.patches.transaction import all_or_nothing
from vtok.registry import METHODS
from vtok.reports.prompt import PromptPlan
from vtok.reports.results import Info, PlanReport, Support
from vtok.targets import Request, Target, find_targets, lifecycle
from vtok.targets.kernels import attention_kernels
from vtok.targets.resolve import Method, Size, methods_for, require_module, run_of


def patch(
    model: nn.Module,
    method: Method = "tome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
    **params: Any,
) -> nn.Module:
    """Makes a model shorten its token sequence from now on, in place. An earlier patch is removed first.

    Args:
        model: a model that holds one or more supported vision towers, or a supported vision-language model, whose prompts are
            shortened by visual tokens, `generate()` and all; weights and state_dict stay as they are. Methods for vision
            encoders act in the tower of a vision-language model: `vtok.supports(model)` says whether its prompts get shorter.
        method: a method's name; a config object; a list of these (they must reduce in different blocks); or the path of a file,
            or of a folder, that `save_config` wrote. Default: ToMe at its own default (see
            `vtok.eval.models.dinov2` for why).
        flops: a budget instead of a knob: the share of the model's FLOPs to leave, the reduction's own included, in (0, 1]. Of
            a vision-language model: of tower, connector and prefill of a stated prompt.
        input_size: (channels, height, width) for which a budget is solved and counts are checked; default: the model's own.
        calibration: images, as the tower takes them (a mapping: by name), for methods whose token counts depend on the image.
            For a vision-language model: inputs as the processor returns them, or a list of these, on which a method finds a
            number that it has no default for (`correlation`), and on which a budget is solved instead of a stated prompt where
            counts depend on images or text; they are run now.
        trace: keep a map from original to reduced tokens of the vision tower, for `unmerge` and overlays.
        positions: of a vision-language model's tokens behind dropped ones: "original", or "compact", numbered anew. Default:
            those of the program that a method's `preset="official"` stands for, else "original". An LLM that counts columns
            itself (attention within chunks, or to blocks) gets them numbered anew always.
        prompt: that a budget is solved for on a vision-language model: a `vtok.Prompt`, or a mapping of its fields such as
            {"images": 1, "text_tokens": 64}.
        **params: parameters of the method, if it was given by name.

    Returns:
        The same model. Where fewer tokens leave its vision tower, `get_image_features` still returns a row for each that there
        were; rows of those that are gone hold 2**-10 throughout, by which they are known and left out wherever features go.

    Raises:
        UnknownNameError: no such method or parameter.
        ConfigError: a value that makes no sense for this model, or a budget that cannot be met.
        UnsupportedModelError: nothing in the model can be patched, or not with this method; the model is left as it was.
    """
    require_module(model)
    flops, input_size, prompt = native(flops), native(input_size), native(prompt)
    lifecycle.check_whole(model)
    targets = find_targets(model, input_size)
    configs_of, saved = methods_for([target.info for target in targets], method, params, flops)
    if saved is not None:
        trace, positions = trace or saved.trace, saved.positions if positions is None else positions
    request = Request(flops, input_size, calibration, trace, positions, prompt)
    ready = [(target, target.resolve(configs, request)) for target, configs in zip(targets, configs_of) if configs]
    for target, resolved in ready:
        for sentence in target.warnings(resolved):
            warnings.warn(sentence, stacklevel=2)
    all_or_nothing(model, lambda: _install(unpatch(model), ready))
    return model


def _install(model: nn.Module, ready: list[tuple[Target, Any]]) -> None:
    for target, resolved in ready:
        target.install(resolved)


def _installed(model: nn.Module) -> list[tuple[Target, Any]]:
    """What is patched, as `_install` takes it."""
    return [(target, resolved) for target in find_targets(model) if (resolved := target.installed()) is not None]


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a model bit for bit: classes, hooks and attributes. A model that is not patched is returned as it is.

    Raises:
        StateError: another tool has wrapped a patched module since, or this is a part of what was patched; nothing is changed.
    """
    require_module(model)
    lifecycle.check_whole(model)
    return lifecycle.unpatch(model)


@contextmanager
def patched(model: nn.Module, method: Method = "tome", **kwargs: Any) -> Iterator[nn.Module]:
    """`with vtok.patched(model, "tome", r=8): ...`; at the end, whatever happens inside, the model is as it was before:
    unpatched, or with the patch that it had."""
    require_module(model)
    before = _installed(model)
    with lifecycle.temporarily(model, lambda: patch(model, method, **kwargs), lambda: _install(model, before)):
        yield model


def plan(
    model: nn.Module,
    method: Method = "tome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
    **params: Any,
) -> PlanReport | PromptPlan:
    """What a method would do, before anything runs: tokens and MACs per block and the speed-up they imply.

    No forward pass is needed. For methods whose counts depend on the image the numbers are upper bounds, and say so, unless
    `calibration` images are given, which are run once. Arguments and errors are those of `patch`; the model is not changed.
    Of a model with several towers it describes the first.

    With `batch_size` an encoder's passes are timed, too, unpatched and patched, on the device that it is on, for about a second
    (in six rounds where these take longer). The report then foresees the speed-up at that batch (`forecast`, with a 95 %
    interval) and says in a sentence where none is to be expected, what the time goes into, and what may help. Images are random
    unless `calibration` ones are given.

    For a vision-language model it states tokens and MACs of tower, connector and every decoder layer, KV-cache bytes, and the
    speed-up of the prefill that follows, for a prompt (`vtok.Prompt`, or a mapping of its fields). What depends on the words or
    the images is an upper bound, and called so, unless `calibration` inputs are given and no prompt: then it is their mean.
    """
    require_module(model)
    flops, input_size, prompt, batch_size = native(flops), native(input_size), native(prompt), native(batch_size)
    targets = find_targets(model, input_size)
    configs_of, _ = methods_for([target.info for target in targets], method, params, flops)
    return targets[0].plan(configs_of[0], Request(flops, input_size, calibration, prompt=prompt, batch_size=batch_size))


def prune_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: Method = "random",
    *,
    positions: str | None = None,
    pad_token_id: int | None = None,
    calibration: Any = None,
    **params: Any,
) -> dict[str, Any]:
    """Shortens the prompt of a vision-language model itself: no hooks, for static caches, compilation and serving.

    The vision side is run, the method chooses among its features, and the placeholders of those that leave are deleted. Of a
    method that also drops tokens inside the LLM only this part is done, with a warning.

    Args:
        model: with its language head, not patched.
        inputs: what the processor returned: input_ids, attention_mask, pixel_values and so on.
        method: as for `patch`.
        positions: "original": tokens keep the positions they had in the long prompt; "compact": numbered anew. Default: as for
            `patch`.
        pad_token_id: fills rows that keep fewer tokens, on the left; default: the model's own.
        calibration: as for `patch`; for many prompts, pass the number it finds instead.
        **params: parameters of the method, if it was given by name.

    Returns:
        Inputs for `generate()` or the model: shorter input_ids, attention_mask and position_ids, and the features that stay in
        place of the pixels. `generate()` returns this shorter prompt followed by the answer: slice at its length. Make them
        anew for every call: `generate()` with beams changes the features it is given. Sliding windows look back over the tokens
        that are left. `generate(use_cache=False)` of an unpadded prompt takes gaps between positions for borders of packed
        samples; a warning says so, and `positions="compact"` leaves none.

    Raises:
        ConfigError, UnsupportedModelError, UnknownNameError: as `patch` does.
    """
    require_module(model)
    try:
        targets = find_targets(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"prune_inputs takes one vision-language model with its language head: {error}") from error
    if len(targets) > 1:
        raise UnsupportedModelError(
            f"prune_inputs takes one vision-language model with its language head, got {type(model).__name__}, which holds "
            f"{len(targets)} models that can be patched"
        )
    (target,) = targets
    (configs,), saved = methods_for([target.info], method, params, None)
    if positions is None and saved is not None:
        positions = saved.positions
    request = Request(calibration=calibration, trace=saved is not None and saved.trace, positions=positions)
    return target.shortened_inputs(inputs, configs, request, pad_token_id)


def info(model: nn.Module, probe: Any = None) -> Info:
    """What is patched, and what the last forward pass of this thread did.

    Args:
        model: patched or not.
        probe: input for the model (a mapping: by name); it is run once, which also finds the attention kernel of every block.

    Returns:
        Tokens in and out of every block (per image where they differ), MACs of that pass; of a vision-language model tokens at
        every place and decoder layer (per row), MACs of tower, connector and decoder layers, KV-cache bytes. Print it.
    """
    targets = find_targets(model)
    kernels: list[str] | None = None
    if probe is not None:
        with torch.no_grad():
            modules = [module for target in targets for module in target.layers.modules]
            kernels = attention_kernels(modules, lambda: lifecycle.call(model, probe))
    found = []
    for target in targets:
        count = len(target.layers.modules)
        found.append(target.describe(None if kernels is None else kernels[:count]))
        kernels = None if kernels is None else kernels[count:]
    return Info(tuple(t for one in found for t in one.towers), tuple(p for one in found for p in one.prompts))


def supports(model: nn.Module) -> Support:
    """What `patch` would patch in a model, and which methods work on it, by default or with options; never raises."""
    try:
        return _supports(model)
    except Exception as error:  # whatever a model of unknown make does when it is looked at
        what = f"{type(model).__name__} could not be examined: {type(error).__name__}: {error}"
        return Support(reason=f"{what}; vtok patches models as timm, open_clip and transformers build them")


def _supports(model: nn.Module) -> Support:
    try:
        targets = find_targets(model)
    except VtokError as error:
        return Support(reason=str(error))
    rows = []
    for layers in (target.layers for target in targets):
        kinds = ", ".join(f"{name} x{count}" for name, count in Counter(layers.kinds).items())
        rows.append((layers.path, layers.name, len(layers.modules), kinds))
    methods: dict[str, str | None] = {}
    on_request: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for name in METHODS.names():
        why: list[str] = []
        for extra, config in METHODS.get(name).variants(targets[0].info):
            try:
                place = _place(targets, config)
            except VtokError as error:
                why.append(str(error))
                continue
            methods[name] = why[0] if extra else None
            if extra:
                on_request[name] = extra
            if place:
                places[name] = place
            break
        else:
            methods[name] = why[-1]
    return Support(tuple(rows), methods, on_request=on_request, places=places)


def _place(targets: list[Target], config: MethodConfig) -> str:
    """Where a method acts, in words. Raises if it cannot act on one of the targets."""
    resolved = [(target, target.resolve((config,), Request())) for target in targets]
    return " or ".join(dict.fromkeys(place for target, one in resolved if (place := target.place((config,), one))))


def unmerge(model: nn.Module, tokens: Tensor, fill: float = 0.0) -> Tensor:
    """Puts the tokens [B, N, C] of a forward pass back on the original grid: [B, N0, C], prefix first.

    Tokens that `forward_features` or a block returned are known again; others are taken for those of the last pass. The model
    must be patched with `trace=True`. Merged tokens share their features, dropped ones get `fill`.
    """
    run = run_of(model)
    if run is None or run.current.final is None:
        raise StateError("unmerge needs a patched model that has just run; patch it with trace=True and call it first")
    return reduction.unmerge(tokens, run.known_state(tokens) or run.current.final, fill)


def save_config(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes what is patched as JSON: to a file, or as `vtok.json` into a folder (beside a saved model).

    `vtok.patch(other_model, path)` brings it back; numbers that a budget chose are written, not the budget.
    """
    require_module(model)
    found = [(target, target.installed()) for target in find_targets(model)]
    patches = [resolved for _, resolved in found if resolved is not None]
    if not patches:
        raise StateError("the model is not patched; there is nothing to save")
    prompts = any(target.reads_prompts for target, _ in found)
    if prompts and len(patches) < len(found):
        raise StateError("of several vision-language models only some are patched; save each of these by itself")
    compact = any(getattr(resolved, "compact", False) for resolved in patches)
    positions = ("compact" if compact else "original") if prompts else None
    saved = [(target.info, () if resolved is None else resolved.configs) for target, resolved in found]
    files.save(path, saved, any(resolved.trace for resolved in patches), positions)
