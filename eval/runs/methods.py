"""Methods as run files and the command line write them, read into settings.

In a file a method is a mapping with its name and its parameters, `{name: tome, r: 13}`; `flops` among them is a budget, solved
for the model, and `at_random: true` draws the tokens that the method would choose. A list of mappings is patched together. On
the command line the same is `tome:r=13` and `pitome:ratio=0.9+todre`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from vtok.config import MethodConfig
from vtok.errors import ConfigError, UnknownNameError, VtokError, shown
from vtok.eval.common.checked import FileModel, Share, validated
from vtok.eval.common.settings import Setting
from vtok.eval.models.assets import asset, assets, installed
from vtok.eval.runs import yaml_text
from vtok.eval.runs.names import split_methods
from vtok.registry import METHODS

ASSET = "asset:"  # starts the name of a file that comes with vtok, as the value of a parameter
# other arguments of vtok.patch and vtok.plan
_NOT_PARAMETERS = ("model", "method", "input_size", "calibration", "trace", "batch_size")


class MethodEntry(FileModel, extra="allow"):
    """One method of a run file; what is not listed here are its parameters."""

    name: str
    flops: Share | None = None
    at_random: bool = False


def read_setting(where: str, key: str, value: Any) -> Setting:
    """What a run file says about one setting: a mapping, or a list of mappings that are patched together. Messages name the
    file (`where`) and the key under which it stands.

    Raises:
        ConfigError: something else, no name, a parameter that makes no sense, a budget for several methods.
        UnknownNameError: no such method or parameter.
    """
    parts = value if isinstance(value, list) else [value]
    if not parts:
        raise ConfigError(f"{where}: {key} is an empty list; leave it out or name a method")
    for part in parts:
        if not isinstance(part, Mapping):
            raise ConfigError(
                f"{where}: {key} must be a mapping such as {{name: tome, r: 13}}, or a list of these, got {shown(part)}"
            )
    if len(parts) == 1:
        config, flops = _read(where, key, parts[0])
        drawn = bool(parts[0].get("at_random"))
        if flops is None:
            return Setting(config, at_random=drawn)
        return Setting(config.name, {**_parameters(parts[0]), "flops": flops}, drawn)
    if any(part.get("at_random") for part in parts):
        raise ConfigError(f"{where}: {key}: at_random draws the tokens of one method; leave it out of several patched together")
    read = [_read(where, f"{key}.{i}", part) for i, part in enumerate(parts)]
    if any(flops is not None for _, flops in read):
        raise ConfigError(
            f"{where}: {key}: a FLOPs budget sets the knob of one method; with several patched together give each its numbers"
        )
    return Setting([config for config, _ in read])


def with_budget(where: str, key: str, value: Any, flops: float) -> Any:
    """The same setting of a run file with a budget; one that says `flops: null` keeps its own numbers. Raises `ConfigError`:
    several methods are patched together, which no budget can set."""
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, Mapping) and "flops" in part and part["flops"] is None for part in parts):
        return value
    if len(parts) != 1 or not isinstance(parts[0], Mapping):
        raise ConfigError(
            f"{where}: {key}: a FLOPs budget sets the knob of one method; say flops: null in each of several that are patched "
            "together to keep their numbers"
        )
    return {**parts[0], "flops": flops}


def _read(where: str, key: str, value: Mapping[str, Any]) -> tuple[MethodConfig, float | None]:
    """(config without its budget, budget)."""
    if value.get("name") is None:
        raise ConfigError(f"{where}: {key}.name is missing; known methods: {', '.join(METHODS.names())}")
    entry = validated(MethodEntry, value, where, f"{key}.")
    flops = entry.flops
    try:
        config = METHODS.get(entry.name).create(**_parameters(value))
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: {key}: {error}") from error
    except (VtokError, TypeError) as error:
        raise ConfigError(f"{where}: {key}: {error}") from error
    both = [name for name in config.set_by_budget if name in config.given()] if flops is not None else []
    if both:
        raise ConfigError(f"{where}: {key}: flops sets {' and '.join(both)} of {config.name}; give the budget or the parameter")
    return config, flops


def _parameters(value: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _asset(given) for name, given in value.items() if name not in MethodEntry.model_fields}


def _asset(value: Any) -> Any:
    """The path of a file that comes with vtok, where a value names one."""
    if not isinstance(value, str) or not value.startswith(ASSET):
        return value
    name = value.removeprefix(ASSET)  # where no file came with vtok, its runs are listed, and the model says what is missing
    return str(asset(name) if installed() else assets() / name)


def portable(value: Any) -> Any:
    """Plain values with files that come with vtok named as run files name them, wherever vtok is installed."""
    if isinstance(value, dict):
        return {name: portable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [portable(one) for one in value]
    return value.replace(f"{assets()}{os.sep}", ASSET) if isinstance(value, str) else value


_FORM = "name or name:key=value,key=value, e.g. tome:r=13"


class _Tuples(yaml_text.Loader):
    """Plain values and, besides, tuples of them."""


def _tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


_Tuples.add_constructor("!tuple", _tuple)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Reads a method as the command line writes it: `tome`, `tome:r=13`, `tome:r=(8,-1)`, `zero_tprune:layers=[2],retain=0.9`.
    Gives (name, parameters); raises `ConfigError` if the part after the colon is not `key=value, ...`."""
    name, colon, rest = text.partition(":")
    if not colon:
        return name, {}
    try:
        text_in_yaml = re.sub(r"\(([^()]*)\)", r"!tuple [\1]", rest.replace("=", ": "))
        params = yaml_text.parse("{" + text_in_yaml + "}", text, _Tuples)
    except ConfigError as error:
        first = str(error).splitlines()[0][-100:]
        raise ConfigError(f"cannot read {shown(text)}; write a method as {_FORM} ({first})") from error
    unset = isinstance(params, dict) and any(value is None and f"{key}=null" not in rest for key, value in params.items())
    if not isinstance(params, dict) or not params or unset:
        raise ConfigError(f"cannot read {shown(text)}; write a method as {_FORM}")
    for key in params:
        if key in _NOT_PARAMETERS:
            raise ConfigError(f"{shown(text)}: {key} is no parameter of a method")
    return name, params


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Reads methods joined by "+": (name, parameters) of each. Errors are those of `parse_method`."""
    return [parse_method(part) for part in split_methods(text)]


def parse_setting(text: str) -> Any:
    """Reads one method, or several joined by "+" that are patched together: `pitome:ratio=0.9+todre:keep=0.1`.

    Gives what a task takes as a setting: (name, parameters), or a list of configs. Errors are those of `parse_method`, and of
    several `UnknownNameError`: one of them, or a parameter of it, does not exist.
    """
    pairs = parse_methods(text)
    if len(pairs) == 1:
        return pairs[0]
    return [METHODS.get(name).create(**params) for name, params in pairs]
