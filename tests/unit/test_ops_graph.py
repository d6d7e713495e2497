"""The attention graph and near duplicates, against loops and smaller graphs."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, properties, row_stochastic, seeds
from torch import Tensor

from vtok.methods.zero_tprune.duplicates import METRICS, PARTITIONS, most_similar, similarity, split_halves
from vtok.methods.zero_tprune.graph import head_root_mean_square, head_variance, importance, initial_signal, weighted_page_rank

# The attention graph.
graphs = (st.integers(1, 2), st.integers(1, 3), st.integers(3, 9), seeds)


@properties
@given(*graphs, st.integers(0, 30), st.booleans(), st.sampled_from([0.0, 0.15]), st.booleans())
def test_votes_preserve_their_sum(
    batch: int, heads: int, n: int, seed: int, iters: int, boost: bool, damping: float, some_dead: bool
) -> None:
    attn = row_stochastic(seed, batch, heads, n, n)
    alive = alive_tokens(seed, batch, n) if some_dead else None
    signal = weighted_page_rank(attn, initial_signal(attn, boost, alive), iters, alive, damping)
    assert_close(signal.sum(-1), torch.ones(batch, heads, dtype=torch.float64), 1e-12)
    assert (signal >= 0).all()
    assert alive is None or not signal[(~alive)[:, None].expand_as(signal)].any()


def alive_tokens(seed: int, batch: int, n: int) -> Tensor:
    """Every image loses the same number of patches, never token 0."""
    dead = 1 + torch.rand(batch, n - 1, generator=generator(seed)).argsort(-1)[:, : (n - 1) // 2]
    return torch.ones(batch, n, dtype=torch.bool).scatter(1, dead, False)


@properties
@given(*graphs, st.integers(1, 8), st.booleans(), st.sampled_from([None, (0.01, 0.7)]))
def test_dead_tokens_leave_the_graph(
    batch: int, heads: int, n: int, seed: int, iters: int, boost: bool, bounds: tuple[float, float] | None
) -> None:
    """Importance with `alive` is importance on the smaller matrix with its rows normalised again."""
    attn, alive = row_stochastic(seed, batch, heads, n, n), alive_tokens(seed, batch, n)
    found = importance(attn, iters, 1, boost, bounds, alive)
    assert not found[~alive].any()
    for b in range(batch):
        rows = alive[b].nonzero().flatten()
        small = attn[b, :, rows][:, :, rows]
        small = small / small.sum(-1, keepdim=True)
        assert_close(found[b, rows], importance(small[None], iters, 1, boost, bounds)[0], 1e-12)


@properties
@given(*graphs, st.integers(1, 8), st.booleans(), st.sampled_from([None, (0.01, 0.7)]))
def test_importance_moves_with_the_patches(
    batch: int, heads: int, n: int, seed: int, iters: int, boost: bool, bounds: tuple[float, float] | None
) -> None:
    attn = row_stochastic(seed, batch, heads, n, n)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(n - 1, generator=generator(seed))])
    moved = importance(attn[:, :, order][..., order], iters, 1, boost, bounds)
    assert_close(moved, importance(attn, iters, 1, boost, bounds)[:, order], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_looks_at_dead_ones_only_has_no_vote(dtype: torch.dtype) -> None:
    attn = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], dtype=dtype)[None, None]
    alive = torch.tensor([[True, True, True, False]])
    found = importance(attn, 2, 1, boost_cls=False, head_filter=None, alive=alive)
    assert_close(found, torch.tensor([[1 / 3, 1 / 3, 0, 0]], dtype=dtype), 1e-7)


@properties
@given(st.integers(1, 8), st.booleans(), st.booleans())
def test_uniform_attention_ranks_no_patch_above_another(iters: int, boost: bool, some_dead: bool) -> None:
    n = 9
    attn = torch.full((1, 2, n, n), 1 / n, dtype=torch.float64)
    alive = alive_tokens(0, 1, n) if some_dead else None
    score = importance(attn, iters, 1, boost, (0.01, 0.7), alive)[:, 1:]
    score = score if alive is None else score[alive[:, 1:]]
    assert_close(score, score.flatten()[0].expand_as(score), 1e-15)


def test_heads_outside_the_bounds_are_ignored_unless_all_are() -> None:
    signal = torch.tensor([[[0.5, 0.2, 0.3], [0.5, 0.25, 0.25]], [[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]], dtype=torch.float64)
    assert_close(head_variance(signal, 1), torch.tensor([[0.04, 0.0], [0.0, 0.0]], dtype=torch.float64), 1e-15)
    chosen = head_variance(signal, 1) >= 0.01
    found = head_root_mean_square(signal, chosen)
    assert_close(found[0], signal[0, 0], 1e-15)  # the second head is flat
    assert_close(found[1], signal[1].square().mean(0).sqrt(), 1e-15)  # both are: both count


# Near duplicates.
@properties
@given(st.integers(1, 2), st.integers(1, 11), st.sampled_from(PARTITIONS), seeds)
def test_halves_share_nothing_and_miss_nothing(batch: int, n: int, partition: str, seed: int) -> None:
    a, b = split_halves(normal(seed, batch, n), partition, seed)
    assert a.shape == (batch, n // 2)
    assert_equal(torch.cat([a, b], 1).sort(-1).values, torch.arange(n).expand(batch, n))


@properties
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(METRICS), seeds)
def test_similarity(na: int, nb: int, metric: str, seed: int) -> None:
    a, b = normal(seed, 1, na, 5), normal(seed + 1, 1, nb, 5)
    norms: dict[str, Any] = {"manhattan": 1, "euclidean": 2, "chebyshev": float("inf")}
    for i in range(na):
        for j in range(nb):
            u, v = a[0, i], b[0, j]
            if metric in ("cos", "dot"):
                expected = u @ v / (u.norm() * v.norm() if metric == "cos" else 1)
            else:
                expected = -torch.linalg.vector_norm(u - v, norms[metric] if metric in norms else float(metric[-1]))
            assert_close(similarity(a, b, metric)[0, i, j], expected, 1e-12)


def test_a_copy_is_the_first_to_go() -> None:
    features = normal(0, 1, 8, 5)
    a, b = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])
    features[0, 2] = features[0, 5]
    for metric in (m for m in METRICS if m != "dot"):  # a product also grows with length
        assert most_similar(features, a, b, 1, metric).tolist() == [[2]]
