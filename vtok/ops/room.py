"""Whether a matrix that grows with the square of the tokens will fit, asked before it is made."""

from __future__ import annotations

import torch

from vtok.errors import UnsupportedModelError

_SMALL = 2**30  # bytes that nobody asks about


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left on a device, as far as it can be told: what CUDA and torch's allocator have, or the system."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(found.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def check_room(needed: int, device: torch.device, what: str) -> None:
    """Raises if what is about to be made is known not to fit.

    Args:
        needed: bytes; up to a gibibyte nothing is looked up.
        device: where it is made.
        what: it is, and what can be done instead.

    Raises:
        UnsupportedModelError: the device has less left.
    """
    if needed <= _SMALL:
        return
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UnsupportedModelError(f"{what} (it takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free)")
