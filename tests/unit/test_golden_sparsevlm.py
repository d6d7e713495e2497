"""SparseVLM against its authors' program (see golden/README.md)."""

import math

import pytest
import torch
from helpers_golden import assert_close, assert_equal, load
from helpers_layers import given_probs, info, layout
from torch import Tensor

import vtok
from vtok.core.prompt import Entry, LayerAttention, Layout
from vtok.core.reduction import Fold, folded
from vtok.core.tokens import Place, Site
from vtok.methods.in_llm import sparsevlm
from vtok.methods.in_llm.density_peaks import density_peaks


def prompt(g: dict) -> Layout:
    return layout(g["hidden"].shape[1], g["v_start"], g["v_num"])


def attention(g: dict) -> LayerAttention:
    """The given rows of the text; what they leave goes to the first column."""
    rows, (start, length) = g["attn_text_rows"], (g["v_start"], g["hidden"].shape[1])
    probs = torch.zeros(1, rows.shape[1], length, length, dtype=rows.dtype)
    probs[..., 0] = 1
    text = slice(g["text_start"], length)
    probs[:, :, text, start : start + g["v_num"]] = rows
    probs[:, :, text, 0] = 1 - rows.sum(-1)
    return given_probs(probs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_raters_and_what_stays(dtype: torch.dtype, tolerance: float) -> None:
    g, (start, text) = load("baseline_sparsevlm", dtype), (10, 350)
    whole = prompt(g)
    score = sparsevlm.rater_scores(g["hidden"], whole.visual, whole.after_image)[0]
    assert_close(score[text:].to(torch.float64), g["rater_prob"].to(torch.float64), tolerance)
    assert not score[:text].any()
    entry = Entry(g["hidden"], whole)
    chosen = sparsevlm.raters(entry)
    assert_equal(chosen[0].nonzero()[:, 0] - text, g["rater_index"])
    seen = attention(g)
    relevance = seen.mean_probs(chosen)[0, start : start + g["v_num"]]
    assert_close(relevance.to(torch.float64), g["relevance"].to(torch.float64), 1e-7)

    model = vtok.SparseVLM(keep_tokens=[g["keep_target"], 200, 110], recycle=False).build_vlm(info())
    asked = LayerAttention(2, seen.scale, seen.project, seen.bias, entry=entry)
    keep = model.keep(g["hidden"], whole, asked, model.sites[0])
    assert isinstance(keep, Tensor)
    assert_equal(keep[0, start : start + g["v_num"]], g["keep_mask"])


def test_what_is_recycled() -> None:
    g, start = load("baseline_sparsevlm"), 10
    dropped = torch.zeros(1, 380, dtype=torch.bool)
    dropped[0, start : start + 340] = ~g["keep_mask"]
    assert_equal(dropped[0].nonzero()[:, 0] - start, g["dropped_index"])
    assert sparsevlm.recycled(40) == (len(g["recycle_index_in_dropped"]), g["cluster_num"])
    relevance = torch.zeros(1, 380, dtype=torch.float64)
    relevance[0, start : start + 340] = g["relevance"]
    members = start + g["dropped_index"][g["recycle_index_in_dropped"]]
    noise = 1e-6 * g["cluster_noise"]
    valid = torch.ones(1, 13, dtype=torch.bool)
    centre, home = density_peaks(g["hidden"][:, members], torch.tensor([2]), 2, valid, noise[None])
    padded = torch.cat([noise, noise.new_zeros(sparsevlm.recycled(380)[0] - 13)])[None]
    found = sparsevlm.recycle(g["hidden"], relevance, dropped, padded)
    into = found.into
    assert_equal((into[0] >= 0).nonzero()[:, 0], members.sort().values)
    assert_equal(into[0, members], members[centre[0][home[0]]])
    merged = folded(g["hidden"], into)[0, members[centre[0]]]
    assert_close(merged, g["merged"], 1e-5)  # the program divides by the count + 1e-6
    kept = torch.zeros(1, 380, dtype=torch.bool)
    kept[0, start : start + 340] = g["keep_mask"]
    fold = sparsevlm.program_order(kept, found)
    sequence = folded(g["hidden"], fold.into)[fold.keep]
    assert_equal(sequence[:300], g["hidden"][kept])
    assert_close(sequence[300:], g["merged"], 1e-5)  # behind all that stay, in the program's order


def test_keep_is_a_fold_of_exactly_as_many_as_planned() -> None:
    g = load("baseline_sparsevlm")
    whole, seen = prompt(g), attention(g)
    asked = LayerAttention(2, seen.scale, seen.project, seen.bias, entry=Entry(g["hidden"], whole))
    for target in (300, 335, 339, 340, 20):
        model = vtok.SparseVLM(keep_tokens=[target, target, target]).build_vlm(info())
        found = model.keep(g["hidden"], whole, asked, model.sites[0])
        assert isinstance(found, Fold)
        stays = found.keep & whole.visual
        assert int(stays.sum()) == model.layer_count(model.sites[0], 340, 340)
        centres = found.into[found.into >= 0]
        assert stays[0, centres].all()
        assert_equal(found.into[0, centres], centres)  # a centre names itself
        assert int((found.into >= 0).sum()) == sparsevlm.recycled(340 - target)[0]


def slow_clusters(x: Tensor, m: int) -> tuple[list[int], list[int]]:
    n, width = x.shape
    d = [[math.sqrt(float(((x[i] - x[j]) ** 2).sum())) / math.sqrt(width) for j in range(n)] for i in range(n)]
    rho = [math.exp(-sum(v * v for v in sorted(row)[:m]) / m) for row in d]
    top = max(map(max, d))
    denser = [[j for j in range(n) if (rho[j], -j) > (rho[i], -i)] for i in range(n)]
    score = [rho[i] * min((d[i][j] for j in denser[i]), default=top) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:m]
    return centres, [centres.index(i) if i in centres else min(range(m), key=lambda c: (d[centres[c]][i], c)) for i in range(n)]


def test_clusters_by_a_loop_in_batches_of_unequal_rows() -> None:
    x = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 4] = x[1, 2]  # copies
    points, clusters = [9, 7, 1], [3, 2, 1]
    valid = torch.arange(9) < torch.tensor(points)[:, None]
    centre, home = density_peaks(x, torch.tensor(clusters), 4, valid)
    for b in range(3):
        centres, homes = slow_clusters(x[b, : points[b]], clusters[b])
        assert centre[b, : clusters[b]].tolist() == centres
        assert home[b, : points[b]].tolist() == homes


def test_clusters_of_points_far_apart() -> None:
    """Their densities are all 0 in float32, and still the choice is that of float64."""
    x = 12 * torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid, three = torch.ones(2, 30, dtype=torch.bool), torch.tensor([3, 3])
    for found, expected in zip(density_peaks(x.float(), three, 3, valid), density_peaks(x, three, 3, valid)):
        assert_equal(found, expected)
    near = torch.cdist(x[0], x[0]).topk(3, largest=False).values.square().sum(1) / 6 / 3
    assert not (-near.float()).exp().gt(1e-30).all()


def test_raters_where_no_text_follows() -> None:
    """Rows without an image, and with the image at the end: the last token rates; scores stay finite."""
    real = torch.ones(2, 8, dtype=torch.bool)
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[1, 4:] = True
    chosen = sparsevlm.raters(Entry(torch.randn(2, 8, 4), Layout.whole(visual, real)))
    assert chosen.tolist() == [[False] * 7 + [True]] * 2
    assert not sparsevlm.rater_scores(torch.randn(2, 8, 4), visual, torch.zeros_like(visual)).any()


def test_where_and_how_many() -> None:
    def sites(depth: int, **params: object) -> list[int]:
        reducer = vtok.SparseVLM(**params).build_vlm(info(depth=depth))
        assert [reducer.probe(site) for site in reducer.sites] == [site.index - 1 for site in reducer.sites]
        return [site.index for site in reducer.sites]

    assert [sites(depth) for depth in (32, 40, 17, 16, 4)] == [[3, 7, 16]] * 3 + [[2, 4, 8], [1, 2, 3]]
    assert sites(32, keep=[1.0, 0.5], layers=[4, 9]) == [10]
    model, at = vtok.SparseVLM(recycle=False).build_vlm(info()), Site(Place.DECODER_IN, 3)
    assert model.layer_count(at, 576, 576) == 300
    for table, counts in sparsevlm.TABLES.items():
        model = vtok.SparseVLM(keep_tokens=table).build_vlm(info())
        assert tuple(count for _, _, count in model.stages) == counts
    averages = [(3 * 576 + 4 * a + 9 * b + 16 * c) / 32 for a, b, c in sparsevlm.TABLES.values()]
    assert [round(x) for x in averages] == [203, 141, 110, 79]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"keep": [0.5, 0.25, 0.1], "keep_tokens": 192}, "give keep or keep_tokens, not both"),
        ({"keep_tokens": 100}, "keep_tokens is one of 192, 128, 96, 64, or one count a layer; got 100"),
        ({"keep_tokens": [300, 0, 10]}, "keep_tokens must be a whole number >= 1, got 0"),
        ({"keep": [0.5, 0.25]}, "2 numbers of tokens need layers, one for each"),
        ({"keep": [0.5, 0.25], "layers": [2]}, "layers names 1 decoder layers for 2 shares"),
        ({"recycle": 1}, "recycle is True or False, got 1"),
    ],
)
def test_values_that_make_no_sense(params: dict, message: str) -> None:
    with pytest.raises(vtok.ConfigError, match=message):
        vtok.SparseVLM(**params)
