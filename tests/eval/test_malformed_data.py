"""Malformed questions, captions, pictures and folders of them; see `malformed`."""

import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_tasks import WRITERS
from malformed import ACCEPTED, JUNK, REFUSED, TEXTS, failures, model, mutations, outcome, pipe, some, told
from PIL import Image

import vtok
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.image_folder import Sample, Unreadable, open_dataset
from vtok.eval.tasks.scoring import Scorer
from vtok.eval.tasks.vqa.sources.files import read_results
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.tasks.vqa.task import Sources
from vtok.eval.viz.input import prepared


def test_lines_of_questions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    one = {"id": 0, "image": "0.png", "question": "what?", "answers": ["a", "b"]}
    path = tmp_path / "q.jsonl"

    def ask(*lines):
        path.write_bytes(b"\n".join(lines))
        data = open_vqa(path)
        for q in data.questions:
            assert isinstance(q.text, str) and all(isinstance(answer, str) for answer in q.answers)
            assert not any(word.startswith(("[", "{", "None")) for word in (q.text, *q.answers)), "the repr of an object"
            data.read(q.image)

    junk = {name: value for name, value in JUNK.items() if not (isinstance(value, str) and value)}
    calls = []
    for what, value in mutations(one, junk):
        number = what.endswith(("negative", "huge", "half", "beyond", "nan", "infinite", "long list", "empty text"))
        fine = number or what.startswith((".id", "+"))  # numbers may be meant as words
        lines = [json.dumps(value).encode()]
        calls.append((f"questions: {what}", lambda own=lines: ask(*own), (ACCEPTED, REFUSED) if fine else (REFUSED,)))
    calls += [(f"questions: {w}", lambda t=t: ask(t), (REFUSED,)) for w, t in TEXTS.items()]
    calls.append(("questions: a pipe", lambda: open_vqa(pipe(tmp_path / "pipe.jsonl")), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


@pytest.mark.parametrize("task", sorted(WRITERS))
def test_files_of_question_tasks(tmp_path, task):
    """Every JSON file of a task's public form, changed in every place; a picture is only asked for if its question is read."""
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[task](folder)
    calls = []
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        text = path.read_bytes()

        def read(content, path=path, text=text):
            path.write_bytes(content)
            try:
                ocr = str(path) if "OCR" in path.name else ""
                data = QUESTION_TASKS.get(task).open(Sources(str(folder), ocr=ocr))
                assert all(isinstance(q.text, str) for q in data.questions), "a question that is no text"
                assert all(isinstance(answer, str) for q in data.questions for answer in q.answers), "an answer that is no text"
            finally:
                path.write_bytes(text)

        calls += [(f"{task} {path.name}: {w}", lambda t=t, r=read: r(t)) for w, t in list(TEXTS.items())[::3]]
        by_line = path.suffix == ".jsonl" or text.count(b"}\n{") > 0
        content = [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
        for what, value in some(mutations(content), 40):
            if by_line:
                written = b"\n".join(json.dumps(one).encode() for one in value) if isinstance(value, list) else b""
            else:
                written = json.dumps(value).encode()
            calls.append((f"{task} {path.name}: {what}", lambda w=written, r=read: r(w)))
    if calls:
        found = failures(calls)
        assert not found, told(found)


def test_answers_of_other_programs(tmp_path):
    path = tmp_path / "answers.json"

    def read(text):
        path.write_bytes(text)
        assert all(isinstance(said, str) for said in read_results(path).values())

    base = [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "no"}]
    calls = [(f"answers: {w}", lambda v=v: read(json.dumps(v).encode())) for w, v in some(mutations(base))]
    calls += [(f"answers: {w}", lambda t=t: read(t)) for w, t in TEXTS.items()]
    found = failures(calls)
    assert not found, told(found)


def test_caption_files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    base = {"images": [{"filename": "0.png", "filepath": "", "split": "test", "sentences": [{"raw": "a dog"}]}]}
    path = tmp_path / "dataset.json"

    def read(text):
        path.write_bytes(text)
        data = open_captions(path)
        assert all(isinstance(caption, str) for own in data.captions for caption in own)

    calls = [(f"captions: {w}", lambda v=v: read(json.dumps(v).encode())) for w, v in some(mutations(base))]
    calls += [(f"captions: {w}", lambda t=t: read(t), (REFUSED,)) for w, t in TEXTS.items()]
    found = failures(calls)
    assert not found, told(found)


def _png(width, height, depth=8, colour=2, data=b""):
    """A PNG whose header says so, whatever its pixels are."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) & 0xFFFFFFFF)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _pictures(folder):
    """(name, bytes, whether it shows something)."""
    good = folder / "good.png"
    Image.fromarray((np.arange(3 * 16 * 16) % 255).reshape(16, 16, 3).astype(np.uint8)).save(good)
    Image.open(good).save(folder / "good.jpg")
    png, jpg = good.read_bytes(), (folder / "good.jpg").read_bytes()
    yield from ((f"png cut at {n}", png[:n], False) for n in (1, 8, 20, 40, len(png) // 2))
    yield from ((f"jpg cut at {n}", jpg[:n], False) for n in (1, 3, 20, 100))
    for at in range(8, len(png), max(1, len(png) // 12)):
        yield f"png with a changed byte {at}", png[:at] + bytes([png[at] ^ 0xFF]) + png[at + 1 :], None
    for at in range(2, len(jpg), max(1, len(jpg) // 12)):
        yield f"jpg with a changed byte {at}", jpg[:at] + bytes([jpg[at] ^ 0xFF]) + jpg[at + 1 :], None
    yield "bomb", _png(30000, 30000, 1, 0, b"\0" * 3751 * 30), False
    yield "wide bomb", _png(2**31 - 1, 2, 8, 2), False
    yield "no pixels", _png(0, 0), False
    yield "short data", _png(64, 64, data=b"\0" * 10), False
    yield "gif of nothing", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", False
    yield from ((f"text: {name}", text, False) for name, text in TEXTS.items())
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"):
        path = folder / f"{mode.replace(';', '')}.tif"
        Image.new(mode, (9, 5)).save(path)
        yield f"mode {mode}", path.read_bytes(), True


def test_pictures(tmp_path):
    net = model()

    def look_at(path):
        assert prepared(net, path).pixels.isfinite().all()

    calls = []
    for number, (name, data, shows) in enumerate(list(_pictures(tmp_path))):
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        allowed = {True: (ACCEPTED,), False: (REFUSED,), None: (ACCEPTED, REFUSED)}[shows]
        calls.append((f"picture: {name}", lambda p=path: look_at(p), allowed))
    calls.append(("picture: a pipe", lambda: look_at(pipe(tmp_path / "pipe.png")), (REFUSED,)))
    calls.append(("picture: a folder", lambda: look_at(tmp_path), (REFUSED,)))
    calls.append(("picture: a zero byte", lambda: look_at("a\0.png"), (REFUSED,)))
    calls.append(("picture: a long name", lambda: look_at("x" * 5000), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


def test_a_folder_of_broken_pictures_is_read_to_its_end(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    made = [(name, data) for name, data, _ in _pictures(tmp_path)]
    for number, (_, data) in enumerate(made):
        (tmp_path / "data" / "a" / f"{number:03d}.png").write_bytes(data)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "good.png")
    data = open_dataset(str(tmp_path / "data"), "", "validation", "", "RGB", None)
    data.transform = lambda image: torch.zeros(3, 4, 4)
    kinds = []

    def read():
        kinds.extend(type(data[row]) for row in range(len(data)))

    what, detail = outcome(read)
    assert what == ACCEPTED, detail
    assert set(kinds) == {Sample, Unreadable} and len(kinds) == len(made) + 1


def test_pictures_of_no_shape_are_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    for name, size in (("line", (1, 60_000)), ("thin", (255, 1)), ("good", (8, 8))):
        Image.new("RGB", size).save(tmp_path / "a" / f"{name}.png")
    data = open_dataset(str(tmp_path), "", "validation", "", "RGB", None)
    data.transform = lambda image: torch.zeros(3, 4, 4)
    found = {data.filename(row): data[row] for row in range(len(data))}
    assert "1 x 60,000 pixels" in found.pop("a/line.png").reason
    assert len(found) == 2 and all(isinstance(one, Sample) for one in found.values())


def test_questions_about_pictures_that_cannot_be_read_are_left_out(tmp_path):
    from helpers_vqa import tiny_llava

    from vtok.eval.tasks.vqa.evaluate import evaluate
    from vtok.eval.tasks.vqa.task import VQAOptions

    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    broken = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(broken[: len(broken) - 30])
    Image.new("RGB", (1, 5000)).save(tmp_path / "3.png")
    lines = [{"id": i, "image": f"{i % 4}.png", "question": "what is it?", "answers": ["red"]} for i in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = VQAOptions(max_new_tokens=2, batch_size=3, device="cpu", output=str(tmp_path / "out"))
    records = evaluate(tiny_llava(), tmp_path / "q.jsonl", [None, ("random", {"keep": 0.5})], options)
    for record in records:
        assert record["n"] == 4 and record["n_images"] == 2 and record["num_skipped"] == 2
        assert [Path(one["file"]).name for one in record["skipped"]] == ["1.png", "3.png"]
        assert "5,000 pixels" in record["skipped"][1]["reason"] and record["skipped"][0]["reason"]
    for number in (0, 2):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(vtok.ConfigError, match=r"none of the pictures of q can be read; the first: .*0\.png"):
        evaluate(tiny_llava(), tmp_path / "q.jsonl", [None], options)


def _folders(root):
    """(name, call) of data sets that are none."""

    def opened(path, class_map=""):
        return lambda: len(open_dataset(str(path), "", "validation", str(class_map), "RGB", None))

    for name in ("empty", "text", "classes"):
        (root / name).mkdir()
    (root / "text" / "a").mkdir()
    (root / "text" / "a" / "x.txt").write_text("x")
    for one in "ab":
        (root / "classes" / one).mkdir()
        Image.new("RGB", (8, 8)).save(root / "classes" / one / "0.png")
    yield "empty", opened(root / "empty")
    yield "no pictures", opened(root / "text")
    yield "missing", opened(root / "nowhere")
    yield "a file", opened(root / "text" / "a" / "x.txt")
    yield "a pipe", opened(pipe(root / "pipe"))
    yield "zero byte", opened("a\0b")
    yield "a long name", opened("x" * 5000)
    for number, (name, text) in enumerate(TEXTS.items()):
        for ending in (".tar", ".txt", ".pkl"):
            path = root / f"{number}{ending}"
            path.write_bytes(text)
            if ending == ".tar":
                yield f"tar of {name}", opened(path)
            else:
                yield f"class map {ending} of {name}", opened(root / "classes", path)
    (root / "print.pkl").write_bytes(pickle.dumps(print))
    yield "class map that is code", opened(root / "classes", root / "print.pkl")
    yield "class map that is a folder", opened(root / "classes", root / "empty")
    yield "class map that is a pipe", opened(root / "classes", pipe(root / "pipe.txt"))
    yield "class map that is missing", opened(root / "classes", root / "nowhere.txt")
    for argument in ("valid_labels", "real_labels"):
        for name, text in TEXTS.items():
            path = root / f"labels-{name}"
            path.write_bytes(text)
            yield f"{argument} of {name}", lambda a=argument, p=path: Scorer.load(**{a: p}).num_labels(10)
        yield f"{argument}: a pipe", lambda a=argument: Scorer.load(**{a: pipe(root / f"pipe-{a}")})
        yield f"{argument}: a folder", lambda a=argument: Scorer.load(**{a: root})


def test_data_sets_of_pictures(tmp_path):
    found = failures((f"data: {name}", call, (REFUSED,)) for name, call in list(_folders(tmp_path)))
    assert not found, told(found)


def test_there_are_enough_of_them(tmp_path):
    assert len(list(_folders(tmp_path))) > 100
