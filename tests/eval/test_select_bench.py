"""The benchmark of diverse selection: its loop chooses the same, the selection costs k n D and is faster."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vtok
from vtok.capabilities import prompt_reducer
from vtok.errors import ConfigError
from vtok.eval.benchmarks import selection as select_bench
from vtok.eval.benchmarks import selectors
from vtok.eval.cli.program import app
from vtok.methods.todre.selection import SELECTORS
from vtok.ops import diversity
from vtok.ops.determinantal import greedy_dpp, greedy_dpp_macs
from vtok.ops.diversity import all_at_once, max_min, max_min_macs


@pytest.mark.parametrize("selector", list(SELECTORS))
def test_the_loop_chooses_the_same(selector: str) -> None:
    x = torch.randn(1, 60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(SELECTORS[selector](x, 25, 7)[0], select_bench.loop_select(x[0], 25, 7, selector))


@pytest.mark.parametrize(("n", "k", "width"), [(64, 16, 32), (128, 16, 32), (64, 31, 32), (64, 16, 96)])
@pytest.mark.parametrize("selector", list(SELECTORS))
def test_it_costs_k_n_d(selector: str, n: int, k: int, width: int) -> None:
    with FlopCounterMode(display=False) as counter:
        SELECTORS[selector](torch.randn(2, n, width), k, 0)
    assert counter.get_total_flops() == 2 * 2 * (k - 1) * n * width


def test_it_is_much_faster_than_the_loop() -> None:
    """At a size that tests can pay for; `vtok bench-select` measures the one of LLaVA-NeXT."""
    results = select_bench.measure(1200, 200, 256, pairs=3)
    assert [r.selector for r in results] == [*SELECTORS, "max_min", "dpp"]
    for r in results:
        assert r.same
        least = {"dpp": 0.2, "max_min": 1.2}  # the programs' loops leave little out themselves
        assert r.faster.point > least.get(r.selector, 1.5)  # measured 20 and more at full size
        assert set(r.scaling) == set(select_bench.GROWN)
        assert (r.steps is None) == (r.selector not in select_bench.STEPS)
    steps = {r.selector: r.steps.point for r in results if r.steps is not None}
    assert steps["max_min"] > 2 and steps["dpp"] > 0.3  # measured 5 and 1


def test_the_command() -> None:
    found = CliRunner().invoke(app, ["bench-select", "--tokens", "64", "--keep", "16", "--width", "16", "--pairs", "2"])
    assert found.exit_code == 0, found.output
    assert "max_sum" in found.output
    assert "k_center" in found.output and "max_min" in found.output and "dpp" in found.output
    some = CliRunner().invoke(
        app, [*["bench-select", "--tokens", "64", "--keep", "16", "--width", "16", "--pairs", "2", "--selector", "dpp"]]
    )
    assert some.exit_code == 0 and "dpp" in some.output and "max_sum" not in some.output
    with pytest.raises(vtok.UnknownNameError, match="unknown selector 'dpq'; did you mean 'dpp'"):
        select_bench.measure(8, 4, 4, 1, names=["dpq"])
    refused = CliRunner().invoke(app, ["bench-select", "--tokens", "4", "--keep", "5"])
    assert isinstance(refused.exception, ConfigError)
    assert "--keep 5 of --tokens 4" in str(refused.exception)


def test_the_loops_of_other_programs_choose_the_same() -> None:
    x = torch.randn(1, 80, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for name in ("max_min", "dpp"):
        select, loop = select_bench.CONTESTS[name]
        assert torch.equal(select(x, 10)[0], loop(x, 10)), name
        given, given_loop = select_bench.STEPS[name](x, 10)
        assert torch.equal(given()[0], select(x, 10)[0]) and torch.equal(given_loop(), loop(x, 10)), name


def test_max_min_costs_half_a_product_of_all_with_all() -> None:
    for n, k in ((600, 5), (600, 500), (40, 40)):
        with FlopCounterMode(display=False) as counter:
            max_min(torch.randn(1, n, 16), k)
        assert counter.get_total_flops() == 2 * max_min_macs(n, k, 16)
    assert 0.5 < max_min_macs(2880, 320, 1) / 2880**2 < 0.55


@pytest.mark.parametrize(("n", "k"), [(600, 5), (600, 300), (64, 64)])
def test_what_dpp_costs(n: int, k: int) -> None:
    with FlopCounterMode(display=False) as counter:
        greedy_dpp(torch.randn(2, n, 16), torch.ones(2, n), k)
    assert counter.get_total_flops() == 2 * 2 * greedy_dpp_macs(n, k, 16)
    assert all_at_once(n, k) == (k > 5)


def test_rows_made_alone_and_at_once_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, quality = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(3)), torch.rand(2, 300) + 0.1
    whole = greedy_dpp(x, quality, 60), max_min(x, 60)
    monkeypatch.setattr(diversity, "_WHOLE", 10)
    assert not all_at_once(300, 60)
    assert torch.equal(greedy_dpp(x, quality, 60), whole[0]) and torch.equal(max_min(x, 60), whole[1])


def test_rows_that_are_not_finite_are_rows_of_zeros() -> None:
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(4))
    x[0, 7] = float("nan")
    order = max_min(x, 40)
    assert torch.equal(order.sort().values, torch.arange(40)[None])
    assert torch.equal(max_min(x.masked_fill(x.isnan(), 0), 40), order)


def test_bytes_that_are_held() -> None:
    a = torch.zeros(1000)
    with selectors.Held() as held:
        b = a + 1  # 4,000 bytes
        c = (b + 1).sum()  # as many again, which then go
        d = b.view(10, 100)  # none
    assert held.peak == 8004 or held.peak == 8000
    assert held.now == 4004 and float(c) == 2000 and d.shape == (10, 100)
    del b, d
    assert held.now == 4


@pytest.mark.parametrize("video", [False, True])
def test_the_choice_of_every_method(video: bool) -> None:
    prompt = selectors.Synthetic.of(4 * 36, 4, 64, video)
    assert prompt.side == (6, 6) and prompt.tokens == 144
    results = {r.method.name: r for r in selectors.measure(selectors.configs(0.25), prompt, 1)}
    chosen = {name for name, r in results.items() if not r.refused}
    assert {"divprune", "dart", "fastv", "pyramiddrop", "sparsevlm", "todre", "random"} <= chosen
    assert ({"evs", "vidcom2"} <= chosen) == video and "pitome" not in chosen
    for name in ("divprune", "fastv", "todre"):
        assert results[name].kept == 36 and results[name].seconds > 0 and results[name].peak > 0
    assert "acts on" in results["pitome"].refused or "inside vision encoders" in results["pitome"].refused
    assert results["divprune"].share == results["divprune"].macs / selectors.prefill_macs(144 + selectors.TEXT)


def test_every_method_counts_what_it_multiplies() -> None:
    """The closed form in the table is what the choice computes."""
    prompt = selectors.Synthetic.of(4 * 36, 4, 64)
    for config in selectors.configs(0.25):
        try:
            reducer = prompt_reducer(config, prompt.info())
        except vtok.VtokError:
            continue
        if config.name not in ("divprune", "cdpruner", "fastervlm", "fastv", "todre"):
            continue
        call, macs, _ = selectors._choice(reducer, prompt, reducer.sites[0])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() == pytest.approx(2 * macs, rel=0.35), config.name


def test_the_command_for_every_method() -> None:
    args = ["bench-select", "--every-method", "--tokens", "72", "--views", "2", "--keep", "18", "--width", "64", "--pairs", "1"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    for word in ("divprune", "of prefill", "peak MiB", "pitome: pitome reduces tokens inside"):
        assert word in " ".join(found.output.split())
    for wrong, message in ((["--views", "5"], "72 tokens cannot be dealt out to 5 views"), (["--width", "40"], "32 heads")):
        refused = CliRunner().invoke(app, [*args, *wrong])
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception)
