"""Questions from rows of the `datasets` library: what it saved, parquet files, and what is not there."""

import sys

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets
from helpers_tasks import SUFFIX, WRITERS, asked, box_of, mmbench_rows, written, yes_no

import vtok
from vtok.eval.models.vlm import REFERENCE_LLAVA, load_vlm
from vtok.eval.tasks import QUESTION_TASKS, TASKS
from vtok.eval.tasks.vqa.data import EASY_VQA
from vtok.eval.tasks.vqa.sources.hub import is_dataset
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.tasks.vqa.task import Sources, VQAOptions


def rows_of(task):
    """Rows as lmms-eval's data sets have them; GQA's images stand apart."""
    read = open_vqa(EASY_VQA).read
    pairs = list(enumerate(asked()))
    kinds = [(n, i, q, a) for n, (i, q, a) in enumerate(yes_no())]
    science = [
        {
            "question": q,
            "choices": [a, "no such thing"],
            "answer": 0,
            "hint": "",
            "grade": "grade2",
            "subject": "x",
            "image": read(i),
        }
        for _, (i, q, a) in pairs
    ]
    return {
        "chartqa": lambda: [
            {"type": "human_test" if n % 2 else "augmented_test", "question": q, "answer": a, "image": read(i)}
            for n, (i, q, a) in pairs
        ],
        "docvqa": lambda: [
            {"questionId": str(n), "question": q, "answers": [a], "question_types": ["layout"], "image": read(i)}
            for n, (i, q, a) in pairs
        ],
        "gqa": lambda: [
            {"id": str(n), "imageId": f"n{i}", "question": q, "answer": a, "types": {"structural": "query", "semantic": "attr"}}
            for n, (i, q, a) in pairs
        ],
        "mmbench": lambda: [
            {**row, "hint": row["hint"] or "nan", "C": "nan", "D": "nan", "L2-category": "perception",
             "image": read(asked()[row["index"] % 10**6][0])}
            for row in mmbench_rows()
        ],
        "mme": lambda: [
            {"question_id": f"color/{i}.png", "category": "color", "question": f"{q} Please answer yes or no.",
             "answer": a.title(), "image": read(i)}
            for _, i, q, a in kinds
        ],
        "ocrbench": lambda: [
            {"dataset": "svt", "question": q, "question_type": "Doc-oriented VQA", "image": read(i),
             "answer": [a.upper(), "?"] if n % 2 else [a.upper()]}
            for n, (i, q, a) in pairs
        ],
        "refcoco": lambda: [
            {"question_id": str(101 + n), "file_name": f"{i}.jpg", "bbox": box_of(1 + n), "image": read(i),
             "answer": [f"the thing {1 + n} {k}" for k in range(1 + (n == 0))]}
            for n, i in enumerate(dict.fromkeys(i for i, _, _ in asked()))
        ],
        "seedbench": lambda: [
            {"question_id": str(n), "question": q, "choice_a": a, "choice_b": "one", "choice_c": "2", "choice_d": "three",
             "answer": "A", "data_type": kind, "data_id": f"{i}", "question_type_id": 1 + n % 2, "image": [read(i)] * count}
            for n, (i, q, a) in pairs for kind, count in (("image", 1), ("video", 2))[: 1 + (n == 0)]
        ],
        "vizwiz": lambda: [
            {"question_id": f"VizWiz_val_{n:08d}.jpg", "question": q, "answers": [a] * 8 + ["unanswerable"] * 2,
             "category": "yes/no" if a in ("yes", "no") else "other", "image": read(i)}
            for n, (i, q, a) in pairs
        ],
        "pope": lambda: [
            {"question_id": str(n), "question": q, "answer": a, "image_source": str(i), "category": "popular", "image": read(i)}
            for n, i, q, a in kinds
        ],
        "scienceqa": lambda: [{**science[0], "image": None}, *science],
        "scienceqa_img": lambda: science,
        "textvqa": lambda: [
            {"question_id": n, "image_id": str(i), "question": q, "answers": [a] * 10, "ocr_tokens": ["X"], "image": read(i)}
            for n, (i, q, a) in pairs
        ],
        "vqav2": lambda: [
            {"question_id": n, "image_id": i, "question": q, "answer_type": "other", "image": read(i),
             "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k in range(10)]}
            for n, (i, q, a) in pairs
        ],
    }[task]()  # fmt: skip


def saved(task, folder):
    """A folder that `save_to_disk` made."""
    hub = QUESTION_TASKS.get(task).hub
    data = datasets.Dataset.from_list(rows_of(task))
    if "image" in data.column_names and not isinstance(data[0]["image"], list):
        data = data.cast_column("image", datasets.Image())
    target = folder / hub.config if hub.images else folder
    datasets.DatasetDict({hub.split: data}).save_to_disk(str(target))
    if hub.images:
        read = open_vqa(EASY_VQA).read
        images = [{"id": f"n{i}", "image": read(i)} for i in dict.fromkeys(i for i, _, _ in asked())]
        pictures = datasets.Dataset.from_list(images).cast_column("image", datasets.Image())
        datasets.DatasetDict({hub.split: pictures}).save_to_disk(str(folder / hub.images))
    return folder


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_rows_are_the_questions_of_the_files(task, tmp_path):
    declared = QUESTION_TASKS.get(task)
    rows = declared.open(Sources(str(saved(task, tmp_path / "rows"))))
    files = declared.open(Sources(str(written(task, tmp_path / "files"))))
    assert (rows.prompt, rows.whole, rows.name) == (files.prompt, files.whole, files.name)
    if not task.startswith("scienceqa") and task != "chartqa":
        assert {q.text for q in rows.questions} == {q.text for q in files.questions}
        assert {(q.text, q.target.lower()) for q in rows.questions} == {(q.text, q.target.lower()) for q in files.questions}
    first = rows.questions[0]
    assert rows.read(first.image).size == files.read(files.questions[0].image).size == (64, 64)
    assert set(first.groups) >= set(files.questions[0].groups) - {"answer", "type"} or task == "gqa"
    without = [q for q in rows.questions if q.image is None]
    assert len(without) == (1 if task == "scienceqa" else 0) and (not without or rows.questions[-1].image is None)


def test_ocr_tokens_of_rows(tmp_path):
    folder = str(saved("textvqa", tmp_path))
    task = QUESTION_TASKS.get("textvqa")
    assert "Reference OCR" not in task.open(Sources(folder)).questions[0].text
    assert task.open(Sources(folder, ocr="on")).questions[0].text.endswith("\nReference OCR token: X")


def test_the_bundled_model_answers_rows(tmp_path):
    options = VQAOptions(prompt="", max_new_tokens=2, device="cpu", batch_size=16, output=str(tmp_path / "out"))
    (record,) = TASKS.get("gqa")(load_vlm(REFERENCE_LLAVA), str(saved("gqa", tmp_path / "rows")), [None], options)
    assert record["metrics"]["exact_match"] >= 0.8 and record["split"] == "testdev" and record["n_images"] == 3


def test_parquet_files(tmp_path):
    rows = datasets.Dataset.from_list(rows_of("docvqa")).cast_column("image", datasets.Image())
    rows.to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
    assert (
        is_dataset(str(tmp_path))
        and is_dataset("hub")
        and is_dataset("hub:someone/GQA")
        and not is_dataset(str(tmp_path / "x"))
    )
    data = QUESTION_TASKS.get("docvqa").open(Sources(str(tmp_path)))
    assert len(data.questions) == len(asked()) and data.prompt == SUFFIX and data.read(0).size == (64, 64)


def _changed(task, tmp_path, **columns):
    """Rows with some columns replaced (`None` = left out)."""
    rows = [{**row, **columns} for row in rows_of(task)]
    data = datasets.Dataset.from_list(rows)
    data = data.remove_columns([name for name, value in columns.items() if value is None])
    datasets.DatasetDict({QUESTION_TASKS.get(task).hub.split: data}).save_to_disk(str(tmp_path))
    return Sources(str(tmp_path))


@pytest.mark.parametrize(
    ("task", "make", "message"),
    [
        (
            "docvqa",
            lambda p: Sources(str(saved("docvqa", p)), split="train"),
            "no split 'train', only validation; name one with",
        ),
        ("docvqa", lambda p: _changed("docvqa", p, image=None), "no column 'image', only questionId"),
        ("docvqa", lambda p: _changed("docvqa", p, answers=None), "row 0 has no 'answers'; expected"),
        ("pope", lambda p: _changed("pope", p, answer="maybe"), "row 0: the answer must be yes or no, found 'maybe'"),
        ("mme", lambda p: _changed("mme", p, category="colour"), "row 0: 'colour' is none of MME's categories: existence"),
        ("mme", lambda p: _changed("mme", p, question_id="color/1.png"), "asks question color/1.png/(yes|no) more than once"),
        ("mme", lambda p: _shortened(p), "the image 4 has 1 questions; MME asks two about every image"),
        ("gqa", lambda p: _other_images(p), "row 0: no image has the id 'n0' in testdev_balanced_images"),
        (
            "gqa",
            lambda p: Sources("hub"),
            "datasets cannot load hub .configuration testdev_balanced_instructions, split testdev",
        ),
    ],
)
def test_rows_that_cannot_be_asked(task, make, message, tmp_path):
    with pytest.raises(vtok.ConfigError, match=message) as caught:
        QUESTION_TASKS.get(task).open(make(tmp_path))
    assert "\n" not in str(caught.value)


def _shortened(folder):
    rows = datasets.Dataset.from_list(rows_of("mme")[:-1])
    datasets.DatasetDict({"test": rows}).save_to_disk(str(folder))
    return Sources(str(folder))


def _other_images(folder):
    saved("gqa", folder)
    read = open_vqa(EASY_VQA).read
    pictures = datasets.Dataset.from_list([{"id": "other", "image": read(0)}]).cast_column("image", datasets.Image())
    datasets.DatasetDict({"testdev": pictures}).save_to_disk(str(folder / "testdev_balanced_images"))
    return Sources(str(folder))


def test_the_library_is_optional(tmp_path, monkeypatch):
    folder = str(saved("docvqa", tmp_path / "rows"))
    files = str(written("docvqa", tmp_path / "files"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(vtok.VtokError, match=r'datasets is not installed; run: pip install "vtok\[datasets\]"'):
        QUESTION_TASKS.get("docvqa").open(Sources(folder))
    assert QUESTION_TASKS.get("docvqa").open(Sources(files)).questions
