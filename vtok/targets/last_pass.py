"""Reads what a patched tower remembers of its last forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from vtok.core.tokens import TokenState
from vtok.core.tracker import ForwardState, TokenTracker
from vtok.cost.encoder import Estimate, TowerCost, estimate
from vtok.patches.protocol import Adapter, Tower
from vtok.reports.results import BlockInfo, TowerInfo


def tower_info(adapter: Adapter, tower: Tower, run: TokenTracker | None, kernels: Sequence[str] | None) -> TowerInfo:
    """What is known about one tower; see `TowerInfo`."""
    name, patches = type(tower.module).__name__, tower.info.num_patches
    if run is None:
        blocks = () if kernels is None else tuple(BlockInfo(i, "", 0, 0, None, k) for i, k in enumerate(kernels))
        return TowerInfo(tower.path, name, (), blocks, num_patches=patches)
    made, last = run.patch, run.current
    if last.final is None:
        return TowerInfo(tower.path, name, made.configs, budget=made.budget, num_patches=patches)
    ran = [i for i in range(len(tower.blocks)) if last.states[i + 1] is not None]  # fewer if the pass was stopped early
    blocks = tuple(_block(i, run, last, None if kernels is None else kernels[i]) for i in ran)
    cost, notes = adapter.cost(tower), []
    if len(ran) < len(tower.blocks):
        cost = replace(cost, blocks=tuple(cost.blocks[i] for i in ran))
        notes.append(f"note: the last pass ended after {len(ran)} of {len(tower.blocks)} blocks")
    seen = last.length - run.num_prefix
    if seen != patches:  # the stem is priced per patch
        blocks_then = tuple(replace(block, fixed=round(block.fixed * seen / patches)) for block in cost.blocks)
        cost = replace(cost, stem=round(cost.stem * seen / patches), blocks=blocks_then)
        notes.append(f"note: the last pass saw {seen} patches; plans and budgets of this patch were made for {patches}")
    ragged = any(b.per_image is not None for b in blocks)
    return TowerInfo(
        path=tower.path,
        tower=name,
        configs=made.configs,
        blocks=blocks,
        estimate=_estimate(cost, run, [(b.tokens_in, b.tokens_out) for b in blocks]),
        mean_estimate=_mean_estimate(cost, run, blocks, _real(last.states[0])) if ragged else None,
        budget=made.budget,
        num_patches=patches,
        notes=tuple(notes),
    )


def _block(i: int, run: TokenTracker, last: ForwardState, kernel: str | None) -> BlockInfo:
    step, state = run.patch.steps.get(i), last.states[i + 1]
    site = step[0].place.value if step else ""
    return BlockInfo(i, site, last.tokens(i), last.tokens(i + 1), _real(state), kernel)


def _estimate(cost: TowerCost, run: TokenTracker, counts: Sequence[tuple[float, float]]) -> Estimate:
    return estimate(cost, run.patch.steps, int(counts[0][0]), run.num_prefix, counts)


def _real(state: TokenState | None) -> tuple[int, ...] | None:
    """Real tokens of every image, if some are padding."""
    return None if state is None or state.keep is None else tuple(int(c) for c in state.keep.sum(1).tolist())


def rows_of(run: TokenTracker) -> list[tuple[tuple[int, int], ...]]:
    """(real tokens in, out) of every block, for each row of the last pass."""
    last = run.current
    counts = []
    for i, state in enumerate(last.states):
        assert state is not None and state.entered is not None
        counts.append(_real(state) or (last.tokens(i),) * len(state.entered))
    return [tuple(itertools.pairwise(row)) for row in zip(*counts)]


def _mean_estimate(
    cost: TowerCost, run: TokenTracker, blocks: tuple[BlockInfo, ...], entered: tuple[int, ...] | None
) -> Estimate:
    """Mean over images of what each would cost alone (attention is quadratic: not the cost of the mean)."""
    images = max(len(b.per_image or ()) for b in blocks)
    each = []
    for image in range(images):
        n: float = blocks[0].tokens_in if entered is None else entered[image]
        counts: list[tuple[float, float]] = []
        for b in blocks:
            m = b.tokens_out if b.per_image is None else b.per_image[image]
            counts.append((n, m))
            n = m
        each.append(_estimate(cost, run, counts))
    rows = tuple(
        replace(
            same[0],
            tokens_in=sum(r.tokens_in for r in same) / images,
            tokens_out=sum(r.tokens_out for r in same) / images,
            macs=sum(r.macs for r in same) / images,
            reduction_macs=sum(r.reduction_macs for r in same) / images,
        )
        for same in zip(*(e.rows for e in each))
    )
    return Estimate(
        rows,
        sum(e.base_macs for e in each) / images,
        sum(e.macs for e in each) / images,
        sum(e.reduction_macs for e in each) / images,
        exact=True,
    )
