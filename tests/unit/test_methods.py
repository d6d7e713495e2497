"""Properties of the methods' decisions, on random attention."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers_golden import assert_equal, model_info
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention, decided, grids, normal, properties, seeds
from torch import Tensor

import vtok
from vtok.config import MethodConfig, Reducer
from vtok.core.reduction import apply_plan
from vtok.core.tokens import AttentionView, TokenState

# Every way to decide. ATS with parity=True is apart: there an image depends on its batch.
CONFIGS: dict[str, MethodConfig] = {
    "tome": vtok.ToMe(r=3),
    "pitome": vtok.PiToMe(ratio=0.7),
    "pitome, r": vtok.PiToMe(r=2),
    "pitome, sorted": vtok.PiToMe(ratio=0.7, preset="official_deit"),
    "pitome, hidden": vtok.PiToMe(ratio=0.7, preset="official_clip"),
    "pitome, plain": vtok.PiToMe(ratio=0.7, preset="official_llava"),
    "ats": vtok.ATS(keep=0.5),
    "ats, mask": vtok.ATS(num_tokens=3, mode="mask"),
    "ats, per head": vtok.ATS(keep=0.7, score="per_head"),
    "ats, mean": vtok.ATS(keep=0.5, query="mean"),
    "zero_tprune": vtok.ZeroTPrune(layers=[0, 1], retain=0.7, r=2),
    "zero_tprune, I": vtok.ZeroTPrune(layers=[0, 1], retain=0.6, r=0, cls_init="uniform", head_filter=None),
    "zero_tprune, S": vtok.ZeroTPrune(layers=[0, 1], retain=1.0, r=2, metric="euclidean", partition="random"),
    "random": vtok.RandomDrop(keep=0.6),
    "uniform": vtok.UniformGrid(keep=0.6),
}
WITHOUT_CLS: dict[str, Any] = {"ats": {"query": "mean"}, "zero_tprune": {"cls_init": "uniform"}}


def built(name: str, grid: tuple[int, int], num_prefix: int) -> Reducer:
    config = CONFIGS[name] if num_prefix else CONFIGS[name].replace(**WITHOUT_CLS.get(CONFIGS[name].name, {}))
    rows, columns = grid
    return config.build(
        model_info(
            num_prefix=num_prefix, num_patches=rows * columns, grid=grid, has_cls=num_prefix > 0, num_heads=2, head_dim=4
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
@properties
@given(st.integers(1, 3), grids, st.integers(0, 3), seeds)
def test_plans_are_sound(name: str, batch: int, grid: tuple[int, int], p: int, seed: int) -> None:
    reducer, n = built(name, grid, p), p + grid[0] * grid[1]
    state = TokenState(p, n)
    plan = decided(reducer, attention(seed, batch, n), state)
    site = reducer.sites[0]
    if plan is None:
        assert reducer.count(site, n, p) == n
        return
    assert_equal(plan.keep[:, :p], torch.arange(p).expand(batch, p))
    merges = name.startswith(("tome", "pitome"))
    assert (plan.src is not None) == merges
    assert reducer.sizes == (merges and plan.use_size)
    left, expected = plan.keep.shape[1], reducer.count(site, n, p)
    assert left == expected if reducer.exact else left <= expected <= n
    for b in range(batch):
        kept = plan.keep[b].tolist() if plan.valid is None else plan.keep[b, plan.valid[b]].tolist()
        folded = [] if plan.src is None else plan.src[b].tolist()
        assert len(set(kept + folded)) == len(kept + folded) >= p + 1
        assert not merges or sorted(kept + folded) == list(range(n))
        assert plan.dst is None or (plan.dst[b] >= p).all()
    x = normal(seed, batch, n, 3)
    out, after = apply_plan(x, state, plan)
    assert_equal(out[:, :p], x[:, :p])
    assert (after.size is not None) == reducer.sizes
    assert after.size is None or torch.allclose(after.size.sum(1), torch.tensor(float(n), dtype=x.dtype))


@pytest.mark.parametrize("name", CONFIGS)
@properties
@given(grids, st.integers(0, 3), seeds)
def test_an_image_is_treated_alike_alone_and_in_a_batch(name: str, grid: tuple[int, int], p: int, seed: int) -> None:
    reducer, n = built(name, grid, p), p + grid[0] * grid[1]
    view = attention(seed, 3, n)
    together = decided(reducer, view, TokenState(p, n))
    for b in range(3):
        one = AttentionView(*(t[b : b + 1] if isinstance(t, Tensor) else t for t in view))
        alone = decided(reducer, one, TokenState(p, n))
        assert (alone is None) == (together is None)
        if alone is not None and together is not None:
            real = together.keep[b] if together.valid is None else together.keep[b, together.valid[b]]
            assert_equal(alone.keep[0] if alone.valid is None else alone.keep[0, alone.valid[0]], real)
            assert together.src is None or torch.equal(alone.src[0], together.src[b])  # type: ignore[index]
            assert together.dst is None or torch.equal(alone.dst[0], together.dst[b])  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
@properties
@given(grids, seeds)
def test_low_precision_decides_in_fp32(name: str, dtype: torch.dtype, grid: tuple[int, int], seed: int) -> None:
    """The same choice as from the same numbers widened beforehand: no score is rounded to the model's dtype."""
    n = 1 + grid[0] * grid[1]
    reducer, low = built(name, grid, 1), attention(seed, 2, n, dtype)
    widened = AttentionView(*(t.float() if isinstance(t, Tensor) else t for t in low))
    found, expected = (decided(reducer, view, TokenState(1, n)) for view in (low, widened))
    assert (found is None) == (expected is None)
    for ours, theirs in zip(found or (), expected or ()):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_reducers_are_values() -> None:
    """Equal configs make equal reducers: nothing is remembered between calls."""
    for name, config in CONFIGS.items():
        reducer = built(name, (4, 4), 1)
        assert reducer == built(name, (4, 4), 1)
        assert hash(reducer) == hash(built(name, (4, 4), 1))
        with pytest.raises(dataclasses.FrozenInstanceError):
            reducer.anything = 1  # type: ignore[attr-defined]
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.anything = 1  # type: ignore[attr-defined]
