"""Patches as JSON files: plain values, checked key by key, nothing in them is ever executed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok._version import __version__
from vtok.config import MethodConfig, ModelInfo
from vtok.errors import ConfigError, UnknownNameError
from vtok.registry import METHODS

FILE_NAME = "vtok.json"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """Content of a file.

    Attributes:
        path: where it came from.
        configs: the methods.
        trace: whether the token map was kept.
        model: name, depth, num_patches and num_prefix of the tower it was saved from.
    """

    path: Path
    configs: tuple[MethodConfig, ...]
    trace: bool
    model: dict[str, Any]

    def check(self, info: ModelInfo) -> None:
        """Raises ConfigError if the file was saved from a tower of another depth."""
        if self.model.get("depth") != info.depth:
            raise ConfigError(
                f"{self.path}: saved from {self.model.get('name')} with {self.model.get('depth')} blocks, "
                f"this {info.name} has {info.depth}; pass the method and its parameters instead"
            )


def is_path(text: str) -> bool:
    """Whether a string that names no method is meant as a file."""
    return text.endswith(".json") or os.sep in text or Path(text).exists()


def save(path: str | os.PathLike, configs: tuple[MethodConfig, ...], trace: bool, info: ModelInfo) -> None:
    """Writes `configs`; a folder receives `vtok.json`."""
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    content = {
        "format": FORMAT,
        "vtok": __version__,
        "model": {"name": info.name, "depth": info.depth, "num_patches": info.num_patches, "num_prefix": info.num_prefix},
        "methods": [config.to_dict() for config in configs],
        "trace": trace,
    }
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(path: str | os.PathLike) -> Saved:
    """Reads a file, or `vtok.json` in a folder.

    Raises:
        ConfigError: missing, not JSON, of another format, or with a value that makes no sense; the message names the file.
    """
    source = Path(path)
    if source.is_dir():
        source = source / FILE_NAME
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist; methods are: {', '.join(METHODS.names())}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{source} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{source}: expected a file of vtok.save_config with format {FORMAT}, found {found!r}")
    methods, model = content.get("methods"), content.get("model")
    if not isinstance(methods, list) or not methods or not all(isinstance(m, dict) and "method" in m for m in methods):
        raise ConfigError(f"{source}: 'methods' must be a list of mappings with a 'method' each, found {methods!r}")
    if not isinstance(model, dict):
        raise ConfigError(f"{source}: 'model' must be a mapping, found {model!r}")
    try:
        configs = tuple(METHODS.get(m["method"]).from_dict(m) for m in methods)
    except (UnknownNameError, ConfigError) as error:
        raise type(error)(f"{source}: {error}") from error
    return Saved(source, configs, bool(content.get("trace", False)), model)
