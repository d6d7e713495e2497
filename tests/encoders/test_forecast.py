"""What `vtok.plan(batch_size=)` foresees. Time is a clock that the model itself moves, but for the slow test."""

import math
import random
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import vlm_zoo
import zoo
from helpers_errors import message_of
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

import vtok
from vtok.eval.benchmarks import throughput
from vtok.eval.cli.program import app
from vtok.methods.baselines.random_drop import RandomDrop, RandomReducer
from vtok.reports.forecast import Forecast
from vtok.targets import forecast as forecasts
from vtok.targets.forecast import _at, median_interval

NAME, TOWER = "timm: ViT", "transformers: ViT"
TOKENS, DEPTH = 65, 4


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def __deepcopy__(self, memo):  # a copy of a model moves the same clock
        return self


clock = Clock()


@dataclass(frozen=True)
class Priced(RandomDrop):
    """Random pruning whose choice takes `price` seconds a block."""

    name: ClassVar[str] = "priced"
    price: float = 0.0

    def reducer(self, layers, num_patches, grid):
        return PricedReducer(self.keep, layers, self.seed, self.price)


@dataclass(frozen=True)
class PricedReducer(RandomReducer):
    price: float

    def plan(self, x, state, view, at):
        clock.now += self.price
        return super().plan(x, state, view, at)


@pytest.fixture
def timed(monkeypatch):
    """A model each of whose blocks takes `fixed` seconds, and `each` for every token of every image."""

    def make(fixed, each):
        clock.now = 0.0
        monkeypatch.setattr(forecasts, "clock", clock)
        model = zoo.build(NAME)
        for block in model.blocks:

            def mlp(module, args):
                clock.now += fixed + each * args[0].shape[0] * args[0].shape[1]

            block.mlp.register_forward_pre_hook(mlp)
        return model

    return make


def test_nothing_is_timed_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(forecasts, "clock", lambda: pytest.fail("no pass is timed"))
    found = vtok.plan(zoo.build(NAME), "tome", r=8)
    assert found.forecast is None and "foreseen" not in str(found)


def test_a_method_that_chooses_longer_than_it_saves_is_foreseen(timed):
    """Blocks of 1 ms + 10 us a token: 26 of 64 patches go in block 1, choosing them takes 3 ms."""
    model = timed(1e-3, 1e-5)
    config = Priced(keep=0.6, layers=[1], price=3e-3)
    found = vtok.plan(model, config, batch_size=2)
    left = 1 + round(64 * 0.6)
    alone = DEPTH * (1e-3 + 2 * TOKENS * 1e-5)
    shorter = alone - 3 * 2 * (TOKENS - left) * 1e-5 + 3e-3
    told = found.forecast
    assert isinstance(told, Forecast) and (told.batch_size, told.timed, told.steps) == (2, (2,), 1)
    assert told.speedup == pytest.approx(alone / shorter) and told.low == pytest.approx(told.high) == pytest.approx(
        told.speedup
    )
    assert told.step_ms == pytest.approx(3) and told.patched_ms == pytest.approx(1000 * shorter)
    assert told.saved == pytest.approx(1 - 1 / found.estimate.implied_speedup)
    assert told.slower and not told.faster and told.rounds == math.ceil(forecasts.SECONDS / (2 * (alone + shorter)))
    threads, speed = torch.get_num_threads(), f"{alone / shorter:.2f}"
    where = f"cpu, {threads} thread{'s' * (threads != 1)}; timed, {told.rounds} rounds"
    assert str(found).splitlines()[-1] == (
        f"foreseen at batch 2 ({where}): SLOWER than unpatched, {speed}x [{speed}, {speed}]: {100 * told.saved:.0f} % of the "
        f"MACs leave, and choosing and moving tokens in 1 block takes 3.0 of the {1000 * shorter:.0f} ms of the patched pass. "
        "Larger batches, torch.compile, fewer blocks that reduce or a method that chooses with less work can win; "
        "vtok.benchmark measures it"
    )
    assert not vtok.info(model).patched


def test_the_same_method_is_faster_in_a_larger_batch(timed):
    """What a block costs whatever the batch is paid once: the sign turns, and one line says so."""
    found = vtok.plan(timed(1e-3, 1e-5), Priced(keep=0.6, layers=[1], price=3e-3), batch_size=16)
    left = 1 + round(64 * 0.6)
    alone = DEPTH * (1e-3 + 16 * TOKENS * 1e-5)
    assert found.forecast.speedup == pytest.approx(alone / (alone - 3 * 16 * (TOKENS - left) * 1e-5 + 3e-3))
    speed = f"{found.forecast.speedup:.2f}"
    assert found.forecast.faster and str(found).splitlines()[-1].endswith(f"faster, {speed}x [{speed}, {speed}]")


def test_long_passes_are_extrapolated_from_two_smaller_batches(timed):
    """A pass of 64 images would take 1.7 s: 4 and 2 are timed, and the line through both is exact where time is one."""
    config = Priced(keep=0.6, layers=[1], price=3e-3)
    told = vtok.plan(timed(1e-3, 1e-4), config, batch_size=64).forecast
    left = 1 + round(64 * 0.6)
    alone = DEPTH * (1e-3 + 64 * TOKENS * 1e-4)
    assert told.timed == (2, 4) and DEPTH * (1e-3 + 4 * TOKENS * 1e-4) < forecasts.LONGEST
    assert told.speedup == pytest.approx(alone / (alone - 3 * 64 * (TOKENS - left) * 1e-4 + 3e-3))
    assert told.rounds == forecasts.FEWEST, "the second is over"
    assert "; from batch 2 and 4, 6 rounds" in str(told)
    slow = vtok.plan(timed(1e-3, 1e-4), config.replace(price=1.0), batch_size=64).forecast
    assert slow.slower and "ms of the patched pass of 4. Larger" in str(slow)
    long = vtok.plan(timed(1.0, 0.0), config, batch_size=4).forecast  # a single image takes too long already
    assert long.timed == (1,) and long.speedup == pytest.approx(4 / 4.003)


def test_where_nothing_leaves_the_sentence_says_so(timed):
    told = vtok.plan(timed(1e-3, 1e-5), "tome", r=0, batch_size=1).forecast
    assert told.speedup == 1 and not told.faster and not told.slower
    assert "not clearly faster, 1.00x [1.00, 1.00]: nothing leaves, so there is nothing to win" in str(told)


def test_noise_widens_the_interval_and_takes_the_verdict_back(timed):
    model, draw = timed(1e-3, 1e-5), random.Random(0)
    model.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + draw.uniform(0, 0.02)))
    told = vtok.plan(model, Priced(keep=0.6, layers=[1], price=8e-4), batch_size=2).forecast
    assert told.low < 1 < told.high and "not clearly faster" in str(told)


@pytest.mark.parametrize(("n", "rank"), [(5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (60, 21)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(n, rank):
    """Ranks of the tables of the sign test, two-sided at 5 %."""
    values = [float(i) for i in range(n)]
    assert median_interval(values[::-1]) == (rank, n - 1 - rank)


def test_a_line_that_falls_is_level():
    assert _at(10, [(1, 2.0), (2, 1.0)]) == 1.0 and _at(10, [(4, 2.0)]) == 5.0


def test_what_is_patched_already_and_its_mode_stay():
    model = vtok.patch(zoo.build(NAME), "tome", r=4).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    told = vtok.plan(model, "random", keep=0.5, batch_size=2, calibration=zoo.images(NAME, batch=3)).forecast
    assert told.batch_size == 2 and told.rounds >= forecasts.FEWEST and told.speedup > 0
    assert model.training and vtok.info(model).towers[0].configs == (vtok.ToMe(r=4),)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family(name, monkeypatch):
    monkeypatch.setattr(forecasts, "SECONDS", 0.0)
    model = zoo.build(name)
    config = zoo.config_for(name, "random", model)
    assert config is not None
    told = vtok.plan(model, config, input_size=zoo.EXAMPLES[name].input_size, batch_size=2).forecast
    assert told.rounds == forecasts.FEWEST and told.steps > 0 and 0 < told.step_ms < told.patched_ms


def test_a_tower_that_takes_more_than_images_is_timed_on_inputs_by_name(monkeypatch):
    monkeypatch.setattr(forecasts, "SECONDS", 0.0)
    model, images = zoo.build(TOWER).model, zoo.images(TOWER, batch=3)
    told = vtok.plan(model, "random", batch_size=3, calibration={"pixel_values": images}).forecast
    assert told.timed == (3,) and told.rounds == forecasts.FEWEST
    said = message_of(vtok.ConfigError, vtok.plan, model, "random", batch_size=2, calibration={"pixel_values": images})
    assert "its tensors must have 2 rows, as batch_size says, got 3" in said
    name = "transformers: SigLIP2, both towers"
    patches = message_of(vtok.ConfigError, vtok.plan, zoo.build(name), "random", batch_size=2)
    assert "cannot run images of [3, 64, 64] (TypeError: " in patches and "pass as calibration what it takes" in patches


def test_refusals():
    model, images = zoo.build(NAME), zoo.images(NAME)
    for wrong in (0, -1, 1.5, True, "8"):
        said = message_of(vtok.ConfigError, vtok.plan, model, "tome", batch_size=wrong)
        assert said == f"batch_size is a number of images, 1 or more, got {wrong!r}"
    assert "holds no weights (device 'meta')" in message_of(
        vtok.ConfigError, vtok.plan, zoo.build(NAME).to("meta"), "random", batch_size=1
    )
    assert "calibration is a batch of images" in message_of(
        vtok.ConfigError, vtok.plan, model, "random", batch_size=1, calibration=images[0]
    )
    vlm = vlm_zoo.build(next(iter(vlm_zoo.EXAMPLES)))
    assert "batch_size is for vision encoders" in message_of(vtok.ConfigError, vtok.plan, vlm, "random", batch_size=1)


def test_on_the_command_line():
    command = ["plan", "vit_tiny_patch16_224", "random", "--img-size", "64"]
    said = CliRunner().invoke(app, [*command, "-b", "1", "--threads", "1"], catch_exceptions=False).output
    assert "foreseen at batch 1 (cpu, 1 thread; timed, " in said
    assert "foreseen" not in CliRunner().invoke(app, command).output
    for args, refused in (
        ([*command, "--threads", "1"], "--device and --threads go with --batch-size"),
        (["plan", "tome_deit_s_r13", "-b", "1"], "--batch-size goes with a model and methods"),
        (["plan", "transformers:llava-1.5-scaled", "random", "-b", "1"], "--batch-size is for vision encoders"),
        (["plan", "reference", "tome:batch_size=3"], "batch_size is no parameter of a method"),
    ):
        assert refused in str(CliRunner().invoke(app, args).exception)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "batch", "method", "knobs"),
    [(48, 1, "zero_tprune", {}), (48, 1, "pitome", {"ratio": 0.9}), (192, 1, "ats", {}), (192, 4, "tome", {"r": 16})],
)
def test_what_is_foreseen_is_what_is_measured(width, batch, method, knobs, monkeypatch):
    """Wherever both intervals are clear of 1 they lie on the same side. Seconds of this thread: other programs do not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(forecasts, "clock", time.process_time)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=time.process_time))
    try:
        model = VisionTransformer(embed_dim=width, num_heads=width // 16, depth=12, num_classes=10).eval()
        told = vtok.plan(model, method, batch_size=batch, **knobs).forecast
        (seen,) = throughput.measure(
            model, torch.randn(batch, 3, 224, 224), [(method, knobs)], pairs=20, memory=False, profile=False
        )
    finally:
        torch.set_num_threads(threads)
    low, high = seen.speedup_ci
    assert not (told.faster and high < 1) and not (told.slower and low > 1), (told, seen.speedup, seen.speedup_ci)
    assert max(told.speedup / seen.speedup, seen.speedup / told.speedup) < 1.4, (told, seen.speedup)
