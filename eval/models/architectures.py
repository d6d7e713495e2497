"""Architectures of `configs/architectures.yaml` by name: checkpoints on the Hugging Face hub that papers quote, and models for
speed alone. `vtok.eval.models.by_name.load_model(..., meta=True)` builds the former without weights and without asking the hub.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtok.errors import MissingExtraError
from vtok.eval.runs import yaml_text

Architecture = tuple[str, Mapping[str, Any]]  # class of transformers, what its configuration changes of the defaults
_TABLES: dict[str, dict[str, Architecture]] = {
    table: {name: (one["class"], one["config"]) for name, one in held.items()}
    for table, held in yaml_text.read(Path(str(files("vtok.configs") / "architectures.yaml"))).items()
    if table != "parts"
}
PUBLISHED, ARCHITECTURES = _TABLES["published"], _TABLES["random"]


def build_architecture(architecture: Architecture, device: str, **changes: Any) -> nn.Module:
    """A model in eval mode on a device, with random weights but on "meta"; `changes` replaces entries of its configuration.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    kind, config = architecture
    cls: Any = getattr(transformers, kind)
    with torch.device(device):
        return cls(cls.config_class(**copy.deepcopy({**config, **changes}))).eval()


def build_published(name: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of `PUBLISHED` in eval mode.

    Args:
        name: on the hub.
        device: "meta": without weights; elsewhere they are random.
        dtype: of the weights.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return build_architecture(PUBLISHED[name], device)
    finally:
        torch.set_default_dtype(before)
