"""The part of the demo on vision-language models, with tiny ones: real questions and pages, random weights."""

import numpy as np
import pytest

pytest.importorskip("transformers")

from helpers_vqa import ANATOMY, questions, tiny_llava, tiny_next

import vtok
from vtok.eval.common.records import Records
from vtok.eval.common.settings import Setting, twin
from vtok.eval.common.statistics import with_error
from vtok.eval.demo import questions as vqa_demo
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_NEXT
from vtok.eval.report import questions as vqa_report
from vtok.eval.tasks.vqa import pipeline as vqa_pipeline
from vtok.eval.tasks.vqa.data import PAGES
from vtok.eval.tasks.vqa.opening import open_vqa
from vtok.eval.viz import prompt_overlay as vqa_overlay

QUESTIONS, PAGE_QUESTIONS = 10, 8


@pytest.fixture(scope="module")
def models():
    return {REFERENCE_LLAVA: tiny_llava(), REFERENCE_NEXT: tiny_next()}


@pytest.fixture(scope="module")
def patches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa_demo, "TRAINED", {})  # modules of the reference LLaVA do not fit
        patch.setattr(vqa_demo, "CALIBRATION_PAGES", 6)
        patch.setattr(vqa_demo, "CELL_PAGES", 12)
        yield patch


@pytest.fixture(scope="module")
def demo(models, patches, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, vqa_demo.run_vqa_demo(out, QUESTIONS, PAGE_QUESTIONS, (0.5,), (0.5,), models=models)


def test_every_method_beside_random_and_uniform(demo):
    out, (pictures, pages) = demo
    assert [r["method"] for r in pictures] == ["unpatched", "pitome + todre", "todre", "random", "uniform"]
    assert [r["method"] for r in pages] == ["unpatched", "correlation", "random"]
    assert {(r["n"], r["dataset"]) for r in (*pictures, *pages)} == {(QUESTIONS, "easy-vqa"), (PAGE_QUESTIONS, PAGES)}
    base, both, todre, random, _ = pictures
    assert vqa_report.kept_tokens(base) == 16 and vqa_report.kept_tokens(random) == 8
    assert vqa_report.kept_tokens(both) <= 8 and todre["params"]["keep"] == 0.5
    assert base["gmacs"]["model"] > todre["gmacs"]["model"] > both["gmacs"]["model"]
    assert 0 < pictures[0]["blind"] < 1 and pages[0]["groups"]["density"]
    for r in pictures[1:]:
        assert r["metrics"]["exact_match_difference"] == pytest.approx(
            r["metrics"]["exact_match"] - base["metrics"]["exact_match"]
        )
    stored = Records(out / "results.jsonl").by_key()
    assert len(stored) == 8 and {r["key"] for r in (*pictures, *pages)} == set(stored)


def test_the_floor_has_as_many_tokens_as_correlation_kept(demo):
    _, (_, pages) = demo
    _, correlation, random = (vqa_report.kept_tokens(r) for r in pages)
    assert random == pytest.approx(correlation, rel=0.05)


def test_a_second_run_asks_nothing(demo, models, patches, monkeypatch):
    out, (pictures, pages) = demo
    asked = []
    monkeypatch.setattr(vqa_pipeline, "answer", lambda *args: asked.append(args))
    again = vqa_demo.run_vqa_demo(out, QUESTIONS, PAGE_QUESTIONS, (0.5,), (0.5,), models=models)
    assert asked == []
    assert [[r["key"] for r in part] for part in again] == [[r["key"] for r in part] for part in (pictures, pages)]
    assert again[0][2]["metrics"] == pictures[2]["metrics"] and again[1][1]["tokens"] == pages[1]["tokens"]


def test_crops_of_pages_are_counted_by_what_they_hold(demo):
    _, (_, pages) = demo
    kept = pages[1]["kept_of_crops"]
    assert set(kept) == {"blank", "filled"} and all(0 < value <= 16 for value in kept.values())
    assert "kept_of_crops" not in pages[0] and pages[2]["kept_of_crops"]["blank"] > 0


def test_tables_plot_and_overlays(demo):
    out, (pictures, pages) = demo
    for name in ("vqa.png", "vqa_overlay.png", "vqa_pages_overlay.png"):
        assert (out / name).stat().st_size > 10_000
    for records, header, cells in (
        (pictures, vqa_report.HEADER, vqa_report.row),
        (pages, vqa_report.PAGE_HEADER, vqa_report.page_row),
    ):
        lines = vqa_report.markdown(records, header, cells).splitlines()
        assert len(lines) == 2 + len(records) + 1 and {line.count("|") for line in lines} == {len(header) + 1}
        assert lines[-1].startswith("| blind | - |") and f"| {100 * records[0]['blind']:.1f} |" in lines[-1]
    right = with_error(pictures[1]["metrics"], "exact_match", 100)
    assert f"| {right} |" in vqa_report.markdown(pictures, vqa_report.HEADER, vqa_report.row)


def _record(method, tokens, right):
    """right: which of 16 questions."""
    correct = np.packbits(np.isin(np.arange(16), right)).tobytes().hex()
    return {"method": method, "n": 16, "correct": correct, "tokens": {"mean_per_layer": [tokens] * 2, "in": 100}}


def test_findings_compare_with_the_nearest_random():
    first, second = list(range(8)), list(range(8, 16))
    records = [
        _record("unpatched", 100, first + second),
        _record("todre", 50, first + second),
        _record("atp", 52, [*first[1:], 8]),
    ]
    records += [_record("a", 11, []), _record("random", 50, first), _record("random", 10, first), _record("uniform", 10, [])]
    assert vqa_report.findings(records) == [
        "todre with 50 visual tokens is clearly above random with 50: +50.0 [+21.0, +72.0] points",
        "atp with 52 visual tokens is not clearly apart from random with 50: +0.0 [-23.9, +23.9] points",
        "a with 11 visual tokens is clearly below random with 10: -50.0 [-72.0, -21.0] points",
    ]
    assert vqa_demo.shares_without_floor(records) == []
    assert vqa_demo.shares_without_floor([records[0], records[1], records[2], records[3]]) == [0.5, 0.11]
    order = [(r["method"], vqa_report.kept_tokens(r)) for r in vqa_report.ordered(records[::-1])]
    assert order == [
        ("unpatched", 100),
        ("atp", 52),
        ("todre", 50),
        ("random", 50),
        ("a", 11),
        ("random", 10),
        ("uniform", 10),
    ]


def test_survivors_are_the_tokens_that_the_last_layer_sees(models):
    from vlm_zoo import Columns

    model, data = models[REFERENCE_LLAVA], questions(4)
    half = Setting(Columns(((2, 2),))).apply(twin(model.net))
    found = vqa_overlay.survivors(model, half, data, data.questions)
    inputs = model.inputs([data.read(q.image) for q in data.questions], [q.text for q in data.questions])
    first = (inputs["input_ids"] == 3).long().argmax(1).numpy()  # the image token
    start = inputs["attention_mask"].argmax(1).numpy()
    column = first[:, None] + np.arange(ANATOMY.visual_tokens)
    assert np.array_equal(found.left, (column + start[:, None]) % 2 == 0)
    assert found.texts == vqa_pipeline.answer(model, half, inputs, 4).texts
    with pytest.raises(vtok.StateError, match="need a patched model"):
        vqa_overlay.survivors(model, model.net, data, data.questions)


def test_pages_are_put_together_from_their_crops():
    left = np.zeros((1, 4 + 4 * 5), bool)
    left[0, :4] = True  # the view of the whole page
    rows = left[0, 4:].reshape(4, 5)
    rows[0, 0] = rows[1, 3] = rows[3, 4] = rows[2, 2] = rows[3, 3] = True  # (3, 4) is the end of a line
    grid = vqa_overlay.crops_grid(left, 4)
    assert grid.shape == (1, 4, 4) and grid.sum() == 4
    assert vqa_overlay.by_cell(grid).tolist() == [[1, 1, 0, 2]]


def test_two_questions_about_each_of_two_pictures():
    found = vqa_demo.two_questions(open_vqa("easy-vqa"))
    assert [q.groups["kind"] for q in found] == ["open", "yes/no"] * 2
    assert found[0].image == found[1].image != found[2].image == found[3].image and found[0].target != found[2].target
