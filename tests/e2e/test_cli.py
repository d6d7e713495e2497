"""The commands, as a user types them."""

import csv
import dataclasses
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok.eval.cli import main, program
from vtok.eval.cli.program import app

run = CliRunner()


def _ok(*args):
    result = run.invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_and_version():
    assert "bench" in run.invoke(app, ["--help"]).output
    assert vtok.__version__ in _ok("--version")


def test_methods_lists_every_method():
    text = _ok("methods")
    for name in ("tome", "pitome", "ats", "zero_tprune", "random", "uniform"):
        assert name in text


def test_plan():
    text = _ok("plan", "deit_tiny_patch16_224", "tome:r=13", "pitome:flops=0.7")
    assert "41" in text
    assert "implied speed-up" in text
    assert "flops=0.7 -> ratio=" in text


def test_the_small_vit_has_two_names():
    """What run files and `vtok.evaluate` call it is taken by commands, too."""
    assert _ok("plan", "reference-vit", "tome") == _ok("plan", "reference", "tome")


def test_bench(tmp_path):
    args = ["bench", "vit_tiny_patch16_224", "tome:r=8", "random", "--img-size", 64, "-b", 2, "--pairs", 5, "--threads", 1]
    text = _ok(*args, "--no-memory", "--no-profile", "--json", tmp_path / "new" / "bench.json")
    assert "achieved" in text
    rows = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [r["method"] for r in rows] == ["tome", "random"]
    assert _ok(*args, "--no-memory", "--no-profile", "--markdown").startswith("|")


def test_configs_lists_the_runs():
    assert "tome_vit_s_augreg_r13" in _ok("configs")


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("n01440764", (200, 30, 30)), ("n01443537", (30, 30, 200))):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (70, 60), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "n01440764" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    return tmp_path


def test_eval_imagenet(folder, tmp_path):
    out = tmp_path / "r.json"
    args = ["eval", "imagenet", "--model", "vit_tiny_patch16_224", "--data", folder, "--no-pretrained", "--num-classes", 2]
    args += ["-b", 4, "-j", 0, "--model-kwargs", "img_size=64", "--method", "tome:r=2", "-M", "random"]
    text = _ok(*args, "--results-file", out)
    assert "tome(r=2)" in text and "top-5" in text and "agreement" in text
    assert "broken.jpg was skipped" in text
    records = json.loads(out.read_text())
    assert [r["method"] for r in records] == ["unpatched", "tome", "random"]
    assert records[0]["n"] == 6
    first = out.read_bytes()
    _ok(*args, "--results-file", out)
    assert out.read_bytes() == first, "a file of results is not replaced"
    assert len(json.loads((tmp_path / "r-2.json").read_text())) == 3


def test_eval_imagenet_with_real_labels(tmp_path):
    """Images that ReaL leaves without a label do not count, and any of an image's labels is right."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(1, 5):
        Image.new("RGB", (64, 64), (60 * i, 30, 30)).save(tmp_path / "images" / "a" / f"ILSVRC2012_val_{i:08d}.png")
    (tmp_path / "real.json").write_text("[[0, 1], [0, 1], [], []]")
    args = ["eval", "imagenet", "--model", "vit_tiny_patch16_224", "--data", tmp_path / "images", "--no-pretrained", "-j", 0]
    args += ["--num-classes", 2, "--model-kwargs", "img_size=64", "-M", "tome:r=2", "--results-file", tmp_path / "r.json"]
    _ok(*args, "--real-labels", tmp_path / "real.json")
    for record in json.loads((tmp_path / "r.json").read_text()):
        assert (record["labels"], record["n"], record["metrics"]["top1"]) == ("real", 2, 100)


def test_eval_imagenet_as_the_readme_writes_it(folder):
    text = _ok(
        "eval",
        "imagenet",
        "--model",
        "vit_tiny_patch16_224",
        "--method",
        "tome:r=13",
        "--data",
        folder,
        "--no-pretrained",
        "-j",
        0,
    )
    title = next(line for line in text.splitlines() if line.strip().startswith("vit_tiny_patch16_224 on "))
    assert ", 6 samples, float32 on cpu, 224 px" in title


def test_run_prints_published_beside_measured(folder, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model: {backend: timm, name: deit_tiny_patch16_224.fb_in1k}\nmethod: {name: pitome, ratio: 0.9}\ntask: imagenet\n"
        "batch_size: 3\npublished: {top1: 69.34, base_top1: 72.13, gflops: 0.712, source: a log}\n"
    )
    out = tmp_path.parent / f"{tmp_path.name}-out"  # not in the folder of the data, whose folders are classes
    args = ["run", path, "--data", folder, "--no-pretrained", "-j", 0, "-o", out, "--set", "method.ratio=0.95"]
    text = _ok(*args, "--json", tmp_path / "r.json")
    for word in ("69.34", "72.13", "-2.790", "0.712", "published", "measured", "a log"):
        assert word in text
    assert json.loads((tmp_path / "r.json").read_text())[1]["params"]["ratio"] == 0.95
    args[-1] = "method.ratio=0.8"
    assert "ratio=0.95" not in _ok(*args), "the table is that of this call"
    with open(out / "sweep.csv") as file:
        found = [row["setting"] for row in csv.DictReader(file)]
    assert found == ["unpatched", "pitome(ratio=0.95)", "pitome(ratio=0.8)"], "the file holds what the folder holds"


def test_an_expected_error_ends_the_program_in_one_line():
    command = [sys.executable, "-m", "vtok", "plan", "reference", "tomee"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    assert "unknown method 'tomee'; did you mean 'tome'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "nothing"], "unknown run 'nothing'"),
        (["run", "tome_vit_s_augreg_r13"], "names no data; pass --data FOLDER"),
        (["demo", "--budgets", "a,b"], "--budgets takes numbers"),
        (["plan", "zzz", "tome"], "unknown timm model 'zzz'; timm.list_models() names all"),
        (
            ["plan", "deit_smal_patch16_224", "tome"],
            "unknown timm model 'deit_smal_patch16_224'; did you mean 'deit_small_patch16_224'?",
        ),
        (
            ["plan", "deit_small_patch16_224.fb_in1", "tome"],
            "unknown weights of deit_small_patch16_224 'fb_in1'; did you mean 'fb_in1k'?",
        ),
        (["bench", "refrence", "tome"], "unknown timm model 'refrence'; did you mean 'reference'?"),
        (["bench", "reference-lava", "tome"], "unknown bundled model 'reference-lava'; did you mean 'reference-llava'?"),
        (["bench", "open_clip:ViT-B16", "tome"], "unknown open_clip model 'ViT-B16'; did you mean 'ViT-B-16'?"),
        (["tune", "refrence", "tome", "--flops", "0.5"], "unknown timm model 'refrence'; did you mean 'reference'?"),
        (["eval", "vqa", "--model", "reference-scene", "--data", "scenes"], "did you mean 'reference-scenes'?"),
        (["plan", "reference", "tome:method=3"], "method is no parameter of a method"),
        (["bench", "reference", "tome", "--json", "/"], "/ cannot be written: it is a folder"),
        (["eval", "imagenet", "--model", "a", "--data", "b", "--results-file", "/dev/null/r"], "/dev/null/r cannot be written"),
    ],
)
def test_expected_errors_are_one_line(args, words, monkeypatch, capsys):
    """What the program does after it has started, see above."""
    monkeypatch.setattr(sys, "argv", ["vtok", *args])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer has one of its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_demo(tmp_path, monkeypatch):
    """Without the encoder's weights, which a package brings: the small models, on a few images; a second run has nothing left
    to do. See also test_clip_demo and test_vqa_demo."""
    from vtok.eval.demo import encoders
    from vtok.eval.models.dinov2 import weights
    from vtok.eval.tasks import fashion

    def none(name):
        raise weights.PackageNotFoundError(name)

    monkeypatch.setattr(weights, "files", none)
    for home in (encoders, fashion):
        monkeypatch.setattr(home, "CALIBRATION", 8)  # budgets are met on as many images, not on 128
    args = ["demo", "--images", 8, "--out", tmp_path / "d", "--budgets", "0.6", "-b", 4, "--no-clip", "--no-vqa"]
    first = _ok(*args)
    for word in ("only the small models", "pip install --no-deps", "tome", "random", "unpatched", "implied", "standard errors"):
        assert word in first
    for name in ("results.jsonl", "sweep.csv", "pareto.png", "overlays.png"):
        assert (tmp_path / "d" / name).stat().st_size > 0
    lines = (tmp_path / "d" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 7 and len((tmp_path / "d" / "sweep.csv").read_text().splitlines()) == 1 + len(lines)
    second = _ok(*args)
    assert "7 of 7 configurations are in" in second
    assert (tmp_path / "d" / "results.jsonl").read_text().splitlines() == lines
    assert not weights.installed()


def test_the_demo_has_two_parts_and_three_of_small_models(monkeypatch, tmp_path):
    from vtok.eval.demo import encoders, prompts

    seen = {}
    parts = ((encoders, "run_demo"), (encoders, "run_clip_demo"), (prompts, "run_vqa_demo"))
    for home, name in (*parts, (encoders, "run_encoder_demo"), (prompts, "run_scenes_demo")):
        monkeypatch.setattr(home, name, lambda out, *counts, name=name, console, **_: seen.update({name: (out, counts)}))
    _ok("demo", "--images", 100, "--out", tmp_path)
    assert seen == {"run_encoder_demo": (tmp_path, (100, False)), "run_scenes_demo": (tmp_path, (100, False))}
    _ok("demo", "--full", "--out", tmp_path, "--no-clip")
    assert seen.pop("run_encoder_demo") == seen.pop("run_scenes_demo") == (tmp_path, (None, True))
    assert seen == {"run_demo": (tmp_path, (None, (0.8, 0.6, 0.4))), "run_vqa_demo": (tmp_path, (None, None))}


def test_every_flag_of_the_evaluations_is_explained():
    from vtok.eval.cli.flags import _help
    from vtok.eval.tasks.clip.retrieval import RetrievalOptions
    from vtok.eval.tasks.clip.zeroshot import ZeroshotOptions
    from vtok.eval.tasks.timm_pipeline import Options

    for options in (Options, ZeroshotOptions, RetrievalOptions):
        assert {field.name for field in dataclasses.fields(options)} <= set(_help(options)), options.__name__


def test_each_evaluation_offers_the_data_that_it_takes():
    def helped(task):
        return " ".join(run.invoke(app, ["eval", task, "--help"], env={"COLUMNS": "200"}).output.split())

    assert "reference-pictures" in helped("zeroshot") and "reference-pages" not in helped("zeroshot")
    assert "reference-pages" in helped("retrieval") and "reference-pictures" not in helped("retrieval")


def _entries():
    groups = (program.COMMANDS, program.EVALUATIONS)
    return [pytest.param(name, entry, id=name) for group in groups for name, entry in group.items()]


@pytest.mark.parametrize(("name", "entry"), _entries())
def test_a_command_says_in_the_list_what_it_says_itself(name, entry):
    command = program.command_at(entry.home, name)
    assert command.help.splitlines()[0] == entry.help


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--version"], 0, vtok.__version__),
        (["--help"], 0, "bench-suite"),
        (["eval", "--help"], 0, "retrieval"),
        (["bnech"], 2, "No such command 'bnech'"),
        *(([name, "--help"], 0, "Usage") for name in program.COMMANDS),
        *((["eval", name, "--help"], 0, "Usage") for name in program.EVALUATIONS),
        (["tune", "reference", "tom", "--flops", "0.5"], 2, "unknown method 'tom'; did you mean 'tome'?"),
        (
            ["eval", "vqa", "--model", "x", "--data", "y", "--task", "popo"],
            2,
            "unknown question task 'popo'; did you mean 'pope'?",
        ),
        (["eval", "vaq"], 2, "No such command 'vaq'"),
        (["bench", "vit", "tom"], 2, "unknown method 'tom'; did you mean 'tome'?"),
        (["plan", "vit", "pitome+tdre:keep=0.1"], 2, "unknown method 'tdre'; did you mean 'todre'?"),
        (["viz", "reference", "tom", "3"], 2, "unknown method 'tom'"),
        (["run", "demo_vti"], 2, "unknown run 'demo_vti'; did you mean 'demo_vit'?"),
        (["sweep", "x.yaml"], 2, "x.yaml does not exist"),
    ],
)
def test_help_and_typos_import_nothing_that_takes_seconds(args, code, words):
    heavy = "{'torch', 'timm', 'transformers', 'pandas', 'scipy', 'matplotlib', 'numpy', 'PIL'}"
    script = (
        "import sys, atexit; sys.argv = ['vtok', *sys.argv[1:]]\n"
        f"atexit.register(lambda: print('loaded:', *sorted({heavy} & set(sys.modules))))\n"
        "from vtok.eval.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("loaded:"), done.stdout[-200:]
