"""The CLIP part of the demo on a few pictures and pages."""

import pytest

pytest.importorskip("open_clip")

from vtok.eval.common.records import Records
from vtok.eval.demo import clip as clip_demo
from vtok.eval.models.reference import load_reference_clip
from vtok.eval.report.tables import is_unpatched
from vtok.eval.tasks import retrieval, zeroshot

PICTURES, PAGES = 12, 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, clip_demo.run_clip_demo(out, PICTURES, PAGES, budgets=[0.6], methods=["tome", "random"])


def test_records_hold_both_tasks_and_their_costs(demo):
    _, records = demo
    assert [r["method"] for r in records] == ["unpatched", "tome", "random"]
    base = records[0]
    assert is_unpatched(base) and base["n"] == {"pictures": PICTURES, "pages": PAGES}
    for record in records[1:]:
        assert (record["gmacs"]["model"] + record["gmacs"]["pruner"]) / base["gmacs"]["model"] == pytest.approx(0.6, abs=0.03)
        assert record["metrics"]["difference"] == pytest.approx(record["metrics"]["acc1"] - base["metrics"]["acc1"])


def test_metrics_are_those_of_the_tasks(demo):
    _, records = demo
    model, settings = load_reference_clip(), [("tome", records[1]["params"])]
    one = zeroshot.evaluate(model, "reference-pictures", settings, zeroshot.ZeroshotOptions(num_samples=PICTURES, workers=0))
    two = retrieval.evaluate(model, "reference-pages", settings, retrieval.RetrievalOptions(num_samples=PAGES, workers=0))
    metrics = records[1]["metrics"]
    assert one[0]["metrics"]["acc1"] == metrics["acc1"]
    for name in ("image_retrieval_recall@1", "text_retrieval_recall@1", "recall_sum"):
        assert two[0]["metrics"][name] == metrics[name]


def test_a_second_run_measures_what_is_missing_alone(demo, monkeypatch):
    out, records = demo
    asked = []
    measure = clip_demo._measure
    monkeypatch.setattr(
        clip_demo, "_measure", lambda todo, *args: asked.append([c.title for c in todo]) or measure(todo, *args)
    )
    again = clip_demo.run_clip_demo(out, PICTURES, PAGES, budgets=[0.6], methods=["tome", "random"])
    assert again == records and asked == []
    more = clip_demo.run_clip_demo(out, PICTURES, PAGES, budgets=[0.6], methods=["tome", "uniform"])
    assert asked == [["unpatched", "uniform at 0.6"]]  # differences are paired: the unpatched model sees the batches too
    assert [r["method"] for r in more] == ["unpatched", "tome", "uniform"]
    assert len(Records(out / "results.jsonl").load()) == 5


def test_table_plot_and_findings(demo):
    out, records = demo
    assert (out / "clip.png").stat().st_size > 10_000
    lines = clip_demo.markdown(records).splitlines()
    assert len(lines) == 5 and lines[0].count("|") == len(clip_demo.HEADER) + 1
    assert f"| {100 * records[1]['metrics']['acc1']:.1f} [" in lines[3]


def test_findings_name_who_is_below_random(demo):
    _, (base, tome, random) = demo
    high = {
        **random,
        "metrics": {**random["metrics"], "acc1": 1.1, "image_retrieval_recall@1": -1, "text_retrieval_recall@1": -1},
    }
    assert clip_demo.findings([base, tome, high]) == ["tome is below random at 0.6 of the FLOPs in zero-shot top-1"]
    low = {**random, "metrics": {**high["metrics"], "acc1": -1}}
    assert clip_demo.findings([base, tome, low]) == []
