"""Pieces of the plain-text reports: tables, numbers, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vtok.config import MethodConfig
from vtok.cost.encoder import Estimate
from vtok.cost.prefill import PromptEstimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first to the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()

    return "\n".join(line(row) for row in (header, *rows))


def tokens(count: float) -> str:
    """Whole numbers without decimals."""
    return f"{count:.0f}" if float(count).is_integer() else f"{count:.1f}"


def giga(macs: float) -> str:
    """In billions."""
    return f"{macs / 1e9:.3f}"


def settings(config: MethodConfig) -> str:
    """ "pitome(ratio=0.925)": a method with all its parameters."""
    values = {k: v for k, v in config.to_dict().items() if k != "method" and v is not None}
    return f"{config.name}(" + ", ".join(f"{k}={v}" for k, v in values.items()) + ")"


def keywords(params: Mapping[str, Any]) -> str:
    """Parameters as a user writes them: `query="mean", prop_attn=False`."""
    return ", ".join(f"{name}={json.dumps(v) if isinstance(v, str) else repr(v)}" for name, v in params.items())


def listed(counts: Sequence[int]) -> str:
    """One number if all rows of a batch have it, else one for each row."""
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def costs(e: Estimate | PromptEstimate) -> str:
    """MACs and FLOPs, unpatched -> patched, and the speed-up that they imply."""
    return (
        f"GMACs {giga(e.base_macs)} -> {giga(e.macs)} + {giga(e.reduction_macs)} for the reduction itself, "
        f"GFLOPs {giga(2 * e.base_macs)} -> {giga(2 * e.macs)} + {giga(2 * e.reduction_macs)}; "
        f"implied speed-up {e.implied_speedup:.2f}x"
    )
