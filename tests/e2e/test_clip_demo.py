"""The CLIP part of the demo on a few pictures and pages."""

import io

import pytest
from rich.console import Console

pytest.importorskip("open_clip")

from vtok.eval.demo import encoders as clip_demo
from vtok.eval.models.reference import load_reference_clip
from vtok.eval.runs import runner
from vtok.eval.tasks.clip import retrieval, zeroshot

PICTURES, PAGES = 12, 10


def run(out, methods):
    console = Console(width=200, record=True, file=io.StringIO())
    return clip_demo.run_clip_demo(out, PICTURES, PAGES, [0.6], methods, console), console.export_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, *run(out, ["tome", "random"])


def test_records_of_both_tasks_and_their_costs(demo):
    _, parts, _ = demo
    assert [[r["method"] for r in part] for part in parts] == [["unpatched", "tome", "random"]] * 2
    assert [part[0]["n"] for part in parts] == [PICTURES, PAGES]
    for base, *patched in parts:
        for record in patched:
            share = (record["gmacs"]["model"] + record["gmacs"]["pruner"]) / base["gmacs"]["model"]
            assert share == pytest.approx(0.6, abs=0.03)
    assert [r["params"] for r in parts[0]] == [r["params"] for r in parts[1]]  # solved on the same pages


def test_metrics_are_those_of_the_tasks(demo):
    _, (pictures, pages), _ = demo
    model, settings = load_reference_clip(), [("tome", pictures[1]["params"])]
    one = zeroshot.evaluate(model, "reference-pictures", settings, zeroshot.ZeroshotOptions(num_samples=PICTURES, workers=0))
    two = retrieval.evaluate(model, "reference-pages", settings, retrieval.RetrievalOptions(num_samples=PAGES, workers=0))
    assert one[0]["metrics"]["acc1"] == pictures[1]["metrics"]["acc1"]
    for name in ("image_retrieval_recall@1", "text_retrieval_recall@1", "recall_sum"):
        assert two[0]["metrics"][name] == pages[1]["metrics"][name]


def test_a_second_run_measures_nothing(demo, monkeypatch):
    out, parts, _ = demo

    def refuse(*_):
        raise AssertionError("everything is there: no model is needed")

    monkeypatch.setattr(runner.runs_models, "load_for", refuse)
    assert run(out, ["tome", "random"])[0] == parts


def test_tables_plot_and_frame(demo):
    out, (pictures, pages), text = demo
    assert (out / "clip.png").stat().st_size > 10_000
    assert f"{100 * pictures[1]['metrics']['acc1']:.1f} " in text and "image R@1 %" in text
    assert f"{100 * pages[1]['metrics']['image_retrieval_recall@1']:.1f}" in text
    assert len((out / "sweep.csv").read_text().splitlines()) == 1 + 6
