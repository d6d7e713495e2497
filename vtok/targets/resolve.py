"""From what a user types to config objects, and from a model to its towers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from vtok import serialization as files
from vtok.config import MethodConfig, ModelInfo
from vtok.core.prompt import VLMInfo
from vtok.core.tracker import TokenTracker
from vtok.errors import ConfigError, UnsupportedModelError, brief, shown, unknown
from vtok.patches import find_adapters
from vtok.patches.block import ReducingBlock
from vtok.patches.protocol import Adapter, Tower
from vtok.reading import is_path
from vtok.registry import ADAPTERS, METHODS, VLM_ADAPTERS

Method = str | os.PathLike | MethodConfig | Sequence[str | MethodConfig]
Size = tuple[int, int, int]


def require_module(model: Any) -> None:
    """Raises unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"vtok patches a torch.nn.Module, got {type(model).__name__}")


def run_of(module: nn.Module) -> TokenTracker | None:
    """The `TokenTracker` of the first patched tower in a module, or `None`."""
    return next((m._vtok.run for m in module.modules() if isinstance(m, ReducingBlock)), None)


def methods_for(
    infos: Sequence[ModelInfo | VLMInfo], method: Method, params: dict[str, Any], flops: float | None
) -> tuple[list[tuple[MethodConfig, ...]], files.Saved | None]:
    """(configs for every tower or vision-language model, the file that they came from)."""
    if isinstance(method, os.PathLike) or (isinstance(method, str) and method not in METHODS and is_path(method)):
        if params or flops is not None:
            given = ", ".join([*params, *([] if flops is None else ["flops"])])
            raise ConfigError(f"{os.fspath(method)} is a saved patch, which holds all its numbers; leave out {given}")
        loaded = files.load(method)
        return loaded.configs_for(infos), loaded
    return [configs(method, params)] * len(infos), None


def configs(method: Method, params: dict[str, Any]) -> tuple[MethodConfig, ...]:
    """What the user named -> config objects."""
    if isinstance(method, str):
        name, colon, given = method.partition(":")
        if colon and method not in METHODS and name in METHODS:
            raise ConfigError(
                f"{shown(method)} holds parameters, as vtok.benchmark and the program vtok read them; here they are "
                f"keywords of their own: {name!r}, {brief(given, 80)}"
            )
        return (METHODS.get(method).create(**params),)
    if isinstance(method, MethodConfig):
        if params:
            raise ConfigError(f"parameters belong into the config object: {type(method).__name__}({', '.join(params)}=...)")
        return (method,)
    if isinstance(method, Sequence):
        if not method:
            raise ConfigError("the list of methods is empty; name at least one, or leave the model unpatched")
        if params:
            raise ConfigError("with a list of methods, give parameters as config objects: [vtok.ToMe(r=8), ...]")
        return tuple(config for one in method for config in configs(one, {}))
    if isinstance(method, type) and issubclass(method, MethodConfig):
        raise ConfigError(f"{method.__name__} is a config class; pass an object of it: vtok.{method.__name__}(...)")
    raise unknown("method", str(method), METHODS.names())


def towers(model: nn.Module, input_size: Size | None = None, no_prompt: str | None = None) -> list[tuple[Adapter, Tower]]:
    """Every supported tower of a model; raises if there is none. `no_prompt` says why its prompts stay as they are."""
    require_module(model)
    if input_size is not None:
        numbers = isinstance(input_size, (tuple, list)) and all(isinstance(n, int) and n > 0 for n in input_size)
        if not numbers or len(input_size) != 3:
            raise ConfigError(f"input_size is (channels, height, width), got {shown(input_size)}")
    described = [(adapter, tower) for _, adapter in find_adapters(model) for tower in adapter.towers(model, input_size)]
    outermost: dict[int, tuple[Adapter, Tower]] = {}
    for adapter, tower in described:  # a wrapper and what it wraps, from two backends: the wrapper knows what comes after
        key = id(tower.blocks[0].module)
        if key not in outermost or len(tower.path) < len(outermost[key][1].path):
            outermost[key] = (adapter, tower)
    found = list(outermost.values())
    if not found:
        encoders = [ADAPTERS.get(name).supported for name in ADAPTERS]
        known = "; ".join([*encoders, *(f"the prompts of {VLM_ADAPTERS.get(name)().supported}" for name in VLM_ADAPTERS)])
        why = "" if no_prompt is None else f", and {no_prompt}"
        raise UnsupportedModelError(f"{type(model).__name__} holds nothing that vtok can patch{why}; supported: {known}")
    return found
