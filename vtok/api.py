"""The functions a user calls. Names and configs become methods, models become towers; every user-facing check lives here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtok import serialization as files
from vtok.core import reduction
from vtok.cost.prefill import Prompt
from vtok.errors import ConfigError, StateError, VtokError
from vtok.patches import find_vlms
from vtok.patches.block import check
from vtok.patches.module_swap import Mixin, check_class, remove_hooks, shared_by, take_off
from vtok.patches.protocol import Adapter, Tower
from vtok.patches.transaction import all_or_nothing, to_the_end
from vtok.plain import native
from vtok.registry import METHODS
from vtok.reports.prompt import PromptPlan
from vtok.reports.results import Info, PlanReport, Support
from vtok.targets.encoder import Patch, call, fit, foretell, measured, put
from vtok.targets.resolve import Method, Size, own_class, require_module, run_of, wanted
from vtok.targets.resolve import towers as _towers


def patch(
    model: nn.Module,
    method: Method = "pitome",
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
            or of a folder, that `save_config` wrote.
        flops: a budget instead of a knob: the share of the model's FLOPs to leave, the reduction's own included, in (0, 1]. Of
            a vision-language model: of tower, connector and prefill of a stated prompt.
        input_size: (channels, height, width) for which a budget is solved and counts are checked; default: the model's own.
        calibration: images, as the tower takes them (a mapping: by name), for methods whose token counts depend on the image.
            For a vision-language model: inputs as the processor returns them, or a list of these, on which a method finds a
            number that it has no default for (`correlation`), and on which a budget is solved instead of a stated prompt where
            counts depend on images or text; they are run now.
        trace: keep a map from original to reduced tokens of the vision tower, for `unmerge` and overlays.
        positions: of a vision-language model's tokens behind dropped ones: "original" (default), or "compact", numbered anew.
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
    _check_whole(model)
    if vlms := find_vlms(model):
        from vtok.targets import vlm
        from vtok.targets import vlm_budget as prompt_budget
        from vtok.targets import vlm_tower as vlm_towers

        stated, (configs_of, saved) = Prompt.of(prompt, input_size), wanted([v.info for v in vlms], method, params, flops)
        free = prompt is None and input_size is None
        configs_of = vlm.calibrated(vlms, configs_of, calibration, measures=free and flops is not None)
        configs_of, budgets = prompt_budget.budgeted(model, vlms, configs_of, flops, stated, calibration if free else None)
        pruners = vlm.resolve_all(vlms, configs_of, saved, positions, budgets, trace)
        vlm_towers.warn_of_grids(vlms, pruners)
        all_or_nothing(model, lambda: vlm.put(unpatch(model), vlms, pruners))
        return model
    for name, value in (("positions", positions), ("prompt", prompt)):
        if value is not None:
            raise ConfigError(f"{name} is for vision-language models; {type(model).__name__} is none that vtok knows")
    found = _towers(model, input_size)
    configs_of, saved = wanted([tower.info for _, tower in found], method, params, flops)
    ready = []
    for (adapter, tower), configs in zip(found, configs_of):
        if not configs:  # saved from a model of which this tower was not patched
            continue
        made = fit(adapter, tower, configs, flops, calibration)
        check(tower, made.steps)
        ready.append((adapter, tower, made))
    traced = trace or (saved is not None and saved.trace)
    all_or_nothing(model, lambda: _put_back(unpatch(model), [(*one, traced) for one in ready]))
    return model


def _check_whole(model: nn.Module) -> None:
    """Raises if a module is part of a vision-language model that is patched."""
    hooks = [hook for module in model.modules() for hook in shared_by(module) if hasattr(hook, "pruner")]
    owned = {id(hook.pruner) for hook in hooks if hook.leads}
    if any(id(hook.pruner) not in owned for hook in hooks):
        raise StateError(
            f"this {type(model).__name__} is part of a vision-language model that vtok patched; patch and unpatch that model: "
            "what was patched into its parts belongs together"
        )


def _put_back(model: nn.Module, patches: Iterable[tuple[Adapter, Tower, Patch, bool]]) -> None:
    for adapter, tower, made, traced in patches:
        put(adapter, tower, made, traced)


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a model bit for bit: classes, hooks and attributes. A model that is not patched is returned as it is.

    Raises:
        StateError: another tool has wrapped a patched module since, or this is a part of what was patched; nothing is changed.
    """
    require_module(model)
    _check_whole(model)
    for module in model.modules():
        if isinstance(module, Mixin):
            check_class(module)

    def bare() -> nn.Module:
        for module in model.modules():
            if isinstance(module, Mixin):
                take_off(module)
            for name in ("_vtok", "_vtok_run", "_vtok_taps"):
                module.__dict__.pop(name, None)
            remove_hooks(module)
        return model

    return all_or_nothing(model, bare)


@contextmanager
def patched(model: nn.Module, method: Method = "pitome", **kwargs: Any) -> Iterator[nn.Module]:
    """`with vtok.patched(model, "tome", r=8): ...`; at the end, whatever happens inside, the model is as it was before:
    unpatched, or with the patch that it had."""
    require_module(model)
    before, pruners, marks = _installed(model), _pruners(model), _marks(model)

    def restore() -> None:
        if _marks(model) == marks:  # nothing has been patched
            return
        unpatch(model)
        _put_back(model, before)
        if pruners:
            from vtok.targets import vlm

            vlm.put(model, [v for v, _ in pruners], [p for _, p in pruners])

    try:
        patch(model, method, **kwargs)
        yield model
    finally:
        to_the_end(lambda: all_or_nothing(model, restore))


def _marks(model: nn.Module) -> list[int]:
    """What is patched, as far as it can be told from what is patched anew."""
    return [id(shared) for module in model.modules() for shared in shared_by(module)]


def _pruners(model: nn.Module) -> list[Any]:
    """(vision-language model, what its hooks share) where it is patched."""
    vlms = find_vlms(model)
    if not vlms:
        return []
    from vtok.patches.hf_vlm.install import pruner_of

    return [(v, pruner) for v in vlms if (pruner := pruner_of(v)) is not None]


def _installed(model: nn.Module) -> list[tuple[Adapter, Tower, Patch, bool]]:
    """What is patched into each tower, as `put` takes it; towers of vision-language models are left to `_pruners`."""
    if run_of(model) is None or find_vlms(model):
        return []
    found = [(adapter, tower, run_of(tower.module)) for adapter, tower in _towers(model, None)]
    return [(adapter, tower, run.patch, run.trace) for adapter, tower, run in found if run is not None]


def plan(
    model: nn.Module,
    method: Method = "pitome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    **params: Any,
) -> PlanReport | PromptPlan:
    """What a method would do, before anything runs: tokens and MACs per block and the speed-up they imply.

    No forward pass is needed. For methods whose counts depend on the image the numbers are upper bounds, and say so, unless
    `calibration` images are given, which are run once. Arguments and errors are those of `patch`; the model is not changed.
    Of a model with several towers it describes the first.

    For a vision-language model it states tokens and MACs of tower, connector and every decoder layer, KV-cache bytes, and the
    speed-up of the prefill that follows, for a prompt (`vtok.Prompt`, or a mapping of its fields). What depends on the words or
    the images is an upper bound, and called so, unless `calibration` inputs are given and no prompt: then it is their mean.
    """
    require_module(model)
    flops, input_size, prompt = native(flops), native(input_size), native(prompt)
    if vlms := find_vlms(model):
        from vtok.targets import vlm
        from vtok.targets import vlm_budget as prompt_budget

        wishes, _ = wanted([v.info for v in vlms], method, params, flops)
        wishes = vlm.calibrated(vlms[:1], wishes[:1], calibration, measures=prompt is None and input_size is None)
        return prompt_budget.plan(model, vlms, wishes, flops, prompt, input_size, calibration)
    if prompt is not None:
        raise ConfigError(f"prompt is for vision-language models; {type(model).__name__} is none that vtok knows")
    found = _towers(model, input_size)
    configs_of, _ = wanted([tower.info for _, tower in found], method, params, flops)
    adapter, tower = found[0]
    made = fit(adapter, tower, configs_of[0], flops, calibration)
    result = foretell(adapter, tower, made.steps)
    if calibration is not None and not result.exact:
        result = measured(adapter, tower, made.configs, calibration)
    return PlanReport(type(tower.module).__name__, made.configs, result, made.budget, tower.info.num_patches)


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
        positions: "original" (default): tokens keep the positions they had in the long prompt; "compact": numbered anew.
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
    from vtok.targets import vlm

    require_module(model)
    vlms = find_vlms(model)
    configs_of, saved = wanted([v.info for v in vlms], method, params, None)
    return vlm.shorten(model, vlms, inputs, configs_of, saved, positions, pad_token_id, calibration)


def info(model: nn.Module, probe: Any = None) -> Info:
    """What is patched, and what the last forward pass of this thread did.

    Args:
        model: patched or not.
        probe: input for the model (a mapping: by name); it is run once, which also finds the attention kernel of every block.

    Returns:
        Tokens in and out of every block (per image where they differ), MACs of that pass; of a vision-language model tokens at
        every place and decoder layer (per row), MACs of tower, connector and decoder layers, KV-cache bytes. Print it.
    """
    from vtok.targets.inspection import tower_info

    require_module(model)
    if vlms := find_vlms(model):
        from vtok.targets import vlm
        from vtok.targets import vlm_tower as vlm_towers

        if probe is not None:
            with torch.no_grad():
                call(model, probe)
        towers = (vlm_towers.describe_tower(v) for v in vlms)
        return Info(tuple(t for t in towers if t is not None), tuple(vlm.describe(model, v) for v in vlms))
    found = _towers(model, None)
    kernels: dict[int, list[str]] = {}
    if probe is not None:
        from vtok.targets.kernels import attention_kernels

        modules = [b.module for _, tower in found for b in tower.blocks]
        names = attention_kernels(modules, lambda: call(model, probe))
        for i, (_, tower) in enumerate(found):
            kernels[i], names = names[: len(tower.blocks)], names[len(tower.blocks) :]
    return Info(
        tuple(tower_info(adapter, tower, run_of(tower.module), kernels.get(i)) for i, (adapter, tower) in enumerate(found))
    )


def supports(model: nn.Module) -> Support:
    """What `patch` would patch in a model, and which methods work on it, by default or on request; never raises."""
    try:
        return _supports(model)
    except Exception as error:  # whatever a model of unknown make does when it is looked at
        what = f"{type(model).__name__} could not be examined: {type(error).__name__}: {error}"
        return Support(reason=f"{what}; vtok patches models as timm, open_clip and transformers build them")


def _supports(model: nn.Module) -> Support:
    try:
        require_module(model)
        if vlms := find_vlms(model):
            from vtok.targets import vlm

            return vlm.support(vlms)
        found = _towers(model, None)
    except VtokError as error:
        return Support(reason=str(error))
    towers: list[tuple[str, str, int, str]] = []
    methods: dict[str, str | None] = {}
    for _, tower in found:
        kinds = Counter(own_class(b.module).__name__ for b in tower.blocks)
        towers.append(
            (tower.path, own_class(tower.module).__name__, len(tower.blocks), ", ".join(f"{n} x{c}" for n, c in kinds.items()))
        )
    on_request: dict[str, dict[str, Any]] = {}
    for name in METHODS.names():
        methods[name] = None
        for extra, config in METHODS.get(name).variants():
            try:
                for adapter, tower in found:
                    check(tower, fit(adapter, tower, (config,), None, None).steps)
            except VtokError as error:
                methods[name] = methods[name] or str(error)
                continue
            if extra:
                on_request[name] = extra
            break
    return Support(tuple(towers), methods, on_request=on_request)


def unmerge(model: nn.Module, tokens: Tensor, fill: float = 0.0) -> Tensor:
    """Puts the tokens [B, N, C] of the last forward pass back on the original grid: [B, N0, C], prefix first.

    The model must be patched with `trace=True`. Merged tokens share their features, dropped ones get `fill`.
    """
    run = run_of(model)
    if run is None or run.current.final is None:
        raise StateError("unmerge needs a patched model that has just run; patch it with trace=True and call it first")
    return reduction.unmerge(tokens, run.current.final, fill)


def save_config(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes what is patched as JSON: to a file, or as `vtok.json` into a folder (beside a saved model).

    `vtok.patch(other_model, path)` brings it back; numbers that a budget chose are written, not the budget.
    """
    if pruners := _pruners(model):
        if len(pruners) < len(find_vlms(model)):
            raise StateError("of several vision-language models only some are patched; save each of these by itself")
        saved = [(v.info, pruner.configs) for v, pruner in pruners]
        trace = any(pruner.trace for _, pruner in pruners)
        return files.save(path, saved, trace, "compact" if pruners[0][1].compact else "original")
    found = [] if run_of(model) is None or find_vlms(model) else [(t, run_of(t.module)) for _, t in _towers(model)]
    if not any(run is not None for _, run in found):
        raise StateError("the model is not patched; there is nothing to save")
    saved = [(tower.info, () if run is None else run.patch.configs) for tower, run in found]
    files.save(path, saved, any(run is not None and run.trace for _, run in found))
