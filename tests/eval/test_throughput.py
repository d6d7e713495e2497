"""The benchmark: what it reports, not how fast this machine is. Timings are only asserted where they differ by a lot."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from rich.console import Console
from torch import nn

import vtok
from vtok.config import MethodConfig, Reducer
from vtok.core.tokens import Place, Site
from vtok.eval.benchmarks import memory, throughput
from vtok.eval.benchmarks import result as bench_result
from vtok.eval.benchmarks.throughput import compare, measure, reduction_share, verdict
from vtok.eval.common.settings import PassCost, Setting, mean_cost, pass_cost, weight_sharing_copy
from vtok.eval.common.statistics import Interval

NAME = "timm: ViT"
# What result files of an evaluation must say.
FIELDS = (
    "model, backend, method, setting, params, tokens, gmacs, implied_speedup, samples_per_sec, step_time_ms, speedup, "
    "achieved, kernel, "
    "dtype, device, batch_size, img_size, seed, versions, speedup_ci, achieved_ci, threads, peak_memory_mb, reduction_share, "
    "baseline_check, slower, verdict, pairs, gflops, spread, device_name, compiled"
)
BALLAST_MB = 1200


@dataclass(frozen=True)
class Sleepy(MethodConfig):
    """Does nothing, slowly."""

    name: ClassVar[str] = "sleepy"
    seconds: float = 0.05

    def build(self, info):
        return SleepyReducer(self.seconds)


@dataclass(frozen=True)
class SleepyReducer(Reducer):
    seconds: float

    @property
    def sites(self):
        return (Site(Place.BLOCK_MID, 0),)

    def plan(self, x, state, view, at):
        time.sleep(self.seconds)

    def count(self, at, n, num_prefix):
        return n


def run(settings, **extra):
    options = {"pairs": 5, "warmup": 1, "memory": False, "profile": False}
    return measure(zoo.build(NAME), zoo.images(NAME), settings, **{**options, **extra})


@pytest.fixture(scope="module")
def results():
    """A full run but for memory, which takes a process a setting."""
    settings = [("tome", {"r": 8}), ("ats", {"num_tokens": 24})]
    return measure(zoo.build(NAME), zoo.images(NAME), settings, name="tiny", seed=3, memory=False)


@pytest.fixture(scope="module")
def with_memory():
    """A run whose own process holds more than any child will."""
    ballast = torch.ones(BALLAST_MB, 2**18)  # MB of fp32
    found = run(["tome"], memory=True)
    del ballast
    return found


def test_every_field_is_there_and_means_what_it_says(results):
    assert {f.name for f in dataclasses.fields(bench_result.Result)} == set(FIELDS.split(", "))
    for r in results:
        assert (r.model, r.backend, r.seed, r.pairs, r.batch_size, r.img_size) == ("tiny", "timm", 3, 20, 2, 64)
        assert (r.dtype, r.device, r.threads) == ("float32", "cpu", torch.get_num_threads())
        assert {"python", "torch", "timm", "vtok"} <= set(r.versions)
        assert r.speedup_ci[0] <= r.speedup <= r.speedup_ci[1]
        assert r.achieved == pytest.approx(r.speedup / r.implied_speedup)
        assert r.achieved_ci == pytest.approx([end / r.implied_speedup for end in r.speedup_ci])
        assert r.samples_per_sec["base"] == pytest.approx(2000 / r.step_time_ms["base"])
        assert 0 < r.reduction_share < 1
        assert set(r.baseline_check) == {"plain_ms", "ratio", "ok"}
        assert r.kernel == {"base": "flash (cpu) x4", "patched": "flash (cpu) x4"}
        assert r.device_name and r.verdict
        assert all(r.gflops[key] == 2 * value for key, value in r.gmacs.items())


def test_tokens_and_macs_are_those_of_the_method(results):
    tome, ats = results
    plan = vtok.plan(zoo.build(NAME), "tome", r=8).estimate
    assert tome.params == {"r": 8, "prop_attn": True}
    assert tome.tokens == {"in": 65, "out": 33, "mean_per_layer": [57, 49, 41, 33]}
    assert tome.implied_speedup == plan.implied_speedup
    assert tome.gmacs["base"] == plan.base_macs / 1e9 and tome.gmacs["pruner"] == plan.reduction_macs / 1e9
    model = zoo.attach(NAME, zoo.build(NAME), "ats", num_tokens=24)
    model(zoo.images(NAME))
    seen = vtok.info(model).towers[0]
    assert ats.tokens["out"] == seen.blocks[-1].mean_tokens
    assert ats.implied_speedup == (seen.mean_estimate or seen.estimate).implied_speedup


def test_memory_is_that_of_the_child_not_of_this_process(with_memory):
    (r,) = with_memory
    assert set(r.peak_memory_mb) == {"base", "patched"}
    assert all(20 < peak < BALLAST_MB for peak in r.peak_memory_mb.values())
    base, patched = r.peak_memory_mb.values()
    assert f"{base:.0f} -> {patched:.0f}" in bench_result.markdown(with_memory)


def test_peak_is_forgotten_and_found_again():
    """In a process of its own: here, freed memory of other tests may be large enough to be used again."""
    script = """
import torch
from vtok.eval.benchmarks import memory
torch.ones(200, 2**18)  # 200 MB, freed at once
memory._forget_peak()
before = memory._peak_bytes()
torch.ones(100, 2**18)
print(before, memory._peak_bytes())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, run.stdout.split())
    assert before + 90 * 2**20 < after < before + 190 * 2**20


def test_memory_says_why_it_cannot_be_measured():
    model = zoo.build(NAME)
    model.hook = lambda: None
    with pytest.raises(vtok.ConfigError, match="leave memory out"):
        memory.peak_memory(model, zoo.images(NAME), [Setting()])
    with pytest.raises(vtok.ConfigError, match="unknown method 'nonsense'"):
        memory.peak_memory(zoo.build(NAME), zoo.images(NAME), [Setting("nonsense")])


def test_json_round_trip(results):
    text = bench_result.to_json(results)
    assert bench_result.from_json(text) == results
    assert json.loads(text)[0]["tokens"]["in"] == 65


def test_tables_show_everything(results):
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(bench_result.table(results))
    markdown = bench_result.markdown(results)
    for text in (console.export_text(), markdown):
        for part in ("tome(r=8)", "GMACs", "GFLOPs (2x)", "65 -> 33", "implied", "achieved", "flash (cpu) x4"):
            assert part in text
    lines = markdown.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert "tiny, 64 px, batch 2, float32" in markdown and results[0].verdict in markdown


def test_doing_nothing_costs_little():
    (r,) = run([("tome", {"r": 0})], pairs=20)
    assert r.implied_speedup == 1
    assert 0.5 < r.speedup < 2
    assert r.params["r"] == 0


def test_a_slow_patch_is_called_slower():
    slow, quick = run([Sleepy(), ("random", {"keep": 0.5})])
    assert slow.slower and slow.speedup_ci[1] < 0.7
    assert slow.verdict.startswith("SLOWER than unpatched")
    assert "SLOWER" in bench_result.markdown([slow, quick])
    assert slow.method == "sleepy"


def test_words_for_every_case():
    assert "no measurable difference" in verdict(Interval(0.99, 0.9, 1.1), Interval(0.9, 0.8, 1.0))
    assert verdict(Interval(1.5, 1.4, 1.6), Interval(0.9, 0.8, 1.0)) == "faster than unpatched (1.50x)"
    assert "more than its MACs imply" in verdict(Interval(1.5, 1.4, 1.6), Interval(1.2, 1.1, 1.3))
    assert "SLOWER" in verdict(Interval(0.8, 0.7, 0.9), Interval(0.5, 0.4, 0.6))


def test_timing_fields_from_known_times():
    cost = PassCost(65.0, (33.0,), 4e9, 2e9, 2e9, 0.0, False)
    fields = compare([0.2, 0.4, 0.3], [0.1, 0.25, 0.2], cost.implied_speedup, batch_size=10)
    assert fields["speedup"] == pytest.approx(1.6)  # of 2, 1.6 and 1.5
    assert fields["achieved"] == pytest.approx(0.8)
    assert fields["samples_per_sec"] == pytest.approx({"base": 10 / 0.3, "patched": 50})
    assert fields["step_time_ms"] == pytest.approx({"base": 300, "patched": 200})
    assert not fields["slower"]


def test_baseline_check_flags_a_disturbed_run():
    assert throughput.baseline_check([1.0, 1.01, 1.02], [1.0])["ok"]
    disturbed = throughput.baseline_check([1.1, 1.1], [1.0, 1.0])
    assert not disturbed["ok"] and disturbed["ratio"] == pytest.approx(1.1) and disturbed["plain_ms"] == 1000


def test_models_run_in_turn_in_one_loop():
    order = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)

    models = [Named("u"), Named("a"), Named("b")]
    batch = torch.zeros(1)
    times, plain = throughput.interleave(models, 8, lambda model: model(batch), batch.device)
    rest = "".join(order)
    rounds = []
    for start in range(0, len(rest), 15):
        assert rest[start : start + 3] == "uuu", "a stretch of the plain loop before every second round"
        rounds += [rest[start + 3 : start + 9], rest[start + 9 : start + 15]]
    assert all(r[::2] == r[1::2] for r in rounds), "an untimed batch of the same model before each timed one"
    rounds = [r[::2] for r in rounds]
    assert len(rounds) == 8 and all(sorted(r) == ["a", "b", "u"] for r in rounds)
    assert len(set(rounds)) > 2, "the order changes"
    assert [len(t) for t in times] == [8, 8, 8] and len(plain) == 8


def test_leaves_the_model_and_the_process_as_they_were():
    model, images = zoo.build(NAME), zoo.images(NAME)
    model.train()
    model.blocks[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads, seen = torch.get_num_threads(), []
    options = {"pairs": 5, "memory": False, "profile": False, "threads": 2, "dtype": "bf16"}
    measure(model, images, ["tome"], **options, progress=lambda *p: seen.append(p))
    assert model.training and not model.blocks[1].training and model.blocks[0].training
    assert not vtok.info(model).patched
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert seen[-1] == (5, 5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.float64])
def test_other_types(dtype):
    (r,) = run(["tome"], dtype=dtype)
    assert r.dtype == str(throughput.DTYPES.get(dtype, dtype)).removeprefix("torch.")
    assert r.peak_memory_mb is None and r.reduction_share is None


def test_twins_share_their_weights():
    model = zoo.build(NAME)
    other = weight_sharing_copy(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in other.parameters()]
    vtok.patch(other, "tome", r=8)
    assert not vtok.info(model).patched
    assert other.blocks[0] is not model.blocks[0]


def test_share_of_the_reduction():
    images = zoo.images(NAME)
    slow = vtok.patch(zoo.build(NAME).eval(), Sleepy(0.02))
    assert reduction_share(slow, images) > 0.5
    assert reduction_share(zoo.build(NAME), images) == 0


def test_budgets_are_solved_for_the_images_at_hand():
    (r,) = run([("tome", {"flops": 0.7})])
    assert (r.gmacs["model"] + r.gmacs["pruner"]) / r.gmacs["base"] == pytest.approx(0.7, abs=0.03)


def test_cost_of_an_unpatched_model_needs_no_pass():
    model = zoo.build(NAME)
    cost = pass_cost(model, (3, 64, 64))
    assert cost.base_macs == cost.macs == vtok.plan(model, "tome", r=1).estimate.base_macs
    assert cost.mean_per_layer == (65,) * 4 and cost.implied_speedup == 1
    with pytest.raises(vtok.ConfigError, match="not run yet"):
        pass_cost(vtok.patch(model, "tome", r=8))


def test_mean_cost_weighs_passes_by_images():
    a = PassCost(10.0, (8.0, 6.0), 100.0, 60.0, 70.0, 1.0, True)
    b = PassCost(10.0, (4.0, 2.0), 100.0, 20.0, 30.0, 3.0, False)
    mean = mean_cost([a, b], [3, 1])
    assert mean == PassCost(10.0, (7.0, 5.0), 100.0, 50.0, 60.0, 1.5, True)


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ([], {}, "at least one method"),
        (["tome"], {"pairs": 2}, "says nothing"),
        (["tome"], {"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ([3], {}, "a setting is None"),
        (["tomee"], {}, "did you mean 'tome'"),
    ],
)
def test_refuses_what_makes_no_sense(settings, extra, message):
    with pytest.raises(vtok.VtokError, match=message):
        run(settings, **extra)


def test_refuses_a_patched_model():
    with pytest.raises(vtok.ConfigError, match="unpatched"):
        measure(vtok.patch(zoo.build(NAME), "tome"), zoo.images(NAME), ["tome"])


def test_setting_names():
    assert Setting().name == "unpatched"
    assert Setting.of(["tome", "pitome"]).name == "tome + pitome"
    assert Setting.of(("tome", {"r": 3})) == Setting("tome", {"r": 3})
    assert Setting("tome", {"r": 3}).title == "tome(r=3)"
    assert Setting("ats", {"flops": 0.61234567, "calibration": zoo.images(NAME)}).title == "ats(flops=0.6123)"
    assert Setting([vtok.ToMe(r=[1, 2]), "random"]).title == "tome(r=[1, 2]) + random"
    assert Setting(vtok.PiToMe()).title == "pitome"
