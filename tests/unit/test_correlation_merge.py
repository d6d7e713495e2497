"""What becomes of dropped tokens: against loops over tokens, and properties."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, positive, properties, seeds
from torch import Tensor

from vtok.errors import ConfigError
from vtok.methods.correlation.merge import AGGREGATIONS, compress_features, feature_plan, knn_features, nearest_kept
from vtok.methods.correlation.scores import score_tokens, select_tokens
from vtok.ops.crops import Layout, packed_layout, plain_layout
from vtok.ops.packing import packing

views, sizes = st.integers(1, 4), st.integers(1, 14)


def some_kept(seed: int, v: int, n: int) -> Tensor:
    """At least one token a view."""
    kept = torch.rand(v, n, generator=generator(seed)) < 0.5
    kept[:, seed % n] = True
    return kept


def all_valid(layout: Layout) -> list[list[int]]:
    return [[int(row) for row, valid in zip(rows, real) if valid] for rows, real in zip(layout.rows, layout.valid)]


def cosines(metric: Tensor) -> list[list[float]]:
    return torch.nn.functional.cosine_similarity(metric[:, None], metric[None], dim=-1).tolist()


def slow(x: Tensor, layout: Layout, kept: Tensor, metric: Tensor, weight: Tensor, mode: str, k: int) -> list[Tensor]:
    """Features that stay, by the definition."""
    out = []
    for i, rows in enumerate(all_valid(layout)):
        if layout.is_global[i]:
            out += [x[row] for row in rows]
            continue
        cosine, stays = cosines(metric[i]), [j for j in range(len(rows)) if kept[i, j]]
        home = {j: max(stays, key=lambda s: cosine[j][s]) for j in range(len(rows)) if j not in stays}
        for j in stays:
            mine = [j, *(dropped for dropped, to in home.items() if to == j)]
            if mode == "nearest":
                out.append(sum(weight[i, t] * x[rows[t]] for t in mine) / weight[i, mine].sum())
            elif mode == "knn":
                near = sorted((t for t in range(len(rows)) if t != j), key=lambda t: -cosine[j][t])[:k]
                out.append(x[rows[j]] + sum((weight[i, t] * x[rows[t]] for t in near), torch.zeros(())))
            else:
                out.append(x[rows[j]])
    return out


@pytest.mark.parametrize("mode", AGGREGATIONS)
@properties
@given(views, sizes, st.integers(1, 5), seeds)
def test_aggregation_by_the_definition(mode: str, v: int, n: int, k: int, seed: int) -> None:
    layout = plain_layout("internvl" if seed % 2 else "docowl", v, n)
    x, metric, weight, kept = normal(seed, v * n, 3), normal(seed + 1, v, n, 4), positive(seed, v, n), some_kept(seed, v, n)
    features, rows = compress_features(x, layout, kept, metric, weight, mode, k)
    assert_close(features, torch.stack(slow(x, layout, kept, metric, weight, mode, k)), 1e-12)
    assert_equal(rows, (kept | layout.is_global[:, None]).flatten().nonzero()[:, 0])


@properties
@given(views, sizes, seeds)
def test_nearest_stays_in_the_convex_hull_and_loses_nothing(v: int, n: int, seed: int) -> None:
    layout, kept = plain_layout("docowl", v, n), some_kept(seed, v, n)
    x, metric, weight = normal(seed, v * n, 3), normal(seed + 1, v, n, 4), positive(seed, v, n)
    features, _ = compress_features(x, layout, kept, metric, weight)
    parts = features.split([n, *kept[1:].sum(-1).tolist()])
    for part, view in zip(parts, x.view(v, n, 3)):
        assert (part >= view.amin(0) - 1e-12).all() and (part <= view.amax(0) + 1e-12).all()
    plan = feature_plan(layout, kept, nearest_kept(metric, kept | layout.is_global[:, None]), weight)
    assert plan.src is not None
    assert sorted(plan.keep[0].tolist() + plan.src[0].tolist()) == list(range(v * n))
    ones, _ = compress_features(torch.ones(v * n, 1, dtype=torch.float64), layout, kept, metric, weight)
    assert_close(ones, torch.ones_like(ones), 1e-12)  # weights of every mean sum to one


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_whole_page_is_copied_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    x, metric, weight = normal(0, 30, 3, dtype=dtype), normal(1, 3, 10, 4), positive(2, 3, 10)
    for family, whole in (("llava_next", slice(0, 10)), ("idefics3", slice(20, 30))):
        layout = plain_layout(family, 3, 10)
        kept = some_kept(0, 3, 10) & ~layout.is_global[:, None]  # nothing of the page was chosen
        features, rows = compress_features(x, layout, kept, metric, weight, mode)
        assert features.dtype == dtype
        here = (rows >= whole.start) & (rows < whole.stop)
        assert_equal(rows[here], torch.arange(30)[whole])
        assert_equal(features[here], x[whole])
        assert len(features) < 30


@pytest.mark.parametrize("mode", ["none", "nearest"])
def test_with_everything_kept_nothing_changes(mode: str) -> None:
    layout, x = plain_layout("docowl", 3, 10), normal(0, 30, 3)
    kept = torch.ones(3, 10, dtype=torch.bool)
    features, rows = compress_features(x, layout, kept, normal(1, 3, 10, 4), positive(2, 3, 10), mode)
    assert_equal(features, x)
    assert_equal(rows, torch.arange(30))


def test_weights_that_vanish() -> None:
    """A token that nobody looks at gives way to those that join it, and does not divide by nothing."""
    layout = plain_layout("internvl", 2, 2)
    metric = torch.ones(2, 2, 4)
    x = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    kept = torch.tensor([[True, False], [True, True]])
    for weight, expected in (([0.0, 0.5], 3.0), ([0.5, 0.0], 1.0), ([0.0, 0.0], 2.0)):
        features, _ = compress_features(x, layout, kept, metric, torch.tensor([weight, weight]))
        assert features[0].item() == pytest.approx(expected)


def test_padding_joins_nobody_and_is_no_neighbour() -> None:
    layout, x = plain_layout("internvl", 2, 4), normal(0, 8, 3)
    metric, weight = normal(1, 2, 4, 4), positive(2, 2, 4)
    valid = torch.tensor([[True, True, False, True], [True] * 4])
    kept = torch.tensor([[True, False, False, False], [True] * 4])
    changed = x.clone()
    changed[2] = 1e6
    for mode in AGGREGATIONS:
        first, rows = compress_features(x, layout, kept, metric, weight, mode, valid=valid)
        assert 2 not in rows.tolist()
        assert_equal(compress_features(changed, layout, kept, metric, weight, mode, valid=valid)[0], first)


@properties
@given(st.integers(2, 4), st.integers(2, 14), seeds)
def test_views_in_another_order_give_the_same_features(v: int, n: int, seed: int) -> None:
    x, keys, low = normal(seed, v, n, 3), normal(seed + 1, v, 2, n, 4), positive(seed, v, n)
    order = torch.rand(v, generator=generator(seed)).argsort()
    layout, numbers = plain_layout("docowl", v, n)._replace(is_global=torch.zeros(v, dtype=torch.bool)), torch.arange(v)

    def run(at: Tensor) -> list[Tensor]:
        kept = select_tokens(score_tokens(keys[at], low[at], low[at], 0.2), 0.3, seed=seed, view=numbers[at])
        metric = keys[at].transpose(1, 2).flatten(2)
        return list(compress_features(x[at].flatten(0, 1), layout, kept, metric, low[at])[0].split(kept.sum(-1).tolist()))

    moved, straight = run(order), run(numbers)
    for place, view in enumerate(order.tolist()):
        assert_close(moved[place], straight[view], 1e-12)


@pytest.mark.parametrize("max_views", [None, 1])
def test_a_newline_stays_if_its_line_keeps_a_token(max_views: int | None) -> None:
    how = packing((2, 2), 3, (60, 50), max_views)
    layout = packed_layout(how)
    height, width = how.size
    kept = torch.rand(layout.rows.shape, generator=generator(1)) < 0.15
    plan = feature_plan(layout, kept)
    left = set(plan.keep[0].tolist())
    assert set(range(9)) <= left
    empty = 0
    for line in range(height):
        first = 9 + line * (width + 1)
        tokens = left & set(range(first, first + width))
        assert (first + width in left) == bool(tokens)
        empty += not tokens
    assert 0 < empty < height
    assert plan.src is None


def test_the_newline_of_a_lone_view_stays() -> None:
    layout = packed_layout(packing((0, 0), 3, (60, 50)))
    x = normal(0, 10, 2)
    features, rows = compress_features(x, layout, torch.zeros(1, 9, dtype=torch.bool), normal(1, 1, 9, 4), positive(2, 1, 9))
    assert rows.tolist() == list(range(10))
    assert_equal(features, x)


def test_gradients_reach_every_token() -> None:
    layout, x = plain_layout("docowl", 2, 6), normal(0, 12, 3).requires_grad_()
    features, _ = compress_features(x, layout, some_kept(3, 2, 6), normal(1, 2, 6, 4), positive(2, 2, 6))
    features.sum().backward()
    assert x.grad is not None and (x.grad > 0).all()


def _refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_errors() -> None:
    layout, metric, weight = plain_layout("docowl", 2, 3), normal(0, 2, 3, 4), positive(0, 2, 3)
    kept = torch.ones(2, 3, dtype=torch.bool)
    wrong = _refused(compress_features, torch.ones(6, 2), layout, kept, metric, weight, "mean")
    assert "aggregation must be one of nearest, none, knn, got 'mean'" in wrong
    assert "the layout has 6 feature rows, the features 5" in _refused(
        compress_features, torch.ones(5, 2), layout, kept, metric, weight
    )
    assert "k counts neighbours and starts at 1, got 0" in _refused(knn_features, metric, metric, weight, 0)
