"""Commands that cannot be meant; see `malformed`."""

import json
import os

import pytest
import yaml
from malformed import (
    REFUSED,
    RUN,
    failures,
    record,
    some,
    told,
)
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok.eval.cli.program import app

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
    (folder / "r.jsonl").write_text(json.dumps(record()) + "\n")
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
    assert json.loads((tmp_path / "r.jsonl").read_text()) == record()


def test_there_are_enough_of_them(tmp_path):
    assert len(list(_commands(tmp_path))) > 100
