"""What is particular to one method, against loops."""

import math
from typing import Any

import pytest
import torch
from helpers_golden import assert_equal, model_info, start
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention, decided, generator, grids, normal, positive, properties, row_stochastic, seeds
from torch import Tensor
from zoo import build, images

import vtok
from vtok.config import ModelInfo
from vtok.core.prompt import View, VLMInfo
from vtok.core.tokens import AttentionView, Place, Site, TokenState, log_size_bias
from vtok.methods.ats import significance_scores
from vtok.methods.ats.sampling import midpoint_samples
from vtok.methods.baselines.uniform_grid import dither_rank
from vtok.methods.pitome import energy_plan, energy_score, merge_count, sorted_bsm_plan
from vtok.methods.zero_tprune import Step, prune_plan
from vtok.ops.selection import kept_tokens


# PiToMe.
@properties
@given(st.integers(1, 2), st.integers(1, 9), st.floats(-1, 1), st.sampled_from([0.0, 0.5, 1.0]), seeds)
def test_energy_is_the_mean_of_rectified_similarities(batch: int, t: int, margin: float, alpha: float, seed: int) -> None:
    metric = normal(seed, batch, t, 3)
    found = energy_score(metric, margin, alpha)
    for b in range(batch):
        for i in range(t):
            total = 0.0
            for j in range(t):
                u, v = metric[b, i], metric[b, j]
                z = float(u @ v / (u.norm() * v.norm())) - margin
                total += z if z > 0 else alpha * math.expm1(z)
            assert float(found[b, i]) == pytest.approx(total / t, abs=1e-12)


@properties
@given(st.integers(0, 400), st.floats(0.001, 1))
def test_merge_count_never_exceeds_half(t: int, ratio: float) -> None:
    assert merge_count(t, ratio) == min(math.floor(t - t * ratio), t // 2) >= 0
    assert merge_count(t, 1.0) == 0


def test_nothing_to_merge_makes_no_plan() -> None:
    metric = normal(0, 1, 9, 4)
    assert energy_plan(metric, 0, 0.5, 1.0, 1) is None
    assert sorted_bsm_plan(metric, 0, 0.5, 1.0, 1) is None
    reducer = vtok.PiToMe(ratio=0.95).build(model_info())
    assert reducer.plan(metric, TokenState(1, 9), attention(0, 1, 9), Site(Place.BLOCK_MID, 0)) is None  # 5 % of 8 is none


def test_prop_attn_is_on_unless_said_otherwise() -> None:
    for config, on in (
        (vtok.ToMe(r=2), True),
        (vtok.ToMe(r=2, prop_attn=False), False),
        (vtok.PiToMe(), True),
        (vtok.PiToMe(prop_attn=False), False),
        (vtok.PiToMe(preset="official_mae"), False),
        (vtok.PiToMe(preset="official_mae", prop_attn=True), True),
    ):
        assert config.build(model_info()).prop_attn is on


# ATS.
@properties
@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 7), st.booleans(), seeds)
def test_significance(batch: int, heads: int, n: int, per_head: bool, seed: int) -> None:
    attn, v = positive(seed, batch, heads, n), normal(seed, batch, heads, n, 4)
    found = significance_scores(attn, v, per_head)
    for b in range(batch):
        if per_head:
            scores = [sum(float(attn[b, h, j] * v[b, h, j].norm()) for h in range(heads)) for j in range(1, n)]
        else:
            scores = [float(attn[b, :, j].sum() * v[b, :, j].flatten().norm()) for j in range(1, n)]
        assert found[b].tolist() == pytest.approx([score / sum(scores) for score in scores], abs=1e-12)
    assert not significance_scores(attn, 0 * v, per_head).any()


@properties
@given(st.integers(1, 2), st.integers(3, 9), st.integers(1, 3), st.integers(1, 6), st.booleans(), seeds)
def test_a_token_is_sampled_by_its_own_attention_and_value(
    batch: int, patches: int, p: int, k: int, per_head: bool, seed: int
) -> None:
    """Of the class token's row, whatever stands in front of the patches."""
    n = p + patches
    view, k = attention(seed, batch, n), min(k, patches)
    facts = model_info(num_prefix=p, num_patches=patches, grid=(1, patches), num_heads=2, head_dim=4)
    config = vtok.ATS(num_tokens=k, layers=[0], score="per_head" if per_head else "sum_attention")
    plan = config.build(facts).plan(torch.zeros(batch, n, 1), TokenState(p, n), view, Site(Place.BLOCK_PRE, 0))
    assert plan is not None and view.v is not None
    row = view.probs()[:, :, 0]
    hit = midpoint_samples(significance_scores(row[:, :, p - 1 :], view.v[:, :, p - 1 :], per_head), k)
    for b in range(batch):
        real = plan.keep[b] if plan.valid is None else plan.keep[b][plan.valid[b]]
        assert real.tolist() == [*range(p), *(hit[b].nonzero()[:, 0] + p).tolist()]


@pytest.mark.parametrize("config", [{}, {"query": "mean"}, {"score": "per_head"}], ids=str)
@properties
@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 13), seeds)
def test_padding_does_not_change_what_is_sampled(
    config: dict[str, Any], batch: int, patches: int, padding: int, p: int, k: int, seed: int
) -> None:
    """Rows that stand for nothing are behind the real ones; dropping and masking keep the same tokens."""
    n = p + patches
    view = attention(seed, batch, n + padding)
    keep = torch.ones(batch, n + padding, dtype=torch.bool)
    keep[:, n:] = False
    state = start(torch.zeros(batch, n + padding, 1), p, keep=keep)
    padded = view._replace(bias=log_size_bias(state, torch.float64))
    bare = AttentionView(*(t[:, :, :n] if isinstance(t, Tensor) else t for t in view))
    facts = model_info(num_prefix=p, num_patches=patches + padding, grid=(1, patches + padding), num_heads=2, head_dim=4)
    k = min(k, patches + padding)  # an earlier block may have left fewer tokens than there are samples
    found = []
    for mode in ("drop", "mask"):
        reducer = vtok.ATS(num_tokens=k, mode=mode, layers=[0], **config).build(facts)
        for given_view, given_state in ((bare, TokenState(p, n)), (padded, state)):
            plan = decided(reducer, given_view, given_state)
            assert plan is not None
            if mode == "mask":
                assert plan.keep.shape[1] == p + min(k, given_view.k.shape[2] - p)  # type: ignore[union-attr]
            real = torch.ones_like(plan.keep, dtype=torch.bool) if plan.valid is None else plan.valid
            assert mode == "mask" or real.any(0).all()  # cut to the longest image
            assert mode == "mask" or (plan.valid is None) == bool(real.all())
            assert (real.sum(1) <= p + k).all()
            found.append([rows[mine].tolist() for rows, mine in zip(plan.keep, real)])
    assert found.count(found[0]) == 4
    assert all(rows == sorted(rows) and rows[-1] < n for rows in found[0])


# Zero-TPrune.
@properties
@given(st.integers(1, 40), st.integers(0, 20), st.floats(0.01, 1), seeds)
def test_deep_blocks_prune_what_they_can(n: int, r: int, retain: float, seed: int) -> None:
    """Late in a schedule fewer patches may be left than r asks for: half of them can go at most, and one stays."""
    step = Step(0, retain, r, 1)
    similar, kept = step.counts(n)
    assert similar == min(r, n // 2)
    assert kept == max(1, math.floor((n - similar) * retain))
    plan = prune_plan(row_stochastic(seed, 2, 1, n + 1, n + 1), normal(seed, 2, 1, n + 1, 3), 1, step)
    assert plan.keep.shape == (2, 1 + kept)


@pytest.mark.parametrize(
    "options",
    [{}, {"tau": 0.3}, {"cls_init": "uniform"}, {"head_filter": None}, {"partition": "seq_i"}, {"metric": "manhattan"}],
    ids=str,
)
def test_every_option_reaches_the_plan(options: dict[str, Any]) -> None:
    view, n = attention(7, 8, 33), 33
    facts = model_info(num_patches=32, grid=(4, 8), num_heads=2, head_dim=4)
    config = vtok.ZeroTPrune(layers=[1], retain=0.6, r=6, iters=3)
    changed = config.replace(**options)
    plans = [decided(c.build(facts), view, TokenState(1, n), block=1) for c in (config, changed)]
    assert plans[0] is not None and plans[1] is not None and view.k is not None
    assert torch.equal(plans[0].keep, plans[1].keep) == (not options)
    direct = prune_plan(
        view.probs(tau=changed.tau), view.k, 1, changed.build(facts).steps[0],
        changed.cls_init == "sqrt", changed.head_filter, changed.partition, changed.metric,
    )  # fmt: skip
    assert_equal(plans[1].keep, direct.keep)


@properties
@given(st.integers(3, 12), seeds, st.sampled_from(["seq_u", "seq_i", "alternate"]))
def test_pruning_moves_with_the_patches(patches: int, seed: int, partition: str) -> None:
    reducer = vtok.ZeroTPrune(layers=[0], retain=0.7, r=1, partition=partition).build(
        model_info(num_patches=patches, grid=(1, patches), num_heads=2, head_dim=4)
    )
    view = attention(seed, 2, 1 + patches)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(patches, generator=generator(seed))])
    moved = AttentionView(*(t[:, :, order] if isinstance(t, Tensor) else t for t in view))
    kept, kept_moved = (decided(reducer, v, TokenState(1, 1 + patches)) for v in (view, moved))
    assert kept is not None and kept_moved is not None
    assert_equal(order[kept_moved.keep].sort(-1).values, kept.keep)


# Random and uniform pruning.
def ranks(config: Any, patches: int, grid: tuple[int, int], block: int) -> Tensor:
    """[1, patches]: what decides for every image of any batch."""
    reducer = config.build(model_info(num_patches=patches, grid=grid))
    return reducer.rank(patches, TokenState(1, 1 + patches), Site(Place.BLOCK_MID, block), torch.device("cpu"))


@properties
@given(st.integers(20, 300), st.integers(-5, 2**40), st.integers(0, 30))
def test_random_order_is_a_permutation_that_differs_between_blocks_and_seeds(patches: int, seed: int, block: int) -> None:
    grid = (1, patches)
    found = ranks(vtok.RandomDrop(seed=seed), patches, grid, block)
    assert found.shape == (1, patches)  # all images alike
    assert len(set(found[0].tolist())) == patches
    drawn = [ranks(vtok.RandomDrop(seed=s), patches, grid, b).argsort(-1) for s in (seed, seed + 1) for b in (0, 1, 2)]
    assert len({tuple(order[0].tolist()) for order in drawn}) == 6


def test_random_order_favours_no_patch() -> None:
    """Over many seeds every patch is kept about half of the time: 5 standard deviations are 0.11."""
    kept = torch.zeros(16)
    for seed in range(512):
        order = ranks(vtok.RandomDrop(keep=0.5, seed=seed), 16, (4, 4), 0).argsort(-1)[0, :8]
        kept[order] += 1 / 512
    assert ((kept - 0.5).abs() < 0.11).all()


@properties
@given(st.integers(1, 40), st.integers(1, 40))
def test_dither_ranks_are_distinct(rows: int, columns: int) -> None:
    found = dither_rank(torch.arange(rows * columns), columns, rows)
    assert len(set(found.tolist())) == rows * columns
    assert (found >= 0).all()


def kept_patches(keep: float, grid: tuple[int, int]) -> set[tuple[int, int]]:
    patches = grid[0] * grid[1]
    reducer = vtok.UniformGrid(keep=keep).build(model_info(num_patches=patches, grid=grid))
    plan = decided(reducer, attention(0, 1, 1 + patches), TokenState(1, 1 + patches))
    kept = range(1, 1 + patches) if plan is None else plan.keep[0, 1:].tolist()  # a large share of few is all of them
    return {divmod(i - 1, grid[1]) for i in kept}


def test_a_quarter_of_the_grid_is_every_second_row_and_column() -> None:
    everywhere = {(y, x) for y in range(8) for x in range(8)}
    assert kept_patches(1 / 4, (8, 8)) == {(y, x) for y, x in everywhere if y % 2 == x % 2 == 0}
    assert kept_patches(1 / 2, (8, 8)) == {(y, x) for y, x in everywhere if y % 2 == x % 2}  # a chessboard
    assert kept_patches(1 / 16, (8, 8)) == {(y, x) for y, x in everywhere if y % 4 == x % 4 == 0}
    assert kept_patches(1 / 4, (4, 8)) == {(y, x) for y, x in everywhere if y % 2 == x % 2 == 0 and y < 4}


@properties
@given(grids, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_what_a_smaller_share_keeps_a_larger_one_keeps_too(grid: tuple[int, int], a: float, b: float) -> None:
    few, many = sorted((a, b))
    assert kept_patches(few, grid) <= kept_patches(many, grid)


@properties
@given(seed=seeds)
def test_uniform_goes_by_original_positions(seed: int) -> None:
    """After a method that moved and dropped tokens, whichever of them are left are ranked where they came from."""
    reducer = vtok.UniformGrid(keep=0.6).build(model_info())
    left = 1 + torch.rand(1, 16, generator=generator(seed)).argsort(-1)[:, :10]
    plans = []
    for order in (left, left.sort(-1).values):
        index = torch.cat([torch.zeros(1, 1, dtype=torch.int64), order], 1)
        plan = decided(reducer, attention(0, 1, 11), TokenState(1, 17, index))
        assert plan is not None
        assert_equal(plan.keep.sort(-1).values, plan.keep)  # what stays, stays in order
        plans.append(set(index[0, plan.keep[0]].tolist()))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.55, 0.9, 0.925, 0.999])
def test_a_share_means_one_number_of_tokens(keep):
    """Whatever method, whatever side of a model: a table compares methods that keep as many."""
    for n in (1, 2, 5, 49, 64, 196, 256, 576, 577, 2880):
        wanted = kept_tokens(n, keep)
        assert wanted == min(n, max(1, round(n * keep)))
        facts = ModelInfo("ViT", 4, 1, n, (1, n), True, 48, 12, 4, 4)
        for config in (vtok.RandomDrop(keep=keep), vtok.UniformGrid(keep=keep), vtok.ATS(keep=keep)):
            reducer = config.build(facts)
            assert reducer.count(reducer.sites[0], n + 1, 1) == wanted + 1, config
        llm = VLMInfo("VLM", 4, 64, 4)
        for config in (vtok.RandomDrop(keep=keep), vtok.UniformGrid(keep=keep), vtok.ToDRE(keep=keep, probe=None)):
            assert config.build_vlm(llm).feature_count(n, (View(0, 1, n),)) == wanted, config


def test_ats_takes_a_k_for_every_block():
    x = images("timm: ViT", batch=3)

    def run(**params: Any) -> tuple[Tensor, list[float]]:
        model = vtok.patch(build("timm: ViT"), "ats", **params)
        with torch.no_grad():
            out = model(x)
        return out, [block.mean_tokens for block in vtok.info(model).towers[0].blocks]

    same = run(num_tokens=[20, 20], layers=[1, 2]), run(num_tokens=20, layers=[1, 2])
    assert torch.equal(same[0][0], same[1][0])
    first, second = run(num_tokens=20, layers=[1])[1][1], run(num_tokens=[20, 7], layers=[2, 1])[1]  # blocks in their order
    assert second[1] == first > second[2] and second[2] <= 1 + 7
    assert vtok.plan(build("timm: ViT"), "ats", num_tokens=[20, 7], layers=[1, 2]).tokens[1:3] == (21, 8)
    with pytest.raises(vtok.ConfigError, match=r"num_tokens has 2 numbers for 3 layers \(1, 2, 3\)"):
        vtok.patch(build("timm: ViT"), "ats", num_tokens=[20, 7], layers=[1, 2, 3])


def test_plans_say_what_was_measured_against_a_setting():
    told = str(vtok.plan(build("timm: ViT"), "pitome"))
    assert told.splitlines()[-1].startswith("note: with the paper's matching") and 'protect="late"' in told
    assert "lost to random pruning" in str(vtok.plan(build("timm: ViT"), "zero_tprune"))
    for params in ({"protect": "late"}, {"protect": "none"}, {"preset": "official_deit"}):
        assert "note:" not in str(vtok.plan(build("timm: ViT"), "pitome", **params))


def test_which_blocks_of_pitome_protect():
    def matching(**params: Any) -> tuple[str, ...]:
        return vtok.PiToMe(**params).build(model_info(depth=5, num_patches=20)).matching

    assert matching() == matching(protect="all") == ("energy",) * 5
    assert matching(protect="late") == matching(preset="official_deit") == ("sorted_bsm",) * 3 + ("energy",) * 2
    assert matching(protect="none") == ("sorted_bsm",) * 5
    late = vtok.PiToMe(protect="late").build(model_info(depth=5, num_patches=20))
    assert late.prop_attn and late.margin[0] == 0.9 and not late.hidden  # all else is the paper's
    with pytest.raises(vtok.ConfigError, match="protect must be one of all, late, none, got 'early'"):
        vtok.PiToMe(protect="early")
    with pytest.raises(vtok.ConfigError, match="preset 'official_mae' fixes the matching; drop protect=late"):
        vtok.PiToMe(preset="official_mae", protect="late")
