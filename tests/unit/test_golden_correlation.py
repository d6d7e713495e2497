"""Correlation-guided compression against slow loops written from the method's steps, and its hosts against their own programs
(see golden/README.md)."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers_golden import FOLDER, assert_close, assert_equal, load
from torch import Tensor

from vtok.methods.correlation.docowl import ANCHORS, HReducer, best_anchor, crop_positions, crop_prompt, crop_views, h_reducer
from vtok.methods.correlation.merge import compress_features, knn_features
from vtok.methods.correlation.scores import (
    critical_alpha,
    group_scores,
    head_metric,
    redundant_tokens,
    score_tokens,
    select_tokens,
    similar_counts,
)
from vtok.ops.attention import cls_attention
from vtok.ops.crops import group_map, packed_layout, plain_layout
from vtok.ops.matching import unit
from vtok.ops.packing import best_grid, pack, packing
from vtok.ops.selection import iqr_fence, largest, upper_outliers, weighted_draw

ALPHA, BETA = 0.8, 8
N, BLOCKS = 64, {"h4": (1, 4), "s2": (2, 2), "s4": (4, 4)}


def attentions(g: dict[str, Any], joint: bool = False) -> tuple[Tensor, Tensor]:
    low, deep = (cls_attention(g[f"q_{at}"][None], g[f"k_{at}"][None], joint=joint) for at in ("low", "deep"))
    return low, deep


def where(mask: Tensor) -> Tensor:
    return mask[0].nonzero()[:, 0]


def one(index: Tensor, n: int = N) -> Tensor:
    """Token numbers as the mask of one view."""
    return torch.zeros(1, n, dtype=torch.bool).index_fill(1, index, True)


# One view.
@pytest.mark.parametrize("setting", ["a0.8_b8", "a0.7_b8", "a0.8_b16", "a0.9_b4"])
def test_density(setting: str) -> None:
    g = load("correlation_eq_subimage")
    keys, alpha, beta = g["k_low"][None, :, 1:], float(setting[1:4]), int(setting[6:])
    assert_equal(similar_counts(keys, alpha)[0], g[f"count_{setting}"])
    redundant = redundant_tokens(keys, alpha, beta)
    assert_equal(redundant[0], g[f"redundant_{setting}"])
    assert_equal(critical_alpha(keys, beta) > alpha, redundant)
    assert 1 - redundant.double().mean().item() == pytest.approx(g[f"rho_{setting}"], abs=1e-15)


def test_similarity() -> None:
    g = load("correlation_eq_subimage")
    metric = unit(head_metric(g["k_low"][None, :, 1:]))
    assert_close((metric @ metric.mT)[0], g["sim"], 1e-12)
    assert_equal(similar_counts(g["k_low"][None, :, 1:], ALPHA)[0], g["count"])
    assert_equal(redundant_tokens(g["k_low"][None, :, 1:], ALPHA, BETA)[0], g["redundant"])


def test_class_attention_and_its_outliers() -> None:
    g = load("correlation_eq_subimage")
    low, deep = attentions(g)
    assert_close(low[0], g["attn_low"], 1e-12)
    assert_close(deep[0], g["attn_deep"], 1e-12)
    joint_low, joint_deep = attentions(g, joint=True)
    assert_close(joint_low[0], g["attn_low_concat"], 1e-12)
    assert_close(joint_deep[0], g["attn_deep_concat"], 1e-12)
    assert [float(t) for t in iqr_fence(deep)] == pytest.approx([g["q1"], g["q3"], g["upper"]], abs=1e-12)
    assert_equal(where(upper_outliers(deep)), g["outliers"])


@pytest.mark.parametrize("case", range(4))
def test_fences(case: int) -> None:
    g = load("correlation_eq_iqr")
    row = g[f"a{case}"][None]
    assert_close(torch.cat(iqr_fence(row)), g[f"stats{case}"], 1e-12)
    assert_equal(where(upper_outliers(row)), g[f"out{case}"])


def test_local_tokens_and_union() -> None:
    g = load("correlation_eq_subimage")
    low, deep = attentions(g)
    scores = score_tokens(g["k_low"][None, :, 1:], low, deep, BETA)
    count = (scores.critical <= ALPHA).sum(-1)
    assert count.item() == g["num_local"] == round(g["rho"] * N)
    p = low / low.sum()
    assert_close(p[0], g["p"], 1e-12)
    assert_equal(where(largest(p, count)), g["local_topk"])
    drawn = weighted_draw(p, count, g["u"][None])
    assert_equal(where(drawn), g["local_es"])
    assert_equal(where(drawn | scores.outlier), g["kept_es"])
    assert_equal(where(select_tokens(scores, ALPHA, "topk")), g["kept_topk"])
    assert_equal(where(select_tokens(scores, ALPHA, "topk", multiple=4)), g["kept_topk_r4"])


def test_drawn_tokens_are_those_of_the_uniform_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole choice with the file's numbers in place of the hashed ones."""
    g = load("correlation_eq_subimage")
    monkeypatch.setattr("vtok.methods.correlation.scores.uniforms", lambda *_: g["u"][None])
    scores = score_tokens(g["k_low"][None, :, 1:], *attentions(g), BETA)
    assert_equal(where(select_tokens(scores, ALPHA)), g["kept_es"])


@pytest.mark.parametrize("mode", ["none", "nearest", "knn", "nearest_r4"])
def test_aggregation(mode: str) -> None:
    g = load("correlation_eq_subimage")
    metric, low = head_metric(g["k_low"][None, :, 1:]), attentions(g)[0]
    kept = one(g["kept_topk_r4" if mode == "nearest_r4" else "kept_topk"])
    layout = plain_layout("internvl", 2, N)  # one crop, then the whole page
    twice = torch.cat([g["x"], g["x"]])
    features, rows = compress_features(
        twice, layout, kept.expand(2, N), metric.expand(2, -1, -1), low.expand(2, -1), mode.split("_")[0], k=8
    )
    assert_equal(rows, torch.cat([where(kept), torch.arange(N, 2 * N)]))
    assert_close(features[:-N], g[f"agg_{mode}"], 1e-12)
    assert_equal(features[-N:], g["x"])
    if mode == "knn":
        assert_close(knn_features(g["x"][None], metric, low, 8)[kept], g["agg_knn"], 1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_merged_tokens(name: str) -> None:
    g = load("correlation_eq_subimage")
    groups = group_map((8, 8), BLOCKS[name])
    ids = torch.empty(N, dtype=torch.int64)
    ids[groups] = torch.arange(len(groups))[:, None].expand_as(groups)
    assert_equal(ids, g[f"gid_{name}"])
    low, deep = attentions(g)
    scores = group_scores(score_tokens(g["k_low"][None, :, 1:], low, deep, BETA), groups)
    assert_equal((scores.critical > ALPHA)[0], g[f"gred_{name}"])
    assert_close((scores.low / low.sum())[0], g[f"gp_{name}"], 1e-12)
    assert_equal(where(select_tokens(scores, ALPHA, "topk")), g[f"gkept_{name}"])


def test_fp32_chooses_the_same_tokens() -> None:
    g = load("correlation_eq_subimage", torch.float32)
    low, deep = attentions(g)
    scores = score_tokens(g["k_low"][None, :, 1:], low, deep, BETA)
    assert low.dtype == scores.critical.dtype == torch.float32
    assert_close(low[0], g["attn_low"], 1e-6)
    assert_equal(where(select_tokens(scores, ALPHA, "topk")), g["kept_topk"])
    assert_equal(redundant_tokens(g["k_low"][None, :, 1:], ALPHA, BETA)[0], g["redundant"])


# DocOwl-1.5.
@pytest.mark.parametrize("most", [1, 4, 9, 20])
def test_crop_grids(most: int) -> None:
    g = load("correlation_docowl_anchors")
    assert ANCHORS[most] == tuple(map(tuple, g[f"grid_{most}"].tolist()))
    chosen = [best_anchor((width, height), ANCHORS[most]) for width, height in g["sizes_wh"].tolist()]
    assert chosen == g[f"grid_{most}_choice"].tolist()


def test_crops_positions_and_prompt() -> None:
    with np.load(FOLDER / "correlation_docowl_processor.npz") as g:
        image = torch.from_numpy(g["image"]).permute(2, 0, 1)
        expected, position, text = torch.from_numpy(g["crops"]), torch.from_numpy(g["patch_position"]), str(g["text"])
    grid = ANCHORS[9][best_anchor((image.shape[2], image.shape[1]), view=28)]
    assert grid == (2, 3)
    crops = crop_views(image, grid, 28)
    one_grey_level = 1 / 255 / 0.26130258
    assert_close(crops, expected, one_grey_level * 1.001)  # Pillow computes in fixed point
    assert (crops - expected).abs().gt(1e-5).double().mean() < 1e-3
    assert_equal(crop_positions(grid), position)
    assert crop_prompt("<|image|>What is it?", grid) == text


def test_h_reducer() -> None:
    g = load("correlation_docowl_hreducer")
    weights = HReducer.of({key[2:]: g[key] for key in g if key.startswith("w.")})
    patches = g["x"][:, 1:]
    found = torch.cat([h_reducer(patches, weights), weights.eos.expand(2, -1, -1)], 1)
    assert_close(found, g["y"], 1e-12)
    strip = torch.cat([h_reducer(patches[:1, g["kept"]], weights), weights.eos], 1)
    assert_close(strip, g["y_kept_strip"], 1e-12)


# transformers.
@pytest.mark.parametrize(
    ("name", "side", "block"),
    [
        ("internvl_g8", 8, 2), ("internvl_g32", 32, 2), ("idefics3_g8_s2", 8, 2), ("idefics3_g9_s3", 9, 3),
        ("idefics3_g8_s4", 8, 4), ("idefics3_g27_s3", 27, 3), ("idefics3_g32_s4", 32, 4),
    ],
)  # fmt: skip
def test_pixel_shuffle(name: str, side: int, block: int) -> None:
    assert_equal(group_map((side, side), (block, block)), load("correlation_hf_groupmaps")[name])


PINPOINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]


@pytest.mark.parametrize("case", range(7))
def test_packed_crops(case: int) -> None:
    g = load("correlation_hf_anyres")
    size = tuple(g[f"size{case}_hw"].tolist())
    grid = best_grid(size, PINPOINTS, 84)
    assert 1 + grid[0] * grid[1] == g[f"size{case}_ncrops"]
    ids = torch.arange(g[f"size{case}_ncrops"] * 36, dtype=torch.float64).view(-1, 36, 1)
    newline = ids.new_tensor([-1])

    how = packing(grid, 6, size)
    assert_equal(pack(ids, how, newline)[:, 0], g[f"size{case}_map"].double())
    layout = packed_layout(how)  # every row belongs to the view and patch that its number says
    places = g[f"size{case}_map"]
    assert layout.length == len(places) and layout.patches is not None
    assert_equal(places[layout.rows[layout.valid]], places[places >= 0].sort().values)
    assert_equal(layout.patches.flatten().nonzero()[:, 0], places[places >= 0].sort().values)

    shrunk = packing(grid, 6, size, max_views=2)
    assert shrunk.shrunk == (case in (2, 4, 6))
    found = pack(ids, shrunk, newline)[:, 0]
    assert_close(found, g[f"size{case}_ov"], 1e-12)
    assert len(found) == g[f"size{case}_ov_len"] == packed_layout(shrunk).length
