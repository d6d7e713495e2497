"""What property tests draw: small shapes, seeds for tensors, and arbitrary plans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from vtok.config import Reducer
from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, TokenState

properties = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
grids = st.tuples(st.integers(2, 5), st.integers(3, 5))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def positive(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0.5, 4.5)."""
    return (0.5 + 4 * torch.rand(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def row_stochastic(seed: int, *shape: int) -> Tensor:
    """Attention maps: positive, every row sums to 1, far from uniform."""
    return (2 * normal(seed, *shape)).softmax(-1)


class Shape(NamedTuple):
    """Images, rows, rows at the front that stay where they are, width."""

    batch: int
    n: int
    num_prefix: int
    width: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_prefix = draw(st.integers(0, 3))
    return Shape(draw(st.integers(1, 3)), num_prefix + draw(st.integers(1, 12)), num_prefix, draw(st.integers(1, 5)))


def random_plan(shape: Shape, merge: bool, seed: int) -> Plan:
    """A plan that treats every image differently: some patches stay, in any order, the rest goes or is folded in anywhere."""
    batch, n, p, _ = shape
    rng = generator(seed)
    kept = int(torch.randint(1, n - p + 1, (), generator=rng))
    order = torch.rand(batch, n - p, generator=rng).argsort(-1) + p
    keep = torch.cat([torch.arange(p).expand(batch, p), order[:, :kept]], 1)
    if not merge:
        return Plan(keep)
    dst = torch.randint(p, p + kept, (batch, n - p - kept), generator=rng)
    return Plan(keep, order[:, kept:], dst)


def attention(seed: int, batch: int, n: int, dtype: torch.dtype = torch.float64) -> AttentionView:
    """Two heads of width 4, sharp attention."""
    q, k, v = (normal(seed + i, batch, 2, n, 4, dtype=dtype) for i in range(3))
    return AttentionView(2 * q, k, k, v, 0.5, None)


def decided(reducer: Reducer, view: AttentionView, state: TokenState, block: int = 0) -> Plan | None:
    site = next(site for site in reducer.sites if site.index >= block)
    assert view.k is not None
    return reducer.plan(view.k.transpose(1, 2).flatten(2), state, view, site)  # the tokens: keys of all heads side by side
