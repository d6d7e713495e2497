"""Checks of the fields of options: the type that each field is annotated with, and numbers that can be used at all."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from vtok.errors import ConfigError, shown

MOST = 2**63 - 1  # of a seed: torch takes no more
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check_fields(options: Any) -> None:
    """Raises unless every field of a dataclass holds what its annotation says; numbers must be finite, seeds usable.

    Raises:
        ConfigError: one does not.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _fits(value, hints[field.name]):
            raise ConfigError(f"{field.name} must be {_words(hints[field.name])}, got {shown(value)}")
    if hasattr(options, "seed"):
        check_seed(options.seed, "seed")


def check_seed(value: Any, name: str) -> None:
    """Raises unless a number can be a seed."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ConfigError(f"{name} must be a whole number from 0 to 2^63 - 1, got {shown(value)}")


def check_range(options: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises unless numbers, where they are given, lie within their limits, ends included.

    Args:
        options: with the fields.
        limits: field -> (least, most).

    Raises:
        ConfigError: one does not.
    """
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if not least <= number <= most:
                end = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
                raise ConfigError(f"{name} must be {end}, got {shown(value)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        each = inside[0] if len(inside) == 2 and inside[1] is Ellipsis else None
        if not isinstance(value, tuple):
            return False
        return all(_fits(one, each or inside[min(i, len(inside) - 1)]) for i, one in enumerate(value))
    if hint is Any:
        return True
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return _number(value, hint)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _number(value: Any, kind: type) -> bool:
    """Whether it is a finite number; whole ones will do for any."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return False
    return abs(number) <= MOST if isinstance(number, int) else math.isfinite(number)


def _words(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in inside if one is not type(None))
    if origin is tuple:
        return f"a list, each {_words(inside[0])}"
    return _WORDS.get(hint, "a mapping" if origin is not None else "something else")
