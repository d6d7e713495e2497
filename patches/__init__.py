"""What touches other people's classes: one file per backend, found by the module names of the classes in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vtok.patches.protocol import Adapter
from vtok.registry import ADAPTERS


def find_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Adapters whose backend some module of `model` comes from; only these are imported."""
    roots = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    for name in ADAPTERS:
        if name in roots:
            yield name, ADAPTERS.get(name)()
