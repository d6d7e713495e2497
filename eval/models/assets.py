"""The files of vtok's own models: weights, pictures and questions, in the folder `assets/` of the source repository."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from vtok.errors import ConfigError

HOME = "VTOK_ASSETS"  # names the folder where vtok is installed without it


def assets() -> Path:
    """The folder, which need not be there: of the checkout, or the one that `VTOK_ASSETS` names."""
    return Path(os.environ.get(HOME) or str(files("vtok.assets")))


def asset(name: str) -> Path:
    """Path of one of its files.

    Raises:
        ConfigError: it is not there.
    """
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
