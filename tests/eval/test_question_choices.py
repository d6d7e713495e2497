"""Sets of questions with choices, grounding, text in images: scores, prompts, and what cannot be asked."""

import ast
import csv
import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from helpers_tasks import asked, mmbench_rows, put, written

import vtok
from vtok.eval.models.vlm import REFERENCE_LLAVA, load_vlm
from vtok.eval.tasks import QUESTION_TASKS, TASKS
from vtok.eval.tasks.vqa.data import EASY_VQA, Question, VQAData
from vtok.eval.tasks.vqa.records import Scored
from vtok.eval.tasks.vqa.sources.hub import Cell
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.tasks.vqa.task import Sources, VQAOptions
from vtok.eval.tasks.vqa_benchmarks.refcoco import iou, parse_box
from vtok.eval.tasks.vqa_choice.letters import letter_of
from vtok.eval.tasks.vqa_choice.mmbench import infer_letter
from vtok.eval.tasks.vqa_choice.mmmu import open_answers, read_letter

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "question_scores_2.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", ["mmbench", "mmmu", "mvbench", "ocrbench", "refcoco", "seedbench", "videomme", "vizwiz"])
def test_scores_are_those_of_lmms_eval(task):
    """Answers and what lmms-eval 0.7.3 gives them."""
    rows = [row for row in GOLDEN if row["task"] == task]
    assert len(rows) >= 60 and len({row["score"] for row in rows}) > 1
    for row in rows:
        question = Question(0, "", tuple(row["answers"]), 0, row["groups"], row["facts"])
        score = QUESTION_TASKS.get(task).scores[row["metric"]]
        assert score(row["said"], question) == pytest.approx(row["score"]), row


@pytest.mark.parametrize(
    ("said", "letters", "mmbench", "mmmu"),
    [
        ("A dog and a cat", "A", "", "A"),  # an article
        ("I think it is B because A is wrong", "A", "", "A"),
        ("The answer is A, not B or C at all", "C", "A", "C"),
        ("(A) or (B)", "B", "", "B"),
        ("A.", "A", "A", "A"),
        ("banana", "", "", ""),
        ("it is the blue one of them", "", "A", "A"),
        ("", "", "", ""),
    ],
)
def test_programs_read_letters_differently(said, letters, mmbench, mmmu):
    options = {"A": "blue", "B": "red", "C": "green", "D": "white"}
    found = letter_of(said), infer_letter(said, options), read_letter(said, list(options.values()))
    assert found == (letters, mmbench, mmmu)


def test_open_answers_of_mmmu():
    assert open_answers("so it is 1,200\nx = 7") == [1200, 7, 1200, 200, 7]  # ends of lines, then numbers in them
    assert open_answers("x = 7\nno number")[0] == "x = 7\nno number"  # "=" counts in the last line alone
    assert " a" in open_answers("The answer is a") and open_answers("Blue.") == ["blue"]


def test_boxes():
    assert parse_box("the box [0.1, 0.2, 0.5, 0.6] or [0, 0, 1, 1]") == (0.1, 0.2, 0.5, 0.6)
    assert parse_box("0.1, 0.2, 0.5, 0.6") == (0, 0, 0, 0) == parse_box("")
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0  # lmms-eval divides by zero here


def test_a_question_of_mmbench_is_right_if_all_its_rotations_are():
    options = {"A": "one", "B": "two"}
    rows = [(1, "A"), (2, "A"), (1 + 10**6, "B"), (2 + 10**6, "B")]
    questions = [Question(i, "q", (target,), i % 10**6, {}, {"options": options, "base": i % 10**6}) for i, target in rows]
    found = Scored(VQAData("x", questions, None), ["A", "A", "B", "A"], QUESTION_TASKS.get("mmbench")).metrics(None)
    assert found["circular"] == pytest.approx(1 / 2) and found["vanilla"] == pytest.approx(3 / 4)


def test_the_table_of_mmbench(tmp_path):
    data = QUESTION_TASKS.get("mmbench").open(Sources(str(written("mmbench", tmp_path))))
    image, text, answer = asked()[1]
    plain, rotated = data.questions[2:4]
    assert plain.text == f"Look. {text} There are several options:\nA. {answer}\nB. one\n"
    assert rotated.text == f"Look. {text} There are several options:\nA. one\nB. {answer}\n"
    assert (plain.target, rotated.target) == ("A", "B") and plain.image == rotated.image == 1 and data.whole
    assert data.questions[0].text.startswith(asked()[0][1])
    assert data.read(1).tobytes() == open_vqa(EASY_VQA).read(image).tobytes()
    part = data.take(3).questions  # whole questions
    assert len(part) == 4 and len({q.facts["base"] for q in part}) == 2


def changed_table(folder, change):
    path = written("mmbench", folder) / "mmbench_dev_20230712.tsv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    change(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        out.writeheader()
        out.writerows(rows)
    return Sources(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(answer="C"), "row 0: 'answer' must be one of its choices A, B, found 'C'"),
        (lambda rows: rows[0].update(index="first"), "row 0: 'index' must be a whole number, found 'first'; expected a table"),
        (lambda rows: rows[1].update(image="77"), "row 1: its image is that of row 77, which has none; is the table whole?"),
        (lambda rows: rows[0].update(image=""), "row 0: question 0 has no 'image'; expected a table"),
        (lambda rows: rows[0].update(A="", B=""), "row 0: question 0 has no choices; expected a table"),
        (lambda rows: rows[0].update(question="nan"), "row 0: question 0 has no text; expected a table"),
        (lambda rows: [row.pop("image") for row in rows], "has no column 'image'; expected a table of tabs"),
    ],
)
def test_tables_of_mmbench_that_cannot_be_asked(change, message, tmp_path):
    with pytest.raises(vtok.ConfigError) as caught:
        QUESTION_TASKS.get("mmbench").open(changed_table(tmp_path, change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_picture_in_a_table(tmp_path):
    data = QUESTION_TASKS.get("mmbench").open(changed_table(tmp_path, lambda rows: rows[0].update(image="%%%")))
    with pytest.raises(vtok.ConfigError, match=r"the image of question 0 is no base64"):
        data.read(0)


def test_what_mmbench_hands_in(tmp_path):
    task = QUESTION_TASKS.get("mmbench")
    data = task.open(Sources(str(written("mmbench", tmp_path))))
    task.write(tmp_path, "answers", data.questions, ["A\nB"] * len(data.questions))
    rows = list(csv.DictReader((tmp_path / "answers.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert len(rows) == len(mmbench_rows()) and rows[0]["prediction"] == "A B" and rows[1]["answer"] == "B"


class Pathless:
    """What a pickle must not do: run a program."""

    def __reduce__(self):
        return ast.literal_eval, ("[]",)


def boxes(folder, content=None, coco=None):
    written("refcoco", folder)
    if content is not None:
        (folder / "refs(unc).p").write_bytes(content)
    if coco is not None:
        path = folder / "instances.json"
        found = json.loads(path.read_text())
        coco(found)
        put(path, found)
    return Sources(str(folder))


def test_the_references_of_refcoco(tmp_path):
    source, task = boxes(tmp_path), QUESTION_TASKS.get("refcoco")
    data = task.open(source)
    first = data.questions[0]
    assert first.text.endswith("the region this sentence describes: the thing 1 0") and first.facts["box"] == [
        5 / 64, 8 / 64, 37 / 64, 24 / 64,
    ]  # fmt: skip
    assert [q.doc_id for q in data.questions[:3]] == ["101/0", "101/1", "102/0"]
    assert task.score_all(first.target, first)["acc_90"] == 1  # its box to three places
    assert [q.doc_id for q in task.open(source._replace(split="testA")).questions] == ["100/0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: boxes(p, b"no pickle"), "refs(unc).p is no pickle of plain lists and texts of the form"),
        (lambda p: boxes(p, pickle.dumps([Pathless()])), "refs(unc).p is no pickle of plain lists and texts of the form"),
        (lambda p: boxes(p, pickle.dumps({"a": 1})), "is not of the form"),
        (lambda p: boxes(p, pickle.dumps([{"ref_id": 1}])), "entry 0 has no 'ann_id', 'image_id', 'split', 'sentences'"),
        (lambda p: boxes(p)._replace(split="test"), "has no reference of the split 'test', only of testA, val (--split)"),
        (lambda p: boxes(p, coco=lambda c: c.update(annotations=[])), "has no image "),
        (lambda p: boxes(p, coco=lambda c: c["images"][0].update(id=[1])), "images, entry 0: 'id' must be a text, found [1]"),
        (lambda p: boxes(p, coco=lambda c: [a.update(bbox=[1, 2]) for a in c["annotations"]]),
         "'bbox' must be [x, y, width, height] in an image with a size, found [1, 2] in 64 x 64"),
        (lambda p: boxes(p, coco=lambda c: [i.update(width=0) for i in c["images"]]), "in an image with a size, found"),
    ],
)  # fmt: skip
def test_files_of_refcoco_that_cannot_be_asked(make, message, tmp_path):
    with pytest.raises(vtok.ConfigError) as caught:
        QUESTION_TASKS.get("refcoco").open(make(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_vizwiz_hands_in(tmp_path):
    task = QUESTION_TASKS.get("vizwiz")
    data = task.open(Sources(str(written("vizwiz", tmp_path))))
    task.write(tmp_path, "answers", data.questions[:1], ["The Dog."])
    assert json.loads((tmp_path / "answers.json").read_text()) == [{"image": "VizWiz_val_00000000.jpg", "answer": "dog"}]


def test_secret_answers_of_vizwiz(tmp_path):
    path = written("vizwiz", tmp_path) / "val.json"
    rows = json.loads(path.read_text())
    put(tmp_path / "test.json", [{"image": row["image"], "question": row["question"]} for row in rows])
    assert all(q.answers == () for q in QUESTION_TASKS.get("vizwiz").open(Sources(str(tmp_path), split="test")).questions)


def college(folder, **changes):
    """Two questions of MMMU, one with two images, one open."""
    datasets = pytest.importorskip("datasets")
    read = open_vqa(EASY_VQA).read
    numbers = list(dict.fromkeys(i for i, _, _ in asked()))
    common = {"explanation": "", "topic_difficulty": "Easy", "subfield": "x", **{f"image_{k}": None for k in range(1, 8)}}
    rows = [
        {**common, "id": "validation_Art_Theory_1", "question": "Of <image 1> and <image 2>, which?", "answer": "B",
         "options": "['the <image 1>', 'the second']", "question_type": "multiple-choice",
         "image_1": read(numbers[0]), "image_2": read(numbers[1]), **changes},
        {**common, "id": "validation_Math_7", "question": "How many in <image 1>?", "options": "[]", "answer": "12",
         "question_type": "open", "image_1": read(numbers[2])},
    ]  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    for k in range(1, 8):
        data = data.cast_column(f"image_{k}", datasets.Image())
    datasets.DatasetDict({"validation": data}).save_to_disk(str(folder))
    return Sources(str(folder))


def test_the_rows_of_mmmu(tmp_path):
    data = QUESTION_TASKS.get("mmmu").open(college(tmp_path))
    two, count = data.questions
    assert two.text == (
        "Of <image 1> and <image 2>, which?\nA. the <image 1>\nB. the second\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert count.text == "How many in <image 1>?\n\nAnswer the question using a single word or phrase." and data.prompt == ""
    assert two.groups == {
        "kind": "choices", "images": "several", "subject": "Art_Theory", "discipline": "Art and Design",
    }  # fmt: skip
    assert two.image == (Cell(0, "image_1"), Cell(0, "image_2")) and [i.size for i in data.read(two.image)] == [(64, 64)] * 2
    assert len(data.read(count.image)) == 1 and data.identify(two.image) != data.identify(count.image)


def test_several_images_are_shown_together(tmp_path):
    source = college(tmp_path / "rows")
    options = VQAOptions(batch_size=2, max_new_tokens=2, device="cpu", output=str(tmp_path / "out"))
    (base, patched) = TASKS.get("mmmu")(load_vlm(REFERENCE_LLAVA), source.data, [None, ("uniform", {"keep": 0.5})], options)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    counts = {(line["doc_id"], line["method"]): line["visual_tokens"] for line in lines}
    assert {v for (doc, _), v in counts.items() if doc.startswith("validation_Art")} == {512}
    assert {v for (doc, _), v in counts.items() if doc.startswith("validation_Math")} == {256}
    assert base["tokens"]["in"] == 384 and patched["tokens"]["out"] == 192
    # no letter is read: one of two choices is right by chance half of the time
    assert base["metrics"]["accuracy_unguessed"] == 0 and 0 <= base["metrics"]["accuracy"] <= 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": "blue or red"}, "row 0: 'options' must be a list of texts, found 'blue or red'"),
        ({"answer": "C"}, "row 0: 'answer' must be the letter of one of 2 choices, found 'C'"),
        ({"question_type": "essay"}, "row 0: 'question_type' must be multiple-choice or open, found 'essay'"),
        ({"question": "<image 9>?"}, "row 0: its text names image_9; rows of MMMU have image_1 to image_7"),
    ],
)
def test_rows_of_mmmu_that_cannot_be_asked(changes, message, tmp_path):
    with pytest.raises(vtok.ConfigError) as caught:
        QUESTION_TASKS.get("mmmu").open(college(tmp_path, **changes))
    assert message in str(caught.value)


def test_an_image_of_mmmu_that_is_not_there(tmp_path):
    data = QUESTION_TASKS.get("mmmu").open(college(tmp_path, image_2=None))
    kept, skipped = data.readable()
    assert [q.doc_id for q in kept.questions] == ["validation_Math_7"] and len(skipped) == 1


def test_files_of_mmmu(tmp_path):
    with pytest.raises(vtok.ConfigError, match=r"MMMU is distributed as rows of the datasets library: pass hub, hub:NAME or"):
        QUESTION_TASKS.get("mmmu").open(Sources(str(tmp_path)))


def test_the_answers_of_seed_bench(tmp_path):
    path = written("seedbench", tmp_path) / "SEED-Bench.json"
    task = QUESTION_TASKS.get("seedbench")
    data = task.open(Sources(str(tmp_path)))
    assert "v" not in {q.doc_id for q in data.questions}  # about a video
    assert data.questions[0].text == f"{asked()[0][1]}\nA. {asked()[0][2]}\nB. one\nC. 2\nD. three"
    content = json.loads(path.read_text())
    content["questions"][0]["answer"] = "E"
    put(path, content)
    with pytest.raises(vtok.ConfigError, match=r"question 0: 'answer' must be A, B, C or D, found 'E'"):
        task.open(Sources(str(tmp_path)))


def test_full_width_characters():
    q = Question(0, "", ("CENTRE 12",), 0, {}, {"formula": False})
    assert QUESTION_TASKS.get("ocrbench").score_all("it says ＣＥＮＴＲＥ　１２", q) == {"accuracy": 1, "accuracy_official": 0}
