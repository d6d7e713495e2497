"""ATP-LLaVA against slow loops written from its equations as others relay them; no code of the authors was to be had (see
golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, load
from torch import Tensor

from vtok.core.prompt import Layout
from vtok.methods.atp import Slots, hard_mask, min_max, next_gate, redundancy, soft_masks, spatial_scores, to_grid
from vtok.methods.atp.attention import CausalAttention, attention_scores, debiased, gate_bias, self_logits, soft_attention
from vtok.methods.atp.losses import atp_loss, average_tokens, depth_loss
from vtok.methods.atp.modules import ATPModules, ThresholdHead
from vtok.methods.atp.spec import ATPSpec


def slots_of(kinds: Tensor) -> Slots:
    """From -1 padding, 0 system, 1 visual, 2 text behind the image."""
    visual = kinds == 1
    slots = Slots.of(Layout.whole(visual, kinds >= 0), 16)
    assert_equal(slots.visual, visual)
    assert_equal(slots.text, kinds == 2)
    return slots


def fill(head: ThresholdHead, g: dict[str, Any], prefix: str) -> None:
    """The weights of a golden module."""
    state = {
        "fc.weight": g[f"{prefix}w1"], "fc.bias": g[f"{prefix}b1"],
        "redundant.weight": g[f"{prefix}wr"][None], "redundant.bias": torch.tensor([g[f"{prefix}br"]], dtype=torch.float64),
        "spatial.weight": g[f"{prefix}ws"][None], "spatial.bias": torch.tensor([g[f"{prefix}bs"]], dtype=torch.float64),
    }  # fmt: skip
    head.load_state_dict(state)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def margin(redundant: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> float:
    """Distance of the closest score to its threshold."""
    return min((redundant - theta_r).abs().min().item(), (spatial - theta_s).abs().min().item())


# Scores.
def test_scores_from_attention() -> None:
    g = load("atp_scores")
    slots = slots_of(g["layout"])
    self_score, cross = attention_scores(CausalAttention(g["q"], g["k"], slots.real, g["scale"]), slots)

    def visual(score: Tensor) -> Tensor:
        assert not score[~slots.visual].any()
        return score[slots.visual].view(2, 16)

    assert_close(visual(self_score), g["self_probs"], 1e-14)
    assert_close(visual(cross), g["cross"], 1e-14)
    assert_close(visual(debiased(self_score, slots)), g["self_debiased"], 1e-14)
    assert_close(visual(self_logits(g["q"], g["k"], slots, g["scale"])), g["self_logits"], 1e-14)
    assert_close(visual(redundancy(self_score, cross)), g["redundant"], 1e-14)
    scaled = redundancy(*(min_max(s, slots.visual, g["minmax_eps"]) for s in (self_score, cross)))
    assert_close(visual(scaled), g["redundant_minmax"], 1e-12)


@pytest.mark.parametrize("grid", [(24, 24), (27, 27), (5, 7)])
def test_spatial_scores(grid: tuple[int, int]) -> None:
    g = load("atp_spatial")
    name = f"{grid[0]}x{grid[1]}"
    for stride in (2, 4):
        assert_equal(spatial_scores(grid, (stride,), g["lam"], dtype=torch.float64), g[f"single_{name}_s{stride}"])
    assert_equal(spatial_scores(grid, (2, 4), g["lam"], dtype=torch.float64), g[f"nested_{name}_s2_4"])
    if grid == (24, 24):
        assert_equal(spatial_scores(grid, (2,), g["lam"], -100.0, dtype=torch.float64), g["single_24x24_s2_offm100"])


# One module.
def module_64(g: dict[str, Any]) -> ATPModules:
    modules = ATPModules(ATPSpec(depth=2, width=1, grid=(8, 8), layers=(1,), hidden=4, minmax=False)).double()
    fill(modules.head(1), g, "W_")
    return modules


@pytest.mark.parametrize("case", ["full", "after"])
def test_one_module(case: str) -> None:
    g = load("atp_module")
    modules, alive = module_64(g), g[f"{case}_alive"]
    assert_equal(spatial_scores((8, 8), dtype=torch.float64), g["spatial"])
    everything = torch.ones(1, 64, dtype=torch.bool)
    slots = Slots(torch.arange(64)[None], ~everything, everything, alive[None])
    scores = [(g[key] * alive)[None] for key in ("self_s", "cross_s")]

    z = modules.head(1).features(torch.cat([to_grid(s, slots, 64) for s in scores], -1))
    assert_close(z, g[f"{case}_z"][None], 1e-12)
    decision = modules(1, *scores, slots)
    assert decision.gate is None
    assert_close(decision.theta_r, scalar(g[f"{case}_theta_r"])[None], 1e-14)
    assert_close(decision.theta_s, scalar(g[f"{case}_theta_s"])[None], 1e-14)
    assert_close(decision.redundant, g[f"{case}_redundant"][None], 1e-14)
    assert_equal(decision.keep, g[f"{case}_hard"][None])
    assert_equal(decision.keep[0].nonzero()[:, 0], g[f"{case}_kept_index"])
    found = margin(decision.redundant[0][alive], g["spatial"][alive], decision.theta_r, decision.theta_s)
    assert found == pytest.approx(g[f"{case}_margin"], abs=1e-12)


@pytest.mark.parametrize("temperature", [10, 100])
@pytest.mark.parametrize("case", ["full", "after"])
def test_soft_masks_and_their_gradients(case: str, temperature: int) -> None:
    g = load("atp_module")
    alive, key = g[f"{case}_alive"], f"{case}_soft{temperature}"
    theta_r, theta_s = (scalar(g[f"{case}_theta_{x}"]).requires_grad_() for x in "rs")
    m_r, m_s, m = soft_masks(g[f"{case}_redundant"], g["spatial"], theta_r, theta_s, temperature)
    assert_close(m_r.detach(), g[f"{key}_r"], 1e-12)
    assert_close(m_s.detach(), g[f"{key}_s"], 1e-12)
    everything = torch.ones(1, 64, dtype=torch.bool)
    gate = next_gate(m[None], Slots(torch.arange(64)[None], ~everything, everything, alive[None]))[0]
    assert_close(gate.detach(), g[key], 1e-12)
    assert_equal(gate > 0.5, g[f"{case}_hard"])
    assert_equal(hard_mask(g[f"{case}_redundant"], g["spatial"], theta_r, theta_s) & alive, g[f"{case}_hard"])
    assert gate.sum().item() == pytest.approx(g[f"{key}_sum"], abs=1e-10)
    d_r, d_s = torch.autograd.grad(gate.sum(), (theta_r, theta_s))
    assert d_r.item() == pytest.approx(g[f"{key}_dsum_dtheta_r"], abs=1e-10)
    assert d_s.item() == pytest.approx(g[f"{key}_dsum_dtheta_s"], abs=1e-10)


# Attention behind a module.
def test_soft_attention() -> None:
    g = load("atp_soft_attention")
    slots = slots_of(g["layout"][None])
    q, k, scale = g["q"][None], g["k"][None], g["scale"]

    def attend(soft: Tensor, renormalise: bool = True) -> Tensor:
        gate = torch.ones(1, 32, dtype=torch.float64).masked_scatter(slots.visual, soft)
        return soft_attention(q, k, gate, slots.real, scale, renormalise)[0]

    assert_close(attend(g["D"]), g["attn_renormalised"], 1e-13)
    assert_close(attend(g["D"], renormalise=False), g["attn_multiplied"], 1e-13)
    assert_equal((g["D"] > 0.5).double(), g["hard_D"])
    assert_close(attend(g["hard_D"]), g["attn_hard"], 1e-13)

    # What a layer computes whose mask has the bias added.
    gate = torch.ones(1, 32, dtype=torch.float64).masked_scatter(slots.visual, g["D"])
    logits = (q * scale) @ k.repeat_interleave(2, 1).transpose(-2, -1) + gate_bias(gate, torch.float64)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    assert_close(logits.masked_fill(~causal, float("-inf")).softmax(-1)[0], g["attn_renormalised"], 1e-13)


def test_a_hard_gate_is_pruning() -> None:
    g = load("atp_soft_attention")
    rows = g["rows_equal_hard_prune"]
    gone = torch.zeros(32, dtype=torch.bool).masked_scatter(g["layout"] == 1, g["hard_D"] == 0)
    assert_equal(rows, (~gone).nonzero()[:, 0])
    q, k = (g[name][None, :, rows] for name in "qk")
    everything = torch.ones(1, len(rows))
    short = soft_attention(q, k, everything.double(), everything > 0, g["scale"])[0]
    assert_close(short, g["attn_hard"][:, rows][:, :, rows], 1e-13)
    assert not g["attn_hard"][:, rows][:, :, gone].any()


# Losses.
@pytest.mark.parametrize("case", range(5))
def test_losses(case: int) -> None:
    g = load("atp_losses")
    counts, layers, n0 = g["n_after"][case], g["layers"][case].tolist(), g["n0"]
    depth = g["n_decoder_layers"]
    assert_close(depth_loss(counts, layers, n0), g["l_atp"][case], 1e-12)
    assert_close(average_tokens(counts, layers, n0, depth), g["nbar_all_layers"][case], 1e-11)
    assert_close(average_tokens(counts, layers, n0, depth, over="modules"), g["nbar_modules"][case], 1e-11)
    for normalise, key in ((False, "extra_loss"), (True, "extra_loss_normalised")):
        weights = {"lambda_atp": g["lam_atp"], "lambda_target": g["lam_target"]}
        found = atp_loss(counts[None], layers, n0, depth, g["n_target"], **weights, normalise=normalise)
        assert_close(found.extra, g[key][case], 1e-11)
        assert_close(found.depth, g["l_atp"][case], 1e-12)
        assert_close(found.average, g["nbar_all_layers"][case], 1e-11)
        assert_close(found.target * (n0 if normalise else 1), g["l_target"][case], 1e-11)


# Three modules in a row.
def test_three_modules_prune_one_sequence() -> None:
    """Columns 0 to 4 are text, 5 to 148 visual; what is pruned leaves, the rest keeps its slot and its position."""
    g = load("atp_cascade")
    grid, first = tuple(g["grid"].tolist()), g["first_visual_position"]
    total = grid[0] * grid[1]
    spec = ATPSpec(depth=4, width=1, grid=grid, layers=(1, 2, 3), hidden=8)
    modules = ATPModules(spec).double()
    assert_equal(spatial_scores(grid, dtype=torch.float64), g["spatial"])
    position = torch.arange(first + total)
    real = torch.ones(1, len(position), dtype=torch.bool)
    slots = Slots.of(Layout.whole(position[None] >= first, real), total)
    assert g["minmax_eps"] == 1e-6
    for m, layer in enumerate(spec.sites):
        fill(modules.head(layer), g, f"m{m}_W_")
        visual = slots.visual[0]
        assert_equal(slots.slot[0][visual], g[f"m{m}_alive_in"])
        scores = [torch.zeros(1, len(position), dtype=torch.float64) for _ in range(2)]
        for score, key in zip(scores, ("self_raw", "cross_raw")):
            score[0, visual] = g[f"m{m}_{key}"]
        decision = modules(layer, *scores, slots)
        assert_close(decision.theta_r, scalar(g[f"m{m}_theta_r"])[None], 1e-12)
        assert_close(decision.theta_s, scalar(g[f"m{m}_theta_s"])[None], 1e-12)
        found = margin(decision.redundant[0][visual], g["spatial"][slots.slot[0][visual]], decision.theta_r, decision.theta_s)
        assert found == pytest.approx(g[f"m{m}_margin"], abs=1e-12)
        assert_equal(decision.keep[0][visual], g[f"m{m}_keep"])
        assert decision.keep[0][~visual].all()
        rows = decision.keep[0].nonzero()[:, 0]
        slots, position = slots.take(rows[None]), position[rows]
        assert_equal(slots.slot[0][slots.visual[0]], g[f"m{m}_alive_out"])
        assert_equal(position[slots.visual[0]], g[f"m{m}_position_ids_out"])
    assert slots.visual.sum() == 12
