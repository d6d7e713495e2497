"""What is particular to ToDRE, against loops: budgets, pivots, relevance of text and image to each other, layers."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal, positive, properties, seeds
from torch import Tensor

from vtok.core.prompt import LayerAttention, Layout
from vtok.core.tokens import AttentionView
from vtok.errors import ConfigError, UnknownNameError
from vtok.methods.todre import max_sum_select, relevance
from vtok.methods.todre import text_relevance as todre_relevance
from vtok.methods.todre.pivot import choose_pivot, cls_attention
from vtok.methods.todre.text_relevance import DEFAULT_PROBE, drops_visual, kinds, probe_layers
from vtok.ops.selection import kept_tokens


def test_tokens_an_image_keeps() -> None:
    assert kept_tokens(2880, keep=0.1) == 288 and kept_tokens(576, keep=0.1) == 58 and kept_tokens(2880, keep=0.25) == 720
    assert kept_tokens(3, keep=0.01) == 1 and kept_tokens(577, keep=1.0) == 577 == kept_tokens(577)
    assert kept_tokens(2144, keep_tokens=288) == 288 and kept_tokens(200, keep_tokens=288) == 200


# Pivots.
def test_class_attention_chooses_among_the_tokens_it_covers() -> None:
    """Thumbnail in front (LLaVA-NeXT) or behind (InternVL): only its tokens are candidates."""
    features, attn = torch.zeros(1, 20, 3), torch.tensor([[0.1, 0.2, 0.4, 0.3]])
    assert choose_pivot("cls", features, cls_attn=attn).tolist() == [2]
    assert choose_pivot("cls", features, cls_attn=attn, start=16).tolist() == [18]
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 18] = False
    assert choose_pivot("cls", features, valid, attn, start=16).tolist() == [19]


def test_class_attention_of_a_video_is_compared_over_all_frames() -> None:
    attn = positive(0, 2, 3, 5)
    attn[0, 1, 4], attn[1, 2, 0] = 9, 9
    assert choose_pivot("cls", torch.zeros(2, 15, 3), cls_attn=attn).tolist() == [1 * 5 + 4, 2 * 5]
    per_frame = attn.max(-1)
    frame = per_frame.values.argmax(-1)  # the paper's two steps
    expected = frame * 5 + per_frame.indices.gather(1, frame[:, None])[:, 0]
    assert_equal(choose_pivot("cls", torch.zeros(2, 15, 3), cls_attn=attn), expected)


@properties
@given(st.sampled_from(["center", "farthest"]), st.integers(1, 3), st.integers(1, 9), seeds)
def test_pivots_by_distance_from_the_mean(rule: str, batch: int, n: int, seed: int) -> None:
    features = normal(seed, batch, n, 4)
    valid = torch.rand(batch, n, generator=generator(seed)) < 0.7
    valid[:, seed % n] = True
    features[~valid] = 100
    found = choose_pivot(rule, features, valid)
    for b in range(batch):
        rows = valid[b].nonzero().flatten().tolist()
        mean = sum(features[b, i] for i in rows) / len(rows)
        distance = {i: float((features[b, i] - mean).square().sum()) for i in rows}
        best = (max if rule == "farthest" else min)(distance.values())
        assert valid[b, found[b]] and distance[int(found[b])] == pytest.approx(best, rel=1e-12)


def test_random_pivots_repeat_and_differ_by_seed() -> None:
    features = torch.zeros(3, 100, 2)
    found = [choose_pivot("random", features, seed=seed) for seed in range(50)]
    assert_equal(choose_pivot("random", features, seed=7), found[7])
    numbers = [int(f[0]) for f in found]
    assert len(set(numbers)) > 30 and min(numbers) < 20 and max(numbers) > 80
    for seed in range(20):
        valid = torch.rand(3, 100, generator=generator(seed)) < 0.1
        valid[:, 5] = True
        assert valid.gather(1, choose_pivot("random", features, valid, seed=seed)[:, None]).all()


def test_the_default_pivot_is_the_center_without_a_class_token() -> None:
    features, attn = normal(0, 2, 8, 3), positive(1, 2, 8)
    assert_equal(choose_pivot(None, features), choose_pivot("center", features))
    assert_equal(choose_pivot(None, features, cls_attn=attn), attn.argmax(-1))
    assert choose_pivot(3, features).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("rule", "options", "error", "words"),
    [
        ("cls", {}, ConfigError, ["class token", 'pivot="center"']),
        ("cls", {"cls_attn": torch.zeros(1, 9)}, ConfigError, ["tokens 0 to 8", "has 8"]),
        ("cls", {"cls_attn": torch.zeros(1, 4), "start": 5}, ConfigError, ["tokens 5 to 8", "has 8"]),
        ("centre", {}, UnknownNameError, ["did you mean 'center'?"]),
        (8, {}, ConfigError, ["pivot=8", "0 to 7"]),
        (-1, {}, ConfigError, ["pivot=-1"]),
        (0.5, {}, ConfigError, ["pivot=0.5"]),
    ],
)
def test_pivots_that_make_no_sense(rule: Any, options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        choose_pivot(rule, torch.zeros(1, 8, 2), **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("single_head", [False, True])
def test_class_attention_with_registers_and_shared_keys(single_head: bool) -> None:
    q, k = normal(0, 2, 4, 10, 3), normal(1, 2, 2, 10, 3)
    view = AttentionView(q, k, k, None, 0.5, None)
    found = cls_attention(view, 3, single_head)
    for b in range(2):
        logits = torch.stack([k[b, h // 2] @ q[b, h, 0] for h in range(4)])
        scaled, patches = logits * 0.5, logits[:, 3:].sum(0) * 0.25  # scale 0.5 of a head, halved at four times the width
        expected = patches.softmax(-1) if single_head else scaled.softmax(-1)[:, 3:].mean(0)
        assert_close(found[b], expected, 1e-12)


def test_first_stage_of_a_video_under_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        features, attn = torch.empty(1, 32, 8), torch.empty(1, 4, 8)
        for rule in ("cls", "center", "farthest", "random"):
            pivot = choose_pivot(rule, features, torch.ones(1, 32, dtype=torch.bool), attn)
            assert max_sum_select(features, kept_tokens(32, 0.1), pivot).shape == (1, 3)


# Relevance.
def whole_matrix(q: Tensor, k: Tensor, scale: float, codes: Tensor) -> tuple[float, float]:
    """One prompt: the full attention matrix, then ratios of sums."""
    n, heads = len(codes), len(q)
    probs = torch.zeros(n, n, dtype=torch.float64)
    for h in range(heads):
        for i in range(n):
            seen = [j for j in range(i + 1) if codes[j] >= 0]
            if codes[i] >= 0:
                probs[i, seen] += torch.stack([q[h, i] @ k[h * len(k) // heads, j] * scale for j in seen]).softmax(0) / heads

    def ratio(queries: Tensor, keys: Tensor) -> float:
        return float(probs[queries][:, keys].sum() / probs[queries][:, codes >= 0].sum()) if queries.any() else 0.0

    return ratio(codes == 2, codes == 1), ratio(codes == 1, codes == 2)


@properties
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]), st.integers(1, 9), st.integers(1, 9), seeds)
def test_relevance_is_a_ratio_of_sums(batch: int, heads: tuple[int, int], n: int, most: int, seed: int) -> None:
    """Any order of text, image, system prompt and padding; however few probabilities are held at a time."""
    q, k = normal(seed, batch, heads[0], n, 3), normal(seed + 1, batch, heads[1], n, 3)
    codes = torch.randint(-1, 3, (batch, n), generator=generator(seed))
    expected = torch.tensor([whole_matrix(q[b], k[b], 1.5, codes[b]) for b in range(batch)], dtype=torch.float64)
    before, todre_relevance._ROWS_AT_ONCE = todre_relevance._ROWS_AT_ONCE, most
    try:
        found = relevance(q, k, 1.5, codes)
    finally:
        todre_relevance._ROWS_AT_ONCE = before
    assert_close(torch.stack(found, 1), expected, 1e-12)
    assert_equal(
        drops_visual(*found, codes, 0.3),
        (found[0] < 0.3) & (found[1] < 0.3) & (codes == 1).any(-1) & (codes == 2).any(-1),
    )


def test_only_rows_that_can_differ_from_zero_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt of 5 system, 40 visual and 7 text tokens: 7 rows; with text in front also the visual ones."""
    rows: list[int] = []
    kept = LayerAttention.probs

    def counted(self: LayerAttention, which: Tensor) -> Tensor:
        rows.append(which.shape[1])
        return kept(self, which)

    monkeypatch.setattr(LayerAttention, "probs", counted)
    q, k = normal(0, 1, 2, 52, 4), normal(1, 1, 2, 52, 4)
    codes = torch.tensor([[0] * 5 + [1] * 40 + [2] * 7])
    relevance(q, k, 0.5, codes)
    assert sum(rows) == 7
    rows.clear()
    relevance(q, k, 0.5, torch.where(torch.arange(52) == 0, 2, codes))
    assert sum(rows) == 47
    rows.clear()
    monkeypatch.setattr(todre_relevance, "_ROWS_AT_ONCE", 3)
    relevance(q, k, 0.5, codes)
    assert rows == [3, 3, 1]
    rows.clear()
    assert not relevance(q, k, 0.5, codes.clamp_max(1))[0].any() and not rows  # nobody asks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relevance_is_taken_in_at_least_fp32(dtype: torch.dtype) -> None:
    q, k = normal(0, 1, 2, 12, 4, dtype=dtype), normal(1, 1, 2, 12, 4, dtype=dtype)
    codes = torch.tensor([[0, 2, 1, 1, 1, 1, 2, 2, 1, 2, 2, 2]])
    found = relevance(q, k, 0.5, codes)
    assert found[0].dtype == torch.float32
    assert_equal(torch.stack(found), torch.stack(relevance(q.float(), k.float(), 0.5, codes)))


def test_text_is_what_follows_the_first_image() -> None:
    visual = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    found = kinds(Layout.whole(visual & real, real))
    assert found[0].int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 0], [0] * 8, [0, 0, 1, 1, 0, 0, 0, 0]]
    assert found[1].int().tolist() == [[0, 0, 0, 0, 0, 1, 0, 1], [0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    assert found[2] is real


def test_the_decision() -> None:
    codes = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 0], [0, 2]])  # the last two lack text and image
    forth, back = torch.tensor([0.05, 0.05, 0.1, 0.0, 0.0]), torch.tensor([0.0, 0.2, 0.0, 0.0, 0.0])
    assert drops_visual(forth, back, codes).tolist() == [True, False, False, False, False]
    assert drops_visual(forth, back, codes, criterion="text_to_visual").tolist() == [True, True, False, False, False]
    assert not drops_visual(forth, back, codes, tau=0).any()
    real = torch.ones(5, 2, dtype=torch.bool)
    real[0, 1] = False
    layout = Layout.whole(codes == 1, real)
    assert not drops_visual(forth, back, layout, criterion="text_to_visual")[0]
    assert drops_visual(forth, back, layout, criterion="text_to_visual")[1]
    with pytest.raises(UnknownNameError, match="did you mean 'both'"):
        drops_visual(forth, back, codes, criterion="bot")


@pytest.mark.parametrize(
    ("k", "codes", "words"),
    [
        (torch.zeros(1, 3, 5, 2), torch.zeros(1, 5), ["dividing 4", "[1, 3, 5, 2]"]),
        (torch.zeros(1, 2, 4, 2), torch.zeros(1, 5), ["[1, 2, 4, 2]"]),
        (torch.zeros(2, 2, 5, 2), torch.zeros(1, 5), ["[2, 2, 5, 2]"]),
        (torch.zeros(1, 2, 5, 2), torch.zeros(1, 4), ["layout must describe", "[1, 5]", "[1, 4]"]),
    ],
)
def test_relevance_of_things_that_do_not_fit(k: Tensor, codes: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        relevance(torch.zeros(1, 4, 5, 2), k, 1.0, codes)
    assert all(word in str(caught.value) for word in words), caught.value


# Layers.
def test_probed_layers() -> None:
    assert [probe_layers(DEFAULT_PROBE, depth) for depth in (32, 40, 28, 24)] == [(27,), (34,), (23,), (20,)]
    assert probe_layers([0.5, 7 / 8, 0.625, 0.75], 32) == (15, 19, 23, 27)
    assert probe_layers([27, -5, 0.875], 32) == (27,) and probe_layers(0.29, 100) == (28,)
    assert (
        probe_layers(1.0, 32) == (31,) and probe_layers(1, 32) == (1,) and probe_layers(None, 32) == () == probe_layers([], 32)
    )


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (1.5, ["(0, 1]", "1.5"]),
        (0.0, ["(0, 1]"]),
        (0.01, ["probe=0.01", "of 32"]),
        (32, ["probe=32", "of 32"]),
        (-33, ["probe=-33"]),
        ("late", ["such as 0.875", "late"]),
        ([True], ["such as 0.875", "True"]),
    ],
)
def test_layers_that_do_not_exist(probe: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        probe_layers(probe, 32)
    assert all(word in str(caught.value) for word in words), caught.value
