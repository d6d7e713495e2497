"""Galleries, groups and questions of the page: drawn and counted from what records and bundled data say."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from test_report_html import lines, made, record

from vtok.eval import write_report
from vtok.eval.models.reference import load_reference_images
from vtok.eval.models.vlm import REFERENCE_LLAVA, VisionLanguageModel
from vtok.eval.report import sections
from vtok.eval.report.html import ReportOptions, gallery, groups, questions
from vtok.eval.runs.again import configs_of
from vtok.eval.tasks.vqa.data import EASY_VQA
from vtok.eval.tasks.vqa.sources.opening import open_vqa

N = 60


@pytest.fixture
def reference():
    base = np.arange(N) % 9 > 0
    hits = base & (np.arange(N) % 4 > 0)
    common = {"model": "reference-vit", "dataset": "fashion-mnist/test"}
    return [
        record("unpatched", 1.0, base, **common),
        record("tome", 0.6, hits, base, **common | {"params": {"r": 12, "prop_attn": True}}),
        record("random", 0.6, hits, base, **common | {"params": {"keep": 0.9}}),
    ]


def opened(uri):
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_gallery_shows_every_setting_on_every_image(tmp_path, reference):
    (section,) = sections.sections(reference)
    found = gallery.gallery(section, None, 2, ())
    assert found.problems == [] and found.choice == "evenly spaced over the data"
    assert [item.title.split(":")[0] for item in found.items] == ["Image 0", "Image 30"]
    first = found.items[0]
    assert [tile.label for tile in first.tiles] == ["unpatched", "tome at 60\u00a0%", "random at 60\u00a0%"]
    assert [tile.verdict for tile in first.tiles] == ["wrong"] * 3 and first.tiles[1].words.endswith("of 196")
    pictures = [np.asarray(opened(tile.uri).convert("RGB"), int) for tile in first.tiles]
    assert pictures[0].shape[0] >= 128 and np.abs(pictures[0] - pictures[2]).mean() > 5
    shown, report = made(tmp_path, reference, gallery=1)
    assert len(shown.all("img")) == 3 and all(attrs["alt"] for attrs in shown.all("img")) and report.problems == []


def test_what_cannot_be_drawn_is_said_and_the_page_is_written(tmp_path, reference):
    reference[1]["params"] = {"nonsense": 1}
    unknown = [one | {"model": "some/model", "key": f"x{one['key']}"} for one in reference]
    shown, report = made(tmp_path, reference + unknown, gallery=1)
    assert len(shown.all("img")) == 2
    assert any("nonsense" in problem for problem in report.problems)
    assert any("some/model does not come with vtok" in problem for problem in report.problems)
    assert "Not drawn" in shown.text and "nonsense" in shown.text
    shown, report = made(tmp_path, unknown, images=(str(tmp_path / "nothing.png"),))
    assert shown.all("img") == [] and "neither bundled nor in timm's registry" in report.problems[0]
    shown, report = made(tmp_path, reference, images=(str(tmp_path / "nothing.png"), "99999"))
    assert shown.all("img") == [] and len(report.problems) >= 2 and "does not exist" in str(report.problems)


def test_chosen_images_are_drawn(tmp_path, reference):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    (section,) = sections.sections(reference)
    found = gallery.gallery(section, None, 1, (str(tmp_path / "mine.png"), "7"))
    assert [item.title.split(":")[0] for item in found.items] == ["mine.png", "Image 7"] and found.choice == "as named"
    assert found.items[0].tiles[1].verdict == "" and found.items[1].tiles[1].verdict == "right"


@pytest.mark.parametrize("place", ["/nowhere/", "asset:"])
def test_weights_that_are_not_there_are_looked_for_among_the_bundled_ones(place):
    held = {"method": "atp", "params": {"weights": f"{place}easyvqa_llava_atp.safetensors"}}
    pytest.importorskip("transformers")
    (config,) = configs_of(held)
    assert config.weights.endswith("assets/easyvqa_llava_atp.safetensors") and place not in config.weights


def test_classes_of_bundled_images(reference):
    (section,) = sections.sections(reference)
    (table,) = groups.group_tables(section)
    labels = load_reference_images("test")[1][:N].numpy()
    assert table.name == "class" and [int(n) for _, n, _ in table.groups] == np.bincount(labels, minlength=10).tolist()
    base, hits = (row.correct.astype(float) for row in section.rows[:2])
    for i, cell in enumerate(table.rows[0][1]):
        assert cell.sort == pytest.approx(100 * (hits - base)[labels == i].mean())


def test_samples_of_runs_are_spaced_over_the_bundled_images(reference):
    held = [one | {"dataset": "fashion-mnist"} for one in reference]
    (section,) = sections.sections(held)
    assert groups.images_of(section)[:3] == [0, 166, 333] and len(groups.images_of(section)) == N
    labels = load_reference_images("test")[1][groups.images_of(section)].numpy()
    (table,) = groups.group_tables(section)
    assert [int(n) for _, n, _ in table.groups] == np.bincount(labels, minlength=10).tolist()
    found = gallery.gallery(section, None, 2, ())
    assert [item.title.split(":")[0] for item in found.items] == ["Image 0", "Image 5000"]
    assert [item.tiles[0].verdict for item in found.items] == ["wrong", "right"]  # samples 0 and 30
    named = gallery.gallery(section, None, 1, ("7",))
    assert [tile.verdict for tile in named.items[0].tiles] == [""] * 3  # no sample of the record
    skipped = [one | {"num_skipped": 1} for one in held]
    assert groups.images_of(sections.sections(skipped)[0]) is None


def test_groups_of_records_are_cut_to_those_that_change(reference):
    parts = {
        f"g{i}": {"n": 5, "top1": 50.0, "top1_difference": -float(i), "top1_difference_ci": [-i - 1, -i + 1]} for i in range(20)
    }
    held = [one | {"groups": {"kind": parts if one["method"] == "tome" else {}}} for one in reference]
    (table,) = groups.group_tables(sections.sections(held)[0])
    assert [name for name, *_ in table.groups] == [f"g{i}" for i in range(8, 20)] and "12 of 20" in table.note
    cells = table.rows[0][1]
    assert cells[0].kind == "bad" and cells[0].words == "−8.0" and cells[0].mark == "▼"


def answers(key, method, said, base, target="yes"):
    return [
        {
            "key": f"{key}/{i}",
            "doc_id": i,
            "method": method,
            "question": f"question {i}?",
            "prediction": one,
            "baseline_prediction": before,
            "target": target,
            "score": float(one == target),
            "kept_tokens": [8, 4],
        }
        for i, (one, before) in enumerate(zip(said, base))
    ]


def test_questions_on_which_settings_disagree(tmp_path):
    base, other, third = ["yes", "yes", "no"], ["yes", "no", "yes"], ["yes", "no", "no"]
    held = [record(m, 1.0 if m == "unpatched" else 0.5, key=m) for m in ("unpatched", "todre", "random")]
    samples = [*answers("unpatched", "unpatched", base, base), *answers("todre", "todre", other, base)]
    samples += answers("random", "random", third, base)
    (section,) = sections.sections(held)
    grouped = {}
    for line in samples:
        grouped.setdefault(line["key"].split("/")[0], []).append(line)
    found = questions.questions(section, grouped)
    assert (found.total, found.disputed) == (3, 2) and [one.doc_id for one in found.shown] == [1, 2]
    assert [(s.row.method, s.answer, s.score, s.changed) for s in found.shown[0].said] == [
        ("unpatched", "yes", "right", False),
        ("todre", "no", "wrong", True),
        ("random", "no", "wrong", True),
    ]
    assert questions.questions(section, {}) is None
    renamed = [one | {"key": f"run-{one['key']}", "title": one["method"], "n": 3, "path": "out/results.jsonl"} for one in held]
    placed = {key: [line | {"path": "out/part/samples.jsonl"} for line in own] for key, own in grouped.items()}
    assert questions.questions(sections.sections(renamed)[0], placed).disputed == 2  # by folder, title and number of answers
    assert questions.questions(sections.sections(renamed)[0], grouped) is None
    lines(tmp_path / "samples.jsonl", samples)
    lines(tmp_path / "results.jsonl", held)
    report = write_report([tmp_path], tmp_path / "r.html")
    assert "2 of 3 questions get another answer" in report.path.read_text()


def test_questions_are_drawn_with_what_is_left_of_their_tokens(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    from helpers_vqa import tiny_llava

    tiny = tiny_llava()
    monkeypatch.setattr(gallery, "load_vlm", lambda name: VisionLanguageModel(tiny.net, tiny.processor, name))
    shares = {"exact_match": 0.9, "exact_match_stderr": 0.01}
    held = [
        record("unpatched", 1.0, model=REFERENCE_LLAVA, dataset=EASY_VQA, metrics=shares, key="a"),
        record("random", 0.5, model=REFERENCE_LLAVA, dataset=EASY_VQA, metrics=shares, key="b", params={"keep": 0.5}),
    ]
    samples = answers("b", "random", ["no"] * 3, ["no", "no", "yes"])
    (section,) = sections.sections(held)
    asked = questions.questions(section, {"b": samples})
    found = gallery.gallery(section, asked, 1, ())
    assert found.problems == [] and "disagree" in found.choice
    (item,) = found.items
    question = open_vqa(EASY_VQA).questions[2]
    assert item.title == f"Question 2: {question.text} ({question.target})"
    assert item.tiles[1].words.startswith("8 of 16, says") and item.tiles[1].verdict in ("right", "wrong")
    lines(tmp_path / "results.jsonl", held)
    report = write_report([tmp_path], tmp_path / "r.html", ReportOptions(images=("5",)))
    assert report.problems == [] and json.dumps(open_vqa(EASY_VQA).questions[5].text)[1:-1] in report.path.read_text()
