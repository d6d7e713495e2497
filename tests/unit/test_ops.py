"""Pure functions of vtok.ops, against loops."""

import pytest
import torch
from helpers_golden import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, properties, seeds
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vtok.methods.ats.sampling import endpoint_samples, midpoint_samples, nearest
from vtok.methods.zero_tprune.duplicates import METRICS, similarity
from vtok.ops.hashing import splitmix
from vtok.ops.matching import bipartite_pairs, bipartite_soft_matching, unit
from vtok.ops.rows import ramp, rows_where, take_rows, with_prefix

sizes = st.integers(1, 12)
REAL = torch.zeros(1)


# Rows.
@properties
@given(st.integers(1, 3), sizes, st.integers(0, 12), st.integers(1, 4), seeds)
def test_take_rows_is_a_gather(batch: int, n: int, m: int, width: int, seed: int) -> None:
    x, rows = normal(seed, batch, n, width), torch.randint(0, n, (batch, m), generator=generator(seed))
    expected = [[x[b, i].tolist() for i in rows[b]] for b in range(batch)]
    assert take_rows(x, rows).tolist() == expected
    assert take_rows(x.transpose(0, 1).contiguous().transpose(0, 1), rows).tolist() == expected  # any strides
    assert take_rows(x[..., 0], rows).tolist() == [[row[0] for row in image] for image in expected]


@properties
@given(st.integers(0, 4))
def test_with_prefix_puts_the_prefix_first(num_prefix: int) -> None:
    found = with_prefix(torch.tensor([[2, 0], [1, 1]]), num_prefix)
    front = list(range(num_prefix))
    assert found.tolist() == [[*front, num_prefix + 2, num_prefix], [*front, num_prefix + 1, num_prefix + 1]]


@properties
@given(st.integers(1, 3), sizes, st.integers(1, 14), seeds)
def test_rows_where_is_nonzero_padded(batch: int, n: int, width: int, seed: int) -> None:
    chosen = torch.rand(batch, n, generator=generator(seed)) < 0.5
    rows, valid = rows_where(chosen, width)
    assert rows.shape == valid.shape == (batch, width)
    for b in range(batch):
        expected = chosen[b].nonzero().flatten().tolist()[:width]
        assert rows[b].tolist() == expected + [0] * (width - len(expected))
        assert valid[b].tolist() == [True] * len(expected) + [False] * (width - len(expected))


def test_row_numbers_that_are_kept_serve_every_kind_of_pass() -> None:
    with torch.inference_mode():
        kept = ramp(3, 1003, 7, torch.zeros(1))
    assert kept.tolist() == list(range(3, 1003, 7))
    assert ramp(3, 1003, 7, torch.zeros(2)) is kept
    x = torch.zeros(1, 1003, 2, requires_grad=True)
    take_rows(x, kept[None]).sum().backward()  # a tensor of inference mode could not be saved for backward
    assert x.grad is not None
    assert x.grad[0, :, 0].nonzero().flatten().tolist() == kept.tolist()


def test_row_numbers_of_a_trace_do_not_outlive_it() -> None:
    with FakeTensorMode() as mode:
        fake = ramp(5, 1005, 7, torch.zeros(1))
    assert isinstance(fake, FakeTensor)
    with mode:  # a real tensor, but what is made here is fake
        ramp(6, 1006, 7, REAL)
    assert ramp(5, 1005, 7, REAL).tolist() == list(range(5, 1005, 7))
    assert ramp(6, 1006, 7, REAL).tolist() == list(range(6, 1006, 7))


def test_row_numbers_of_a_transform_do_not_outlive_it() -> None:
    def f(x: Tensor) -> Tensor:
        return (x * ramp(7, 13, 2, x)).square().sum()

    x = torch.ones(3)
    assert torch.func.hessian(f)(x).diagonal().tolist() == [98, 162, 242]
    assert torch.func.grad(f)(x).tolist() == [98, 162, 242]
    torch.func.functionalize(f)(x)
    assert ramp(7, 13, 2, x).tolist() == [7, 9, 11]


# Sampling.
def eighths(seed: int, *shape: int) -> Tensor:
    """Multiples of 1/8: sums are exact, equal entries and equal distances are common."""
    return torch.randint(0, 9, shape, generator=generator(seed)).double() / 8


@properties
@given(st.integers(1, 3), sizes, st.integers(1, 9), seeds)
def test_nearest_is_the_first_of_the_closest(batch: int, n: int, k: int, seed: int) -> None:
    grid = eighths(seed, batch, n).sort(-1).values
    points = torch.randint(-4, 21, (batch, k), generator=generator(seed + 1)).double() / 16
    assert_equal(nearest(points, grid), (points[..., None] - grid[:, None]).abs().argmin(-1))


def whole(score: Tensor) -> Tensor:
    """Raises the last score so that the sum is a power of two: the CDF is exact and so are its ties."""
    total = score.sum(-1).clamp_min(1 / 8)
    score[:, -1] += 2 ** total.log2().ceil() - score.sum(-1)
    return score


def sampled(score: list[float], k: int) -> set[int]:
    """ATS for one image, as one would write it down."""
    order = sorted(range(len(score)), key=lambda i: score[i])
    total, cdf = sum(score), []
    for i in order:
        cdf.append((cdf[-1] if cdf else 0.0) + score[i])
    cdf = [c / total if total else c for c in cdf]
    hits = [min(range(len(cdf)), key=lambda i: abs((t + 0.5) / k - cdf[i])) for t in range(k)]
    return {order[i] for i in hits}


@properties
@given(st.integers(1, 3), sizes, st.integers(1, 15), st.integers(0, 4), seeds)
def test_midpoint_samples(batch: int, n: int, k: int, padding: int, seed: int) -> None:
    score = whole(eighths(seed, batch, n))
    hit = midpoint_samples(score, k)
    for b in range(batch):
        assert set(hit[b].nonzero().flatten().tolist()) == sampled(score[b].tolist(), k)
        assert 1 <= int(hit[b].sum()) <= min(k, n)
    # Padding changes nothing, whatever its scores are and wherever it stands.
    order = torch.rand(n + padding, generator=generator(seed)).argsort()
    padded = torch.cat([score, eighths(seed + 1, batch, padding)], 1)[:, order]
    valid = torch.ones(batch, n + padding, dtype=torch.bool)
    valid[:, n:] = False
    found = midpoint_samples(padded, k, valid[:, order])
    assert not found[~valid[:, order]].any()
    if len(set(score.flatten().tolist())) == score.numel():  # equal scores are told apart by their order
        assert_equal(found[:, order.argsort()][:, :n], hit)
    kept_in_place = midpoint_samples(torch.cat([score, eighths(seed + 1, batch, padding)], 1), k, valid)
    assert_equal(kept_in_place[:, :n], hit)


@properties
@given(st.integers(2, 12), st.integers(0, 4), seeds)
def test_endpoint_samples_lose_the_least_token_only_without_padding(n: int, padding: int, seed: int) -> None:
    score = torch.rand(1, n, generator=generator(seed), dtype=torch.float64) + 0.01
    order, hit = endpoint_samples(torch.nn.functional.pad(score, (0, padding)), 50 * n)
    assert hit[:, -1].all()
    assert order[0, padding:].tolist() == sorted(range(n), key=lambda i: score[0, i])
    assert bool(hit[0, padding]) == (padding > 0)
    assert not hit[0, :padding].any()


def authors_hits(score: list[float], points: int) -> set[int]:
    """The same samples for one image by their distance to every entry; the even steps are float32, as in the authors' code."""
    order = sorted(range(len(score)), key=lambda i: score[i])
    cdf = [sum(score[i] for i in order[: n + 1]) for n in range(len(order))]
    cdf = [(c - cdf[0]) / (cdf[-1] - cdf[0]) for c in cdf]
    start, last = min(c for c in cdf if c), points - 1
    line = torch.linspace(0, 1, points, dtype=torch.float32).tolist()
    samples = [start + (step * last - start * t) / last for t, step in enumerate(line)]
    return {order[min(range(len(cdf)), key=lambda i: abs(sample - cdf[i]))] for sample in samples}


@properties
@given(st.integers(2, 9), st.integers(2, 40), seeds)
def test_endpoint_samples(n: int, points: int, seed: int) -> None:
    score = eighths(seed, 1, n) + 0.125
    order, hit = endpoint_samples(score, points)
    assert set(order[hit].tolist()) == authors_hits(score[0].tolist(), points)


def test_endpoint_samples_step_in_float32() -> None:
    """The second of four samples lies half-way between two entries: the last bit of the step decides."""
    score = torch.tensor([[2.0, 6.0, 9.0, 1.0, 3.0]], dtype=torch.float64)
    order, hit = endpoint_samples(score, 4)
    assert hit.tolist() == [[False, True, False, True, True]]  # with steps in float64: also the third
    assert set(order[hit].tolist()) == authors_hits(score[0].tolist(), 4)


# Matching.
def tome_pairs(metric: Tensor, r: int, num_prefix: int) -> tuple[list[int], dict[int, int]]:
    """ToMe for one image: rows that stay in order, and what each folded row goes into."""
    n = len(metric)
    m = metric / metric.norm(dim=-1, keepdim=True)
    a, b = [i for i in range(0, n, 2) if i >= num_prefix], [i for i in range(1, n, 2) if i >= num_prefix]
    best = {i: max((float(m[i] @ m[j]), j) for j in b) for i in a} if b else {}
    ranked = sorted(a, key=lambda i: -best[i][0]) if b else a
    folded = ranked[: min(r, (n - num_prefix) // 2)]
    rest = [i for i in ranked if i not in folded]
    front = list(range(num_prefix))
    return front + (sorted(rest) if num_prefix else rest) + b, {i: best[i][1] for i in folded}


@properties
@given(st.integers(1, 14), st.integers(0, 5), st.integers(0, 9), seeds)
def test_bipartite_matching_for_any_number_of_prefix_tokens(patches: int, num_prefix: int, r: int, seed: int) -> None:
    metric = normal(seed, 2, num_prefix + patches, 4)
    found = bipartite_soft_matching(metric, r, num_prefix)
    assert (found is None) == (bipartite_pairs(num_prefix + patches, r, num_prefix) == 0) == (min(r, patches // 2) == 0)
    if found is None:
        return
    keep, src, dst = found
    for b in range(2):
        stay, folded = tome_pairs(metric[b], r, num_prefix)
        assert keep[b].tolist() == stay
        assert dict(zip(src[b].tolist(), keep[b, dst[b]].tolist())) == folded


def test_a_zero_key_is_like_nothing() -> None:
    metric = normal(0, 1, 9, 4)
    metric[0, 4] = 0
    assert_equal(unit(metric)[0, 4], torch.zeros(4, dtype=torch.float64))
    found = bipartite_soft_matching(metric, 3, 1)
    assert found is not None
    assert 4 not in found[1]


# Hashing.
@properties
@given(st.integers(0, 2**40), st.integers(0, 2**62))
def test_splitmix_is_the_published_generator(position: int, seed: int) -> None:
    mask = (1 << 64) - 1
    z = (seed * 0x94D049BB133111EB + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    assert splitmix(torch.tensor(position), seed).item() & mask == z ^ (z >> 31)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_taken_in_at_least_fp32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    t = normal(0, 1, 6, 4, dtype=dtype)
    assert_equal(unit(t), unit(t.to(expected)))
    for metric in METRICS:
        found = similarity(t, t, metric)
        assert found.dtype == expected and found.isfinite().all()
        assert_equal(found, similarity(t.to(expected), t.to(expected), metric))
