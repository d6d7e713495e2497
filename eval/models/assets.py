"""The files of vtok's own models: weights, pictures and questions, in the folder `assets/` of the source repository."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok.errors import ConfigError, MissingExtraError
from vtok.writing import write

HOME = "VTOK_ASSETS"  # names the folder where vtok is installed without it


def assets() -> Path:
    """The folder, which need not be there: of the checkout, or the one that `VTOK_ASSETS` names."""
    return Path(os.environ.get(HOME) or str(files("vtok.assets")))


def asset(name: str) -> Path:
    """Path of one of its files. Raises `ConfigError` if it is not there."""
    path = assets() / name
    if not path.is_file():
        raise missing(name)
    return path


def installed() -> bool:
    """Whether the files are there at all."""
    return any(path.suffix == ".safetensors" for path in assets().glob("*"))


def missing(name: str) -> ConfigError:
    """What is said where a file is not there."""
    return ConfigError(
        f"{name} is not in {assets()}: weights and pictures of vtok's own models are in the folder assets/ of its source "
        f"repository and not in the installed package; work in a checkout, or set {HOME} to that folder of one"
    )


def library(name: str, package: str = "") -> Any:
    """An optional library, which the extra of the same name installs; `package`: its name on PyPI if that is another one.
    Raises `MissingExtraError` if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(package or name, name) from error


def save_weights(path: Path, model: Any, without: str | None = None) -> None:
    """Writes the weights in fp16, those left out whose names start with a text."""
    from safetensors.torch import save

    kept = {k: v for k, v in model.state_dict().items() if without is None or not k.startswith(without)}
    write(path, save({k: v.detach().half().contiguous() for k, v in kept.items()}, metadata={"format": "pt"}))


def load_weights(name: str) -> dict[str, Tensor]:
    """Bundled weights, which are kept in fp16, in fp32; raises what `asset` raises."""
    from safetensors.torch import load_file

    return {k: v.float() for k, v in load_file(asset(name)).items()}
