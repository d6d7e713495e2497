"""Who runs on which batch, and what becomes of the times; counted and computed here."""

import pytest
import torch
from torch import nn

from vtok.eval.common import timing
from vtok.eval.common.settings import PassCost
from vtok.eval.common.timing import FEWEST_PAIRS, TIMED_EVERY, BaselineCache, PairedTimer, Step


class Counting(nn.Module):
    """Adds a number and counts its batches."""

    def __init__(self, add):
        super().__init__()
        self.add, self.seen = add, []

    def forward(self, x):
        self.seen.append(len(x))
        return x + self.add


def show(timer, batches, size=2):
    return [timer.show(i, torch.full((size, 1), float(i)), lambda m, x: m(x), lambda y: y[0].item()) for i in range(batches)]


def test_every_model_sees_every_batch_without_a_memory():
    models = [Counting(0), Counting(10)]
    assert show(PairedTimer(models, 0, 5), 5) == [[i, i + 10] for i in range(5)]
    assert [model.seen for model in models] == [[2] * 5, [2] * 5]


def test_the_unpatched_model_runs_again_for_the_clock_alone():
    batches, base, memory = 8 * TIMED_EVERY, Counting(0), BaselineCache()
    assert show(PairedTimer([base], 0, batches, memory), batches) == [[i] for i in range(batches)]
    assert len(base.seen) == batches
    base.add = 999  # what it makes of a batch is known: the second pass is for the clock
    patched = Counting(10)
    assert show(PairedTimer([base, patched], 0, batches, memory), batches) == [[i, i + 10] for i in range(batches)]
    assert len(base.seen) - batches == batches // TIMED_EVERY == 8
    assert len(patched.seen) == batches


def test_few_batches_are_timed_more_often():
    assert PairedTimer([], None, 3).every == PairedTimer([], None, FEWEST_PAIRS).every == 1
    assert PairedTimer([], None, 2 * FEWEST_PAIRS).every == 2
    assert PairedTimer([], None, 1000).every == TIMED_EVERY


def test_unpatched_batches_that_are_missing_are_run():
    base, memory = Counting(0), BaselineCache()
    memory.outputs[1] = 77.0
    assert show(PairedTimer([base, Counting(10)], 0, 4 * TIMED_EVERY, memory), 4) == [[0, 10], [77, 11], [2, 12], [3, 13]]
    assert memory.outputs == {0: 0.0, 1: 77.0, 2: 2.0, 3: 3.0}


def _steps(seconds, images=10):
    return [Step(i, images, s, cold=i == 0) for i, s in enumerate(seconds)]


def test_times_are_compared_within_pairs():
    timer = PairedTimer([nn.Identity(), nn.Identity()], 0, 5)
    timer.steps = [_steps([9.0, 0.2, 0.4, 0.3, 5.0]), _steps([0.1, 0.1, 0.25, 0.2])]
    timer.steps[0][-1] = Step(4, 3, 5.0, False)  # a smaller last batch
    timer.steps[1].append(Step(4, 3, 0.1, False))
    fields = timer.fields(1, PassCost(65.0, (33.0,), 4e9, 2e9, 2e9, 0.0, False))
    assert fields["pairs"] == 3  # neither the first batch nor the smaller one
    assert fields["speedup"] == pytest.approx(1.6)  # median of 2, 1.6 and 1.5
    assert fields["speedup_ci"] is None and fields["achieved_ci"] is None  # three pairs support no interval
    assert not fields["slower"] and "too few to tell" in fields["verdict"]
    assert fields["achieved"] == pytest.approx(0.8)
    assert fields["samples_per_sec"] == pytest.approx({"base": 10 / 0.3, "patched": 50})
    assert timer.fields(0, None)["samples_per_sec"] == pytest.approx({"base": 10 / 0.3})
    unknown = timer.fields(1, None)
    assert "achieved" not in unknown and unknown["speedup"] == fields["speedup"]


def test_one_cold_batch_is_better_than_none():
    timer = PairedTimer([nn.Identity(), nn.Identity()], 0, 1)
    timer.steps = [_steps([0.4]), _steps([0.1])]
    assert timer.fields(1, None)["speedup"] == pytest.approx(4)
    timer.steps[0] = []
    assert timer.fields(1, None) == {}
    assert PairedTimer([nn.Identity()], None, 1).fields(0, None) == {}


def test_the_kernel_is_named_and_random_numbers_are_given_back():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        name = timing.kernels(model, lambda: model(torch.randn(2, 3, 32, 32)))
    assert name is not None and name.endswith(" x2") and not name.startswith("-")
    assert torch.equal(torch.get_rng_state(), before)
    assert timing.kernels(nn.Linear(2, 2), lambda: None) is None
