"""Which tokens correlation-guided compression keeps: against slow loops, and properties."""

import math
from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, positive, properties, seeds
from torch import Tensor

from vtok.errors import ConfigError
from vtok.methods.correlation.calibrate import calibrate_alpha, crop_scores
from vtok.methods.correlation.scores import (
    TokenScores,
    critical_alpha,
    group_scores,
    redundant_tokens,
    score_tokens,
    select_tokens,
    similar_counts,
)

views, sizes, alphas = st.integers(1, 3), st.integers(1, 16), st.floats(-1, 1)
betas = st.one_of(st.integers(0, 26), st.floats(0.01, 0.99))
samplings = st.sampled_from(["multinomial", "topk"])


def some_keys(seed: int, v: int, n: int, blank: float = 0.5) -> Tensor:
    """[v, 2, n, 4]: a share `blank` of every view's patches look much alike."""
    keys, background = normal(seed, v, 2, n, 4), 4 * normal(seed + 1, 1, 2, 1, 4)
    return torch.where(torch.rand(v, 1, n, 1, generator=generator(seed)) < blank, background + 0.1 * keys, keys)


def some_valid(seed: int, v: int, n: int) -> Tensor:
    """At least one real token a view."""
    valid = torch.rand(v, n, generator=generator(seed)) < 0.7
    valid[:, seed % n] = True
    return valid


def some_scores(seed: int, v: int, n: int, beta: float = 0.1, blank: float = 0.5, valid: Tensor | None = None) -> TokenScores:
    low, deep = positive(seed + 2, v, n).square() / 1000, (2 * normal(seed + 3, v, n)).softmax(-1)
    return score_tokens(some_keys(seed, v, n, blank), low, deep, beta, valid)


def pick(scores: TokenScores, index: Any) -> TokenScores:
    return TokenScores(*(None if part is None else part[index] for part in scores))


# Density.
def slow_redundant(keys: Tensor, alpha: float, beta: float, valid: list[bool]) -> list[bool]:
    """One view, by the definition: keys [H, n, d]."""

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b))

    n, vectors = keys.shape[1], keys.transpose(0, 1).flatten(1).tolist()
    cosine = [[dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for b in vectors] for a in vectors]
    limit = round(beta * sum(valid)) if 0 < beta < 1 else beta
    return [valid[i] and sum(cosine[i][j] > alpha for j in range(n) if j != i and valid[j]) > limit for i in range(n)]


@properties
@given(views, sizes, alphas, betas, st.booleans(), seeds)
def test_redundant_tokens_by_the_definition(v: int, n: int, alpha: float, beta: float, padded: bool, seed: int) -> None:
    keys, valid = some_keys(seed, v, n), some_valid(seed, v, n) if padded else None
    found = redundant_tokens(keys, alpha, beta, valid)
    real = [[True] * n] * v if valid is None else valid.tolist()
    assert found.tolist() == [slow_redundant(keys[i], alpha, beta, real[i]) for i in range(v)]
    assert_equal(critical_alpha(keys, beta, valid) > alpha, found)


@properties
@given(views, sizes, seeds)
def test_size_of_keys_and_order_of_heads_do_not_matter(v: int, n: int, seed: int) -> None:
    keys = some_keys(seed, v, n)
    scaled = keys * (2.0 ** torch.randint(-9, 9, (v, 1, n, 1), generator=generator(seed)))  # exact
    assert_equal(redundant_tokens(scaled, 0.8, 0.1), redundant_tokens(keys, 0.8, 0.1))
    assert_equal(redundant_tokens(keys.flip(1), 0.8, 0.1), redundant_tokens(keys, 0.8, 0.1))


@properties
@given(views, sizes, betas, seeds)
def test_padding_is_as_if_it_were_not_there(v: int, n: int, beta: float, seed: int) -> None:
    valid, keys, low = some_valid(seed, v, n), some_keys(seed, v, n), positive(seed, v, n)
    scores = score_tokens(keys, low, low, beta, valid)
    kept = select_tokens(scores, 0.8, "topk")
    assert not kept[~valid].any()
    for i in range(v):
        one = slice(i, i + 1), valid[i]
        alone = score_tokens(keys[i : i + 1, :, valid[i]], low[one], low[one], beta)
        assert_close(scores.critical[one], alone.critical, 1e-12)
        assert_equal(scores.outlier[one], alone.outlier)
        assert_equal(kept[one], select_tokens(alone, 0.8, "topk"))


def test_views_without_a_real_patch_keep_nothing() -> None:
    scores = some_scores(0, 2, 6, valid=torch.tensor([[False] * 6, [True] * 6]))
    for sampling in ("topk", "multinomial"):
        assert select_tokens(scores, 0.8, sampling).any(-1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_are_compared_in_at_least_fp32(dtype: torch.dtype) -> None:
    keys = some_keys(0, 2, 9).to(dtype)
    wide = keys.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert critical_alpha(keys, 2).dtype == wide.dtype
    assert_equal(critical_alpha(keys, 2), critical_alpha(wide, 2))


def test_many_views_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, valid = some_keys(0, 5, 6), some_valid(0, 5, 6)
    at_once = [redundant_tokens(keys, 0.8, 0.2, valid), critical_alpha(keys, 0.2, valid), critical_alpha(keys, 2)]
    monkeypatch.setattr("vtok.methods.correlation.scores._ENTRIES", 2 * 6 * 6)
    apart = [redundant_tokens(keys, 0.8, 0.2, valid), critical_alpha(keys, 0.2, valid), critical_alpha(keys, 2)]
    for found, expected in zip(apart, at_once):
        assert_equal(found, expected)


def test_pages_that_were_not_cropped_have_no_crops() -> None:
    scores = some_scores(0, 0, 5)
    assert select_tokens(scores, 0.8).shape == redundant_tokens(some_keys(0, 0, 5), 0.8, 2).shape == (0, 5)


# Choice.
def slow_choice(scores: TokenScores, i: int, alpha: float, multiple: int) -> list[int]:
    """The tokens that `topk` keeps of view i, by the definition."""
    tokens = [j for j in range(scores.low.shape[1]) if scores.valid is None or scores.valid[i, j]]
    by_attention = sorted(tokens, key=lambda j: -scores.low[i, j].item())  # sorted() is stable
    count = sum(scores.critical[i, j].item() <= alpha for j in tokens)
    kept = set(by_attention[:count]) | {j for j in tokens if scores.outlier[i, j]}
    wanted = min(math.ceil(max(1, len(kept)) / multiple) * multiple, len(tokens))
    rest = [j for j in by_attention if j not in kept]
    return sorted(kept | set(rest[: wanted - len(kept)]))


@properties
@given(views, sizes, alphas, st.integers(1, 5), st.booleans(), seeds)
def test_top_tokens_by_the_definition(v: int, n: int, alpha: float, multiple: int, padded: bool, seed: int) -> None:
    scores = some_scores(seed, v, n, valid=some_valid(seed, v, n) if padded else None)
    kept = select_tokens(scores, alpha, "topk", multiple=multiple)
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [slow_choice(scores, i, alpha, multiple) for i in range(v)]


@properties
@given(views, sizes, alphas, samplings, st.integers(1, 6), seeds)
def test_counts_and_union(v: int, n: int, alpha: float, sampling: str, least: int, seed: int) -> None:
    scores = some_scores(seed, v, n)
    kept = select_tokens(scores, alpha, sampling, seed, min_tokens=least)
    assert kept[scores.outlier].all()  # the union holds every outlier
    local, number = (scores.critical <= alpha).sum(-1), kept.sum(-1)
    floor = torch.maximum(local, scores.outlier.sum(-1)).clamp(least, None).clamp_max(n)
    assert (number >= floor).all()
    assert (number <= (local + scores.outlier.sum(-1)).clamp_min(least)).all()
    without = select_tokens(scores._replace(outlier=torch.zeros_like(scores.outlier)), alpha, sampling, seed, min_tokens=least)
    assert_equal(without.sum(-1), local.clamp_min(least).clamp_max(n))


@properties
@given(views, sizes, alphas, alphas, samplings, seeds)
def test_a_higher_alpha_only_adds_tokens(v: int, n: int, a: float, b: float, sampling: str, seed: int) -> None:
    scores = some_scores(seed, v, n)
    few, many = (select_tokens(scores, alpha, sampling, seed) for alpha in sorted([a, b]))
    assert not (few & ~many).any()


@properties
@given(samplings, seeds)
def test_blank_views_keep_fewer_tokens_than_dense_ones(sampling: str, seed: int) -> None:
    keys = torch.cat([some_keys(seed, 1, 40, blank) for blank in (1.0, 0.8, 0.4, 0.0)])
    low = positive(seed, 4, 40)
    scores = score_tokens(keys, low, torch.ones_like(low), 5)
    blank, sparse, mixed, dense = select_tokens(scores, 0.95, sampling, seed).sum(-1).tolist()
    assert 1 == blank < sparse < mixed < dense == 40


def test_identical_and_orthogonal_patches() -> None:
    low, deep = positive(0, 1, 16), torch.ones(1, 16).index_fill(1, torch.tensor([3]), 9.0)
    same = score_tokens(torch.ones(1, 2, 16, 8), low, deep, 4)
    assert select_tokens(same, 0.8)[0].nonzero()[:, 0].tolist() == [3]  # no density: the outlier alone
    apart = score_tokens(torch.eye(16).view(1, 1, 16, 16), low, deep, 4)
    assert select_tokens(apart, 0.8).all()


@properties
@given(sizes, seeds)
def test_top_tokens_follow_their_patches(n: int, seed: int) -> None:
    keys, low, deep = some_keys(seed, 2, n), positive(seed + 2, 2, n), positive(seed + 3, 2, n)
    order = torch.rand(n, generator=generator(seed)).argsort()
    kept = select_tokens(score_tokens(keys, low, deep, 0.1), 0.8, "topk")
    moved = select_tokens(score_tokens(keys[:, :, order], low[:, order], deep[:, order], 0.1), 0.8, "topk")
    assert_equal(moved, kept[:, order])


@properties
@given(st.integers(2, 5), sizes, samplings, seeds)
def test_a_view_does_not_depend_on_its_neighbours(v: int, n: int, sampling: str, seed: int) -> None:
    """Views in another order, or one alone, keep what they kept, if they keep their numbers within their page."""
    scores, numbers = some_scores(seed, v, n), torch.arange(v) + 3
    order = torch.rand(v, generator=generator(seed)).argsort()
    kept = select_tokens(scores, 0.8, sampling, seed, numbers)
    assert_equal(select_tokens(pick(scores, order), 0.8, sampling, seed, numbers[order]), kept[order])
    assert_equal(select_tokens(pick(scores, order[:1]), 0.8, sampling, seed, numbers[order[:1]]), kept[order[:1]])


def test_draws_depend_on_seed_and_number_of_the_view() -> None:
    scores = pick(some_scores(1, 1, 40), [0, 0, 0])
    kept = select_tokens(scores, 0.8)
    assert_equal(select_tokens(scores, 0.8), kept)
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(select_tokens(scores, 0.8, seed=1), kept)
    assert_equal(select_tokens(scores, 0.8, view=torch.tensor([0, 1, 0]))[2], kept[0])
    assert_equal(select_tokens(scores, 0.8, "topk", seed=1)[0], select_tokens(scores, 0.8, "topk")[2])


# Merged tokens.
@properties
@given(views, st.integers(1, 6), st.integers(1, 4), alphas, betas, st.booleans(), seeds)
def test_merged_tokens_by_the_definition(
    v: int, count: int, members: int, alpha: float, beta: float, padded: bool, seed: int
) -> None:
    n = count * members
    groups = torch.rand(n, generator=generator(seed)).argsort().view(count, members)
    valid = some_valid(seed, v, n) if padded else None
    patches = some_scores(seed, v, n, beta, valid=valid)
    merged = group_scores(patches, groups)
    redundant = redundant_tokens(some_keys(seed, v, n), alpha, beta, valid)
    for i in range(v):
        for group in range(count):
            real = [j for j in groups[group].tolist() if valid is None or valid[i, j]]
            assert merged.valid is None or merged.valid[i, group] == bool(real)
            if real:
                assert (merged.critical[i, group] > alpha) == redundant[i, real].all()
                assert_close(merged.low[i, group], patches.low[i, real].sum(), 1e-12)
            assert merged.outlier[i, group] == patches.outlier[i, real].any()
    if members == 1 and valid is None:
        assert_equal(merged.critical, patches.critical[:, groups[:, 0]])


# Calibration.
@properties
@given(st.integers(1, 5), st.integers(4, 30), st.floats(0.05, 1), samplings, st.booleans(), seeds)
def test_calibration_meets_its_target(v: int, n: int, target: float, sampling: str, padded: bool, seed: int) -> None:
    scores = some_scores(seed, v, n, beta=2, valid=some_valid(seed, v, n) if padded else None)
    scores = scores._replace(outlier=torch.zeros_like(scores.outlier))
    alpha, share = calibrate_alpha(scores, target, sampling, seed)
    total = v * n if scores.valid is None else int(scores.valid.sum())
    kept = select_tokens(scores, alpha, sampling, seed)
    assert kept.sum().item() / total == share
    few = scores.critical[scores.valid] if scores.valid is not None else scores.critical
    lowest = max(v, int((few == -1).sum()))  # tokens with too few others to be redundant stay, and one of every view
    assert abs(share * total - max(target * total, lowest)) <= v
    assert -1 <= alpha <= 1


def test_calibration_counts_outliers() -> None:
    scores = some_scores(0, 4, 50, beta=3)
    assert scores.outlier.sum() > 8
    alpha, share = calibrate_alpha(scores)
    assert abs(share - 0.66) <= 1 / 50
    kept = select_tokens(scores, alpha)
    assert kept.double().mean().item() == share
    assert calibrate_alpha(scores, 0.01).share >= scores.outlier.double().mean().item()  # they stay whatever is asked for
    assert calibrate_alpha(scores, 1.0).share == 1


def test_calibration_on_crops_of_several_pages() -> None:
    """Pages of other lengths are padded, whole pages left out, and every view draws as it will on its own page."""
    pages = [(some_scores(0, 3, 12, beta=2), torch.tensor([True, False, False])), (some_scores(9, 1, 20), torch.tensor([True]))]
    pages.append((some_scores(5, 2, 20, beta=2), torch.tensor([False, True])))
    scores, numbers = crop_scores(pages)
    assert numbers.tolist() == [1, 2, 0]
    assert scores.valid is not None and scores.valid.sum(-1).tolist() == [12, 12, 20]
    alpha, share = calibrate_alpha(scores, 0.5, view=numbers)
    kept = [select_tokens(page, alpha)[~whole] for page, whole in pages]
    assert sum(int(k.sum()) for k in kept) == round(share * 44)
    assert abs(share - 0.5) <= 3 / 44


# Errors and tracing.
def _refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_errors() -> None:
    keys, scores = some_keys(0, 1, 4), some_scores(0, 1, 4)
    assert "alpha is a cosine in [-1, 1], got 1.5" in _refused(redundant_tokens, keys, 1.5, 2)
    assert "alpha is a cosine in [-1, 1], got nan" in _refused(redundant_tokens, keys, math.nan, 2)
    assert "between 0 and 1, got -1" in _refused(redundant_tokens, keys, 0.5, -1)
    assert "between 0 and 1, got True" in _refused(redundant_tokens, keys, 0.5, True)
    assert "[views, heads, patches, head width], got [2, 4, 4]" in _refused(similar_counts, keys[0], 0.5)
    assert "multinomial, topk, got 'random'" in _refused(select_tokens, scores, 0.5, "random")
    assert "start at 1, got 0 and 1" in _refused(select_tokens, scores, 0.5, min_tokens=0)
    assert "start at 1, got 1 and 0" in _refused(select_tokens, scores, 0.5, multiple=0)
    assert "alpha is a cosine in [-1, 1], got 2" in _refused(select_tokens, scores, 2)
    assert "target is a share of tokens in (0, 1], got 0" in _refused(calibrate_alpha, scores, 0)
    assert "pass the scores of a few cropped pages" in _refused(calibrate_alpha, pick(scores, slice(0, 0)))
    assert "no pages were given" in _refused(crop_scores, [])


def test_the_choice_waits_for_nothing() -> None:
    """No value is read on the host: it runs on tensors without values."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        low, valid = torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)
        scores = score_tokens(torch.ones(2, 3, 6, 4), low, low, 0.1, valid)
        merged = group_scores(scores, torch.arange(6).view(3, 2))
        assert select_tokens(merged, 0.5).shape == (2, 3)
        assert redundant_tokens(torch.ones(2, 3, 6, 4), 0.5, 0.1, valid).shape == (2, 6)
