"""Methods on one vision-language model: numbers found on calibration inputs, and what its hooks need, checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from vtok.capabilities import prompt_reducer, to_calibrate
from vtok.config import MethodConfig
from vtok.core.prompt import POSITIONS, ImageFeatures, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, UnsupportedModelError, unknown
from vtok.patches.decoder.masks import window_of
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.decoder.text_models import counts_columns
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import calibration_inputs, observed
from vtok.patches.hf_vlm.install import install as install_hooks
from vtok.targets.vlm.sites import check_probe, check_site, check_tower
from vtok.targets.vlm.tower import check_readable, install_tower, resolve_in_tower


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
    inside = tuple(config for config in configs if config.in_tower)
    tower = resolve_in_tower(vlm, inside) if inside else None
    joint = vlm.joint() if tower is not None and tower.steps else None
    if trace and joint is None:
        raise ConfigError(
            "trace=True keeps which patches were merged or dropped inside the vision tower, where none of these methods acts: "
            + ", ".join(config.name for config in configs)
        )
    for config in configs:
        if config.in_tower:
            continue
        reducer = prompt_reducer(config, vlm.info)
        check_tower(config, reducer, vlm.info)
        for site in reducer.sites:
            check_site(config, site, vlm.info)
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
            check_probe(layer, reducer.probe(site), layers, vlm.info)
    compact = positions == "compact" or counts_columns(vlm.text)
    if compact:
        _check_compact(vlm, layers)
    left = iter(() if tower is None else tower.configs)
    chosen = tuple(next(left) if config.in_tower else config for config in configs)
    return Pruner(vlm.family, vlm.tokens, features, layers, compact, chosen, vlm.path, tower, joint, trace, pixels)


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
