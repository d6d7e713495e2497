"""ATS with `parity=True` against numbers computed with the authors' code (see golden/README.md).

The authors' softmax works in float32 whatever the model's dtype, so modules and models agree to 2e-6, not better. Rows of zeros
that pad the authors' tensors are compared by their number, not by their content.
"""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, images, load, model, model_info, run_model, start, states, token_counts
from torch import Tensor

import vtok
from vtok.core.reduction import apply_plan
from vtok.core.tokens import AttentionView, Place, Site, TokenState, log_size_bias
from vtok.methods.ats import significance_scores
from vtok.methods.ats.sampling import endpoint_samples, nearest
from vtok.ops.rows import rows_where, take_rows, with_prefix

FUNCTIONS = ["ats_fn_n17", "ats_fn_n17_ref33", "ats_fn_n17_padded", "ats_fn_n50_flat", "ats_fn_n197"]
MODULES = ["ats_module", "ats_module_padded"]
MODELS = ["ats_micro_drop", "ats_micro_mask", "ats_deit_tiny_drop", "ats_deit_tiny_mask"]
SOFTMAX = 2e-6


def real_rows(t: Tensor, real: Tensor) -> list[Tensor]:
    """Per image the rows that are not padding; lengths differ."""
    return [row[: int(count)] for row, count in zip(t, real.sum(-1))]


def kept_ids(state: TokenState, width: int) -> Tensor:
    """[B, width]: original ids of the tokens that are left, -1 after them."""
    assert state.index is not None
    ids = state.index if state.keep is None else state.index.where(state.keep, -1)
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores(name: str) -> None:
    g = load(name)
    assert_close(significance_scores(g["attn"][:, :, 0], g["v"]), g["score_f64"], 1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nearest_picks_the_same_entries(name: str) -> None:
    g = load(name)
    cdf, samples = g["normalized_cdf_f64"], g["ys_f64"]
    assert samples.shape[1] == g["n_ref_tokens"] - 1
    padded = torch.nn.functional.pad(cdf, (0, samples.shape[1] - cdf.shape[1]), value=7.0)  # out of reach, as in a batch
    for grid in (cdf, padded):
        assert_equal(nearest(samples.contiguous(), grid.contiguous()), g["picked_sorted_pos"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_keep_the_same_tokens(name: str) -> None:
    g = load(name)
    score = significance_scores(g["attn"][:, :, 0], g["v"])
    order, hit = endpoint_samples(score, g["n_ref_tokens"] - 1)
    assert_close(score.gather(1, order), g["sorted_score_f64"], 1e-9)
    ranked = g["sorted_score_f64"] > 0  # tokens of score zero are tied
    assert_equal(order[ranked], g["sorted_index"][ranked])
    assert int((~ranked).sum()) == (5 if name == "ats_fn_n17_padded" else 0)

    positions, real = rows_where(hit, hit.shape[1])
    padding = hit.shape[1]
    assert_equal(positions.where(real, padding), g["unique_sorted_pos"])
    ids = order.gather(1, positions)
    assert_equal((ids + 1).where(real, -1), g["kept_token_id"])

    rows, real = with_prefix(ids, 1), torch.cat([real.new_ones(len(real), 1), real], 1)
    assert_equal(real[..., None].to(torch.float64), g["policy_out"])
    context = (g["attn"] @ g["v"]).transpose(1, 2).flatten(2)
    for found, expected in (
        (take_rows(g["raw_x"], rows), g["selected_x_f64"]),
        (take_rows(context, rows), g["attn_out_f64"]),
    ):
        for ours, theirs in zip(real_rows(found, real), real_rows(expected, real)):
            assert_close(ours, theirs, 1e-9)


def attention_view(g: dict[str, Any], state: TokenState) -> AttentionView:
    q, k, v = (g["x"] @ g["qkv_weight"].T + g["qkv_bias"]).unflatten(-1, (3, g["num_heads"], -1)).permute(2, 0, 3, 1, 4)
    return AttentionView(q, k, k, v, q.shape[-1] ** -0.5, log_size_bias(state, q.dtype))


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("name", MODULES)
def test_attention_modules(name: str, mode: str) -> None:
    g = load(name)
    alive = g["policy_in"][..., 0] > 0
    assert bool(alive.all()) == (name == "ats_module")
    state = start(g["x"], 1, keep=None if alive.all() else alive)
    assert state.length == g["n_ref_tokens"]
    view = attention_view(g, state)
    reducer = vtok.ATS(parity=True, mode=mode).build(model_info(num_heads=g["num_heads"]))
    plan = reducer.plan(g["raw_x"], state, view, Site(Place.BLOCK_PRE, 1))
    assert plan is not None
    selected, after = apply_plan(g["raw_x"], state, plan)

    keep = torch.ones(plan.keep.shape, dtype=torch.bool) if after.keep is None else after.keep
    assert_equal(keep[..., None].to(torch.float64), g[f"{mode}_policy"])
    context = reducer.attention(state, view, plan.keep)
    assert context is not None
    y = context.transpose(1, 2).flatten(2) @ g["proj_weight"].T + g["proj_bias"]
    for ours, theirs in zip(real_rows(selected, keep), real_rows(g[f"{mode}_selected_x_f64"], keep)):
        assert_equal(ours, theirs)
    for ours, theirs in zip(real_rows(y, keep), real_rows(g[f"{mode}_y_f64"], keep)):
        assert_close(ours, theirs, SOFTMAX)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    g = load(name)
    blocks = g["ats_blocks"].tolist()
    mode = "drop" if g["drop_tokens"] else "mask"
    with vtok.patched(model(g["tag"]), "ats", parity=True, mode=mode, layers=blocks) as patched:
        logits, _, done = run_model(patched, images(g))
    assert token_counts(done) == g["tokens_after_block"].tolist()
    width = g["kept_token_id"].shape[-1]
    ids = torch.stack([kept_ids(state, width) for state in states(done, blocks)])
    assert_equal(ids, g["kept_token_id"])
    assert_equal((ids >= 0).sum(-1), g["kept_per_block"])
    assert_close(logits, g["logits_f64"], SOFTMAX)


@pytest.mark.parametrize("name", ["ats_micro_drop", "ats_micro_mask"])
def test_block_outputs(name: str) -> None:
    g = load(name)
    mode = "drop" if g["drop_tokens"] else "mask"
    with vtok.patched(model(g["tag"]), "ats", parity=True, mode=mode, layers=g["ats_blocks"].tolist()) as patched:
        _, outputs, done = run_model(patched, images(g))
    for i, (output, state) in enumerate(zip(outputs, states(done, range(4)))):
        keep = torch.ones(output.shape[:2], dtype=torch.bool) if state.keep is None else state.keep
        expected = g[f"block{i}_out_f64"]
        assert output.shape == expected.shape
        for ours, theirs in zip(real_rows(output, keep), real_rows(expected, keep)):
            assert_close(ours, theirs, SOFTMAX)
