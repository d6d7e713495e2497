"""What a file of questions may say: texts and numbers, never the `str()` of something else; pictures of its own folder."""

import json
import os

import pytest

pytest.importorskip("transformers")

from helpers_tasks import WRITERS, written
from helpers_vqa import picture, write_vqav2
from PIL import Image

import vtok
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.vqa.sources.files import read_results, read_vqav2
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.tasks.vqa.task import Sources

NOTHING = (None, ["x"], {"a": 1}, True, [])
BOM = "\ufeff"


def one_line(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    picture(0).save(folder / "0.png")
    line = {"id": 0, "image": "0.png", "question": "what colour?", "answers": ["red"], **changes}
    (folder / "q.jsonl").write_text(json.dumps(line))
    return folder / "q.jsonl"


@pytest.mark.parametrize(
    ("answers", "taken"),
    [
        (["red"], ("red",)),
        ("red", ("red",)),
        ([{"answer": "red", "answer_id": 1}, "rot"], ("red", "rot")),
        ([2, 2.5], ("2", "2.5")),
        (["None"], ("None",)),
    ],
)
def test_answers_that_are_taken(answers, taken, tmp_path):
    assert open_vqa(one_line(tmp_path, answers=answers)).questions[0].answers == taken


@pytest.mark.parametrize("answers", [None, [None, "red"], [["red"]], [{"a": 1}], [{"answer": None}], {"a": 1}, [True], 5])
def test_answers_that_are_refused(answers, tmp_path):
    with pytest.raises(vtok.ConfigError, match=r"q.jsonl:1.* (must be a|has no 'answers')") as caught:
        open_vqa(one_line(tmp_path, answers=answers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", NOTHING)
@pytest.mark.parametrize("field", ["id", "image", "question"])
def test_fields_that_are_neither_text_nor_number(field, value, tmp_path):
    with pytest.raises(vtok.ConfigError, match=rf"q.jsonl:1.* ('{field}' must be a text, found|has no '{field}')"):
        open_vqa(one_line(tmp_path, **{field: value}))


# task -> (file, how to reach an entry, fields that hold a text)
FIELDS = {
    "chartqa": ("test_human.json", lambda content: content[0], ("imgname", "query", "label")),
    "docvqa": ("val_v1.0*.json", lambda content: content["data"][0], ("image", "question", "questionId")),
    "gqa": ("testdev_balanced_questions.json", lambda content: content["201"], ("imageId", "question", "answer")),
    "ocrbench": ("OCRBench.json", lambda content: content[0], ("image_path", "question", "dataset_name", "type")),
    "scienceqa": ("problems.json", lambda content: content["0"], ("question", "image", "hint")),
    "seedbench": (
        "SEED-Bench.json",
        lambda content: content["questions"][0],
        ("data_id", "question", "question_id", "choice_b"),
    ),
    "textvqa": ("TextVQA_0*.json", lambda content: content["data"][0], ("image_id", "question", "question_id")),
    "vizwiz": ("val.json", lambda content: content[0], ("image", "question", "answer_type")),
    "vqav2": ("*uestions*.json", lambda content: content["questions"][0], ("image_id", "question", "question_id")),
}


@pytest.mark.parametrize(("task", "field"), [(task, field) for task, (_, _, names) in FIELDS.items() for field in names])
def test_every_task_wants_texts(task, field, tmp_path):
    pattern, entry, _ = FIELDS[task]
    written(task, tmp_path)
    (path,) = tmp_path.rglob(pattern)
    content = json.loads(path.read_text())
    entry(content)[field] = ["x"]
    path.write_text(json.dumps(content))
    with pytest.raises(vtok.ConfigError, match=r"must be (a text|known by|numbers)|a question is known by"):
        QUESTION_TASKS.get(task).open(Sources(str(tmp_path)))


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_byte_order_marks_change_nothing(task, tmp_path):
    folder = written(task, tmp_path)
    plain = QUESTION_TASKS.get(task).open(Sources(str(folder)))
    for path in [*folder.rglob("*.json"), *folder.rglob("*.txt"), *folder.rglob("*.jsonl")]:
        path.write_text(BOM + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert QUESTION_TASKS.get(task).open(Sources(str(folder))).questions == plain.questions


def test_byte_order_marks_in_lines_and_captions(tmp_path):
    path = one_line(tmp_path)
    path.write_text(BOM + path.read_text(), encoding="utf-8")
    assert open_vqa(path).questions[0].doc_id == 0
    entry = {"filename": "0.png", "split": "test", "sentences": [{"raw": "a picture"}]}
    (tmp_path / "dataset_x.json").write_text(BOM + json.dumps({"images": [entry]}), encoding="utf-8")
    assert open_captions(tmp_path).captions == [["a picture"]]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": [entry | {"sentences": [{"raw": None}]}]}))
    with pytest.raises(vtok.ConfigError, match="'raw' must be a text, found None"):
        open_captions(tmp_path)


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_what_macos_leaves_behind_changes_nothing(task, tmp_path):
    folder = written(task, tmp_path)
    plain = QUESTION_TASKS.get(task).open(Sources(str(folder)))
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        for fork in (folder / "__MACOSX" / path.relative_to(folder).parent / f"._{path.name}", path.parent / f"._{path.name}"):
            fork.parent.mkdir(parents=True, exist_ok=True)
            fork.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    again = QUESTION_TASKS.get(task).open(Sources(str(folder)))
    assert again.questions == plain.questions and again.identity() == plain.identity()


def test_two_annotations_of_one_question(tmp_path):
    root = write_vqav2(tmp_path)
    (path,) = root.glob("*nnotations*.json")
    notes = json.loads(path.read_text())["annotations"]
    path.write_text(json.dumps({"annotations": [*notes, notes[0]]}))
    with pytest.raises(vtok.ConfigError, match=r"has two annotations of question 100; every question"):
        open_vqa(root)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}], "two answers to question 1, 'a' and 'b'"),
        ([{"question_id": 1, "answer": None}], "entry 0 has no 'answer'"),
        ([{"question_id": 1, "answer": ["a"]}], r"entry 0: 'answer' must be a text, found \['a'\]"),
        ([{"question_id": ["x"], "answer": "a"}], "entry 0: 'question_id' must be a text"),
        ({"a": 1}, "no list"),
    ],
)
def test_answers_of_others_that_are_refused(entries, message, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(entries))
    with pytest.raises(vtok.ConfigError, match=message):
        read_results(tmp_path / "r.json")


def test_answers_of_others(tmp_path):
    same = [{"question_id": 1, "answer": "a"}, {"question_id": "1", "answer": "b"}, {"question_id": 1, "answer": "a"}]
    (tmp_path / "r.json").write_text(BOM + json.dumps(same), encoding="utf-8")
    assert read_results(tmp_path / "r.json") == {1: "a", "1": "b"}


@pytest.fixture
def outside(tmp_path):
    """(folder of the questions, a picture beside it)."""
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "other" / "secret.png")
    return tmp_path / "data", tmp_path / "other" / "secret.png"


def test_questions_name_pictures_of_their_folder(outside):
    folder, secret = outside
    for name in ("../other/secret.png", "sub/../../other/secret.png", str(secret), "../data/../other/secret.png"):
        path = one_line(folder, image=name)
        with pytest.raises(vtok.ConfigError, match=r"q.jsonl:1: the image .*secret.png lies outside .*data; .*\(--images\)"):
            open_vqa(path)
        found = open_vqa(path, images=str(secret.parent))  # whoever names the folder means it
        assert found.read(found.questions[0].image).getpixel((0, 0)) == (0, 0, 255)
    for name in ("0.png", "./0.png", str(folder / "0.png")):
        assert open_vqa(one_line(folder, image=name)).questions[0].image


def test_links_do_not_lead_out_of_the_folder(outside):
    folder, secret = outside
    (folder / "link.png").symlink_to(secret)
    path = one_line(folder, image="link.png")
    with pytest.raises(vtok.ConfigError, match=r"the image link.png is a link to .*secret.png, outside .*data; .*--images"):
        open_vqa(path)
    assert open_vqa(path, images=str(folder)).questions
    (folder / "inner.png").symlink_to("0.png")
    assert open_vqa(one_line(folder, image="inner.png")).questions
    (folder.parent / "way").symlink_to(folder)  # the folder itself may be reached by one
    assert open_vqa(folder.parent / "way" / "q.jsonl").questions


@pytest.mark.parametrize("task", ["chartqa", "docvqa", "gqa", "scienceqa", "textvqa"])
def test_every_task_keeps_to_its_folder(task, tmp_path):
    pattern, entry, names = FIELDS[task]
    (field,) = (name for name in names if name.lower().startswith("im"))
    folder = written(task, tmp_path / "data")
    for ending in ("", ".jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"secret{ending or '.png'}")
    (path,) = folder.rglob(pattern)
    content = json.loads(path.read_text())
    ending = ".png" if field in ("imgname", "image") else ""
    entry(content)[field] = os.path.relpath(tmp_path / "secret", path.parent) + ending
    path.write_text(json.dumps(content))
    with pytest.raises(vtok.ConfigError, match=r"lies outside|is missing from"):
        QUESTION_TASKS.get(task).open(Sources(str(folder)))


def test_captions_keep_to_their_folder(outside):
    folder, secret = outside
    picture(0).save(folder / "0.png")
    (folder / "link.png").symlink_to(secret)

    def captions(*names):
        images = [{"filename": name, "split": "test", "sentences": [{"raw": "a"}]} for name in names]
        (folder / "dataset_x.json").write_text(json.dumps({"images": images}))
        return folder

    for name in ("../other/secret.png", str(secret), "link.png"):
        with pytest.raises(vtok.ConfigError, match=rf"the image {name} lies outside .*data; pass the folder"):
            open_captions(captions("0.png", name))
    assert len(open_captions(captions("0.png", "link.png"), images=str(folder))) == 2


def test_a_number_that_stands_for_several_pictures(tmp_path):
    def numbered(folder, **files):
        asked = [{"question_id": 1, "image_id": 42, "question": "what colour?"}]
        notes = [{"question_id": 1, "answers": [{"answer": "red"}]}]
        for name, colour in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(path.with_suffix(".png"))
        (folder / "q.json").write_text(json.dumps({"questions": asked}))
        (folder / "a.json").write_text(json.dumps({"annotations": notes}))
        data = read_vqav2(folder / "q.json", folder / "a.json", folder)
        return data.read(data.questions[0].image).getpixel((0, 0))

    coco, other = "COCO_val2014_000000000042", (0, 0, 255)
    red = (255, 0, 0)
    assert numbered(tmp_path / "1", **{coco: "red"}) == red
    assert numbered(tmp_path / "2", **{coco: "red", "preview_42": "blue", "vg__42": "blue"}) == red
    assert numbered(tmp_path / "3", **{coco: "red", f"again__{coco}": "red"}) == red  # the same picture
    assert numbered(tmp_path / "4", preview_42="blue") == other
    for more in ({coco: "red", f"masks__{coco}": "blue"}, {"a_42": "red", "b_42": "blue"}):
        with pytest.raises(vtok.ConfigError, match=r"question 1: the image 42 may be .* or .*; pass the folder of one"):
            numbered(tmp_path / "5" / str(len(str(more))), **more)
