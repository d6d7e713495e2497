"""What the functions of `vtok.api` do on a vision-language model, and `prune_inputs`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vtok.config import MethodConfig
from vtok.core.prompt import POSITIONS, ImageFeatures, VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.cost.budget import Budget
from vtok.errors import ConfigError, UnsupportedModelError, VtokError, unknown
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.hf_vlm.families import SUPPORTED, VLM
from vtok.patches.hf_vlm.install import calibration_inputs, install, observed, pruner_of, short_inputs
from vtok.registry import METHODS
from vtok.reports.results import PromptInfo, PromptRow, Support
from vtok.serialization import Saved
from vtok.targets.resolve import run_of
from vtok.targets.vlm_estimate import measured, visual_left
from vtok.targets.vlm_tower import check_readable, fitted, in_tower, place, put_tower, tower_patched


def check_positions(positions: str) -> None:
    """Raises unless `positions` is one of `POSITIONS`."""
    if positions not in POSITIONS:
        raise unknown("positions", str(positions), POSITIONS)


def resolve(vlm: VLM, configs: Sequence[MethodConfig], positions: str, trace: bool = False) -> Pruner:
    """Methods -> what the hooks of one model need, checked against it.

    A method that acts both in vision encoders and on prompts acts on the prompt here.

    Raises:
        UnsupportedModelError: a method does not act on vision-language models, or not on this one.
        ConfigError: two methods want one place, or a place that the model does not have.
    """
    check_positions(positions)
    features: VLMReducer | None = None
    layers: dict[int, tuple[Site, VLMReducer]] = {}
    inside = tuple(config for config in configs if in_tower(config))
    tower = fitted(vlm, inside) if inside else None
    joint = vlm.joint() if tower is not None and tower.steps else None
    if trace and joint is None:
        raise ConfigError(
            "trace=True keeps which patches were merged or dropped inside the vision tower, where none of these methods acts: "
            + ", ".join(config.name for config in configs)
        )
    for config in configs:
        if in_tower(config):
            continue
        reducer = config.build_vlm(vlm.info)
        _check_tower(config, reducer, vlm.info)
        for site in reducer.sites:
            _check_site(config, site, vlm.info)
            taken = features is not None if site.place is Place.IMAGE_FEATURES else site.index in layers
            if taken:
                raise ConfigError(f"two methods drop visual tokens at one place ({site}); give them different ones")
            if site.place is Place.IMAGE_FEATURES:
                features = reducer
            else:
                layers[site.index] = (site, reducer)
    if joint is not None and tower is not None and features is not None:
        check_readable(features, vlm.info, tower, joint)
    for layer, (site, reducer) in layers.items():
        if "attention" in reducer.needs:
            _check_probe(layer, reducer.probe(site), layers, vlm.info)
    compact = positions == "compact"
    if compact:
        _check_compact(vlm, layers)
    left = iter(() if tower is None else tower.configs)
    chosen = tuple(next(left) if in_tower(config) else config for config in configs)
    return Pruner(vlm.spec, vlm.tokens, features, layers, compact, chosen, vlm.path, tower, joint, trace)


def _check_site(config: MethodConfig, site: Site, info: VLMInfo) -> None:
    if site.place is Place.IMAGE_FEATURES:
        return
    if site.place is not Place.DECODER_IN:
        raise UnsupportedModelError(f"{config.name} acts at {site}, which is no place of a vision-language model's LLM")
    if not 0 <= site.index < info.depth:
        raise ConfigError(
            f"{config.name} drops tokens in front of decoder layer {site.index}, {info.name} has decoder layers 0 to "
            f"{info.depth - 1}"
        )
    if 0 < site.index < info.first_layer:
        raise UnsupportedModelError(
            f"{config.name} drops tokens in front of decoder layer {site.index}, but {info.name} adds tower features to its "
            f"visual tokens up to layer {info.first_layer - 1}; drop them before the LLM or from layer {info.first_layer} on"
        )


def _check_tower(config: MethodConfig, reducer: VLMReducer, info: VLMInfo) -> None:
    wanted = reducer.tower_blocks
    if not wanted:
        return
    if info.tower is None:
        raise UnsupportedModelError(
            f"{config.name} looks at the attention of {info.name}'s vision tower, which cannot be read: {info.no_tower}"
        )
    wrong = [block for block in wanted if not 0 <= block < info.tower.depth]
    if wrong:
        raise ConfigError(
            f"{config.name} looks into block {wrong[0]} of the vision tower, {info.name} has blocks 0 to {info.tower.depth - 1}"
        )


def _check_probe(layer: int, probed: int, layers: Mapping[int, Any], info: VLMInfo) -> None:
    if info.no_attention is not None:
        raise UnsupportedModelError(f"attention of {info.name}'s decoder layers cannot be read: {info.no_attention}")
    if layer == 0:
        raise ConfigError("before the LLM there is no attention to decide by; drop in front of a later decoder layer")
    between = [i for i in layers if probed < i < layer and i > 0]  # what a layer drops leaves before its attention is read
    if not 0 <= probed <= layer or between:
        why = (
            f"tokens are dropped in between, in front of layer {between[0]}"
            if between
            else "it must be that layer or an earlier one"
        )
        raise ConfigError(f"attention of decoder layer {probed} cannot decide what is dropped in front of layer {layer}: {why}")


def _check_compact(vlm: VLM, layers: Mapping[int, Any]) -> None:
    if vlm.spec.rotary_3d:
        raise UnsupportedModelError(
            f"positions='compact' numbers the tokens that are left one after the other, but {vlm.info.name} gives visual "
            "tokens positions in time, height and width; use positions='original'"
        )
    if any(layer > 0 for layer in layers):
        raise ConfigError(
            "positions='compact' is for tokens dropped before the LLM; what is dropped between its layers has been rotated by "
            "its original position already: use positions='original'"
        )


def resolve_all(
    vlms: Sequence[VLM],
    wanted: Sequence[tuple[MethodConfig, ...]],
    saved: Saved | None,
    positions: str | None,
    budgets: Sequence[Budget | None] | None = None,
    trace: bool = False,
) -> list[Pruner]:
    """`resolve` for every model; positions that are not given come from the file that the methods came from."""
    if positions is None:
        positions = (saved.positions if saved is not None else None) or POSITIONS[0]
    trace = trace or (saved is not None and saved.trace)
    pruners = [resolve(vlm, configs, positions, trace) for vlm, configs in zip(vlms, wanted)]
    for pruner, budget in zip(pruners, budgets or ()):
        pruner.budget = budget
    return pruners


def calibrated(
    vlms: Sequence[VLM], wanted: Sequence[tuple[MethodConfig, ...]], calibration: Any, measures: bool = False
) -> list[tuple[MethodConfig, ...]]:
    """The methods of every model, with the numbers that some of them find on inputs.

    Args:
        vlms: the models.
        wanted: methods for each.
        calibration: the inputs; `None` = none.
        measures: whether costs will be measured on them, so that they are of use to any method.

    Raises:
        ConfigError: the inputs are of no use, or are none.
    """
    return [_calibrated(vlm, configs, calibration, measures) for vlm, configs in zip(vlms, wanted)]


def _calibrated(vlm: VLM, configs: Sequence[MethodConfig], calibration: Any, measures: bool) -> tuple[MethodConfig, ...]:
    if calibration is None:
        return tuple(configs)
    if not measures and not any(config.calibrates for config in configs):
        names = " + ".join(config.name for config in configs)
        raise ConfigError(
            f"calibration cannot be used on a vision-language model with {names}, which has no number to find; leave it out "
            "(costs are measured on it under a FLOPs budget and in plans for which no prompt is stated)"
        )
    calibration_inputs(calibration)

    def observe(blocks: Sequence[int]) -> Iterator[ImageFeatures]:
        return observed(vlm, calibration, blocks)

    return tuple(config.calibrated(vlm.info, observe) if config.calibrates else config for config in configs)


def put(model: nn.Module, vlms: Sequence[VLM], pruners: Sequence[Pruner]) -> None:
    """Installs resolved patches."""
    for vlm, pruner in zip(vlms, pruners):
        put_tower(vlm, pruner)
        install(model, vlm, pruner)


def support(vlms: Sequence[VLM]) -> Support:
    """See `vtok.supports`."""
    rows: list[tuple[str, str, int, str]] = []
    methods: dict[str, str | None] = {}
    for vlm in vlms:
        kinds = Counter(type(layer).__name__ for layer in vlm.text.layers)
        listed = ", ".join(f"{name} x{count}" for name, count in kinds.items())
        rows.append((vlm.path, type(vlm.module).__name__, vlm.info.depth, listed))
    places: dict[str, str] = {}
    why: list[str]
    on_request: dict[str, dict[str, Any]] = {}
    for name in METHODS.names():
        methods[name], why = None, []
        for extra, config in METHODS.get(name).variants():
            try:
                pruners = [resolve(vlm, (config,), POSITIONS[0]) for vlm in vlms]
            except VtokError as error:
                why.append(str(error))
                continue
            if extra:
                methods[name], on_request[name] = why[0], extra
            places[name] = place(config, pruners)
            break
        else:
            methods[name] = why[-1]
    return Support(tuple(rows), methods, on_request=on_request, places=places)


def describe(model: nn.Module, vlm: VLM) -> PromptInfo:
    """What is patched into a model and what became of the last prompt of this thread."""
    pruner = pruner_of(vlm)
    name = type(vlm.module).__name__
    if pruner is None:
        return PromptInfo(vlm.path, name, ())
    last = pruner.last
    if last is None:
        return PromptInfo(vlm.path, name, pruner.configs, _positions(pruner), budget=pruner.budget, shortened=pruner.shortens)
    entered = visual = tuple(last.visual.sum(1).tolist())
    rows: list[PromptRow] = []
    if last.alive is not None:
        left = tuple((last.visual & last.alive).sum(1).tolist())
        rows.append(PromptRow("vision tower", entered, left))
        entered = left
    for layer, stage in sorted(last.stages.items()):
        if layer == 0 and pruner.features is None and 0 not in pruner.layers:
            continue  # what left the tower is all that enters the LLM
        left = tuple(visual_left(last.visual, stage.column))
        rows.append(PromptRow("before the LLM" if layer == 0 else f"decoder layer {layer}", entered, left))
        entered = left
    text = tuple((last.real & ~last.visual).sum(1).tolist())
    cost, mean, notes = measured(model, vlm, pruner, last)
    return PromptInfo(
        vlm.path, name, pruner.configs, _positions(pruner), tuple(rows), text, visual, cost, mean, pruner.budget, notes
    )


def _positions(pruner: Pruner) -> str:
    return POSITIONS[int(pruner.compact)]


def shorten(
    model: Any,
    vlms: Sequence[VLM],
    inputs: Mapping[str, Any],
    wanted: Sequence[tuple[MethodConfig, ...]],
    saved: Saved | None,
    positions: str | None,
    pad: int | None,
    calibration: Any = None,
) -> dict[str, Any]:
    """See `vtok.prune_inputs`."""
    if len(vlms) != 1 or not hasattr(model, "_prepare_position_ids_for_generation"):
        raise UnsupportedModelError(
            f"prune_inputs takes one vision-language model with its language head, got {type(model).__name__}; supported: "
            f"{SUPPORTED}"
        )
    if pruner_of(vlms[0]) is not None or run_of(vlms[0].module) is not None:
        raise ConfigError("the model is patched and would shorten the prompt a second time; call vtok.unpatch(model) first")
    pruner = resolve_all(vlms, calibrated(vlms, wanted, calibration), saved, positions)[0]
    places = " and ".join(str(site) for site, _ in pruner.layers.values())
    names = " + ".join(config.name for config in pruner.configs)
    if pruner.features is None and pruner.joint is None:
        if places:
            raise UnsupportedModelError(f"{names} drops tokens {places}, inside the LLM, which needs hooks: use vtok.patch")
        return dict(inputs)
    if places:
        warnings.warn(
            f"prune_inputs does what {names} does before the LLM; dropping tokens {places} as well needs hooks: use vtok.patch",
            stacklevel=3,
        )
    if pad is None:
        pad = getattr(model.generation_config, "pad_token_id", None)
    if pad is None:
        pad = model.config.get_text_config().pad_token_id
    with tower_patched(vlms[0], pruner):
        return short_inputs(model, vlms[0], inputs, pruner, 0 if pad is None else int(pad))
