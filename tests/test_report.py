"""Tables, findings, CSV, plots and overlays made from records."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from zoo import build, images

import vtok
from vtok.eval.common.records import Records
from vtok.eval.common.settings import Setting
from vtok.eval.demo.compare import Case, Comparison, Data, cases
from vtok.eval.report import tables as report
from vtok.eval.viz.overlay import outlines, overlay_sheet, paint, token_groups


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    model, x = build("timm: ViT"), images("timm: ViT", batch=48)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    labels[::6] = (labels[::6] + 1) % 10  # five in six are right
    data = Data("noise", x, labels, images("timm: ViT", batch=6, seed=9))
    return Comparison(model, "tiny", data, Records(tmp_path_factory.mktemp("r") / "results.jsonl"), batch_size=12)


@pytest.fixture(scope="module")
def records(comparison):
    seen = []
    for case in cases(["tome", "ats", "random"], [0.7]):
        comparison.run(case, seen.append)
    assert sum(seen) == 4 * 48
    return report.ordered(comparison.records.load())


def test_records_hold_what_a_reader_needs(comparison, records):
    base, *patched = records
    assert base["method"] == "unpatched"
    assert base["metrics"]["top1"] == pytest.approx(100 * 40 / 48)
    for record in patched:
        assert {"params", "versions", "dtype", "device", "threads", "batch_size", "n", "dataset", "backend"} <= set(record)
        assert record["gmacs"]["base"] == base["gmacs"]["model"]
        assert record["gflops"]["model"] == 2 * record["gmacs"]["model"]
        assert record["pairs"] < 5 and record["speedup_ci"] is None
        low, high = record["metrics"]["difference_ci"]
        assert low < record["metrics"]["difference"] < high
        assert record["achieved"] == pytest.approx(record["speedup"] / record["implied_speedup"])
        difference = report.correctness(record).astype(float) - report.correctness(base)
        assert record["metrics"]["difference"] == pytest.approx(100 * difference.mean())
        assert record["metrics"]["difference_stderr"] == pytest.approx(100 * difference.std(ddof=1) / 48**0.5)
        assert (record["gmacs"]["model"] + record["gmacs"]["pruner"]) / base["gmacs"]["model"] == pytest.approx(0.7, abs=0.04)


def test_accuracy_is_that_of_a_plain_loop(comparison, records):
    record = next(r for r in records if r["method"] == "tome")
    with vtok.patched(build("timm: ViT"), "tome", **{"r": record["params"]["r"]}) as model, torch.no_grad():
        hits = torch.cat([model(x).argmax(-1) for x in comparison.data.images.split(7)]) == comparison.data.labels
    assert (hits.numpy() == report.correctness(record)).all()


def test_the_model_is_left_as_it_was(comparison, records):
    assert not vtok.info(comparison.model).patched
    assert not vtok.info(comparison.patched).patched


def test_what_is_finished_is_not_pending(comparison, records):
    assert comparison.pending(cases(["tome", "ats", "random"], [0.7])) == []
    assert [c.budget for c in comparison.pending(cases(["tome"], [0.7, 0.6]))] == [0.6]


def test_a_failing_configuration_leaves_no_record_and_no_patch(comparison, records):
    with pytest.raises(vtok.BudgetError):
        comparison.run(Case(Setting("tome", {"flops": 0.05}), 0.05))
    assert len(comparison.records.load()) == 4
    assert not vtok.info(comparison.patched).patched


def test_table_and_markdown(records):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.table(records, "title"))
    text = console.export_text()
    for word in ("tome", "unpatched", "GMACs", "GFLOPs", "±", "title"):
        assert word in text
    lines = report.markdown(records).splitlines()
    assert len(lines) == 2 + len(records)
    assert all(line.count("|") == len(report.HEADER) + 1 for line in lines)


def _fake(method, budget, top1, macs, speedup=2.0, right=1000):
    bits = np.zeros(2000, bool)
    bits[:right] = True
    return {
        "key": f"{method}{budget}",
        "method": method,
        "budget": budget,
        "n": 2000,
        "correct": np.packbits(bits).tobytes().hex(),
        "gmacs": {"model": macs},
        "speedup": speedup,
        "speedup_ci": [speedup - 0.05, speedup + 0.05],
        "metrics": {"top1": top1, "difference": top1 - 90, "difference_stderr": 0.5},
    }


def test_findings_speak_up():
    rows = [_fake("random", 0.4, 85.0, 1.0), _fake("tome", 0.4, 86.0, 1.0, right=1001), _fake("ats", 0.4, 89.0, 1.0, 0.9, 1200)]
    lines = report.findings(rows)
    assert lines[0].startswith("random at 0.4 of the FLOPs loses 5.00 points, 10.0 standard errors: enough")
    assert any("tome does not clearly beat random at 0.4" in line for line in lines)
    assert not any("ats does not" in line for line in lines)
    assert any("ats at 0.4 was slower than unpatched" in line for line in lines)
    few = report.findings([rows[0], _fake("ats", 0.4, 89.0, 1.0, 0.9, 1200) | {"speedup_ci": None}])
    assert not any("slower" in line for line in few)
    assert few[-1] == "1 settings were timed too few times for an interval of their speed-up"
    assert "too little" in report.findings([_fake("random", 0.4, 89.9, 1.0)])[0]


def test_the_pareto_front():
    rows = [_fake("a", 0.4, 80.0, 1.0), _fake("b", 0.4, 80.0, 1.2), _fake("c", 0.6, 85.0, 2.0), _fake("d", 0.6, 79.0, 0.9)]
    assert report.pareto(rows) == {"a0.4", "c0.6", "d0.6"}


def test_csv(records, tmp_path):
    report.write_csv(records, tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [r["method"] for r in rows] == [r["method"] for r in records]
    assert next(iter(rows[0])) == "model"
    assert float(rows[1]["top1"]) == records[1]["metrics"]["top1"]


def test_plot(records, tmp_path):
    report.plot(records, tmp_path / "pareto.png", "title")
    width, height = Image.open(tmp_path / "pareto.png").size
    assert width > 1000
    assert height > 400


def test_paint_shows_what_stays_merges_and_goes():
    image = np.linspace(0, 1, 64).reshape(8, 8)
    groups = np.array([0, 1, 1, -1])  # 2 x 2 patches of 4 x 4 pixels
    out = paint(image, groups, (2, 2))
    assert np.allclose(out[:4, :4], image[:4, :4, None])
    assert np.ptp(out[:4, 4:], axis=(0, 1)).max() == 0
    assert np.allclose(out[:4, 4:], out[4:, :4].mean((0, 1)))
    assert out[4:, 4:].mean() < 0.5 * image[4:, 4:].mean()
    assert len(outlines(groups, (2, 2))) == 4


def test_overlay_sheet(tmp_path):
    model, x = build("timm: ViT"), images("timm: ViT", batch=2)
    pictures = [np.random.rand(64, 64, 3) for _ in x]
    overlay_sheet(
        model, x, pictures, [("tome", "tome", {"r": 8}), ("random", "random", {})], tmp_path / "o.png", ["one", "two"], "h"
    )
    assert min(Image.open(tmp_path / "o.png").size) > 200
    assert not vtok.info(model).patched
    with pytest.raises(vtok.StateError, match="trace=True"):
        token_groups(vtok.patch(model, "tome"), x)
