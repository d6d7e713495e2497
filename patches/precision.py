"""Autocast around what methods decide: scores are never cast down, layers that vtok calls run as the model runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # the meta device has no autocast to ask about


def full_precision(device: str) -> AbstractContextManager:
    """No autocast: matrix products of scores stay in the precision that they are given in."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def as_now(device: str) -> Callable[[], AbstractContextManager]:
    """Makes the autocast of this moment again, for layers that are called later, when it has been turned off."""
    if not autocasts(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)
