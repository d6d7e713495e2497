"""PiToMe's presets block by block: against loops, against the authors' arrays, and the token counts that they lead to."""

from typing import Any

import helpers_pitome as slow
import pytest
import torch
from helpers_golden import assert_close, assert_equal, load, model_info, start
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention, normal, positive, properties, seeds
from torch import Tensor

import vtok
from vtok.core.reduction import apply_plan
from vtok.core.tokens import AttentionView, Site, TokenState
from vtok.methods.pitome.presets import PRESETS

OWN_NAME = {"energy": "energy", "sorted": "sorted_bsm", "bsm": "bsm"}
NOTHING = AttentionView(None, None, None, None, 1.0, None)


def test_every_preset_is_looked_at() -> None:
    assert set(PRESETS) == set(slow.PRESETS)


@pytest.mark.parametrize("depth", [1, 5, 12, 13, 24, 40])
@pytest.mark.parametrize("preset", slow.PRESETS)
def test_what_each_block_does(preset: str, depth: int) -> None:
    reducer = vtok.PiToMe(preset=preset).build(model_info(depth=depth))
    expected = [slow.step(preset, i, depth) for i in range(depth)]
    assert reducer.margin == pytest.approx([e.margin for e in expected], abs=1e-15)
    assert list(reducer.matching) == [OWN_NAME[e.matching] for e in expected]
    assert [(site.index, site.place.value) for site in reducer.sites] == [(i, e.place) for i, e in enumerate(expected)]
    assert {e.metric for e in expected} == {"keys" if reducer.needs == frozenset("k") else "hidden"}
    assert {e.weighted for e in expected} == {reducer.sizes}
    assert not reducer.prop_attn
    assert (reducer.alpha, reducer.ratio) == (1.0, (0.925,) * depth)


BLOCKS = [("official_deit", 12, 3), ("official_deit", 12, 6), ("official_mae", 12, 5), ("official_mae", 12, 11)]
BLOCKS += [("official_clip", 24, 0), ("official_clip", 24, 17), ("official_blip", 12, 0), ("official_blip", 12, 11)]
BLOCKS += [("official_llava", 24, 0), ("official_llava", 24, 12), ("official_llava", 24, 13), ("official_llava", 24, 22)]


@pytest.mark.parametrize(("preset", "depth", "block"), BLOCKS)
@settings(properties, max_examples=25)
@given(st.integers(8, 24), st.integers(0, 2), st.sampled_from([0.9, 0.8, 0.66, 0.5, 0.2]), st.booleans(), seeds)
def test_a_block_against_loops(
    preset: str, depth: int, block: int, patches: int, p: int, ratio: float, sized: bool, seed: int
) -> None:
    """Which tokens merge into which, in which order they leave, their means and sizes."""
    n, known = p + patches, slow.step(preset, block, depth)
    x, view = normal(seed, 2, n, 6), attention(seed, 2, n)
    size = positive(seed, 2, n) if sized else None
    facts = model_info(depth=depth, num_prefix=p, num_patches=patches, grid=(1, patches), num_heads=2, head_dim=4, width=6)
    reducer = vtok.PiToMe(ratio=ratio, preset=preset).build(facts)
    site, before = reducer.sites[block], start(x, p, size)
    plan = reducer.plan(x, before, view if known.metric == "keys" else NOTHING, site)
    k = slow.removed(known.matching, n, p, ratio)
    assert reducer.count(site, n, p) == n - k
    if k == 0:
        assert plan is None
        return
    assert plan is not None and view.k is not None
    out, after = apply_plan(x, before, plan)
    assert (after.size is not None) == known.weighted
    metric = view.k.mean(1) if known.metric == "keys" else x
    for b in range(2):
        found = slow.groups(metric[b].numpy(), k, known.matching, known.margin, p)
        ones = torch.ones(n, dtype=torch.float64)
        rows, sizes = slow.merge(x[b].numpy(), (ones if size is None else size[b]).numpy(), found, known.weighted)
        assert after.index is not None and after.index[b].tolist() == [members[0] for members in found]
        assert after.group is not None
        assert after.group[b].tolist() == [next(m for m, members in enumerate(found) if i in members) for i in range(n)]
        assert_close(out[b], torch.from_numpy(rows), 1e-12)
        if after.size is not None:
            assert_close(after.size[b], torch.from_numpy(sizes), 1e-12)


# A file of the authors' operator, and the block of a preset that has its margin (plain ToMe matching has none).
AUTHORS = [
    ("pitome_bsm_cls", "official_llava", 24, 0),
    ("pitome_bsm_deit_r925", "official_llava", 24, 12),
    ("pitome_deit_r90_m75", "official_clip", 19, 4),
    ("pitome_half_nocls_m75", "official_clip", 19, 4),
    ("pitome_deit_r925_m90", "official_blip", 12, 0),
    ("pitome_deit_r95_m375", "official_blip", 12, 7),
    ("pitome_odd_cls_m45", "official_blip", 12, 6),
    ("pitome_deit_r95_m375", "official_llava", 24, 14),
    ("pitome_odd_cls_m45", "official_llava", 26, 13),
]


@pytest.mark.parametrize(("name", "preset", "depth", "block"), AUTHORS)
def test_blocks_against_the_authors_arrays(name: str, preset: str, depth: int, block: int) -> None:
    g = load(name)
    p, n = int(g["class_token"]), g["metric"].shape[1]
    reducer = vtok.PiToMe(ratio=g["ratio"], preset=preset).build(model_info(depth=depth, num_patches=n - p))
    assert g["use_bsm"] or reducer.margin[block] == pytest.approx(g["margin"], abs=1e-15)
    size = g["size_in"][..., 0] if g["size_given"] else None
    plan = reducer.plan(g["metric"], TokenState(p, n), NOTHING, reducer.sites[block])
    assert plan is not None
    merged, state = apply_plan(g["x"], start(g["x"], p, size), plan)
    assert_equal(state.group, g["group"])
    if preset == "official_llava":
        assert_close(merged, g["merged_mean_f64"], 1e-9)
        assert state.size is None
    else:
        assert_close(merged, g["merged_x_f64"], 1e-9)
        assert state.size is not None
        assert_close(state.size[..., None], g["merged_size_f64"], 1e-9)


@pytest.mark.parametrize("ratio", [0.9, 0.925, 0.95])
def test_counts_against_the_authors_table(ratio: float) -> None:
    """Of the patches; in plain ToMe blocks of all tokens. Their code has no cap, ours removes half of the patches at most."""
    g = load("pitome_r_table")
    table = dict(zip(g["T"].tolist(), g["r"][g["ratio"].tolist().index(ratio)].tolist()))
    llava, clip = (
        vtok.PiToMe(ratio=ratio, preset=f"official_{name}").build(model_info(depth=24)) for name in ("llava", "clip")
    )
    differ = 0
    for n in range(2, 1025):
        found = [reducer.merged(i, n, 1) for reducer, i in ((llava, 12), (llava, 13), (clip, 12))]
        assert found == [table[n], table[n - 1], table[n - 1]]
        differ += table[n] != table[n - 1]
    assert differ > 40


def tokens(preset: str, ratio: float, depth: int, n: int) -> list[int]:
    """Tokens, the class token included, that leave every block."""
    reducer = vtok.PiToMe(ratio=ratio, preset=preset).build(model_info(depth=depth, num_patches=n - 1))
    found = []
    for site in reducer.sites:
        n = reducer.count(site, n, 1)
        found.append(n)
    assert len(found) == depth
    return found


@pytest.mark.parametrize(
    ("preset", "depth", "n", "left"),
    [
        ("official_clip", 24, 257, {0.9: 26, 0.925: 45, 0.95: 82, 0.975: 150}),  # CLIP-L/14
        ("official_blip", 12, 577, {0.9: 167, 0.925: 230, 0.95: 316, 0.975: 430}),  # BLIP-B/16 at 384 px
    ],
)
def test_tokens_that_are_left(preset: str, depth: int, n: int, left: dict[float, int]) -> None:
    assert {ratio: tokens(preset, ratio, depth, n)[-1] for ratio in left} == left


def test_image_tokens_that_llava_hands_on() -> None:
    """CLIP-L/14 at 336 px; LLaVA reads what leaves the last block but one, without the class token."""
    left = {0.975: 330, 0.95: 183, 0.925: 101, 0.9: 54, 0.875: 30, 0.85: 17}
    assert {ratio: tokens("official_llava", ratio, 24, 577)[22] - 1 for ratio in left} == left


def test_half_of_the_patches_is_the_most_that_a_block_merges() -> None:
    """Ratios below one half crash the authors' code."""
    for preset in slow.PRESETS:
        assert tokens(preset, 0.2, 14, 101)[:3] == [51, 26, 14]


def test_a_count_instead_of_a_ratio() -> None:
    """r is what a block removes, however it matches; which tokens go follows from the preset."""
    x = normal(3, 1, 21, 6)
    for preset, facts in (("official_clip", {"depth": 24}), ("official_llava", {"depth": 24})):
        config = vtok.PiToMe(r=4, preset=preset)
        reducer = config.build(model_info(**facts, num_patches=20))
        share = vtok.PiToMe(ratio=0.8, preset=preset).build(model_info(**facts, num_patches=20))
        for i in (0, 13):
            plan, same = (r.plan(x, TokenState(1, 21), NOTHING, r.sites[i]) for r in (reducer, share))
            assert plan is not None and same is not None
            assert reducer.count(reducer.sites[i], 21, 1) == 17
            assert_equal(plan.keep, same.keep)


def both_metrics(**extra: Any) -> list[Tensor]:
    view, x = attention(5, 1, 21), normal(6, 1, 21, 6)
    found = []
    for metric in ("keys", "hidden"):
        reducer = vtok.PiToMe(ratio=0.8, metric=metric, **extra).build(model_info(num_patches=20))
        assert reducer.prop_attn and reducer.sizes
        plan = reducer.plan(x, TokenState(1, 21), view, reducer.sites[1])
        assert plan is not None
        found.append(plan.keep[0])
    return found


def test_the_metric_is_a_choice_without_a_preset_too() -> None:
    """The paper's margins and proportional attention stay."""
    keys, hidden = both_metrics()
    default = vtok.PiToMe(ratio=0.8).build(model_info(num_patches=20))
    plan = default.plan(normal(6, 1, 21, 6), TokenState(1, 21), attention(5, 1, 21), default.sites[1])
    assert plan is not None
    assert_equal(keys, plan.keep[0])
    found = slow.groups(normal(6, 1, 21, 6)[0].numpy(), 4, "energy", 0.9 - 0.9 / 4, 1)
    assert hidden.tolist() == [members[0] for members in found] != keys.tolist()


@pytest.mark.parametrize("preset", [None, *slow.PRESETS])
def test_deciding_is_priced_by_the_width_of_what_is_compared(preset: str | None) -> None:
    """Against the products written out; whole towers are counted elsewhere."""
    reducer = vtok.PiToMe(ratio=0.9, preset=preset).build(model_info(depth=24, num_patches=30, head_dim=8, width=24))
    for i in (0, 12, 13, 23):
        known = slow.Step(0, "energy", "keys", "mid", True) if preset is None else slow.step(preset, i, 24)
        width = 8 if known.metric == "keys" else 24
        pairs = {"energy": 30 * 30 + 3 * 3, "sorted": 30 * 30 + 15 * 15, "bsm": 15 * 15}[known.matching]
        assert reducer.macs(reducer.sites[i], 31, 1) == pairs * width
        assert reducer.macs(Site(reducer.place, i), 9, 1) == 0  # nothing to merge: 10 % of 8 patches, or of 9 tokens
