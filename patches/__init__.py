"""What touches other people's classes: one file per backend, found by the module names of the classes in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from vtok.patches.protocol import Adapter
from vtok.registry import ADAPTERS


def find_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Adapters whose backend some module of `model` comes from; only these are imported."""
    roots = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    for name in ADAPTERS:
        if name in roots:
            yield name, ADAPTERS.get(name)()


def find_vlms(model: nn.Module) -> Sequence[Any]:
    """The vision-language models inside `model`, as their adapters describe them; empty if there is none.

    Raises:
        UnsupportedModelError: one is there but cannot be patched.
    """
    return [vlm for _, adapter in find_adapters(model) if hasattr(adapter, "vlms") for vlm in adapter.vlms(model)]
