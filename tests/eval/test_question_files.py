"""Public files that are damaged, incomplete or of another form: the message names the file, the entry and what is expected."""

import json
import re

import pytest

pytest.importorskip("transformers")

from helpers_tasks import WRITERS, written

import vtok
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.task import Sources


def at(task, root, pattern):
    """The only file of that name in a task's data."""
    written(task, root)
    (path,) = root.rglob(pattern)
    return path


def source(task, root, **more):
    return Sources(str(written(task, root)), **more)


def changing(pattern, change):
    """Makes a task's data with the content of a JSON file changed; `change` returns the new content or edits it in place."""

    def make(task, root):
        path = at(task, root, pattern)
        content = json.loads(path.read_text())
        new = change(content)
        path.write_text(json.dumps(content if new is None else new))
        return Sources(str(root))

    return make


def replacing(pattern, text):
    """Makes a task's data with the text of a file replaced, or the file removed (`None`)."""

    def make(task, root):
        path = at(task, root, pattern)
        path.unlink() if text is None else path.write_text(text)
        return Sources(str(root))

    return make


def no_tokens(task, root):
    ocr = root / "TextVQA_Rosetta_OCR_v0.2_val.json"
    return changing(ocr.name, lambda content: {"data": []})(task, root)._replace(ocr=str(ocr))


def no_texts(task, root):
    (root / "count").mkdir()
    return Sources(str(root))


def no_pictures(content):
    for problem in content.values():
        problem["image"] = None


def without_images(task, root):
    written(task, root)
    for path in [path for path in root.rglob("*") if path.is_file() and path.suffix in (".jpg", ".png", "")]:
        path.unlink()
    return Sources(str(root))


def first(change):
    """Changes the first entry of {"data": [...]}."""
    return lambda content: change(content["data"][0]) and None


GQA, TEXT, DOC, PROBLEMS = "testdev_balanced_questions.json", "TextVQA_0*.json", "val_v1.0*.json", "problems.json"
POPE, MME = "coco_pope_popular.json", "color/0000.txt"


@pytest.mark.parametrize(
    ("task", "make", "message"),
    [
        ("gqa", replacing(GQA, "{"), "questions.json is no JSON file of the form .*imageId.*: Expecting"),
        ("gqa", replacing(GQA, "[]"), "questions.json is not of the form .*: it holds list"),
        ("gqa", replacing(GQA, "{}"), "questions.json holds no questions"),
        ("gqa", changing(GQA, lambda c: c["201"].pop("answer") and None), "question 201 has no 'answer'; exp"),
        ("gqa", changing(GQA, lambda c: c.update({"201": 5})), "question 201 is int instead of an object"),
        ("gqa", lambda t, p: source(t, p, split="val_balanced"), "holds 0 files val_balanced_questions.json"),
        ("gqa", lambda t, p: Sources(str(p / "nowhere")), "nowhere is neither a folder nor a file; name the folder that ho"),
        ("gqa", lambda t, p: Sources(str(p), questions=str(p / "q.json")), "q.json does not exist; name the task's file"),
        ("textvqa", changing(TEXT, lambda c: []), r"not of the form .*: no list under 'data'"),
        ("textvqa", changing(TEXT, first(lambda e: e.update(answers=[]) or True)),
         "question 34602: 'answers' must be a list of at least one text, found []"),
        ("textvqa", changing(TEXT, first(lambda e: e.pop("question_id"))), "entry 0 has no 'question_id'"),
        ("textvqa", lambda t, p: source(t, p, ocr=str(p / "none.json")), "none.json does not exist"),
        ("textvqa", no_tokens,
         "question 34602: .*OCR.* has no tokens of image 0+; do both files belong to the same split"),
        ("pope", replacing(POPE, '{"question_id": 1}\n'), "popular.json:1 has no 'image', 'text', 'label'"),
        ("pope", replacing(POPE, "\n{"), r"popular.json:2 is no JSON object of the form"),
        ("pope", replacing(POPE, '{"question_id": 1, "image": "COCO_val2014_000000000000.jpg", "text": "q", '
                                    '"label": "maybe"}'), "popular.json:1: the answer must be yes or no, found 'maybe'"),
        ("pope", lambda t, p: source(t, p, split="easy"), "POPE has no split 'easy'; one of adversarial, popular"),
        ("pope", lambda t, p: Sources(str(p)), "holds no file coco_pope_{adversarial,popular,random}.json; name its folder"),
        ("mme", replacing(MME, "Is it?\tYes\n"), "0000.txt must hold two lines QUESTION<TAB>Yes|No, found 1 li"),
        ("mme", replacing(MME, "Is it? Yes\nIs it? No\n"), "0000.txt must hold two lines .*, found 2 lines: 'Is"),
        ("mme", replacing(MME, "Is it?\tYes\nIs it?\tOften\n"), "0000.txt:2: the answer must be yes or no"),
        ("mme", replacing("color/0000.jpg", None), "0000.txt: the image 0000 (.jpg, .png) is missing from"),
        ("mme", lambda t, p: Sources(str(p)), "has none of MME's folders (existence, count"),
        ("mme", no_texts, "count holds no text file with questions; expected one an im"),
        ("scienceqa", replacing("pid_splits.json", None), "pid_splits.json does not exist"),
        ("scienceqa", lambda t, p: source(t, p, split="exam"), "no list of numbers under 'exam', only train, te"),
        ("scienceqa", changing("pid_splits.json", lambda c: {"test": ["5000"]}), "has no question 5000, which"),
        ("scienceqa", changing(PROBLEMS, lambda c: c["0"].update(answer=9)),
         "question 0: 'answer' must be the place of one of its choices [.*] from 0 on, got 9"),
        ("scienceqa_img", changing(PROBLEMS, no_pictures),
         "has no question with an image; --task scienceqa asks without"),
        ("docvqa", changing(DOC, first(lambda e: e.pop("answers"))), "question 49153 has no 'answers'"),
        ("docvqa", changing(DOC, lambda c: c["data"].append(c["data"][0])), "asks question 49153 more than on"),
        ("chartqa", replacing("test_human.json", None), "holds 0 files test_human.json; ChartQA has one of ea"),
        ("chartqa", replacing("test_human.json", '[{"imgname": "0.png", "query": "q"}]'),
         "test_human.json: entry 0 has no 'label'; expected"),
        ("vqav2", lambda t, p: Sources(str(p / "nowhere")), "nowhere is no folder; name the one with VQAv2's questions"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_asked(task, make, message, tmp_path):
    with pytest.raises(vtok.ConfigError, match=message_pattern(message)) as caught:
        QUESTION_TASKS.get(task).open(make(task, tmp_path))
    assert "\n" not in str(caught.value)


def message_pattern(text):
    """Everything literal but `.*` and `0+`."""
    return ".*".join(re.escape(part).replace(r"0\+", "0+") for part in text.split(".*"))


@pytest.mark.parametrize("task", sorted(set(WRITERS) - {"mmbench", "vqav2"}))
def test_an_image_that_is_missing(task, tmp_path):
    with pytest.raises(vtok.ConfigError, match=r"the image .* is missing from .*") as caught:
        QUESTION_TASKS.get(task).open(without_images(task, tmp_path))
    named = str(caught.value).partition(":")[0]
    assert named.startswith(str(tmp_path)) and named.endswith((".json", ".txt"))


def test_an_image_that_is_damaged(tmp_path):
    written("gqa", tmp_path)
    (tmp_path / "images" / "n0.jpg").write_bytes(b"no picture")
    data = QUESTION_TASKS.get("gqa").open(Sources(str(tmp_path)))
    with pytest.raises(vtok.ConfigError, match=r"n0\.jpg cannot be read as an image"):
        data.read(data.questions[0].image)


def test_images_elsewhere_and_of_the_same_name(tmp_path):
    written("gqa", tmp_path / "data")
    (tmp_path / "data" / "images").rename(tmp_path / "pictures")
    task = QUESTION_TASKS.get("gqa")
    found = task.open(Sources(str(tmp_path / "data"), images=str(tmp_path / "pictures")))
    assert found.questions[0].image == str(tmp_path / "pictures" / "n0.jpg")
    (tmp_path / "pictures" / "again").mkdir()
    (tmp_path / "pictures" / "n0.jpg").rename(tmp_path / "pictures" / "again" / "n0.jpg")
    (tmp_path / "pictures" / "twice").mkdir()
    (tmp_path / "pictures" / "twice" / "n0.jpg").write_bytes(b"")
    with pytest.raises(
        vtok.ConfigError, match=r"the image n0\.jpg may be .*again/n0\.jpg or .*twice/n0\.jpg; pass the folder of one"
    ):
        task.open(Sources(str(tmp_path / "data"), images=str(tmp_path / "pictures")))


def test_a_question_file_by_name(tmp_path):
    folder = written("docvqa", tmp_path)
    (folder / "val_v1.0.json").write_text((folder / "val_v1.0_withQT.json").read_text())
    task = QUESTION_TASKS.get("docvqa")
    with pytest.raises(vtok.ConfigError, match=r"holds 2 files val_v1.0\*.json: .*; name the one to read with --questions"):
        task.open(Sources(str(folder)))
    assert task.open(Sources(str(folder), questions=str(folder / "val_v1.0.json"))).questions
    one = task.open(Sources(str(folder / "val_v1.0.json"), images=str(folder)))
    assert one.questions[0].image == str(folder / "documents" / "page0_1.png")
