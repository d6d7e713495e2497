"""What methods share that act in front of several decoder layers, with a share for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vtok.config import fraction
from vtok.errors import ConfigError, shown


def shares(value: Any, name: str) -> tuple[float, ...]:
    """Checks that a value lists fractions in (0, 1], none above the one in front of it."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{name} lists one share a stage, such as [0.5, 0.25, 0.125]; got {shown(value)}")
    listed = tuple(fraction(share, name) for share in value)
    if any(b > a for a, b in itertools.pairwise(listed)):
        raise ConfigError(f"{name} lists shares of the tokens that entered the LLM, which cannot grow; got {list(listed)}")
    return listed


def check_stages(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Checks that there are as many decoder layers as shares, in rising order and none before the first."""
    if len(layers) != count:
        raise ConfigError(f"layers names {len(layers)} decoder layers for {count} shares; give one for each")
    if any(b <= a for a, b in itertools.pairwise(layers)) or layers[0] < 1:
        raise ConfigError(f"layers lists decoder layers from 1 on in rising order, got {list(layers)}")
    return layers
