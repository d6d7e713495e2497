"""Questions about images as data: parts of them, what is known without the image, files that cannot be read."""

import json

import pytest

pytest.importorskip("transformers")

from helpers_vqa import picture, questions, write_vqav2
from PIL import Image

import vtok
from vtok.eval.common.videos import Clip
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, Question, VQAData, blind_answers
from vtok.eval.tasks.vqa.records import blind_scores, groups_of
from vtok.eval.tasks.vqa.sources.opening import open_vqa


def test_a_part_of_the_questions():
    data = questions(12)
    rows = [q.doc_id for q in data.take(5).questions]
    assert [row * 5 // 12 for row in rows] == [0, 1, 2, 3, 4] and data.take(None) is data.take(99) is data
    kinds = groups_of(open_vqa(PAGES).take(200))
    assert {name: int(rows.sum()) for name, rows in kinds["kind"].items()}["open"] in range(85, 116)
    assert all(int(rows.sum()) in range(40, 61) for rows in kinds["density"].values())


def test_easy_vqa_from_the_question_alone():
    """The published test questions, and answers that are the majority among the training questions."""
    data = open_vqa(EASY_VQA)
    right, parts = blind_scores(data), groups_of(data)["kind"]
    assert len(data.questions) == 9673 and len({q.image for q in data.questions}) == 1000
    assert 100 * right.mean() == pytest.approx(67.0, abs=0.05)
    assert 100 * right[parts["yes/no"]].mean() == pytest.approx(82.5, abs=0.05)
    assert 100 * right[parts["open"]].mean() == pytest.approx(23.3, abs=0.05)
    assert data.read(data.questions[0].image).size == (64, 64) and data.prompt == ""


def test_questions_about_pages():
    data = open_vqa(PAGES)
    groups = groups_of(data)
    assert len(data.questions) == 3600 and {n: int(r.sum()) for n, r in groups["density"].items()} == dict.fromkeys("1234", 900)
    assert set(groups["kind"]) == {"open", "yes/no"} and data.read(0).size == (128, 128)
    right = blind_scores(data)
    assert set(data.blind) == {q.text for q in data.questions}
    # "blank" is right for most cells of a page with one picture and for none of a page with four
    open_ones = groups["kind"]["open"]
    shares = [right[open_ones & groups["density"][n]].mean() for n in "1234"]
    assert shares == sorted(shares, reverse=True) and shares[3] == 0 < shares[0]


def test_blind_answers_are_majorities_of_training_questions():
    assert blind_answers(["a", "a", "a", "b"], ["x", "y", "y", "z"]) == {"a": "y", "b": "z"}
    assert blind_answers(["a", "a"], ["x", "y"]) == {"a": "x"}
    easy_vqa = pytest.importorskip("easy_vqa")
    texts, answers, _ = easy_vqa.get_train_questions()
    assert blind_answers(texts, answers) == dict(open_vqa(EASY_VQA).blind)


def _broken(tmp_path, name, text):
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return tmp_path / name


def _changed(tmp_path, part, change):
    root = write_vqav2(tmp_path)
    (path,) = root.glob(f"*{part}*.json")
    content = json.loads(path.read_text())
    change(content[part])
    path.write_text(json.dumps(content))
    return root


LINE = '{"id": 1, "image": "0.png", "question": "q", "answers": ["a"]}'


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "is neither easy-vqa, easy-vqa-pages, scenes, print, a .jsonl file nor a folder"),
        (lambda p: p / "nowhere.jsonl", "nowhere.jsonl does not exist"),
        (
            lambda p: _broken(p, "x.jsonl", LINE + "\n{'id': 1}\n"),
            "x.jsonl:1: the image 0.png is missing from .*; pass the folder",
        ),
        (
            lambda p: (picture(0).save(p / "0.png"), _broken(p, "x.jsonl", LINE + "\n{'id': 1}\n"))[1],
            r"x.jsonl:2 is no JSON object of the form",
        ),
        (lambda p: _broken(p, "x.jsonl", '{"id": 1, "image": "0.png"}'), "x.jsonl:1 has no 'question', 'answers'; expected"),
        (lambda p: _broken(p, "x.jsonl", '{"id": 1, "image": "0.png", "question": "q", "answers": []}'), "question 1 has no"),
        (lambda p: _broken(p, "x.jsonl", "\n"), "x.jsonl holds no questions"),
        (
            lambda p: (picture(0).save(p / "0.png"), _broken(p, "x.jsonl", LINE + "\n" + LINE))[1],
            "asks question 1 more than once",
        ),
        (lambda p: p, r"holds 0 files \*uestions\*.json; name the one to read"),
        (lambda p: _changed(p, "questions", lambda q: q[0].pop("image_id")), "entry 0 has no 'image_id'; expected"),
        (
            lambda p: _changed(p, "questions", lambda q: q[0].update(image_id=77)),
            "question 100: its image is missing: no file in",
        ),
        (lambda p: _changed(p, "annotations", lambda a: a.pop(0)), "no annotation of question 100; do both files belong"),
        (lambda p: _changed(p, "annotations", lambda a: a[0].update(answers=[])), "question 100 has no answers"),
        (lambda p: _changed(p, "annotations", lambda a: a[0].update(answers=["x"])), "are no objects with 'answer'"),
    ],
)
def test_data_that_cannot_be_read(make, message, tmp_path):
    with pytest.raises(vtok.VtokError, match=message) as caught:
        open_vqa(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_pictures_with_shorter_sides():
    """One, several and frames; what identifies them changes with them, and so does the name."""
    seen = {"one": Image.new("RGB", (31, 20)), "two": [Image.new("RGB", (9, 8))] * 2}
    seen["clip"] = Clip([Image.new("RGB", (40, 10))], [0], 1.0, 1)
    asked = [Question(i, "?", ("yes",), name, {}) for i, name in enumerate(seen)]
    data = VQAData("set", asked, seen.__getitem__, identify=lambda image: image)
    assert data.shrunk(1) is data
    half = data.shrunk(2)
    assert half.name == "set, sides / 2" and half.read("one").size == (15, 10)
    assert [one.size for one in half.read("two")] == [(4, 4)] * 2 and half.read("clip").frames[0].size == (20, 5)
    assert data.shrunk(50).read("one").size == (1, 1)
    identities = {one.identity() for one in (data, half, data.shrunk(3), VQAData("set", asked[:2], seen.__getitem__).shrunk(2))}
    assert len(identities) == 4
    assert half.readable()[1] == []
