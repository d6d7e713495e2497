"""PiToMe against numbers computed with the authors' code (see golden/README.md)."""

import math
from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, images, load, model, model_info, run_model, start, token_counts

import vtok
from vtok.core.reduction import Plan, apply_plan
from vtok.methods.pitome import energy_plan, energy_score, merge_count, sorted_bsm_plan
from vtok.ops.matching import bipartite_soft_matching
from vtok.ops.rows import take_rows

ENERGY = [  # only the 2k tokens of highest energy take part
    "pitome_even_nocls_m50",
    "pitome_even_cls_m0",
    "pitome_odd_cls_m45",
    "pitome_half_nocls_m75",
    "pitome_half_even_cls",
    "pitome_alpha0",
    "pitome_alpha05",
    "pitome_deit_r90_m75",
    "pitome_deit_r925_m90",
    "pitome_deit_r95_m375",
]
SORTED = ["pitome_bsmp_even_cls", "pitome_bsmp_odd_cls", "pitome_bsmp_odd_nocls", "pitome_bsmp_deit_r90"]
PLAIN = ["pitome_bsm_cls", "pitome_bsm_deit_r925"]  # ToMe's matching with PiToMe's count
MODELS = {
    "pitome_deit_tiny_r9": "official_deit",
    "pitome_deit_tiny_r95": "official_deit",
    "pitome_micro_r90": "official_deit",
    "pitome_mae_micro_r90": "official_mae",
}
SUFFIX = {torch.float64: ("_f64", 1e-9), torch.float32: ("_f32", 1e-6)}
DTYPES = pytest.mark.parametrize("dtype", SUFFIX, ids=str)


def planned(g: dict[str, Any]) -> tuple[int, int, Plan]:
    """(prefix tokens, patches, plan) of a function file."""
    num_prefix, n = int(g["class_token"]), g["metric"].shape[1]
    if g["use_bsm"]:
        found = bipartite_soft_matching(g["metric"], math.floor(n - n * g["ratio"]), num_prefix)
        plan = None if found is None else Plan(*found)
    else:
        make = sorted_bsm_plan if g["use_bsm_pitome"] else energy_plan
        plan = make(g["metric"], merge_count(n - num_prefix, g["ratio"]), g["margin"], g["alpha"], num_prefix)
    assert plan is not None and plan.src is not None and plan.src.shape[1] == g["r"]
    return num_prefix, n - num_prefix, plan


@DTYPES
@pytest.mark.parametrize("name", ENERGY + SORTED)
def test_energy(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    suffix, tolerance = SUFFIX[dtype]
    found = energy_score(g["metric"][:, int(g["class_token"]) :], g["margin"], g["alpha"])
    assert_close(found, g["energy" + suffix], tolerance)


@DTYPES
@pytest.mark.parametrize("name", ENERGY)
def test_energy_plan(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    p, patches, plan = planned(g)
    assert plan.src is not None and plan.dst is not None
    first_b = p + patches - 2 * g["r"]
    assert_equal(plan.src - p, g["a_index"])
    assert_equal(plan.keep[:, p:first_b] - p, g["protected_index"])
    assert_equal(plan.keep[:, first_b:] - p, g["b_index"])
    assert_equal(plan.dst - first_b, g["dst_b_pos"])


@DTYPES
@pytest.mark.parametrize("name", SORTED)
def test_sorted_plan(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    p, _, plan = planned(g)
    assert plan.src is not None and plan.dst is not None
    first_b = p + g["unm_a_pos"].shape[1]
    assert_equal(plan.src - p, g["a_index"].gather(1, g["src_a_pos"]))
    assert_equal(plan.keep[:, p:first_b] - p, g["a_index"].gather(1, g["unm_a_pos"]))
    assert_equal(plan.keep[:, first_b:] - p, g["b_index"])
    assert_equal(plan.dst - first_b, g["dst_b_pos"])


@DTYPES
@pytest.mark.parametrize("name", PLAIN)
def test_plain_matching(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    _, _, plan = planned(g)
    assert plan.src is not None and plan.dst is not None
    from_a = plan.keep % 2 == 0
    assert_equal(plan.src, 2 * g["src_a_index"])
    assert_equal(plan.keep.gather(1, plan.dst), 2 * g["dst_b_index"] + 1)
    assert_equal(plan.keep[from_a].view(len(plan.keep), -1), 2 * g["unm_a_index"])


@DTYPES
@pytest.mark.parametrize("name", ENERGY + SORTED + PLAIN)
def test_merged_tokens_and_sizes(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    suffix, tolerance = SUFFIX[dtype]
    p, _, plan = planned(g)
    merged, state = apply_plan(g["x"], start(g["x"], p, g["size_in"][..., 0] if g["size_given"] else None), plan)
    assert state.size is not None and state.group is not None
    assert_close(merged, g["merged_x" + suffix], tolerance)
    assert_close(state.size[..., None], g["merged_size" + suffix], tolerance)
    assert_equal(state.group, g["group"])
    mean, _ = apply_plan(g["x"], start(g["x"], p), plan._replace(use_size=False))
    assert_close(mean, g["merged_mean" + suffix], tolerance)
    if not g["use_bsm"]:
        pruned, state = apply_plan(g["x"], start(g["x"], p), Plan(plan.keep))
        assert_equal(pruned, take_rows(g["x"], plan.keep))
        assert_close(pruned, g["pruned" + suffix], tolerance)


def test_merge_count_is_floored_in_double_precision() -> None:
    g = load("pitome_r_table")
    found = [[merge_count(t, ratio) for t in g["T"].tolist()] for ratio in g["ratio"].tolist()]
    assert_equal(torch.tensor(found), g["r"])
    assert any(k != int(t * (1 - ratio)) for ratio, row in zip(g["ratio"].tolist(), found) for t, k in enumerate(row, 1))


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    g = load(name)
    config = vtok.PiToMe(ratio=g["ratio"], preset=MODELS[name])
    depth = len(g["tokens_after_block"])
    reducer = config.build(model_info(depth=depth))
    assert_close(torch.tensor(reducer.margin, dtype=torch.float64), g["margins"], 1e-15)
    assert_equal(torch.tensor([kind == "sorted_bsm" for kind in reducer.matching]), g["use_bsm_pitome"])
    assert not reducer.prop_attn
    with vtok.patched(model(g["tag"]), config, trace=True) as patched:
        logits, outputs, done = run_model(patched, images(g))
    # The authors' MAE variant divides the pooled sum by 3 rather than by the patches; the file holds both.
    assert_close(logits, g.get("logits_divided_by_patches_f64", g["logits_f64"]), 1e-9)
    assert ("logits_divided_by_patches_f64" in g) == (name == "pitome_mae_micro_r90")
    assert token_counts(done) == g["tokens_after_block"].tolist()
    assert done.final is not None
    assert_equal(done.final.group, g["group"])
    assert_equal(done.final.size, g["final_size"])
    for i, output in enumerate(outputs):
        assert (f"block{i}_out_f64" in g) == g["tag"].startswith("micro")
        if f"block{i}_out_f64" in g:
            assert_close(output, g[f"block{i}_out_f64"], 1e-9)
