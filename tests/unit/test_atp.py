"""Properties of ATP-LLaVA's scores, masks and gates."""

import itertools

import pytest
import torch
from helpers_atp import SCALE, SLOTS, Prompts, Sample, alone, batches, compact, modules, prompts
from helpers_golden import assert_close, assert_equal
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import normal, properties, seeds
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtok.core.prompt import Layout
from vtok.errors import UnsupportedModelError
from vtok.methods.atp import Slots, hard_mask, min_max, soft_masks, spatial_scores
from vtok.methods.atp import attention as atp_attention
from vtok.methods.atp.attention import SELF_SCORES, CausalAttention, attention_scores, gate_bias, soft_attention
from vtok.methods.atp.modules import ATPModules, Decision
from vtok.methods.atp.spec import INPUTS

READINGS = st.tuples(st.sampled_from(SELF_SCORES), st.sampled_from(INPUTS), st.booleans())
WITH_IMAGE = st.lists(st.builds(Sample, st.integers(0, 3), st.just(True), st.integers(0, 4)), min_size=1, max_size=3)
SIDES = st.tuples(st.integers(1, 11), st.integers(1, 11))
TEMPERATURE = 10.0


def decided(made: ATPModules, p: Prompts, temperature: float | None = TEMPERATURE, layer: int = 1) -> Decision:
    return made(layer, *made.scores(p.attention(), p.slots), p.slots, temperature=temperature)


def clear(decision: Decision, spatial: Tensor, among: Tensor) -> bool:
    """Whether no score sits on its threshold, where rounding would decide."""
    gaps = [(s - t[:, None]).abs()[among] for s, t in ((decision.redundant, decision.theta_r), (spatial, decision.theta_s))]
    return all(bool((gap > 1e-6).all()) for gap in gaps)


# Batches.
@properties
@given(batches, READINGS, seeds, st.integers(0, 3))
def test_a_batch_is_its_samples(batch: list[Sample], reading: tuple[str, str, bool], seed: int, padding: int) -> None:
    """Nothing depends on padding or on the other samples: scores, thresholds, decisions, gates."""
    made = modules(seed, self_score=reading[0], inputs=reading[1], minmax=reading[2])
    p = prompts(batch, seed, padding)
    together = decided(made, p)
    assume(clear(together, made.spatial(p.slots, together.redundant), p.slots.visual))
    assert together.gate is not None
    assert not together.keep[~p.slots.real].any()
    for b in range(len(batch)):
        one, real = alone(p, b), p.slots.real[b]
        apart = decided(made, one)
        assert apart.gate is not None
        for found, expected in zip(made.scores(p.attention(), p.slots), made.scores(one.attention(), one.slots)):
            assert_close(found[b, real][None], expected, 1e-11)
        assert_close(together.theta_r[b : b + 1], apart.theta_r, 1e-10)
        assert_close(together.theta_s[b : b + 1], apart.theta_s, 1e-10)
        assert_close(together.gate[b, real][None], apart.gate, 1e-9)
        assert_equal(together.keep[b, real][None], apart.keep)


def test_unequal_counts_in_one_batch() -> None:
    """Behind a module each sample keeps its own number; a second module treats the padded rest like each sample alone."""
    made = modules(3)
    p = prompts([Sample(1, True, 3), Sample(2, False, 2), Sample(0, True, 4)], 8)
    keep = decided(made, p, None).keep
    width = int(keep.sum(-1).max())
    order = (~keep).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, -width:]  # what stays moves to the right
    valid = keep.gather(1, order)
    left = Prompts(
        *(t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, 3)) for t in p[:2]), p.slots.take(order, valid)
    )
    counts = left.slots.visual.sum(-1).tolist()
    assert counts[1] == 0 != counts[0] != counts[2] != 0
    second = decided(made, left, None, layer=2)
    for b in range(3):
        assert_equal(second.keep[b, valid[b]][None], decided(made, alone(left, b), None, layer=2).keep)


# What is computed, and in which precision.
@properties
@given(batches, seeds, st.integers(1, 7))
def test_chunks_do_not_change_scores(batch: list[Sample], seed: int, chunk: int) -> None:
    p = prompts(batch, seed)
    whole = attention_scores(p.attention(), p.slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atp_attention, "QUERY_CHUNK", chunk)
        for found, expected in zip(attention_scores(p.attention(), p.slots), whole):
            assert_close(found, expected, 1e-13)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_only_some_query_rows_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atp_attention, "QUERY_CHUNK", 2)
    p = prompts([Sample(40, True, 3)], 0)
    n, heads = p.q.shape[2], p.q.shape[1]
    with Largest() as scores:
        attention_scores(p.attention(), p.slots)
    assert scores.numel <= heads * 2 * n
    with Largest() as everything:
        soft_attention(p.q, p.k, torch.ones(1, n), p.slots.real, SCALE)
    assert everything.numel >= heads * n * n


def test_no_host_synchronisation_when_the_number_of_rows_is_given() -> None:
    made = modules(1)
    p = prompts([Sample(1, True, 3), Sample(0, False, 5)], 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k = mode.from_tensor(p.q), mode.from_tensor(p.k)
        slots = Slots(*(mode.from_tensor(t) for t in p.slots[:3]))
        decision = made(
            1, *made.scores(CausalAttention(q, k, slots.real, SCALE), slots, rows=SLOTS + 4), slots, temperature=TEMPERATURE
        )
        assert decision.keep.shape == p.slots.real.shape
    exact, padded = (attention_scores(p.attention(), p.slots, rows=rows) for rows in (None, SLOTS + 9))
    for found, expected in zip(padded, exact):
        assert_close(found, expected, 1e-14)


def test_scores_are_fp32_whatever_the_model_runs_in() -> None:
    p = prompts([Sample(2, True, 3)], 4)
    made = modules(2, torch.float32)
    q, k = p.q.bfloat16(), p.k.bfloat16()
    expected = decided(made, Prompts(q.float(), k.float(), p.slots))
    with torch.autocast("cpu", torch.bfloat16):
        found = decided(made, Prompts(q, k, p.slots))
    assert found.redundant.dtype == found.theta_r.dtype == torch.float32
    for one, other in zip(found, expected):
        assert one is not None and other is not None
        assert_equal(one, other)
    assert decided(modules(2), p).theta_s.dtype == torch.float64


# Gates.
@properties
@given(WITH_IMAGE, seeds, seeds)
def test_a_gate_of_zeros_and_ones_is_pruning(batch: list[Sample], seed: int, chosen: int) -> None:
    """For the rows of attention that remain, and for the scores that the next module reads off it."""
    p = alone(prompts(batch, seed), 0)
    keep = ~p.slots.visual | (normal(chosen, 1, p.q.shape[2]) > 0)
    gate = keep.to(p.q.dtype)
    short, rows = compact(p, keep)
    full = soft_attention(p.q, p.k, gate, p.slots.real, SCALE)
    pruned = soft_attention(short.q, short.k, torch.ones(1, len(rows)), short.slots.real, SCALE)
    assert_close(full[:, :, rows][..., rows], pruned, 1e-12)
    gated = attention_scores(p.attention(gate), p.slots._replace(alive=keep))
    for found, expected in zip(gated, attention_scores(short.attention(), short.slots)):
        assert_close(found[:, rows], expected, 1e-12)


@properties
@given(WITH_IMAGE, READINGS, seeds)
def test_soft_training_tends_to_hard_pruning(batch: list[Sample], reading: tuple[str, str, bool], seed: int) -> None:
    """Two modules: nothing removed at a very high temperature, against removal in between."""
    made = modules(seed, self_score=reading[0], inputs=reading[1], minmax=reading[2])
    p, later = alone(prompts(batch, seed), 0), alone(prompts(batch, seed + 33), 0)
    soft, hard = decided(made, p, 1e9), decided(made, p, None)
    assert soft.gate is not None and hard.gate is None
    assume(clear(hard, made.spatial(p.slots, hard.redundant), p.slots.visual))
    assert_equal(soft.keep, hard.keep)
    assert_close(soft.gate, hard.keep.to(soft.gate.dtype), 1e-12)

    slots = p.slots._replace(alive=soft.keep)
    soft_2 = made(2, *made.scores(later.attention(soft.gate), slots), slots, soft.gate, temperature=1e9)
    short, rows = compact(later, hard.keep)
    hard_2 = decided(made, short, None, layer=2)
    assume(clear(hard_2, made.spatial(short.slots, hard_2.redundant), short.slots.visual))
    assert_close(soft_2.theta_r, hard_2.theta_r, 1e-9)
    assert_equal(soft_2.keep[:, rows], hard_2.keep)
    assert soft_2.gate is not None
    assert_close(soft_2.gate[:, rows], hard_2.keep.to(soft_2.gate.dtype), 1e-9)
    gone = torch.ones(len(soft.keep[0]), dtype=torch.bool).index_fill(0, rows, False)
    assert not soft_2.keep[:, gone].any() and not soft_2.gate[:, gone].any()


@properties
@given(seeds, st.floats(0.1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_hard_is_soft_above_one_half(seed: int, temperature: float, theta_r: float, theta_s: float) -> None:
    redundant, spatial = normal(seed, 2, 30).sigmoid(), normal(seed + 1, 2, 30).sigmoid()
    thetas = torch.tensor([theta_r, theta_r]).double(), torch.tensor([theta_s, theta_s]).double()
    m_r, m_s, soft = soft_masks(redundant, spatial, *thetas, temperature)
    assert_equal(soft > 0.5, hard_mask(redundant, spatial, *thetas))
    assert_equal(soft, torch.maximum(m_r, m_s))


def test_gates_multiply_and_spare_text() -> None:
    made, p = modules(5), prompts([Sample(2, True, 3)], 6)
    before = normal(7, 1, p.q.shape[2]).sigmoid()
    free, gated = decided(made, p), made(1, *made.scores(p.attention(), p.slots), p.slots, before, TEMPERATURE)
    assert free.gate is not None and gated.gate is not None
    visual = p.slots.visual
    assert_equal(gated.gate[visual], before[visual] * free.gate[visual])
    assert (gated.gate[~visual] == 1).all() and (free.gate[~visual] == 1).all()


def test_half_precision_masks_hold_the_bias() -> None:
    gate = torch.tensor([[0.0, 0.5, 1.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bias = gate_bias(gate, dtype)[0, 0]
        assert bias.dtype == dtype and torch.isfinite(bias).all()
        assert (bias.diagonal() == 0).all() and (bias[:, 2] == 0).all()
        assert bias[1, 0].float().exp() == bias[2, 0].float().exp() < 1e-29


# Gradients.
def test_gradients_of_thresholds_and_scores() -> None:
    redundant, spatial = normal(0, 2, 5).requires_grad_(), normal(1, 2, 5)
    thetas = [normal(i, 2).sigmoid().requires_grad_() for i in (2, 3)]
    assert torch.autograd.gradcheck(lambda r, a, b: soft_masks(r, spatial, a, b, 3.0), (redundant, *thetas))


@pytest.mark.parametrize("inputs", INPUTS)
def test_gradients_of_a_module(inputs: str) -> None:
    """Through thresholds, masks and counts to every parameter, and through scores to queries and keys."""
    made, p = modules(11, inputs=inputs, grid=(3, 4), hidden=2), prompts([Sample(1, True, 2), Sample(0, True, 1)], 12)
    names = [name for name, _ in made.named_parameters() if name.startswith("heads.1.")]

    def gate(q: Tensor, k: Tensor, *values: Tensor) -> Tensor:
        scores = made.scores(CausalAttention(q, k, p.slots.real, SCALE), p.slots, rows=SLOTS + 2)
        return functional_call(made, dict(zip(names, values)), (1, *scores, p.slots), {"temperature": 3.0}).gate

    values = [made.get_parameter(name).detach().requires_grad_() for name in names]
    q, k = (t[..., :2].nan_to_num(9.0).requires_grad_() for t in p[:2])
    assert torch.autograd.gradcheck(gate, (q, k, *values), fast_mode=True)


def test_gradients_of_gated_attention() -> None:
    p = alone(prompts([Sample(1, True, 1)], 13), 0)
    gate = normal(14, 1, p.q.shape[2]).sigmoid().requires_grad_()
    q = p.q[:, :2, :, :2].contiguous().requires_grad_()

    def probs(gate: Tensor, q: Tensor) -> Tensor:
        return soft_attention(q, p.k[..., :2], gate, p.slots.real, SCALE)

    assert torch.autograd.gradcheck(probs, (gate, q), fast_mode=True)
    hard = torch.zeros_like(gate).requires_grad_()
    soft_attention(p.q, p.k, hard, p.slots.real, SCALE).square().sum().backward()
    assert hard.grad is not None and torch.isfinite(hard.grad).all()


# Grids and layouts.
def test_a_threshold_chooses_a_rate() -> None:
    score = spatial_scores((24, 24))
    kept = [score > theta for theta in (0.9, 0.8125, 0.8, 0.25, 0.2, 0.0, -0.1)]
    assert [int(k.sum()) for k in kept] == [0, 0, 36, 36, 144, 144, 576]
    for few, many in itertools.pairwise(kept):
        assert not (few & ~many).any()


@properties
@given(
    st.tuples(st.integers(1, 11), st.integers(1, 11)), st.lists(st.integers(2, 3), min_size=1, max_size=3), st.floats(0.1, 5)
)
def test_grids_nest(grid: tuple[int, int], factors: list[int], lam: float) -> None:
    """Every finer grid holds the coarser ones, and scores no higher."""
    strides = [factors[0]]
    for factor in factors[1:]:
        strides.append(strides[-1] * factor)
    score = spatial_scores(grid, strides, lam, unsampled=-9.0, dtype=torch.float64).view(grid)
    expected = torch.full(grid, -9.0, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            held = [s for s in strides if row % s == 0 and column % s == 0]
            if held:
                expected[row, column] = max(1 - lam / max(held) ** 2, -9.0)
    assert_equal(score, expected)
    for fine, coarse in itertools.pairwise(strides):
        assert score[::coarse, ::coarse].min() >= score[::fine, ::fine].min()


def test_min_max() -> None:
    score, among = (
        torch.tensor([[1.0, 2.0, 3.0, 99.0], [5.0, 5.0, 5.0, 5.0]]),
        torch.tensor([[True] * 3 + [False], [False] * 4]),
    )
    assert_close(min_max(score, among), torch.tensor([[0, 0.5, 1, 0], [0, 0, 0, 0]]), 1e-6)
    assert not min_max(score, ~among)[1].any()  # all alike
    with torch.autograd.set_detect_anomaly(True):  # a NaN on the way back would raise, even one that is masked later
        min_max(score.requires_grad_(), among).sum().backward()


def test_slots_of_a_prompt() -> None:
    visual = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    answer = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [0] * 7]).bool()
    whole = Layout.whole(visual, real)
    slots = Slots.of(whole, 2, answer)
    assert slots.slot.tolist() == [[-1, -1, 0, 1, -1, -1, -1], [-1] * 7]
    assert slots.text.tolist() == [[False] * 4 + [True, True, False], [False] * 7]
    with pytest.raises(UnsupportedModelError, match="one image of 3 visual tokens in a prompt, or none; found 2"):
        Slots.of(whole, 3)


@properties
@given(WITH_IMAGE, seeds)
def test_slots_survive_pruning(batch: list[Sample], seed: int) -> None:
    """Also where the first or the last visual tokens, or all, have left: the prompt remembers them."""
    p = prompts(batch, seed)
    whole = Layout.whole(p.slots.visual, p.slots.real)
    keep = whole.real & (~whole.visual | (normal(seed, *whole.real.shape) > 0))
    rows = (~keep).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, -int(keep.sum(-1).max()) :]
    valid = keep.gather(1, rows)
    left = Layout(whole.visual.gather(1, rows) & valid, valid, rows.masked_fill(~valid, -1), whole.length, whole.before)
    for found, expected in zip(Slots.of(left, SLOTS)[:3], p.slots.take(rows, valid)[:3]):
        assert_equal(found, expected)


def test_some_tokens_stay_whatever_the_thresholds() -> None:
    made = modules(3)
    with torch.no_grad():
        for head in made.heads.values():
            head.redundant.bias.fill_(50.0)  # type: ignore[union-attr, operator]
            head.spatial.bias.fill_(50.0)  # type: ignore[union-attr, operator]
    p = prompts([Sample(1, True, 3), Sample(4, False, 1), Sample(0, True, 1)], 3)
    scores = made.scores(p.attention(), p.slots)
    assert not (made(1, *scores, p.slots).keep & p.slots.visual).any()
    decision = made(1, *scores, p.slots, at_least=2)
    kept = decision.keep & p.slots.visual
    assert kept.sum(-1).tolist() == [2, 0, 2]
    assert_equal(decision.keep & ~p.slots.visual, p.slots.real & ~p.slots.visual)
    for row in (0, 2):
        visual = p.slots.visual[row]
        assert decision.redundant[row][kept[row]].min() >= decision.redundant[row][visual & ~kept[row]].max()
    free = modules(3)
    assert_equal(free(1, *scores, p.slots, at_least=1).keep, free(1, *scores, p.slots).keep)
