"""Choosing among scored tokens, and the attention that patches receive: against loops and laws."""

import itertools

import numpy as np
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, positive, properties, seeds
from torch import Tensor

from vtok.ops.attention import cls_attention, received_attention
from vtok.ops.hashing import uniforms
from vtok.ops.selection import iqr_fence, largest, quantiles, upper_outliers, weighted_draw

sizes = st.integers(1, 12)


def masks(seed: int, *shape: int) -> Tensor:
    """About two thirds True, at least one in every row."""
    valid = torch.rand(shape, generator=generator(seed)) < 0.65
    valid[..., 0] = True
    return valid


@properties
@given(st.integers(1, 3), sizes, st.booleans(), seeds)
def test_largest_takes_the_first_of_equals(batch: int, n: int, padded: bool, seed: int) -> None:
    score = torch.randint(0, 4, (batch, n), generator=generator(seed)).double()
    score[score == 3] = float("-inf")  # as unwelcome as padding, but real
    count = torch.randint(0, n + 3, (batch,), generator=generator(seed + 1))
    valid = masks(seed, batch, n) if padded else None
    found = largest(score, count, valid)
    for b in range(batch):
        real = [j for j in range(n) if valid is None or valid[b, j]]
        expected = sorted(real, key=lambda j: -score[b, j].item())[: int(count[b])]
        assert found[b].nonzero()[:, 0].tolist() == sorted(expected)


def test_draws_have_the_law_of_drawing_one_after_the_other() -> None:
    p = torch.tensor([0.45, 0.3, 0.2, 0.05], dtype=torch.float64)
    n, times = len(p), 60_000
    u = uniforms(torch.arange(times * n).view(times, n), seed=7, dtype=torch.float64)
    found = weighted_draw(p.expand(times, n), torch.full((times,), 2), u)
    assert (found.sum(-1) == 2).all()
    for a, b in itertools.combinations(range(n), 2):
        chance = (p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])).item()
        share = (found[:, a] & found[:, b]).double().mean().item()
        assert abs(share - chance) < 4 * (chance * (1 - chance) / times) ** 0.5


@properties
@given(sizes, st.sampled_from([torch.float32, torch.float64]), seeds)
def test_more_draws_add_tokens_and_those_without_chance_come_last(n: int, dtype: torch.dtype, seed: int) -> None:
    p = positive(seed, 1, n, dtype=dtype) * (torch.rand(1, n, generator=generator(seed)) < 0.6)
    p[:, : n // 3] *= 1e-42  # subnormal in fp32
    u, possible = uniforms(torch.arange(n)[None], seed, dtype), int((p > 0).sum())
    drawn = [weighted_draw(p, torch.tensor([count]), u) for count in range(n + 1)]
    for count, (few, many) in enumerate(itertools.pairwise(drawn)):
        assert few.sum() == count and not (few & ~many).any()
    if dtype == torch.float64:
        assert not drawn[possible][p == 0].any()


def test_uniform_numbers() -> None:
    position = torch.arange(200_000)
    wide, narrow = uniforms(position, 3, torch.float64), uniforms(position, 3, torch.float32)
    assert_equal(narrow.double(), wide)
    assert 0 < wide.min() < 1e-4 and 1 - 1e-4 < wide.max() < 1
    assert abs(wide.mean() - 0.5) < 3 / (12 * len(wide)) ** 0.5
    assert abs(torch.corrcoef(torch.stack([wide[1:], wide[:-1]]))[0, 1]) < 0.01
    assert not torch.equal(uniforms(position, 4, torch.float64), wide)


@properties
@given(st.integers(1, 3), sizes, st.booleans(), st.floats(0, 3), seeds)
def test_quantiles_and_outliers_by_numpy(batch: int, n: int, padded: bool, factor: float, seed: int) -> None:
    score, valid = normal(seed, batch, n), masks(seed, batch, n) if padded else torch.ones(batch, n, dtype=torch.bool)
    at = (0.0, 0.1, 0.25, 0.75, 1.0)
    found = quantiles(score, at, valid if padded else None)
    fence = iqr_fence(score, factor, valid if padded else None)[2]
    outliers = upper_outliers(score, factor, valid if padded else None)
    for b in range(batch):
        real = score[b, valid[b]].numpy()
        expected = [np.percentile(real, 100 * share) for share in at]
        assert_close(torch.stack([row[b] for row in found]), torch.tensor(np.array(expected)), 1e-12)
        assert_close(fence[b], torch.tensor(expected[3] + factor * (expected[3] - expected[2])), 1e-12)
        assert_equal(outliers[b], (score[b] > fence[b]) & valid[b])


# Attention.
@properties
@given(st.integers(1, 3), st.integers(1, 3), sizes, st.integers(1, 3), seeds)
def test_class_attention_is_a_row_of_the_attention_map(v: int, heads: int, n: int, num_prefix: int, seed: int) -> None:
    q, k = normal(seed, v, heads, num_prefix + n, 4), normal(seed + 1, v, heads, num_prefix + n, 4)
    full = (q @ k.mT / 2).softmax(-1)
    assert_close(cls_attention(q[:, :, 0], k, num_prefix), full[:, :, 0, num_prefix:].mean(1), 1e-12)
    assert_close(received_attention(q, k, num_prefix), full[..., num_prefix:].mean((1, 2)), 1e-12)
    assert_close(
        cls_attention(q[:, :, 0], k, num_prefix, scale=0.1)[0], cls_attention(q[:1, :, 0] / 5, k[:1], num_prefix)[0], 1e-12
    )
    beside = [t.transpose(1, 2).flatten(2) for t in (q[:, :, :1], k)]
    joint = (beside[0] @ beside[1].mT / (2 * heads**0.5)).softmax(-1)[:, 0, num_prefix:]
    assert_close(cls_attention(q[:, :, 0], k, num_prefix, joint=True), joint, 1e-12)


@properties
@given(st.integers(1, 3), sizes, st.integers(0, 2), seeds)
def test_padding_neither_asks_nor_is_seen(v: int, n: int, num_prefix: int, seed: int) -> None:
    q, k, valid = normal(seed, v, 2, num_prefix + n, 4), normal(seed + 1, v, 2, num_prefix + n, 4), masks(seed, v, n)
    found = received_attention(q, k, num_prefix, valid=valid)
    assert not found[~valid].any()
    for i in range(v):
        real = torch.cat([torch.ones(num_prefix, dtype=torch.bool), valid[i]])
        alone = received_attention(q[i : i + 1, :, real], k[i : i + 1, :, real], num_prefix)
        assert_close(found[i, valid[i]], alone[0], 1e-12)


def test_attention_of_no_views() -> None:
    q = torch.ones(0, 2, 5, 4)
    assert cls_attention(q[:, :, 0], q).shape == received_attention(q, q, 1).shape == (0, 4)
    assert received_attention(q, q, 1, valid=torch.ones(0, 4, dtype=torch.bool)).shape == (0, 4)
