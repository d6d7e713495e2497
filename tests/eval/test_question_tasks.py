"""The standard sets of questions end to end: tiny data in the public formats, the bundled LLaVA, records, samples, files."""

import io
import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from helpers_tasks import SUFFIX, WRITERS, asked, written, yes_no
from helpers_vqa import words
from rich.console import Console
from typer.testing import CliRunner

from vtok.eval.common.records import Records, correctness
from vtok.eval.models.vlm import REFERENCE_LLAVA, load_vlm
from vtok.eval.report.html.repeat import repeat
from vtok.eval.report.printed import questions
from vtok.eval.report.read import read
from vtok.eval.report.sections import sections
from vtok.eval.runs import loader as runs
from vtok.eval.runs import runner
from vtok.eval.tasks import QUESTION_TASKS, TASKS
from vtok.eval.tasks.vqa.evaluate import BY_TASK
from vtok.eval.tasks.vqa.sources.files import read_results
from vtok.eval.tasks.vqa.task import Sources, VQAOptions

SETTINGS = [None, ("random", {"keep": 1 / 256})]
METRICS = {
    "chartqa": {"relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"},
    "docvqa": {"anls", "anls_definition"},
    "gqa": {"exact_match", "exact_match_vlmeval", "exact_match_official"},
    "mmbench": {"circular", "vanilla"},
    "mme": {"accuracy", "accuracy_plus", "perception", "cognition", "total"},
    "ocrbench": {"accuracy", "accuracy_official"},
    "pope": {f"{m}{p}" for m in ("f1", "accuracy", "precision", "recall", "yes_ratio") for p in ("", "_llava", "_vlmeval")}
    | {"yes_ratio_labels"},
    "refcoco": {"acc_10", "acc_30", "acc_50", "acc_70", "acc_90", "iou", "center_acc"},
    "scienceqa": {"exact_match", "exact_match_llava"},
    "scienceqa_img": {"exact_match", "exact_match_llava"},
    "seedbench": {"accuracy"},
    "textvqa": {"soft_accuracy", "soft_accuracy_vlmeval"},
    "vizwiz": {"soft_accuracy"},
    "vqav2": {"soft_accuracy", "soft_accuracy_official", "soft_accuracy_vlmeval"},
}
GROUPS = {
    "chartqa": {"part": {"human", "augmented"}},
    "gqa": {"structural": {"verify", "query"}, "answer": {"open", "binary"}},
    "mmbench": {"category": {"kind 0", "kind 1"}},
    "mme": {"category": {"color", "celebrity", "code_reasoning"}},
    "ocrbench": {"type": {"Regular Text Recognition", "Doc-oriented VQA"}},
    "pope": {"variant": {"adversarial", "popular", "random"}},
    "scienceqa": {"kind": {"image", "text"}, "grade": {"1-6", "7-12"}},
    "scienceqa_img": {"grade": {"1-6", "7-12"}},
    "seedbench": {"type": {"Scene Understanding", "Instance Identity"}},
    "vizwiz": {"kind": {"yes/no", "other"}},
    "vqav2": {"kind": {"yes/no", "other"}},
}


@pytest.fixture(scope="module")
def llava():
    return load_vlm(REFERENCE_LLAVA)


@pytest.fixture(scope="module")
def evaluated(llava, tmp_path_factory):
    """task -> (folder of results, questions, records); the model does not know the usual text behind questions."""

    class Evaluated(dict):
        def __missing__(self, task):
            folder = written(task, tmp_path_factory.mktemp(task))
            options = VQAOptions(batch_size=16, max_new_tokens=2, device="cpu", prompt="", output=str(folder / "out"))
            records = TASKS.get(task)(llava, str(folder), SETTINGS, options)
            questions = QUESTION_TASKS.get(task).open(Sources(str(folder))).questions
            self[task] = folder / "out", questions, records
            return self[task]

    return Evaluated()


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_records_of_every_task(evaluated, task):
    _, questions, (base, patched) = evaluated[task]
    declared = QUESTION_TASKS.get(task)
    assert (base["task"], base["primary"], base["percent"]) == (task, declared.primary, task == "mme")
    assert base["n"] == len(questions) and base["n_images"] == len(
        {q.doc_id if q.image is None else q.image for q in questions}
    )
    names = METRICS[task]
    assert names <= set(base["metrics"]) and not any("difference" in name for name in base["metrics"])
    for name in names:
        values = [patched["metrics"][f"{name}{end}"] for end in ("", "_stderr", "_difference", "_difference_stderr")]
        assert values[2] == pytest.approx(values[0] - base["metrics"][name], abs=1e-6)
        assert all(v is not None and v >= 0 for v in (values[1], values[3]))
        ends = patched["metrics"][f"{name}_difference_ci"]
        assert base["n_images"] >= 5 or ends is None  # too few images for an interval
        assert ends is None or (ends[0] <= values[2] + 1e-6 and ends[1] >= values[2] - 1e-6)
    assert {g: set(parts) for g, parts in base["groups"].items()} == GROUPS.get(task, {})
    right = [declared.scores[declared.correct](line["prediction"], q) >= 0.5 for q, line in lines(evaluated[task], base)]
    assert np.array_equal(correctness(base), right)
    assert json.loads(json.dumps([base, patched], allow_nan=False)) == [base, patched]


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_every_record_says_how_it_was_made(evaluated, task, tmp_path):
    """The page names a run file that measures the same settings on the same data."""
    folder, _, records = evaluated[task]
    page = repeat(sections([{**record, "path": "results.jsonl"} for record in records])[0], 1)
    assert page.commands == ["vtok run run-1.yaml"] and page.notes == []
    ((name, content),) = page.files
    (tmp_path / name).write_text(content)
    again = runs.load(str(tmp_path / name))
    assert (again.backend, again.model, again.tasks) == ("reference", REFERENCE_LLAVA, (task,))
    assert again.data == {task: str(folder.parent)} and again.options == {"prompt": "", "max_new_tokens": 2, "device": "cpu"}
    assert [setting.title for setting in again.settings] == [records[1]["title"]] and again.batch_size == 16
    if task in ("gqa", "mme"):
        found = runner.run(again, tmp_path / "again").records
        assert [one["metrics"] for one in found] == [one["metrics"] for one in records]
        assert [one["correct"] for one in found] == [one["correct"] for one in records]
        held = read([tmp_path / "again"])
        assert [one["config"]["task"] for one in held.records] == [task, task]  # not those of the task once more
        assert {key: len(lines) for key, lines in held.samples.items()} == {
            one["key"]: one["n"] for one in Records(next((tmp_path / "again" / task).rglob("results.jsonl"))).load()
        }


def lines(evaluated, record):
    """(question, sample) of a setting."""
    folder, questions, _ = evaluated
    found = {line["doc_id"]: line for line in Records(folder / "samples.jsonl").load() if line["key"].startswith(record["key"])}
    return [(q, found[q.doc_id]) for q in questions]


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_samples_of_every_task(evaluated, task):
    declared = QUESTION_TASKS.get(task)
    base, patched = evaluated[task][2]
    before = {q.doc_id: line["prediction"] for q, line in lines(evaluated[task], base)}
    for q, line in lines(evaluated[task], patched):
        assert (line["target"], line["question"]) == (q.target, q.text)
        assert line["scores"] == declared.score_all(line["prediction"], q)
        assert line["score"] == line["scores"][declared.correct] and line["baseline_prediction"] == before[q.doc_id]
        seen = q.image is not None
        assert line["visual_tokens"] == 256 * seen and line["kept_tokens"] == [1 * seen] * 8


def test_what_the_bundled_model_answers(evaluated):
    """It knows these pictures: nearly everything is right, and less with one token of 256."""
    metrics = {task: evaluated[task][2][0]["metrics"] for task in WRITERS}
    assert metrics["gqa"]["exact_match"] >= 0.8 and metrics["vqav2"]["soft_accuracy"] >= 0.8
    assert metrics["textvqa"]["soft_accuracy"] >= 0.8
    assert metrics["pope"]["f1"] >= 0.8 and metrics["mme"]["total"] >= 450
    assert metrics["chartqa"]["relaxed_overall"] >= 0.8 and metrics["docvqa"]["anls"] >= 0.8
    assert metrics["ocrbench"]["accuracy"] >= 0.8 and metrics["vizwiz"]["soft_accuracy"] >= 0.8
    assert metrics["scienceqa"]["exact_match"] == 0  # it knows no letters
    assert evaluated["gqa"][2][1]["metrics"]["agreement"] < 1


def test_mme_of_the_files_by_hand(evaluated):
    record = evaluated["mme"][2][1]
    points = 0.0
    for category, part in record["groups"]["category"].items():
        rows = [(q, line) for q, line in lines(evaluated["mme"], record) if q.groups["category"] == category]
        right = {}
        for q, line in rows:
            right.setdefault(q.image, []).append(line["prediction"].lower() == q.target)
        score = 100 * np.mean([r for pair in right.values() for r in pair]) + 100 * np.mean([all(p) for p in right.values()])
        assert part["total"] == pytest.approx(score) and part["n"] == 6
        points += score
    assert record["metrics"]["total"] == pytest.approx(points)
    assert record["metrics"]["perception"] + record["metrics"]["cognition"] == pytest.approx(points)


def test_questions_without_an_image(evaluated):
    _, questions, (base, patched) = evaluated["scienceqa"]
    assert questions[-1].image is None and questions[0].image is not None and questions[-1].doc_id == "77"
    assert base["groups"]["kind"]["text"]["n"] == 1 and patched["groups"]["kind"]["text"]["kept_tokens"] == 0
    alone = {line["doc_id"]: line for _, line in lines(evaluated["scienceqa"], base)}
    shorter = {line["doc_id"]: line for _, line in lines(evaluated["scienceqa"], patched)}
    assert alone["77"]["prediction"] == shorter["77"]["prediction"] and shorter["77"]["macs"] is None
    assert len(evaluated["scienceqa_img"][1]) == len(questions) - 1


@pytest.mark.parametrize(
    ("task", "suffix", "limit"),
    [
        ("chartqa", "\nAnswer the question with a single word.", 16),
        ("docvqa", SUFFIX, 32),
        ("gqa", SUFFIX, 16),
        ("mmbench", "\nAnswer with the option's letter from the given choices directly.", 1024),
        ("mme", SUFFIX, 16),
        ("ocrbench", "", 128),
        ("pope", SUFFIX, 128),
        ("refcoco", "", 1024),
        ("scienceqa", "\nAnswer with the option's letter from the given choices directly.", 16),
        ("seedbench", "\nAnswer with the option's letter from the given choices directly.", 1024),
        ("textvqa", SUFFIX, 1024),
        ("vizwiz", f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SUFFIX}", 1024),
        ("vqav2", SUFFIX, 16),
    ],
)
def test_prompts_are_those_of_lmms_eval(task, suffix, limit, tmp_path):
    data = QUESTION_TASKS.get(task).open(Sources(str(written(task, tmp_path))))
    assert data.prompt == suffix and QUESTION_TASKS.get(task).max_new_tokens == limit
    texts = [q.text for q in data.questions]
    assert not any("Please answer yes or no" in text for text in texts)
    if task == "textvqa":
        assert all(text == text.capitalize() for text in texts)
        ocr = str(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json")
        known = QUESTION_TASKS.get(task).open(Sources(str(tmp_path), ocr=ocr))
        assert known.name == "textvqa with OCR tokens"
        assert known.questions[0].text == texts[0] + "\nReference OCR token: HELLO, x2"


def test_files_of_answers(evaluated):
    said = {task: [(q, line["prediction"]) for q, line in lines(evaluated[task], evaluated[task][2][0])] for task in WRITERS}

    def file(task, ending=".json"):
        (found,) = evaluated[task][0].glob(f"answers_0-unpatched-*{ending}")
        return found

    assert json.loads(file("gqa").read_text()) == [{"questionId": q.doc_id, "prediction": a} for q, a in said["gqa"]]
    for task in ("vqav2", "textvqa"):
        assert json.loads(file(task).read_text()) == [{"question_id": q.doc_id, "answer": a} for q, a in said[task]]
    assert json.loads(file("docvqa").read_text())[0] == {"questionId": 49153, "answer": said["docvqa"][0][1]}
    assert read_results(file("gqa")) == {q.doc_id: a for q, a in said["gqa"]}
    assert read_results(file("docvqa")) == {q.doc_id: a for q, a in said["docvqa"]}
    science = json.loads(file("scienceqa").read_text())
    assert set(science["results"]) == {q.doc_id for q, _ in said["scienceqa"]} and set(science["results"].values()) == {-1}
    popular = [json.loads(x) for x in file("pope", "-popular.jsonl").read_text().splitlines()]
    assert [(p["question"], p["answer"]) for p in popular] == [
        (q.text, a) for q, a in said["pope"] if q.groups["variant"] == "popular"
    ]
    rows = file("mme", "").joinpath("celebrity.txt").read_text().splitlines()
    image, question, answer, prediction = rows[0].split("\t")
    assert image.endswith(".jpg") and question.endswith("Please answer yes or no.") and answer in ("Yes", "No")
    assert prediction == said["mme"][0][1] or len(rows) == 6
    assert not list(evaluated["chartqa"][0].glob("answers*"))


def test_answers_of_another_program(llava, tmp_path):
    folder = written("gqa", tmp_path)
    (tmp_path / "theirs.json").write_text(
        json.dumps([{"questionId": f"20{n}", "prediction": a} for n, (_, _, a) in enumerate(asked())])
    )
    options = VQAOptions(max_new_tokens=2, device="cpu", results=str(tmp_path / "theirs.json"))
    theirs = TASKS.get("gqa")(llava, str(folder), [None], options)[-1]
    assert theirs["metrics"]["exact_match"] == 1 and theirs["title"] == "theirs" and theirs["primary"] == "exact_match"


def unlabelled(task, folder):
    """The data of a task as a test split, without answers."""
    written(task, folder)
    if task == "vqav2":
        (questions,) = folder.glob("*questions.json")
        questions.rename(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json")
        next(folder.glob("*annotations.json")).unlink()
        return Sources(str(folder))
    (path,) = [p for p in folder.glob("*val*.json") if "OCR" not in p.name]
    content = json.loads(path.read_text())
    for entry in content["data"]:
        del entry["answers"]
    path.with_name(path.name.replace("val", "test")).write_text(json.dumps(content))
    path.unlink()
    return Sources(str(folder), split="test")


@pytest.mark.parametrize("task", ["docvqa", "textvqa", "vqav2"])
def test_questions_whose_answers_are_secret(task, llava, tmp_path):
    declared, sources = QUESTION_TASKS.get(task), unlabelled(task, tmp_path / "data")
    assert all(q.answers == () and q.target == "" for q in declared.open(sources).questions)
    options = VQAOptions(split=sources.split, prompt="", max_new_tokens=2, device="cpu", output=str(tmp_path / "out"))
    base, patched = getattr(BY_TASK, declared.name)(llava, sources.data, SETTINGS, options)
    assert base["metrics"][declared.primary] is None and base["split"].startswith("test")
    assert patched["metrics"][f"{declared.primary}_difference"] is None and 0 <= patched["metrics"]["agreement"] <= 1
    answers = json.loads(next((tmp_path / "out").glob("answers_0-unpatched-*.json")).read_text())
    assert len(answers) == len(asked()) and {a["answer"] for a in answers} > {"yes", "no"}
    questions([base, patched], Console(file=(shown := io.StringIO()), width=160))
    assert "unpatched" in shown.getvalue()


def test_a_part_of_mme_is_whole_images(tmp_path):
    data = QUESTION_TASKS.get("mme").open(Sources(str(written("mme", tmp_path))))
    total = len(data.questions)
    assert total == 3 * len(yes_no()) and data.take(None) is data
    for count in (1, 2, 5, total - 1):
        part = data.take(count).questions
        images = [q.image for q in part]
        assert count <= len(part) <= count + 1 and all(images.count(image) == 2 for image in images)


def test_one_file_of_pope(tmp_path):
    folder = written("pope", tmp_path)
    task = QUESTION_TASKS.get("pope")
    one = task.open(Sources(str(folder / "coco_pope_popular.json"), images=str(folder)))
    assert {q.groups["variant"] for q in one.questions} == {"popular"} and one.split == "popular"
    split = task.open(Sources(str(folder), split="random"))
    assert [q.doc_id for q in split.questions] == [f"random/{i}" for i in range(1, len(yes_no()) + 1)]
    assert task.open(Sources(str(folder))).split == "adversarial+popular+random"


def test_the_command_line(tmp_path):
    from vtok.eval.cli.program import app

    folder = written("mme", tmp_path)
    args = ["eval", "vqa", "--task", "mme", "--model", REFERENCE_LLAVA, "--data", str(folder), "-M", "uniform:keep=0.25"]
    args += ["--max-new-tokens", "2", "--prompt", "", "--device", "cpu"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    for word in ("perception", "cognition", "total", "accuracy_plus:", "category color, 6 questions", "uniform(keep=0.25)"):
        assert word in text, text
