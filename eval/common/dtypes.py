"""Names of floating-point types: torch's, which flags and options use, and the short ones of run files."""

from __future__ import annotations

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHORT = {long: short for short, long in LONG.items()}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of one of torch's names; `None` stays."""
    return None if name is None else TYPES[name]


def fastest_on_cpu() -> str:
    """ "bf16" where the processor multiplies in it, else "fp32": without such instructions bf16 takes five times as long."""
    able = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # other processors, and older releases of torch: fp32
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in able) else "fp32"
