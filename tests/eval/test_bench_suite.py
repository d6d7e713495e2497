"""`vtok bench-suite`: every combination runs once, a second start goes on, what fails is told; the bundled suite can run."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import vtok
from vtok.eval.benchmarks import suite
from vtok.eval.benchmarks.throughput import interleave
from vtok.eval.cli.program import app
from vtok.eval.models.by_name import load_model
from vtok.eval.runs.methods import parse_setting

SMALL = """
cells:
  - {model: reference, methods: [tome:r=4], batch_size: [1, 2], pairs: 5}
  - {model: reference, methods: [fastv], pairs: 5}
"""


def test_goes_on_where_it_stopped(tmp_path):
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(SMALL)
    told = []
    records, left = suite.run(suite.load(str(file)), out, "cpu", minutes=0, tell=told.append)
    assert records == [] and len(left) == 3 and "0 minutes were over" in left[0] and told == []
    records, left = suite.run(suite.load(str(file)), out, "cpu", tell=told.append)
    assert [(r["batch_size"], r["setting"]) for r in records] == [(1, "tome(r=4)"), (2, "tome(r=4)")]
    assert len(left) == 1 and left[0].startswith("reference, batch 1, fp32: ") and "fastv" in left[0]
    assert len(told) == 3
    again, _ = suite.run(suite.load(str(file)), out, "cpu", tell=told.append)
    assert again == records and len(told) == 4, "only what failed is tried again"
    page = (out / "table.md").read_text()
    assert page.count("tome(r=4)") == 2 and "Not run:" in page
    busy, calm = ({**records[0], "baseline_check": {"ok": ok}} for ok in (False, True))
    assert [row[5].endswith(" †") for row in suite.table([busy, calm]).rows] == [True, False]
    assert len([json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cells: []", "cells"),
        ("cells: [{model: reference, methods: [tome], batches: 3}]", "batches"),
        ("cells: [{model: reference, methods: [tomme]}]", "did you mean 'tome'"),
        ("cells: [{model: reference, methods: [tome], dtype: [fp8]}]", "unknown dtype"),
        ("cells: [{model: reference, methods: [tome], compile: [fast]}]", "unknown mode"),
        ("cells: [{model: reference, methods: [tome], pairs: 1}]", "pairs"),
    ],
)
def test_mistakes_are_told_before_anything_runs(text, said, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(vtok.VtokError, match=said):
        suite.load(str(file))


def test_unknown_suites():
    result = CliRunner().invoke(app, ["bench-suite", "tpu"])
    assert "no suite 'tpu'; bundled: gpu" in str(result.exception)


@pytest.mark.slow
def test_the_bundled_suite_can_be_planned():
    """Every setting of it on its model, without weights."""
    pairs = dict.fromkeys(itertools.chain.from_iterable([(b["model"], m) for m in b["methods"]] for b in suite.load("gpu")))
    models = {name: load_model(name, meta=True) for name, _ in pairs}
    for name, text in pairs:
        chosen = parse_setting(text)
        method, params = chosen if isinstance(chosen, tuple) else (chosen, {})
        prompt = vtok.Prompt() if name.startswith("transformers:") else None
        assert vtok.plan(models[name], method, prompt=prompt, **params) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["tome", "pitome", "random", "uniform", "zero_tprune"])
def test_no_host_synchronisation(method):
    model = load_model("deit_tiny_patch16_224").cuda().half()
    vtok.patch(model, method, flops=0.6)
    x = torch.randn(8, 3, 224, 224, device="cuda", dtype=torch.half)
    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_and_clock_agree():
    a = torch.randn(4096, 4096, device="cuda")
    times, plain = interleave([a, a], 5, lambda t: t @ t, a.device)
    assert min(times[0]) > 1e-5 and max(plain) < 1
