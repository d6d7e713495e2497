"""ToMe against numbers computed with the authors' code (see golden/README.md)."""

import json
from typing import Any

import pytest
import torch
from helpers_golden import FOLDER, assert_close, assert_equal, images, load, model, run_model, start, token_counts
from torch import Tensor

import vtok
from vtok.config import Schedule
from vtok.core.reduction import Plan, apply_plan, unmerge
from vtok.ops.matching import bipartite_pairs, bipartite_soft_matching
from vtok.ops.rows import take_rows

FUNCTIONS = [
    "tome_even_nocls",
    "tome_odd_nocls",
    "tome_odd_cls",
    "tome_even_cls",
    "tome_cap_cls",
    "tome_cap_dist",
    "tome_dist_r4",
    "tome_deit_cls_r13",
    "tome_deit_cls_r16_size",
    "tome_deit_dist_r16",
]
MODELS = [
    "tome_deit_tiny_r0",
    "tome_deit_tiny_r8",
    "tome_deit_tiny_r13",
    "tome_deit_tiny_r13_noprop",
    "tome_deit_tiny_r8_dec",
    "tome_deit_tiny_distilled_r8",
    "tome_micro_r6",
]
SUFFIX = {torch.float64: ("_f64", 1e-9), torch.float32: ("_f32", 1e-6)}
PARSED = json.loads((FOLDER / "tome_parse_r.json").read_text())


def matched(g: dict[str, Any]) -> tuple[int, Plan]:
    num_prefix = g["class_token"] + g["distill_token"]
    found = bipartite_soft_matching(g["metric"], g["r_requested"], num_prefix)
    assert found is not None
    return num_prefix, Plan(*found)


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_matching_chooses_the_same_pairs_in_the_same_order(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    num_prefix, plan = matched(g)
    assert plan.src is not None and plan.dst is not None
    assert bipartite_pairs(g["N"], g["r_requested"], num_prefix) == g["r_effective"] == plan.src.shape[1]
    assert_equal(plan.src, 2 * g["src_a_index"])
    assert_equal(plan.keep.gather(1, plan.dst), 2 * g["dst_b_index"] + 1)
    from_a = plan.keep % 2 == 0
    assert_equal(plan.keep[from_a].view(g["B"], -1), 2 * g["unm_a_index"])
    assert_equal(plan.keep[~from_a].view(g["B"], -1), torch.arange(1, g["N"], 2).expand(g["B"], -1))


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_merged_tokens_and_sizes(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    suffix, tolerance = SUFFIX[dtype]
    num_prefix, plan = matched(g)
    merged, state = apply_plan(g["x"], start(g["x"], num_prefix, g["size_in"][..., 0] if g["size_given"] else None), plan)
    assert state.size is not None and state.group is not None
    assert_close(merged, g["merged_x" + suffix], tolerance)
    assert_close(state.size[..., None], g["merged_size" + suffix], tolerance)
    assert_equal(state.group, g["group"])
    if not g["distill_token"]:  # with one the authors' function puts rows back in the wrong places
        assert_close(unmerge(merged, state), g["unmerged" + suffix], tolerance)


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_mean_and_maximum_over_the_same_groups(name: str, dtype: torch.dtype) -> None:
    g = load(name, dtype)
    suffix, tolerance = SUFFIX[dtype]
    num_prefix, plan = matched(g)
    assert plan.src is not None and plan.dst is not None
    mean, state = apply_plan(g["x"], start(g["x"], num_prefix), plan._replace(use_size=False))
    assert state.size is None
    assert_close(mean, g["merged_mean" + suffix], tolerance)
    into = plan.dst[..., None].expand(-1, -1, g["x"].shape[-1])
    largest = take_rows(g["x"], plan.keep).scatter_reduce(1, into, take_rows(g["x"], plan.src), "amax")
    assert_close(largest, g["merged_amax" + suffix], tolerance)


def read_r(text: str) -> Any:
    r = json.loads(text)
    return (r[0], r[1]) if isinstance(r, list) else r


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    g = load(name)
    with vtok.patched(model(g["tag"]), "tome", r=read_r(g["r"]), prop_attn=g["prop_attn"], trace=True) as patched:
        logits, outputs, done = run_model(patched, images(g))
    assert_close(logits, g["logits_f64"], 1e-9)
    assert token_counts(done) == g["tokens_after_block"].tolist()
    final = done.final
    assert final is not None
    if name == "tome_deit_tiny_r0":
        assert final.trivial
        return
    assert_equal(final.group, g["group"])
    assert_equal(final.size, g["final_size"])
    for i, output in enumerate(outputs):
        expected: Tensor | None = g.get(f"block{i}_out_f64")
        assert (expected is None) == (g["tag"] != "micro")
        if expected is not None:
            assert_close(output, expected, 1e-9)


def test_r_may_be_one_number_a_list_or_a_line() -> None:
    too_long = 0
    for key, expected in PARSED.items():
        length, r, kind = (part.partition("=")[2] or part for part in key.split(";"))
        value = tuple(json.loads(r)) if kind == "tuple" else json.loads(r)
        schedule, depth = Schedule.of(value, "r", integer=True), int(length)
        if len(expected) > depth:  # the authors' code ignores what lies beyond the last block
            too_long += 1
            with pytest.raises(vtok.ConfigError, match=f"r lists {len(value)} blocks, the model has {depth}"):
                schedule.resolve(depth, "r", pad=0)
        else:
            assert list(schedule.resolve(depth, "r", pad=0)) == expected, key
    assert (len(PARSED), too_long) == (39, 3)
