"""ToDRE against slow loops written from the paper's equations, and its k-center against DivPrune (see golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, load
from torch import Tensor

from vtok.core.prompt import ImageFeatures, Layout, TowerBlock, TowerFacts, View, VLMInfo
from vtok.core.tokens import AttentionView, Place, Site
from vtok.methods.todre import ToDRE, k_center_select, max_sum_select, relevance
from vtok.methods.todre.pivot import choose_pivot, cls_attention
from vtok.methods.todre.text_relevance import causal_attention, drops_visual
from vtok.ops.diversity import greedy_diverse
from vtok.ops.matching import unit
from vtok.ops.selection import kept_tokens

IMAGES = ["todre_stage1_image_small", "todre_stage1_image_576_k58"]


def select(features: Tensor, k: int, pivot: int, kind: Any = max_sum_select) -> Tensor:
    return kind(features[None], k, torch.tensor([pivot]))[0]


def margins(features: Tensor, order: Tensor, criterion: str) -> Tensor:
    """How much worse the best other choice would have been, step by step: the value chosen once the winner is forbidden."""
    found = []
    for step in range(1, len(order)):
        allowed = torch.ones(1, len(features), dtype=torch.bool)
        allowed[0, order[step]] = False
        best, second = (greedy_diverse(features[None], step + 1, order[:1], v, criterion)[1][0, -1] for v in (None, allowed))
        found.append(second - best)
    return torch.stack(found)


# Stage 1.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", IMAGES)
def test_max_sum_of_an_image(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    pivot = choose_pivot("cls", g["features"][None], cls_attn=g["cls_attn"][None])
    assert pivot.tolist() == [g["pivot"]]
    assert kept_tokens(len(g["features"]), keep=0.25 if g["k"] == 16 else 0.1) == g["k"]
    order = select(g["features"], g["k"], g["pivot"])
    assert_equal(order, g["order"])
    assert_equal(order.sort().values, g["kept_sorted"])


@pytest.mark.parametrize("name", IMAGES)
def test_values_and_margins_of_max_sum(name: str) -> None:
    g = load(name)
    features, order = g["features"][None], g["order"]
    score = greedy_diverse(features, g["k"] + 1, order[:1])[1][0]
    assert_close(score[1 : g["k"]], g["win_value"], 1e-12)
    assert_close(margins(g["features"], order, "sum"), g["win_gap"], 1e-12)
    left = ~g["final_cumsim"].isnan()
    assert left.sum() == len(left) - g["k"]
    assert_close(score[g["k"]], g["final_cumsim"][left].min(), 1e-12)  # what the next step would have looked at
    x = unit(features)[0]
    assert_close((x @ x[order].sum(0))[left], g["final_cumsim"][left], 1e-12)


@pytest.mark.parametrize("name", IMAGES)
def test_k_center_of_an_image(name: str) -> None:
    g = load(name)
    order = select(g["features"], g["k"], g["pivot"], k_center_select)
    assert_equal(order, g["kcenter_order"])
    assert_equal(order.sort().values, g["kcenter_kept_sorted"])
    assert_close(margins(g["features"], order, "max"), g["kcenter_gap"], 1e-12)


@pytest.mark.parametrize("rule", ["center", "farthest"])
def test_pivots_without_class_attention(rule: str) -> None:
    g = load("todre_stage1_pivots")
    pivot = choose_pivot(rule, g["features"][None])
    assert pivot.tolist() == [g[f"pivot_{rule}"]]
    assert_equal(max_sum_select(g["features"][None], g["k"], pivot)[0], g[f"order_{rule}"])


def test_duplicates_a_zero_row_and_an_opposite_one() -> None:
    g = load("todre_stage1_edge")
    assert_equal(select(g["features"], 11, g["pivot"]), g["order_all"])
    assert_equal(select(g["features"], 1, g["pivot"]), g["order_k1"])
    score = greedy_diverse(g["features"][None], 11, torch.tensor([g["pivot"]]))[1][0]
    assert_close(score[1:], g["win_value"], 1e-12)
    assert_close(margins(g["features"], g["order_all"], "sum"), g["win_gap"], 1e-12)
    assert (g["win_gap"] == 0).sum() == 2


def test_a_batch_of_unequal_images() -> None:
    g = load("todre_stage1_batch")
    valid = torch.arange(50) < g["n_valid"][:, None]
    pivot = choose_pivot("cls", g["features"], valid, g["cls_attn"])
    assert_equal(pivot, g["order"][:, 0])
    assert_equal(max_sum_select(g["features"], g["k"], pivot, valid), g["order"])
    assert_equal(max_sum_select(g["features"], g["k"].tolist(), pivot, valid), g["order"])


def test_class_attention() -> None:
    g = load("todre_cls_attention")
    q, k = g["q"][None], g["k"][None]
    view = AttentionView(q, k, k, None, g["scale"], None)
    assert_close(view.probs(first=1)[0, :, 0, 1:], g["clip_rows"], 1e-12)
    features = torch.zeros(1, 25, 1)
    for single, alpha, pivot in (
        (False, "alpha_mean_heads", "pivot"),
        (True, "alpha_eq3_single_head", "pivot_eq3_single_head"),
    ):
        found = cls_attention(view, single_head=single)
        assert_close(found[0], g[alpha], 1e-12)
        assert choose_pivot("cls", features, cls_attn=found).tolist() == [g[pivot]]


# Stage 2.
CASES = ["llava", "llava_drop", "tau", "text_first", "batch_leftpad"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_relevance(case: str, dtype: torch.dtype, tolerance: float) -> None:
    g = load(f"todre_stage2_{case}", dtype)
    layout = g["layout"]
    text_to_visual, visual_to_text = relevance(g["q"], g["k"], g["scale"], layout)
    assert_close(text_to_visual, g["alpha_t2v"], tolerance)
    assert_close(visual_to_text, g["alpha_v2t"], tolerance)
    if case != "text_first":
        assert not visual_to_text.any()  # exactly: no text precedes the image
    for column, tau in enumerate(g["taus"].tolist()):
        for criterion, key in (("both", "drop_both"), ("text_to_visual", "drop_t2v_only")):
            found = drops_visual(text_to_visual, visual_to_text, layout, tau, criterion)
            assert_equal(found, g[key][:, column])


@pytest.mark.parametrize("case", CASES)
def test_probabilities_under_the_causal_mask(case: str) -> None:
    g = load(f"todre_stage2_{case}")
    real = g["layout"] >= 0
    rows = torch.arange(real.shape[1]).expand(real.shape)
    probs = causal_attention(g["q"], g["k"], g["scale"], real).probs(rows)
    assert_close(probs * real[:, None, :, None], g["attn"], 1e-12)


# The same greedy loop with DivPrune's first token: the one whose nearest other is farthest.
def most_isolated(features: Tensor) -> int:
    x = unit(features)
    return int((1 - x @ x.T).topk(2, dim=0, largest=False).values[1].argmax())


@pytest.mark.parametrize("case", ["small", "576"])
def test_k_center_is_the_loop_of_divprune(case: str) -> None:
    g = load(f"baseline_divprune_{case}")
    k = round(g["subset_ratio"] * len(g["features"]))
    first = most_isolated(g["features"])
    order = select(g["features"], k, first, k_center_select)
    assert_equal(order, g["order"])
    assert_equal(order.sort().values, g["kept_sorted"])
    assert_close(margins(g["features"], order, "max"), g["win_gap"][1:], 1e-6)  # theirs are float32


def test_k_center_never_returns_a_token_twice() -> None:
    """DivPrune's own loop does, once only copies of chosen tokens are left."""
    g = load("baseline_divprune_duplicates")
    order = select(g["features"], 24, most_isolated(g["features"]), k_center_select)
    assert_equal(order.sort().values, torch.arange(24))
    assert len(set(g["order"].tolist())) == g["n_unique"] == 22
    assert_equal(order[:22], g["order"][:22])


# The same through what a patched model asks.
def info(width: int) -> VLMInfo:
    return VLMInfo("Golden", 32, width, 8, tower=TowerFacts(24, True, 1, 22, 1024, 16, 64))


def tower_block(view: AttentionView) -> TowerBlock:
    return TowerBlock(1, None, lambda: view, lambda views: tower_block(view))


def images(features: Tensor, cls_attn: Tensor | None = None) -> ImageFeatures:
    """One view of the tower an image, whose class token attends as given."""
    n = features.shape[1]
    tower = {}
    if cls_attn is not None:
        k = torch.cat([cls_attn.new_full((len(cls_attn), 1), -1e9), cls_attn.log()], 1)[:, None, :, None]  # [B, 1, 1 + n, 1]
        tower[22] = tower_block(AttentionView(torch.ones_like(k), k, k, None, 1.0, None))
    return ImageFeatures(features, (View(0, 1, n),), "image", tower, 1)


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_keeps_these_tokens(name: str) -> None:
    g = load(name)
    seen = images(g["features"][None], g["cls_attn"][None])
    for selector, key in (("max_sum", "kept_sorted"), ("k_center", "kcenter_kept_sorted")):
        for amount in ({"keep": 0.25 if g["k"] == 16 else 0.1}, {"keep_tokens": g["k"]}):
            plan = ToDRE(selector=selector, **amount).build_vlm(info(g["features"].shape[1])).features(seen)
            assert plan is not None
            assert_equal(plan.keep[0], g[key])


@pytest.mark.parametrize("rule", ["center", "farthest"])
def test_a_model_starts_from_these_tokens(rule: str) -> None:
    g = load("todre_stage1_pivots")
    plan = ToDRE(keep_tokens=g["k"], pivot=rule).build_vlm(info(8)).features(images(g["features"][None]))
    assert plan is not None
    assert_equal(plan.keep[0], g[f"order_{rule}"].sort().values)


def test_a_model_keeps_these_tokens_of_unequal_images() -> None:
    g = load("todre_stage1_batch")
    for b, (n, k) in enumerate(zip(g["n_valid"].tolist(), g["k"].tolist())):
        seen = images(g["features"][b : b + 1, :n], g["cls_attn"][b : b + 1, :n])
        plan = ToDRE(keep_tokens=k).build_vlm(info(8)).features(seen)
        expected = g["order"][b][:k].sort().values
        assert_equal(torch.arange(n) if plan is None else plan.keep[0], expected)


def test_a_model_reads_class_attention_in_both_ways() -> None:
    g = load("todre_cls_attention")
    q, k = g["q"][None], g["k"][None]
    seen = images(torch.eye(25, dtype=q.dtype)[None])._replace(
        tower={22: tower_block(AttentionView(q, k, k, None, g["scale"], None))}
    )
    for single, key in ((False, "pivot"), (True, "pivot_eq3_single_head")):
        plan = ToDRE(keep_tokens=1, single_head=single).build_vlm(info(25)).features(seen)
        assert plan is not None
        assert plan.keep.tolist() == [[g[key]]]


@pytest.mark.parametrize("case", CASES)
def test_a_model_drops_for_these_prompts(case: str) -> None:
    """A model is not told who wrote which text: what precedes the image counts as system prompt."""
    g = load(f"todre_stage2_{case}")
    codes, real = g["layout"], g["layout"] >= 0
    layout = Layout.whole(codes == 1, real)
    known = torch.where((codes == 2) & ~(layout.visual.cumsum(1) > 0), 0, codes)
    assert (known == codes).all() == (case != "text_first")
    attention = causal_attention(g["q"], g["k"], g["scale"], real)
    x = torch.zeros(*codes.shape, 1)
    forth_and_back = relevance(g["q"], g["k"], g["scale"], known)
    for column, tau in enumerate(g["taus"].tolist()):
        for criterion, key in (("both", "drop_both"), ("text_to_visual", "drop_t2v_only")):
            reducer = ToDRE(tau=tau, criterion=criterion).build_vlm(info(8))
            keep = reducer.keep(x, layout, attention, Site(Place.DECODER_IN, 28))
            assert keep is not None
            expected = g[key][:, column] if case != "text_first" else drops_visual(*forth_and_back, known, tau, criterion)
            assert_equal(keep, ~expected[:, None].expand(codes.shape))


def test_where_a_model_is_asked() -> None:
    for config, layers in ((ToDRE(), [28]), (ToDRE(probe=[0.5, 7 / 8]), [16, 28]), (ToDRE(probe=[31, 3]), [4])):
        reducer = config.build_vlm(info(8))
        assert [site.index for site in reducer.sites] == [0, *layers]
        assert [reducer.probe(site) for site in reducer.sites[1:]] == [layer - 1 for layer in layers]
    assert ToDRE(keep=1.0, probe=None).build_vlm(info(8)).sites == () == ToDRE(keep=1, tau=0).build_vlm(info(8)).sites
    assert ToDRE().build_vlm(info(8)).tower_blocks == (22,)
    assert ToDRE(cls_layer=-1).build_vlm(info(8)).tower_blocks == (23,)
    assert ToDRE(keep=1.0).build_vlm(info(8)).tower_blocks == () == ToDRE(pivot="center").build_vlm(info(8)).tower_blocks
