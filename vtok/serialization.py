"""Patches as JSON files: plain values, checked key by key, nothing in them is ever executed."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok._version import __version__
from vtok.config import MethodConfig, ModelInfo
from vtok.core.prompt import POSITIONS, VLMInfo
from vtok.errors import ConfigError, UnknownNameError, brief, shown, unknown
from vtok.reading import exists, is_folder, read_text
from vtok.registry import METHODS
from vtok.writing import write

FILE_NAME = "vtok.json"
FORMAT = 1
_KEYS = ("format", "vtok", "trace", "towers", "positions")
_IDENTITY = ("name", "depth", "num_patches", "num_prefix")


@dataclass(frozen=True)
class Saved:
    """Content of a file.

    Attributes:
        path: where it came from.
        towers: for every tower its name, depth, num_patches and num_prefix when it was saved, and its methods; none of a tower
            that was not patched.
        trace: whether the token map was kept.
        positions: of the prompts of vision-language models, if it was saved from one.
    """

    path: Path
    towers: tuple[tuple[dict[str, Any], tuple[MethodConfig, ...]], ...]
    trace: bool
    positions: str | None = None

    def configs_for(self, infos: Sequence[ModelInfo | VLMInfo]) -> list[tuple[MethodConfig, ...]]:
        """The methods of every tower of a model.

        Raises:
            ConfigError: the file was saved from a model with other towers, or towers of another depth or prefix.
        """
        if len(infos) != len(self.towers):
            raise ConfigError(f"{self.path}: saved from a model with {len(self.towers)} towers, this one has {len(infos)}")
        for info, (saved, _) in zip(infos, self.towers):
            for name, what in (("depth", "blocks"), ("num_prefix", "prefix tokens")):
                if saved.get(name) != getattr(info, name, None):
                    raise ConfigError(
                        f"{self.path}: saved from {saved.get('name')} with {saved.get(name)} {what}, "
                        f"this {info.name} has {getattr(info, name, 'none')}; pass the method and its parameters instead"
                    )
            patches = getattr(info, "num_patches", None)
            if saved.get("num_patches") != patches:
                warnings.warn(
                    f"{self.path}: saved for {saved.get('num_patches')} patches, this {info.name} has {patches}; "
                    "the numbers are used as they are",
                    stacklevel=4,
                )
        return [configs for _, configs in self.towers]


def save(
    path: str | os.PathLike,
    towers: Sequence[tuple[ModelInfo | VLMInfo, tuple[MethodConfig, ...]]],
    trace: bool,
    positions: str | None = None,
) -> None:
    """Writes the methods of every tower or vision-language model; a folder receives `vtok.json`.

    Raises:
        ConfigError: the file cannot be written there.
    """
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    if not target.parent.is_dir():
        raise ConfigError(f"{target} cannot be written: the folder {target.parent} does not exist")
    content = {
        "format": FORMAT,
        "vtok": __version__,
        "trace": trace,
        "towers": [
            {
                **{n: getattr(info, n) for n in _IDENTITY if hasattr(info, n)},
                "methods": [config.to_dict() for config in configs],
            }
            for info, configs in towers
        ],
        **({} if positions is None else {"positions": positions}),
    }
    write(target, json.dumps(content, indent=2) + "\n")


def load(path: str | os.PathLike) -> Saved:
    """Reads a file, or `vtok.json` in a folder.

    Raises:
        ConfigError: missing, not JSON, of another format, or with a value that makes no sense; the message names the file.
    """
    source = Path(path)
    if is_folder(source):
        source = source / FILE_NAME
    if not exists(source):
        raise ConfigError(f"{brief(source)} does not exist; methods are: {', '.join(METHODS.names())}")
    text = read_text(source)
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of endless digits
        raise ConfigError(f"{source} is not a JSON file: {brief(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{source}: expected a file of vtok.save_config with format {FORMAT}, found {shown(kind)}")
    towers = content.get("towers")
    if not isinstance(towers, list) or not towers or not all(isinstance(tower, dict) for tower in towers):
        raise ConfigError(f"{source}: 'towers' must be a list of mappings, found {shown(towers)}")
    _check_keys(source, content, _KEYS)
    for tower in towers:
        _check_keys(source, tower, (*_IDENTITY, "methods"))
    trace, positions = content.get("trace", False), content.get("positions")
    if not isinstance(trace, bool):
        raise ConfigError(f"{source}: trace is true or false, found {shown(trace)}")
    if positions is not None and positions not in POSITIONS:
        raise ConfigError(f"{source}: positions is one of {', '.join(POSITIONS)}, found {shown(positions)}")
    saved = tuple((tower, _methods(source, tower)) for tower in towers)
    if not any(methods for _, methods in saved):
        raise ConfigError(
            f"{source}: 'methods' must be a list of mappings with a 'method' each; those of every tower are empty"
        )
    return Saved(source, saved, trace, positions)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON, no key of which is written twice."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ConfigError(f"the key {shown(twice[0])} is written twice in one mapping; which of the two is meant?")
    return dict(pairs)


def _check_keys(source: Path, found: dict[str, Any], known: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(f"{source}: {unknown('key', key, known)}")


def _methods(source: Path, tower: dict[str, Any]) -> tuple[MethodConfig, ...]:
    methods = tower.get("methods")
    if not isinstance(methods, list) or not all(isinstance(m, dict) and isinstance(m.get("method"), str) for m in methods):
        raise ConfigError(f"{source}: 'methods' must be a list of mappings with a 'method' each, found {shown(methods)}")
    try:
        return tuple(METHODS.get(m["method"]).from_dict(m) for m in methods or ())
    except (UnknownNameError, ConfigError) as error:
        raise type(error)(f"{source}: {error}") from error
