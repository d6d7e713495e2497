"""Numbers as users have them, NumPy's and torch's among them, as Python's own."""

from __future__ import annotations

from typing import Any

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
