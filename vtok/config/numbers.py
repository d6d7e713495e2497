"""Numbers as users have them: NumPy's and torch's as Python's own, and tensors that hold none which can be computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtok.errors import ConfigError, brief, shown

BITS = 48  # of a whole number that is computed with: seeds are shifted by twelve bits, numbers of blocks added, in 64


def native(value: Any) -> Any:
    """The same as Python's own numbers, where it is a number or an array of NumPy, a torch number, or holds such."""
    if isinstance(value, (list, tuple)):
        found = [native(one) for one in value]
        return value if all(a is b for a, b in zip(found, value)) else type(value)(found)
    if isinstance(value, dict):
        pairs = {key: native(one) for key, one in value.items()}
        return value if all(pairs[key] is value[key] for key in value) else pairs
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def countable(value: Any) -> bool:
    """Whether all whole numbers that a value is or holds can be computed with."""
    if isinstance(value, (list, tuple)):
        return all(countable(one) for one in value)
    if isinstance(value, dict):
        return all(countable(one) for one in value.values())
    return not isinstance(value, int) or abs(value) <= 1 << BITS


def check_numbers(values: Mapping[Any, Any], what: str) -> None:
    """Raises unless the tensors that a model is to be measured on hold numbers; masks may hold infinite ones.

    Args:
        values: argument of the model -> tensor, or something else.
        what: they are, for messages.

    Raises:
        ConfigError: a name is no text, or a tensor is on the device `meta`, sparse or complex, or holds NaN or
            infinity.
    """
    for name, value in values.items():
        if not isinstance(name, str):
            raise ConfigError(f"{what}: a mapping goes from names of a model's arguments to tensors, got {shown(name)}")
        if not isinstance(value, Tensor):
            continue
        if value.is_meta or value.layout is not torch.strided or value.is_complex():
            kind = "on the device 'meta'" if value.is_meta else f"of {value.dtype}" if value.is_complex() else value.layout
            raise ConfigError(f"{what}: {brief(name)} is {kind}, and nothing can be measured on it; pass real numbers")
        if value.is_floating_point() and "mask" not in name and (broken := int((~value.isfinite()).sum())):
            raise ConfigError(
                f"{what}: {brief(name)} holds {broken} numbers that are NaN or infinite; what it would measure is nothing"
            )
