"""Closed-form multiply-accumulates (MACs) of a tower: what its matrix products cost when blocks see fewer tokens.

Norms, softmax, activations and additions are not counted, as in the counters of torch and fvcore. One MAC is two FLOPs.

Shapes: N tokens that enter a block (prefix included), Q query rows that attend, M tokens that the MLP sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtok.config import Reducer
from vtok.core.tokens import Place, Site


@dataclass(frozen=True)
class BlockCost:
    """MACs of one block.

    Attributes:
        per_token: projections of every token that enters (q, k, v).
        per_query: what only attending rows pay (output projection, gate).
        per_pair: one (query, key) pair, scores and weighted values, over all heads.
        per_mlp_token: the MLP.
        whole: attention and MLP cannot be parted: every row pays everything.
        fixed: what does not depend on the tokens that are left.
    """

    per_token: int
    per_query: int
    per_pair: int
    per_mlp_token: int
    whole: bool = False
    fixed: int = 0

    def macs(self, n: float, m: float, place: Place | None) -> float:
        """MACs when n tokens enter and m leave, reduced at `place` (`None` = nowhere in this block)."""
        queries = m if place is Place.BLOCK_PRE and not self.whole else n
        rows = n if place is Place.BLOCK_END or self.whole else m
        attention = n * self.per_token + queries * self.per_query + queries * n * self.per_pair + self.fixed
        return attention + rows * self.per_mlp_token


@dataclass(frozen=True)
class TowerCost:
    """MACs of a whole tower for one image.

    Attributes:
        stem: before block 0 (patch embedding).
        blocks: one entry a block.
        head: after the last block, whatever the number of tokens.
        head_per_token: after the last block, per token that arrives (attention pooling).
        weighted_mean: per token that an average pool takes in, once tokens differ in weight: a plain mean has no products.
        unpooled: tokens in front that the average pool leaves out.
    """

    stem: int
    blocks: tuple[BlockCost, ...]
    head: int
    head_per_token: int = 0
    weighted_mean: int = 0
    unpooled: int = 0

    def total(self, tokens: Sequence[tuple[float, float]], places: Sequence[Place | None], weighted: bool = False) -> float:
        """MACs of the model, reduction left out, given (tokens in, tokens out) of every block.

        `weighted`: the tokens that leave the last block differ in weight (merged, or some are padding).
        """
        blocks = sum(cost.macs(n, m, place) for cost, (n, m), place in zip(self.blocks, tokens, places))
        left = tokens[-1][1]
        pool = self.weighted_mean * (left - self.unpooled) if weighted else 0
        return self.stem + blocks + self.head + self.head_per_token * left + pool


@dataclass(frozen=True)
class Row:
    """One block of a plan."""

    block: int
    place: Place | None
    tokens_in: float
    tokens_out: float
    macs: float
    reduction_macs: float


@dataclass(frozen=True)
class Estimate:
    """What a tower costs with and without reduction, per image.

    Attributes:
        rows: one a block.
        base_macs: unpatched model.
        macs: patched model, the reduction's own MACs left out.
        reduction_macs: the reduction's own.
        exact: False if the token counts are an upper bound.
    """

    rows: tuple[Row, ...]
    base_macs: float
    macs: float
    reduction_macs: float
    exact: bool

    @property
    def implied_speedup(self) -> float:
        """Unpatched MACs / patched MACs, the reduction's own left out."""
        return self.base_macs / self.macs

    @property
    def fraction(self) -> float:
        """Patched MACs, reduction included, as a share of the unpatched ones: what a FLOPs budget limits."""
        return (self.macs + self.reduction_macs) / self.base_macs


def estimate(
    cost: TowerCost,
    steps: dict[int, tuple[Site, Reducer]],
    n0: int,
    num_prefix: int,
    counts: Sequence[tuple[float, float]] | None = None,
) -> Estimate:
    """Costs of a tower.

    Args:
        cost: its closed form.
        steps: block -> (site, reducer) of what reduces there.
        n0: tokens that enter block 0, prefix included.
        num_prefix: of these, protected.
        counts: (tokens in, out) of every block if they were measured; `None` = as the reducers say.
    """
    rows, n, exact, weighted = [], float(n0), True, False
    for i, block in enumerate(cost.blocks):
        m, place, own = n, None, 0.0
        if counts is not None:
            n, m = counts[i]
        if i in steps:
            site, reducer = steps[i]
            place = site.place
            if counts is None:
                m = reducer.count(site, int(n), num_prefix)
                exact = exact and reducer.exact
            own = reducer.macs(site, round(n), num_prefix)
            # A ragged step is taken to leave padding; if all images keep the same number, the pool is priced a hair too high.
            weighted = weighted or reducer.ragged or (reducer.sizes and m < n)
        rows.append(Row(i, place, n, m, block.macs(n, m, place), own))
        n = m
    tokens = [(row.tokens_in, row.tokens_out) for row in rows]
    places = [row.place for row in rows]
    base = cost.total([(n0, n0)] * len(cost.blocks), [None] * len(cost.blocks))
    macs = cost.total(tokens, places, weighted)
    return Estimate(tuple(rows), base, macs, sum(row.reduction_macs for row in rows), exact)
