"""Methods on one vision-language model: numbers found on calibration inputs, and what its hooks need, checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vtok.capabilities import prompt_reducer, to_calibrate
from vtok.config import MethodConfig
from vtok.core.prompt import POSITIONS, ImageFeatures, VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, UnsupportedModelError, unknown
from vtok.patches.decoder.masks import window_of
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.decoder.text_models import counts_columns
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import calibration_inputs, observed
from vtok.patches.hf_vlm.install import install as install_hooks
from vtok.targets.vlm_tower import check_readable, in_tower, install_tower, resolve_in_tower


def check_positions(positions: str) -> None:
    """Raises unless `positions` is one of `POSITIONS`."""
    if positions not in POSITIONS:
        raise unknown("positions", str(positions), POSITIONS)


def positions_of(vlm: VLM, configs: Sequence[MethodConfig]) -> str:
    """The positions that presets of methods stand for, "original" where there are none; visual tokens that have positions in
    time, height and width keep them.

    Raises:
        ConfigError: two presets stand for different ones.
    """
    wanted = {config.preset_positions: config.name for config in configs if config.preset_positions is not None}
    if vlm.family.rotary_3d or not wanted:
        return POSITIONS[0]
    if len(wanted) > 1:
        named = " and ".join(f"{name} {positions}" for positions, name in wanted.items())
        raise ConfigError(f"presets stand for different positions ({named}); pass positions='original' or 'compact'")
    return next(iter(wanted))


def resolve(vlm: VLM, configs: Sequence[MethodConfig], positions: str | None = None, trace: bool = False) -> Pruner:
    """Methods -> what the hooks of one model need, checked against it.

    A method that acts both in vision encoders and on prompts acts on the prompt here.

    Args:
        vlm: the model, described.
        configs: the methods.
        positions: of tokens behind dropped ones; `None` = those that presets stand for (`positions_of`).
        trace: keep which patches were merged or dropped inside the vision tower.

    Raises:
        UnsupportedModelError: a method does not act on vision-language models, or not on this one.
        ConfigError: two methods want one place, or a place that the model does not have.
    """
    positions = positions_of(vlm, configs) if positions is None else positions
    check_positions(positions)
    features: VLMReducer | None = None
    pixels: VLMReducer | None = None
    layers: dict[int, tuple[Site, VLMReducer]] = {}
    inside = tuple(config for config in configs if in_tower(config))
    tower = resolve_in_tower(vlm, inside) if inside else None
    joint = vlm.joint() if tower is not None and tower.steps else None
    if trace and joint is None:
        raise ConfigError(
            "trace=True keeps which patches were merged or dropped inside the vision tower, where none of these methods acts: "
            + ", ".join(config.name for config in configs)
        )
    for config in configs:
        if in_tower(config):
            continue
        reducer = prompt_reducer(config, vlm.info)
        _check_tower(config, reducer, vlm.info)
        for site in reducer.sites:
            _check_site(config, site, vlm.info)
            before = {Place.IMAGE_FEATURES: features, Place.PATCHES: pixels}
            taken = before[site.place] is not None if site.place in before else site.index in layers
            if taken:
                raise ConfigError(f"two methods drop visual tokens at one place ({site}); give them different ones")
            if site.place is Place.IMAGE_FEATURES:
                features = reducer
            elif site.place is Place.PATCHES:
                pixels = reducer
            else:
                layers[site.index] = (site, reducer)
    if joint is not None and pixels is not None:
        raise ConfigError(
            f"{' + '.join(config.name for config in configs)}: one drops patches in front of the vision tower of "
            f"{vlm.info.name}, one acts inside on whole images; use one of the two, and another method on the prompt"
        )
    if joint is not None and tower is not None and features is not None:
        check_readable(features, vlm.info, tower, joint)
    for layer, (site, reducer) in layers.items():
        if "attention" in reducer.needs:
            _check_probe(layer, reducer.probe(site), layers, vlm.info)
    compact = positions == "compact" or counts_columns(vlm.text)
    if compact:
        _check_compact(vlm, layers)
    left = iter(() if tower is None else tower.configs)
    chosen = tuple(next(left) if in_tower(config) else config for config in configs)
    return Pruner(vlm.family, vlm.tokens, features, layers, compact, chosen, vlm.path, tower, joint, trace, pixels)


def _check_site(config: MethodConfig, site: Site, info: VLMInfo) -> None:
    if site.place in (Place.IMAGE_FEATURES, Place.PATCHES):
        return
    if site.place is not Place.DECODER_IN:
        raise UnsupportedModelError(f"{config.name} acts at {site}, which is no place of a vision-language model's LLM")
    if not 0 <= site.index < info.depth:
        raise ConfigError(
            f"{config.name} drops tokens in front of decoder layer {site.index}, {info.name} has decoder layers 0 to "
            f"{info.depth - 1}"
        )
    if site.index > 0 and info.no_layers is not None:
        raise UnsupportedModelError(
            f"{config.name} drops tokens in front of decoder layer {site.index}, but none can leave between the layers of "
            f"{info.name}: {info.no_layers}; methods that shorten its prompt before the LLM work"
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
    if vlm.family.rotary_3d:
        raise UnsupportedModelError(
            f"positions='compact' numbers the tokens that are left one after the other, but {vlm.info.name} gives visual "
            "tokens positions in time, height and width; use positions='original'"
        )
    rotary = getattr(vlm.text, "rotary_emb", None)
    alike = rotary is not None and [*inspect.signature(rotary.forward).parameters] == ["x", "position_ids"]
    windows = any(window_of(layer, i) is not None for i, layer in enumerate(vlm.text.layers))
    if any(layer > 0 for layer in layers) and (not alike or windows):
        raise UnsupportedModelError(
            "positions='compact' numbers anew what is left between decoder layers, which takes one rotary table for all of "
            f"them and attention to all columns; those of {vlm.info.name} differ: use positions='original'"
        )


def calibrated(vlm: VLM, configs: Sequence[MethodConfig], calibration: Any, measures: bool = False) -> tuple[MethodConfig, ...]:
    """The methods with the numbers that some of them find on inputs.

    Args:
        vlm: the model.
        configs: the methods.
        calibration: the inputs; `None` = none.
        measures: whether costs will be measured on them, so that they are of use to any method.

    Raises:
        ConfigError: the inputs are of no use, or are none.
    """
    if calibration is None:
        return tuple(configs)
    if not measures and not any(to_calibrate(config) for config in configs):
        names = " + ".join(config.name for config in configs)
        raise ConfigError(
            f"calibration cannot be used on a vision-language model with {names}, which has no number to find; leave it out "
            "(costs are measured on it under a FLOPs budget and in plans for which no prompt is stated)"
        )
    calibration_inputs(calibration)

    def observe(blocks: Sequence[int]) -> Iterator[ImageFeatures]:
        return observed(vlm, calibration, blocks)

    found: list[MethodConfig] = []
    for config in configs:
        lacking = to_calibrate(config)
        found.append(config if lacking is None else lacking.calibrated(vlm.info, observe))
    return tuple(found)


def install(model: nn.Module, vlm: VLM, pruner: Pruner) -> None:
    """Installs what `resolve` returned.

    Args:
        model: holds the vision-language model and its language head.
        vlm: the model, described.
        pruner: methods, resolved for it.
    """
    install_tower(vlm, pruner)
    install_hooks(model, vlm, pruner)
