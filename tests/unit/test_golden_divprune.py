"""DivPrune against its authors' program (see golden/README.md)."""

import pytest
import torch
from helpers_golden import assert_equal, load

import vtok
from vtok.core.prompt import ImageFeatures, View, VLMInfo
from vtok.methods.features.divprune import max_min_select, official_select
from vtok.ops.diversity import most_isolated


def info(width: int) -> VLMInfo:
    return VLMInfo("Golden", 32, width, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["small", "576"])
def test_order_and_what_a_model_keeps(case: str, dtype: torch.dtype) -> None:
    g = load(f"baseline_divprune_{case}", dtype)
    x = g["features"][None]
    assert_equal(max_min_select(x, len(g["order"]))[0], g["order"])
    reducer = vtok.DivPrune(keep=g["subset_ratio"]).build_vlm(info(x.shape[2]))
    images = ImageFeatures(x, (View(0, 1, x.shape[1]),))
    plan = reducer.features(images)
    assert plan is not None
    assert_equal(plan.keep[0], g["kept_sorted"])
    assert reducer.feature_count(x.shape[1], images.views) == len(g["order"])


def test_copies_are_taken_last_and_once() -> None:
    g = load("baseline_divprune_duplicates")
    order = max_min_select(g["features"][None], 24)[0]
    assert_equal(order[: g["n_unique"]], g["order"][: g["n_unique"]])
    assert_equal(order.sort().values, torch.arange(24))


@pytest.mark.parametrize("name", ["576", "duplicates", "small"])
def test_the_official_preset_goes_on_with_copies(name: str) -> None:
    """Nothing is taken out of the race: the same tokens in the same order, then copies of what was taken, which of them is
    rounding."""
    g = load(f"baseline_divprune_{name}")
    x, k = g["features"][None], len(g["order"])
    found, first = official_select(x, k)[0], int(g.get("n_unique", k))
    assert_equal(found[:first], g["order"][:first])
    assert len(set(found.tolist())) <= first == len(set(g["order"].tolist()))
    reducer = vtok.DivPrune(keep_tokens=k, preset="official").build_vlm(info(x.shape[2]))
    images = ImageFeatures(torch.cat([x, x], 1), (View(0, 1, 2 * x.shape[1]),))  # every token twice
    plan = reducer.features(images)
    assert plan is not None and plan.remake is not None
    assert len(set(plan.keep[0].tolist())) == k and bool((plan.keep[0].diff() > 0).all())
    assert plan.remake(images.tokens).shape == (1, k, x.shape[2])


def test_an_image_chooses_for_itself_alone() -> None:
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = max_min_select(x, 12)
    for b in range(3):
        assert_equal(max_min_select(x[b : b + 1], 12)[0], together[b])
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_the_first_token_by_a_loop_and_ties() -> None:
    x = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # more than one block of rows
    unit = x / x.norm(dim=2, keepdim=True)
    for b in range(2):
        nearest = [float((unit[b, torch.arange(300) != i] @ unit[b, i]).max()) for i in range(300)]
        assert int(most_isolated(x)[b]) == min(range(300), key=nearest.__getitem__)
    assert max_min_select(torch.eye(5)[None], 5).tolist() == [[0, 1, 2, 3, 4]]  # all equally far: the lowest number first
    assert most_isolated(torch.randn(2, 1, 4)).tolist() == [0, 0]


def test_counts() -> None:
    counts = [vtok.DivPrune(keep=share).count(n) for n, share in ((576, 0.098), (2340, 0.3333), (25, 0.5), (3, 0.01))]
    assert counts == [56, 780, 12, 1]
    assert vtok.DivPrune() == vtok.DivPrune(keep=0.098)
    assert vtok.DivPrune(keep_tokens=700).count(576) == 576
    assert vtok.DivPrune(keep=1.0).build_vlm(info(8)).sites == ()
    with pytest.raises(vtok.ConfigError, match="give keep or keep_tokens, not both"):
        vtok.DivPrune(keep=0.1, keep_tokens=3)
    with pytest.raises(vtok.ConfigError, match="keep_tokens must be a whole number >= 1, got 0"):
        vtok.DivPrune(keep_tokens=0)
