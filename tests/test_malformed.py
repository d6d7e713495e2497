"""Malformed inputs by the hundred: none ends in a traceback, a hang, an endless message or a result that means nothing.

A table of seeds, each changed in every place, stands for every kind of thing that users hand over: parameters of methods, files
of patches, of runs, of results and of questions, pictures, folders of them, options and paths of the command line, calibration
and checkpoints. Every test walks through its inputs and names those that fail, all at once.
"""

import dataclasses
import json
import os
import pickle
import random
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_tasks import WRITERS
from malformed import ACCEPTED, JUNK, REFUSED, TEXTS, bomb, finite, mutations, outcome, pipe, plain
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

import vtok
from vtok import serialization as files
from vtok.eval.cli.app import app
from vtok.eval.common.records import Records
from vtok.eval.report.html import ReportOptions, write_report
from vtok.eval.runs import loader as runs
from vtok.eval.runs import models as runs_models
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.captions import open_captions
from vtok.eval.tasks.image_folder import Sample, Unreadable, open_dataset
from vtok.eval.tasks.scoring import Scorer
from vtok.eval.tasks.timm_pipeline import Options, create_model
from vtok.eval.tasks.vqa.files import read_results
from vtok.eval.tasks.vqa.opening import open_vqa
from vtok.eval.tasks.vqa.task import Sources
from vtok.eval.viz.input import prepared
from vtok.registry import METHODS
from vtok.targets.resolve import towers

# What a list of mutations is cut to in the default tests: every so many of it, so that all places are reached.
MOST = 150


def model():
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=4).eval()


def failures(inputs, allowed=(ACCEPTED, REFUSED)):
    """Names of inputs, (name, call[, allowed]), that end otherwise than allowed, with what they end in."""
    found, count = [], 0
    for name, call, *own in inputs:
        count += 1
        what, detail = outcome(call)
        if what not in (own[0] if own else allowed):
            found.append(f"{name}: {what} {detail}")
    assert count, "no inputs"
    return found


def some(inputs, most=MOST):
    """All of a short list, a fixed choice of a long one."""
    inputs = list(inputs)
    return inputs if len(inputs) <= most else random.Random(0).sample(inputs, most)


def told(found):
    return "\n".join([f"{len(found)} inputs end badly", *found[:12], *[one.splitlines()[0][:150] for one in found[12:60]]])


# -- parameters of methods ---------------------------------------------------------------------------------------------------


def _parameters(name, info):
    cls = METHODS.get(name)
    for field in dataclasses.fields(cls):
        for what, value in JUNK.items():

            def make(field=field.name, value=value):
                config = cls.create(**{field: value})
                assert plain(config.to_dict()) or "weights" in field, "an accepted config cannot be written down"
                assert finite(config.to_dict()), "an accepted config holds NaN"
                assert cls.from_dict(config.to_dict()) == config, "an accepted config does not survive being saved"
                if cls.for_encoders() and not config.needs_budget():
                    config.build(info)

            yield f"{name}: {field.name}={what}", make


@pytest.mark.parametrize("name", METHODS.names())
def test_parameters_of_methods(name):
    info = towers(model(), None)[0][1].info
    found = failures(_parameters(name, info))
    assert not found, told(found)


@pytest.mark.parametrize("name", ["tome", "pitome", "random", "ats"])
def test_numbers_of_numpy_and_torch_are_numbers(name):
    given = {
        "tome": ({"r": np.int64(2)}, {"r": 2}),
        "pitome": ({"ratio": np.float32(0.75)}, {"ratio": 0.75}),
        "random": ({"keep": torch.tensor(0.5), "layers": np.arange(3)}, {"keep": 0.5, "layers": [0, 1, 2]}),
        "ats": ({"num_tokens": np.array(20), "layers": [np.int32(1)]}, {"num_tokens": 20, "layers": [1]}),
    }[name]
    ours, plain_ones = (METHODS.get(name).create(**one) for one in given)
    assert ours == plain_ones and plain(ours.to_dict())
    assert vtok.info(vtok.patch(model(), "tome", flops=np.float32(0.75))).patched


def test_what_patch_takes_beside_a_method():
    net = model()
    calls = []
    for argument in ("flops", "input_size", "trace", "positions", "prompt"):
        for what, value in JUNK.items():
            if value is not None and not (argument == "flops" and value == 0.5):
                calls.append((f"patch: {argument}={what}", lambda a=argument, v=value: vtok.patch(net, "tome", **{a: v})))
    for what, value in JUNK.items():
        calls.append((f"patch: method={what}", lambda v=value: vtok.patch(net, v), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


# -- vtok.json ---------------------------------------------------------------------------------------------------------------


def _saved(folder):
    net = vtok.patch(model(), [vtok.ToMe(r=[2, 2]), vtok.RandomDrop(keep=0.9, layers=[2])])
    vtok.save_config(net, folder)
    return json.loads((folder / "vtok.json").read_text())


def test_files_of_patches(tmp_path):
    content = _saved(tmp_path)
    path, before = tmp_path / "changed.json", files.load(tmp_path / "vtok.json")

    def load(text):
        path.write_bytes(text)
        return files.load(path)

    def changed(value):
        loaded = load(json.dumps(value).encode())  # NaN and Infinity as Python writes them
        same = [configs for _, configs in loaded.towers] == [configs for _, configs in before.towers]
        assert all(finite(config.to_dict()) for _, configs in loaded.towers for config in configs), "NaN was accepted"
        return same

    calls = [(f"vtok.json: {what}", lambda v=value: changed(v)) for what, value in some(mutations(content))]
    calls += [(f"vtok.json: {what}", lambda t=text: load(t), (REFUSED,)) for what, text in TEXTS.items()]
    calls += [
        ("vtok.json: a pipe", lambda: files.load(pipe(tmp_path / "pipe.json")), (REFUSED,)),
        ("vtok.json: a folder", lambda: files.load(tmp_path / "nowhere"), (REFUSED,)),
        ("vtok.json: a zero byte", lambda: files.load("a\0b.json"), (REFUSED,)),
        ("vtok.json: a long name", lambda: files.load("x" * 5000 + ".json"), (REFUSED,)),
    ]
    found = failures(calls)
    assert not found, told(found)


# -- run files ---------------------------------------------------------------------------------------------------------------

RUN = {
    "model": {"backend": "timm", "name": "test_vit"},
    "method": {"name": "tome", "r": 2},
    "task": "imagenet",
    "data": "folder",
    "num_samples": 4,
    "batch_size": 2,
    "dtype": "fp32",
    "seed": 1,
    "options": {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "sweep": {"method.r": [1, 2]},
    "output": "out",
}


def _read_run(path):
    """Everything that a run does before it loads its model."""
    config = runs.load(str(path))
    runs_models.check_options(config)
    runs_models.task_options(config, config.tasks[0], False, 0, None)
    from vtok.eval.runs.sweep import points

    points(config)
    return config


def test_run_files(tmp_path):
    path = tmp_path / "run.yaml"

    def load(text):
        path.write_bytes(text)
        return _read_run(path)

    def dump(value):
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")

    calls = []
    short = {name: value for name, value in JUNK.items() if not name.startswith("long")}  # reading YAML is slow
    long = [(name, {**RUN, "seed": JUNK[name]}) for name in JUNK if name.startswith("long")]
    for what, value in [*some(mutations(RUN, short), 2 * MOST), *long]:
        try:
            text = dump(value)
        except yaml.YAMLError:
            continue
        calls.append((f"run: {what}", lambda t=text: load(t)))
    calls += [(f"run: {what}", lambda t=text: load(t), (REFUSED,)) for what, text in TEXTS.items()]
    whole = {key: value for key, value in RUN.items() if key not in ("seed", "sweep", "options", "data")}
    for key in ("seed", "options", "sweep", "data", "table", "nonsense"):
        text = dump({k: v for k, v in whole.items() if k != key}).decode() + bomb(key)
        calls.append((f"run: a bomb under {key}", lambda t=text: load(t.encode()), (REFUSED,)))
    calls += [
        (f"run: {key} twice", lambda k=key: load(dump(RUN) + dump({k: RUN[k]})), (REFUSED,))
        for key in ("method", "task", "seed")
    ]
    calls.append(("run: a pipe", lambda: runs.load(str(pipe(tmp_path / "pipe.yaml"))), (REFUSED,)))
    calls.append(("run: a folder", lambda: runs.load(str(tmp_path / "x.yaml" / "y")), (REFUSED,)))
    path.write_bytes(dump(RUN))
    for what in (
        "a",
        "a.b.c=1",
        "method.r=[",
        "method.r=&a [*a]",
        "methods.0=1",
        "seed.x=1",
        "=1",
        ".=1",
        "sweep.flops=[.nan]",
    ):
        calls.append((f"run: --set {what}", lambda w=what: runs.load(str(path), [w])))
    found = failures(calls)
    assert not found, told(found)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": "x"}, {"std": [0, 0, 0]}, {"interpolation": "nope"}, {"crop_pct": -1}, {"crop_pct": float("nan")},
        {"crop_mode": "nope"}, {"img_size": 0}, {"in_chans": -1}, {"input_size": [3, 0, 32]}, {"mean": [float("nan")] * 3},
        {"crop_border_pixels": -4}, {"num_classes": -1}, {"channels_last": "yes"}, {"amp": 3}, {"class_map": 5},
        {"model_kwargs": [1]}, {"device": 7}, {"use_ema": None}, {"gp": 3},
    ],
)  # fmt: skip
def test_options_of_a_run_that_mean_nothing(tmp_path, options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "options": options}))
    what, detail = outcome(lambda: _read_run(path))
    assert what == REFUSED, detail
    assert next(iter(options)) in detail


@pytest.mark.parametrize(
    "given", [{"dtype": ""}, {"seed": -1}, {"seed": 2**63}, {"batch_size": 0}, {"sweep": {"seed": [0, -1]}}]
)
def test_values_of_a_run_that_mean_nothing(tmp_path, given):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **given}))
    what, detail = outcome(lambda: _read_run(path))
    assert what == REFUSED, detail


# -- results -----------------------------------------------------------------------------------------------------------------


def _record():
    return {
        "key": "k",
        "task": "imagenet",
        "model": "net",
        "backend": "timm",
        "method": "tome",
        "setting": "tome(r=2)",
        "params": {"r": 2},
        "budget": None,
        "dataset": "pictures",
        "n": 16,
        "metrics": {
            "top1": 50.0,
            "top1_stderr": 12.9,
            "difference": -2.0,
            "difference_stderr": 1.0,
            "difference_ci": [-5.0, 1.0],
        },
        "primary": "top1",
        "percent": True,
        "tokens": {"in": 65, "out": 20.0, "mean_per_layer": [60.0, 40.0, 20.0]},
        "gmacs": {"base": 1.0, "model": 0.5, "pruner": 0.01},
        "implied_speedup": 2.0,
        "speedup": 1.4,
        "speedup_ci": [1.2, 1.6],
        "pairs": 9,
        "groups": {"class": {"a": {"n": 8, "top1": 50.0, "top1_difference": 0.0}}},
        "config": {"model": {"backend": "timm", "name": "net"}, "method": {"name": "tome", "r": 2}},
        "correct": "ff00",
    }


def test_damaged_lines_never_cost_the_good_ones(tmp_path):
    good = [json.dumps({"key": f"good {i}", "value": i}).encode() for i in range(3)]
    for what, text in TEXTS.items():
        path = tmp_path / f"{what}.jsonl"
        lines = [good[0], *text.split(b"\n"), good[1], b'{"key": [1]}', b'{"key": null}', b"[]", b"3", good[2]]
        path.write_bytes(b"\n".join(lines) + b"\n")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            records = Records(path)
            kept = [record["value"] for record in records.load() if "value" in record]
            assert kept == [0, 1, 2], what
            records.append({"key": "new", "value": 3})
            assert records.by_key()["new"]["value"] == 3
        assert path.read_bytes().startswith(b"\n".join(lines)), f"{what}: the file was changed"


def test_reports_of_damaged_results(tmp_path):
    path = tmp_path / "results.jsonl"
    base = {**_record(), "key": "u", "method": "unpatched", "setting": "unpatched"}

    def page(*lines):
        path.write_bytes(b"\n".join(lines) + b"\n")
        write_report([path], tmp_path / "page.html", ReportOptions())

    calls = []
    for what, value in some(mutations(_record())):
        lines = [json.dumps(one).encode() for one in (base, value)]
        calls.append((f"report: {what}", lambda own=lines: page(*own), (ACCEPTED,)))
    calls += [
        (f"report: {w}", lambda t=t: page(json.dumps(base).encode(), *t.split(b"\n")), (ACCEPTED,)) for w, t in TEXTS.items()
    ]
    calls += [(f"report: {w} alone", lambda t=t: page(t)) for w, t in TEXTS.items()]
    calls.append(("report: a pipe", lambda: write_report([pipe(tmp_path / "pipe.jsonl")], tmp_path / "p.html"), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


# -- questions ---------------------------------------------------------------------------------------------------------------


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


# -- pictures and folders ----------------------------------------------------------------------------------------------------


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


# -- calibration and checkpoints ---------------------------------------------------------------------------------------------


def test_calibration():
    net, images = model(), torch.rand(2, 3, 32, 32)
    wrong = {
        "NaN": images * float("nan"),
        "infinite": images / 0,
        "size": torch.rand(2, 1, 30, 30),
        "no batch": images[0],
        "float64": images.double(),
        "int64": images.long(),
        "empty": images[:0],
        "complex": images.to(torch.complex64),
        "meta": images.to("meta"),
        "sparse": images.to_sparse(),
        "array": images.numpy(),
        "NaN by name": {"x": images * float("nan")},
        "meta by name": {"x": images.to("meta")},
        "float64 by name": {"x": images.double()},
        "another name": {"nonsense": images},
        "no name": {3: images},
        **{name: value for name, value in JUNK.items() if value is not None},
    }
    allowed = {"float64": (ACCEPTED, REFUSED), "int64": (ACCEPTED, REFUSED)}
    calls = [
        (f"calibration: {n}", lambda v=v: vtok.patch(net, "ats", flops=0.7, calibration=v), allowed.get(n, (REFUSED,)))
        for n, v in wrong.items()
    ]
    found = failures(calls)
    assert not found, told(found)


def test_calibration_of_a_vision_language_model():
    from helpers_vqa import tiny_llava

    vlm = tiny_llava()
    good = vlm.processor(images=[Image.new("RGB", (16, 16))], text=["<image> what?"], return_tensors="pt")
    pixels, ids = good["pixel_values"], good["input_ids"]
    wrong = {
        "NaN": {**good, "pixel_values": pixels * float("nan")},
        "meta": {**good, "pixel_values": pixels.to("meta")},
        "ids on meta": {**good, "input_ids": ids.to("meta")},
        "complex": {**good, "pixel_values": pixels.to(torch.complex64)},
        "float ids": {**good, "input_ids": ids.float()},
        "ids beyond": {**good, "input_ids": ids + 10**6},
        "no batch": {**good, "pixel_values": pixels[0]},
        "size": {**good, "pixel_values": pixels[..., :3, :3]},
        "no name": {**good, 3: 1},
        "empty": [],
        **{name: value for name, value in JUNK.items() if value is not None},
        **{f"ids {name}": {**good, "input_ids": value} for name, value in JUNK.items()},
        **{f"pixels {name}": {**good, "pixel_values": value} for name, value in JUNK.items() if value is not None},
    }
    for method, own in (("ats", {"flops": 0.9}), ("correlation", {})):
        run = partial(vtok.patch, vlm.net, method, **own)
        found = failures((f"calibration of {method}: {n}", partial(run, calibration=v), (REFUSED,)) for n, v in wrong.items())
        assert not found, told(found)


def test_checkpoints(tmp_path):
    from safetensors.torch import save

    state = create_model("test_vit", Options(pretrained=False)).state_dict()
    weights = save({name: value.contiguous() for name, value in state.items()})
    shapes = save({name: value.flatten()[:1].clone() for name, value in state.items()})
    files_of = {
        "cut header": weights[:4],
        "cut": weights[: len(weights) // 2],
        "header of endless length": struct.pack("<Q", 2**62) + weights[8:],
        "other shapes": shapes,
        "other names": save({"x": torch.zeros(1)}),
        "code": pickle.dumps(print),
        **TEXTS,
    }
    calls = []
    for number, (name, data) in enumerate(files_of.items()):
        for ending in (".safetensors", ".pth"):
            path = tmp_path / f"{number}{ending}"
            path.write_bytes(data)
            options = Options(pretrained=False, checkpoint=str(path))
            calls.append((f"checkpoint{ending}: {name}", lambda o=options: create_model("test_vit", o), (REFUSED,)))
            calls.append((f"atp weights{ending}: {name}", lambda p=path: _atp(p), (REFUSED,)))
    fifo = pipe(tmp_path / "pipe.pth")
    calls.append(
        ("checkpoint: a pipe", lambda: create_model("test_vit", Options(pretrained=False, checkpoint=str(fifo))), (REFUSED,))
    )
    calls.append(
        (
            "checkpoint: a folder",
            lambda: create_model("test_vit", Options(pretrained=False, checkpoint=str(tmp_path))),
            (REFUSED,),
        )
    )
    calls.append(("atp weights: a pipe", lambda: _atp(fifo), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


def _atp(path):
    from vtok.methods.atp.modules import load

    load(path, 4, 32, (8, 8))


# -- the command line --------------------------------------------------------------------------------------------------------

WORDS = (
    "", " ", ":", "tome:", "tome:r", "tome:r=", "tome:r=x", "tome:r=[", "tome:r=(1", "tome:r=1e999", "tome:nope=1", "nope",
    "tome+", "+", "tome:r=8+nope", "tome:r=-1", "tome:r=.nan", "pitome:ratio=.inf", "tome:flops=2", "tome:flops=-1",
    "tome:flops=x", "random:seed=99999999999999999999", "tome:{r: 8}", "tome:r=&a [*a]", "tome:r=!!python/object:x",
    "[/red]", ":smile:", "tome:r=8,r=9", "tome:model=x", "a\0b", "/", ".", "..", "x" * 3000, "zero_tprune:layers=[99]",
    "ats:keep=0", "\ud800",
)  # fmt: skip


NAMES = ("nope", "", "[/x]", "open_clip:nope", "transformers:nope", "transformers:/", "a\0b", "x" * 3000, "../x", "\ud800")


def _invoke(*args):
    """Runs a command; errors of vtok and of the command line come out as they would be caught by the program."""
    result = CliRunner().invoke(app, [str(one) for one in args])
    if isinstance(result.exception, SystemExit):
        if result.exit_code == 2:
            raise vtok.ConfigError(result.output[-500:] or "usage")
        return
    if result.exception is not None:
        raise result.exception


def _commands(folder):
    """(name, arguments) of commands that cannot be meant."""
    (folder / "data" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "data" / "a" / "0.png")
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": str(folder / "data")}))
    (folder / "r.jsonl").write_text(json.dumps(_record()) + "\n")
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(folder / "run.yaml")
    os.mkfifo(folder / "pipe")
    tiny = ["--model", "test_vit", "--no-pretrained", "--num-classes", 1, "-j", 0, "--data", folder / "data"]
    run, results = folder / "run.yaml", folder / "r.jsonl"
    for word in WORDS:
        yield f"plan {word[:40]!r}", ["plan", "test_vit", word]
        yield f"eval imagenet --method {word[:40]!r}", ["eval", "imagenet", *tiny, "--method", word, "--num-samples", 0]
    for word in (
        "nope",
        "",
        "[/x]",
        "open_clip:nope",
        "transformers:nope",
        "transformers:/",
        "a\0b",
        "x" * 3000,
        "../x",
        "\ud800",
    ):
        yield f"plan model {word[:40]!r}", ["plan", word, "tome:r=2"]
        yield f"bench model {word[:40]!r}", ["bench", word, "tome:r=2", "--pairs", 5]
        yield f"run {word[:40]!r}", ["run", word]
        yield f"report {word[:40]!r}", ["report", word or "nowhere"]
        yield f"viz image {word[:40]!r}", ["viz", "reference", "tome:r=2", word or "nowhere", "-o", folder / "x.png"]
        yield f"published {word[:40]!r}", ["published", word or "nowhere"]
        yield f"tune method {word[:40]!r}", ["tune", "reference", word, "--flops", 0.5]
    for flag, values in {
        "--seed": (-1, 2**64, "x", 0.5), "-b": (0, -1, "x"), "--num-samples": (0, -3, "x"), "-j": (-1,),
        "--device": ("meta", "x"), "--model-kwargs": ("nope=1", "["),
        "--mean": ("x", "1 2", "nan nan nan"), "--std": ("0 0 0",), "--interpolation": ("nope",), "--crop-pct": (-1, "nan"),
        "--crop-mode": ("nope",), "--model-dtype": ("nope",), "--amp-dtype": ("",), "--gp": ("nope",),
        "--input-size": ("3 0 0", "1"), "--class-map": (folder / "nope", folder / "pipe", folder), "--dataset": ("nope",),
        "--checkpoint": (folder / "nope", folder / "pipe", folder / "file"), "--valid-labels": (folder / "pipe", folder),
        "--real-labels": (folder / "pipe", folder), "--results-file": (folder, folder / "file" / "x", "/proc/x/y"),
        "--img-size": (0, -1),
    }.items():  # fmt: skip
        for value in values:
            yield f"eval imagenet {flag} {value}", ["eval", "imagenet", *tiny, "--method", "tome:r=2", flag, value]
    for task in ("zeroshot", "retrieval"):
        for flag, value in (
            ("--seed", -1),
            ("--num-samples", 0),
            ("-b", 0),
            ("--output", folder / "file"),
            ("--backend", "nope"),
        ):
            data = "reference-pictures" if task == "zeroshot" else "reference-pages"
            yield f"eval {task} {flag}", ["eval", task, "--model", "reference-clip", "--data", data, flag, value]
        yield f"eval {task} --data pipe", ["eval", task, "--model", "reference-clip", "--data", folder / "pipe"]
    for flag, value in (
        ("--seed", -1), ("--num-samples", 0), ("-b", 0), ("--output", folder / "file"), ("--task", "nope"),
        ("--max-new-tokens", 0), ("--model-dtype", "nope"), ("--results", folder / "pipe"), ("--device", "meta"),
    ):  # fmt: skip
        yield f"eval vqa {flag}", ["eval", "vqa", "--model", "reference-llava", "--data", "easy-vqa", flag, value]
    yield "bench --device meta", ["bench", "test_vit", "tome:r=2", "--pairs", 5, "--device", "meta"]
    yield "bench --pairs 1", ["bench", "test_vit", "tome:r=2", "--pairs", 1]
    yield "bench --seed -1", ["bench", "test_vit", "tome:r=2", "--seed", -1]
    yield "bench --json folder", ["bench", "test_vit", "tome:r=2", "--json", folder]
    yield "bench-select --seed -1", ["bench-select", "--seed", -1]
    yield "tune --seed -1", ["tune", "reference", "tome", "--flops", 0.5, "--seed", -1]
    yield "tune --flops nan", ["tune", "reference", "tome", "--flops", "nan", "--out", folder / "tune"]
    yield "demo --budgets", ["demo", "--budgets", "nan", "--out", folder / "demo", "--no-clip", "--no-vqa"]
    yield "run --json over the run", ["run", run, "--json", run]
    yield "run --json over the run, by a link", ["run", run, "--json", folder / "link"]
    yield "run --json over the run, spelled otherwise", ["run", run, "--json", folder / "data" / ".." / "run.yaml"]
    yield "run -o file", ["run", run, "-o", folder / "file"]
    yield "sweep --flops nan", ["sweep", run, "--flops", "nan"]
    yield "report over its results", ["report", results, "-o", results]
    yield "report of a folder over its results", ["report", folder, "-o", folder / "r.jsonl"]
    yield "report into a name for results", ["report", results, "-o", folder / "other.json"]
    yield "report pipe", ["report", folder / "pipe"]
    yield "report -o file/x", ["report", results, "-o", folder / "file" / "x.html"]
    yield "report --gallery -1", ["report", results, "--gallery", -1]
    yield "viz -o over the picture", ["viz", "reference", "tome:r=2", folder / "data/a/0.png", "-o", folder / "data/a/0.png"]
    yield "viz -o elsewhere", ["viz", "reference", "tome:r=2", 3, "-o", folder / "x.txt"]
    yield "viz pipe", ["viz", "reference", "tome:r=2", folder / "pipe", "-o", folder / "x.png"]
    yield "matrix --method", ["matrix", "--method", "nope"]
    yield "matrix --into", ["matrix", "--into", folder / "pipe"]
    yield "configs", ["configs", "nope"]


@pytest.mark.parametrize("part", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_the_command_line(tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    commands = some(_commands(tmp_path), 60) if part == "some" else list(_commands(tmp_path))
    found = failures((name, lambda own=args: _invoke(*own), (REFUSED,)) for name, args in commands)
    assert not found, told(found)
    assert (tmp_path / "run.yaml").read_text().startswith("batch_size"), "an input was written over"
    assert json.loads((tmp_path / "r.jsonl").read_text()) == _record()


def test_there_are_enough_of_them(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    info = towers(model(), None)[0][1].info
    counts = [
        sum(len(list(_parameters(name, info))) for name in METHODS),
        len(list(mutations(RUN))),
        len(list(_commands(tmp_path / "a"))),
        len(list(_folders(tmp_path / "b"))),
    ]
    assert sum(counts) > 1000 and min(counts) > 100
    assert isinstance(Path(tmp_path), Path)
