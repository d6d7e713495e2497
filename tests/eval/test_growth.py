"""Growth of time and memory: every method is measured, memory of merging stays linear, refusals are told."""

from typer.testing import CliRunner

from vtok.core import tokens
from vtok.eval.benchmarks import growth
from vtok.eval.cli.program import app
from vtok.ops import room

ENCODERS = {"ats", "pitome", "random", "tome", "uniform", "zero_tprune"}


def test_every_method_is_measured():
    results = growth.measure_encoders((16, 64), width=12, calls=1)
    assert {r.method for r in results} == {growth.ATTENTION} | ENCODERS
    assert all(r.seconds > 0 and r.peak > 0 for r in results)
    lines = growth.table(results, "attention", "").markdown().splitlines()
    assert len(lines) == 2 + 1 + len(ENCODERS)
    assert growth.exponent(results, "zero_tprune", lambda r: r.peak) > 1.2


def test_memory_of_merging_is_linear(monkeypatch):
    """Four times the tokens, with blocks small enough for either size: about four times the memory, not sixteen times."""
    monkeypatch.setattr(tokens, "LARGEST", 2**14)
    results = growth.measure_encoders((400, 1600), width=12, calls=1, methods=["tome", "pitome"])
    for name in ("tome", "pitome"):
        assert growth.exponent(results, name, lambda r: r.peak) < 1.25, name


def test_prompts():
    results = growth.measure_prompts((16, 64), width=32, calls=1)
    assert {"divprune", "todre", "uniform", "visionzip", "fastv"} <= {r.method for r in results}
    share = {(r.method, r.tokens): r.share for r in results}
    assert share["uniform", 64] == 0 < share["visionzip", 16] and share["divprune", 64] > share["divprune", 16] > 0


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_SMALL", 2**20)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**20)
    picture = tmp_path / "growth.png"
    options = ["--tokens", "64", "--tokens", "400", "--visual", "16", "--visual", "36", "--width", "12", "--calls", "1"]
    found = CliRunner().invoke(app, ["bench-growth", *options, "--markdown", "--plot", str(picture)])
    assert found.exit_code == 0, found.output
    assert "| zero_tprune | " in found.output and "refused" in found.output
    assert "zero_tprune at 400 tokens: zero_tprune reads the attention of every token" in found.output
    assert picture.stat().st_size > 10_000
    wrong = CliRunner().invoke(app, ["bench-growth", "--width", "13"])
    assert wrong.exit_code != 0 and "multiple" in str(wrong.exception)
