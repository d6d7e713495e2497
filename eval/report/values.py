"""Safe reading of results that others wrote, and numbers as they stand on the page.

Nothing here trusts a record: a field may be missing, of another type, not finite, or hostile text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vtok.eval.common.statistics import Interval

LONGEST = 300  # characters of a text from a record


def number(value: Any) -> float | None:
    """A finite number, or `None`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond any float
        return None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping with text keys, or an empty one."""
    return {str(key): one for key, one in value.items()} if isinstance(value, Mapping) else {}


def at(value: Any, *keys: str) -> Any:
    """`value[a][b]...`, or `None` where something is missing."""
    for key in keys:
        value = mapping(value).get(key)
    return value


def numbers(value: Any) -> list[float]:
    """A list of finite numbers; empty if one of them is none."""
    found = [number(one) for one in value] if isinstance(value, (list, tuple)) else []
    return [one for one in found if one is not None] if None not in found else []


def interval(value: Any, ends: Any) -> Interval | None:
    """A number with a pair of ends; `None` without the number."""
    point, pair = number(value), numbers(ends)
    if point is None:
        return None
    return Interval(point, pair[0], pair[1]) if len(pair) == 2 else Interval(point)


def text(value: Any, longest: int = LONGEST) -> str:
    """Text for the page, shortened; "" for nothing."""
    if value is None:
        return ""
    words = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    words = " ".join(words.split())
    return words if len(words) <= longest else words[: longest - 1] + "…"


def figure(value: float | None, digits: int = 1, sign: bool = False, unit: str = "") -> str:
    """ "−3.1", "88.2 %"; "–" for nothing."""
    if value is None:
        return "–"
    words = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(words) == 0:
        words = f"{0:.{digits}f}"
    return words.replace("-", "−") + unit


def with_ends(value: Interval | None, digits: int = 1, sign: bool = False, unit: str = "") -> str:
    """ "1.45× [1.40, 1.51]"."""
    if value is None:
        return "–"
    words = figure(value.point, digits, sign, unit)
    return f"{words} [{figure(value.low, digits, sign)}, {figure(value.high, digits, sign)}]" if value.known else words


def count(value: int, one: str, many: str = "") -> str:
    """ "1 setting", "3 settings"."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def joined(names: Sequence[str], most: int = 8) -> str:
    """ "a, b and 3 more"."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
