"""Whether the sites of a method on prompts are places of a vision-language model, and which methods have such sites alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtok.capabilities import prompt_reducer
from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, UnsupportedModelError, VtokError
from vtok.registry import METHODS


def check_site(config: MethodConfig, site: Site, info: VLMInfo) -> None:
    """Raises if tokens of a model cannot leave at a site of a method."""
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
        later = f" or from layer {info.first_layer} on" if info.inner_layers else ", as there is no later layer"
        raise UnsupportedModelError(
            f"{config.name} drops tokens in front of decoder layer {site.index} of {info.name}, but {info.no_earlier}; drop "
            f"them before the LLM{later}"
        )
    _check_shared(config, site.index, info)


def _check_shared(config: MethodConfig, layer: int, info: VLMInfo) -> None:
    if info.last_layer is not None and layer > info.last_layer:
        raise UnsupportedModelError(
            f"{config.name} drops tokens in front of decoder layer {layer}, but later layers of {info.name} read the keys and "
            f"values of layer {info.last_layer}, and would see them; drop them before the LLM or up to layer {info.last_layer}"
        )


def check_tower(config: MethodConfig, reducer: VLMReducer, info: VLMInfo) -> None:
    """Raises if a method looks at blocks of the vision tower that cannot be read."""
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


def check_probe(layer: int, probed: int, layers: Mapping[int, Any], info: VLMInfo) -> None:
    """Raises if the attention of a decoder layer cannot decide what leaves in front of another."""
    if info.no_attention is not None:
        raise UnsupportedModelError(f"attention of {info.name}'s decoder layers cannot be read: {info.no_attention}")
    known = info.attention_layers
    if known is not None and probed not in known and layer > 0:
        able = info.judged_layers(layer - probed)
        listed = ", ".join(str(i) for i in able[:6]) + (", ..." if len(able) > 6 else "")
        instead = f"let them leave in front of one of the layers {listed}" if able else "use a method that acts before the LLM"
        raise UnsupportedModelError(
            f"decoder layer {probed} of {info.name}, by whose attention tokens would leave in front of layer {layer}, has none "
            f"but a recurrent state or a convolution; {instead}"
        )
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


def prompt_methods(info: VLMInfo) -> list[str]:
    """Names of the methods that act on the prompts of a model, by default or with one of their `alternatives`."""
    return [name for name in METHODS if METHODS.get(name).for_vlms() and _acts(name, info)]


def _acts(name: str, info: VLMInfo) -> bool:
    for _, config in METHODS.get(name).variants(info):
        try:
            reducer = prompt_reducer(config, info)
            check_tower(config, reducer, info)
            layers: dict[int, VLMReducer] = {}
            for site in reducer.sites:
                check_site(config, site, info)
                layers |= {site.index: reducer} if site.place is Place.DECODER_IN else {}
            for site in reducer.sites if "attention" in reducer.needs else ():
                if site.place is Place.DECODER_IN:
                    check_probe(site.index, reducer.probe(site), layers, info)
        except VtokError:
            continue
        return True
    return False
