"""What a packed vision tower costs for the patches that are left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from vtok.cost.prefill import VisionCost
from vtok.patches.decoder.pass_state import TowerCall
from vtok.patches.macs import linear_macs, position_macs


def left_cost(tower: Any, whole: VisionCost, call: TowerCall) -> VisionCost:
    """Of one call of the tower. Comparing pixels makes no products, and counts as nothing.

    Args:
        tower: of the Qwen-VL family.
        whole: what the call costs with all of its patches.
        call: it.
    """
    if call.ends is None:
        return whole
    patches, entered = int(call.ends[-1]), call.shape[0]
    full, everywhere = _pairs(call.ends), getattr(tower.config, "fullatt_block_indexes", None)
    windows = full if call.windows is None else _pairs(call.windows)
    rows = []
    for row, block in zip(whole.rows, tower.blocks):
        pairs = full if everywhere is None or row.block in everywhere else windows
        macs = patches * linear_macs(block) + pairs * 2 * block.attn.qkv.in_features
        rows.append(replace(row, tokens_in=patches, tokens_out=patches, macs=macs))
    stem = patches * position_macs(tower.patch_embed.proj)
    connector = whole.connector_macs * patches / entered
    return replace(whole, rows=tuple(rows), macs=stem + sum(row.macs for row in rows), connector_macs=connector)


def added(costs: list[VisionCost]) -> VisionCost:
    """The sum of several calls of one tower."""
    first, *more = costs
    for cost in more:
        rows = tuple(
            replace(a, **{name: getattr(a, name) + getattr(b, name) for name in ("tokens_in", "tokens_out", "macs")})
            for a, b in zip(first.rows, cost.rows)
        )
        first = replace(
            first, rows=rows, macs=first.macs + cost.macs, connector_macs=first.connector_macs + cost.connector_macs
        )
    return first


def _pairs(ends: Tensor) -> int:
    """(query, key) pairs of segments that end there."""
    return int(ends.long().diff().square().sum())
