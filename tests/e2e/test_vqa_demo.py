"""The part of the demo on vision-language models, with tiny ones: real questions and pages, random weights."""

import io

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("transformers")

from helpers_vqa import ANATOMY, questions, tiny_llava, tiny_next

import vtok
from vtok.eval.common.settings import Setting, weight_sharing_copy
from vtok.eval.common.statistics import with_error
from vtok.eval.demo import prompts as vqa_demo
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_NEXT, VisionLanguageModel
from vtok.eval.runs import loader
from vtok.eval.runs import models as runs_models
from vtok.eval.tasks.vqa import pipeline as vqa_pipeline
from vtok.eval.tasks.vqa.data import PAGES
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz import prompt_overlay as vqa_overlay

QUESTIONS, PAGE_QUESTIONS = 10, 8
SETTINGS = {
    "demo_llava": [
        [{"name": "pitome", "ratio": 0.9}, {"name": "todre", "keep_tokens": 8}],
        {"name": "todre", "keep": 0.5},
        {"name": "random", "keep": 0.5},
    ],
    "demo_llava_next": [{"name": "correlation", "target_keep": 0.5}, {"name": "random", "keep": 0.6}],
}


@pytest.fixture(scope="module")
def models():
    return {REFERENCE_LLAVA: tiny_llava(), REFERENCE_NEXT: tiny_next()}


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory):
    """(folder, records, what was printed)."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for home in (runs_models, vqa_demo):
            patch.setattr(home, "load_vlm", lambda name: VisionLanguageModel(models[name].net, models[name].processor, name))
        patch.setattr(vqa_demo, "CELL_PAGES", 12)

        def run():
            console = Console(width=260, record=True, file=io.StringIO())
            return vqa_demo.run_vqa_demo(out, QUESTIONS, PAGE_QUESTIONS, console, SETTINGS), console.export_text()

        yield out, *run(), run


def test_every_setting_beside_the_unpatched_model(demo):
    out, (pictures, pages), _, _ = demo
    assert [r["method"] for r in pictures] == ["unpatched", "pitome + todre", "todre", "random"]  # as many tokens as random
    assert [r["method"] for r in pages] == ["unpatched", "correlation", "random"]
    assert {(r["n"], r["dataset"]) for r in (*pictures, *pages)} == {(QUESTIONS, "easy-vqa"), (PAGE_QUESTIONS, PAGES)}
    base, both, todre, _ = pictures
    assert todre["params"]["keep"] == 0.5 and base["gmacs"]["model"] > todre["gmacs"]["model"] > both["gmacs"]["model"]
    assert 0 < base["blind"] < 1 and pages[0]["groups"]["density"]
    for r in pictures[1:]:
        change = r["metrics"]["exact_match"] - base["metrics"]["exact_match"]
        assert r["metrics"]["exact_match_difference"] == pytest.approx(change)
    assert len((out / "sweep.csv").read_text().splitlines()) == 1 + 7


def test_a_second_run_asks_nothing(demo, monkeypatch):
    _, parts, text, run = demo
    monkeypatch.setattr(vqa_pipeline, "ask", None)
    again, shown = run()
    tables = "reference-llava on easy-vqa"
    assert again == parts and shown[shown.index(tables) :] == text[text.index(tables) :]


def test_tables_plot_and_overlays(demo):
    out, (pictures, pages), text, _ = demo
    for name in ("vqa.png", "vqa_overlay.png", "vqa_pages_overlay.png"):
        assert (out / name).stat().st_size > 10_000
    lines = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    blind = [line for line in lines if line[1] == "blind"]
    assert [line[6] for line in blind] == [f"{100 * part[0]['blind']:.1f}" for part in (pictures, pages)]
    right = with_error(pictures[2]["metrics"], "exact_match", 100)
    (todre,) = [line for line in lines if line[1].removesuffix(" *") == "todre"]
    change = with_error(pictures[2]["metrics"], "exact_match_difference", 100, sign="+")
    assert todre[6:8] == [right, change] and todre[2] == "8"
    (correlation,) = [line for line in lines if line[1].startswith("correlation")]
    assert all(0 < float(cell) <= 16 for cell in correlation[-3:-1])  # of a blank crop and of a filled one
    words = " ".join(text.replace("┃", " ").replace("│", " ").split())  # headers wrap between words
    for word in ("open", "yes/no", "agreement", "kept of a blank crop", "of a filled one"):
        assert word in words or all(part in words for part in word.split())


@pytest.mark.parametrize(("name", "tokens"), [("demo_llava", 256), ("demo_llava_next", 336)])
def test_methods_of_the_run_files_have_random_with_as_many_tokens(name, tokens):
    settings = loader.load(name).settings
    shares = [setting.method.keep for setting in settings if setting.name == "random"]
    assert len(shares) == len(set(shares)) >= 2
    kept = [setting.method.keep for setting in settings if setting.name == "todre"]
    assert set(kept) <= set(shares) and all(0 < share * tokens < tokens for share in shares)


def test_survivors_are_the_tokens_that_the_last_layer_sees(models):
    from vlm_zoo import Columns

    model, data = models[REFERENCE_LLAVA], questions(4)
    half = Setting(Columns(((2, 2),))).apply(weight_sharing_copy(model.net))
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
