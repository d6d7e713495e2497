"""The benchmark of diverse selection: its loop chooses the same, the selection costs k n D and is faster."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vtok.errors import ConfigError
from vtok.eval.benchmarks import selection as select_bench
from vtok.eval.cli.app import app
from vtok.methods.todre.selection import SELECTORS


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
    results = select_bench.measure(1200, 200, 128, pairs=3)
    assert [r.selector for r in results] == list(SELECTORS)
    for r in results:
        assert r.same
        assert r.faster.point > 2
        assert set(r.scaling) == set(select_bench.GROWN)


def test_the_command() -> None:
    found = CliRunner().invoke(app, ["bench-select", "--tokens", "64", "--keep", "16", "--width", "16", "--pairs", "2"])
    assert found.exit_code == 0, found.output
    assert "max_sum" in found.output
    assert "k_center" in found.output
    refused = CliRunner().invoke(app, ["bench-select", "--tokens", "4", "--keep", "5"])
    assert isinstance(refused.exception, ConfigError)
    assert "--keep 5 of --tokens 4" in str(refused.exception)
