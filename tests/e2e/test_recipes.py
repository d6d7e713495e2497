"""CONTRIBUTING's recipes, executed: a method for encoders, one for prompts, a family of vision-language models and a task, each
added through its file (`tests/toys`) and one line in a table, pass the suites that vtok's own pass."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

from helpers_vqa import ASKED, picture, tiny_llava
from toys import family as toy_family
from toys.encoder_method import TopRows
from toys.prompt_method import Strongest
from typer.testing import CliRunner

import vtok
from vtok.eval.cli.program import app
from vtok.eval.matrix import encoder as matrix
from vtok.eval.matrix import vlm as vlm_matrix
from vtok.eval.tasks import QUESTION_TASKS
from vtok.eval.tasks.vqa.evaluate import evaluate
from vtok.eval.tasks.vqa.task import VQAOptions
from vtok.patches.hf_vlm.families import FAMILIES, OLDEST, release, supported
from vtok.registry import METHODS, encoder_methods
from vtok.testing import EncoderMethodTests, PromptMethodTests, tiny

ROOT = Path(__file__).resolve().parents[2]
LINES = {  # the second place of each recipe
    "top_rows": "toys.encoder_method:TopRows",
    "strongest": "toys.prompt_method:Strongest",
}
SOME = (
    "timm: ViT",
    "timm: EVA-02 rotary, SwiGLU",
    "timm: ViT map pool (SigLIP)",
    "transformers: BEiT relative bias, average pool",
)
needs_vlms = pytest.mark.skipif(release() < OLDEST, reason="vision-language models need a younger transformers")


def written_class():
    """The class of the example of a method, in a module of its own."""
    path = ROOT / "assets" / "docs" / "examples" / "write_a_method.py"
    spec = importlib.util.spec_from_file_location("written_method", path)
    module = sys.modules["written_method"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Loudest


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for name, line in LINES.items():
        monkeypatch.setitem(METHODS._entries, name, line)
    monkeypatch.setitem(FAMILIES, toy_family.NAME, toy_family.FAMILY)
    monkeypatch.setitem(QUESTION_TASKS._entries, "toy", "toys.question_task:TASK")


class TestEncoderMethod(EncoderMethodTests):
    """The toy method for encoders."""

    config = TopRows()
    models = SOME


class TestWrittenMethod(EncoderMethodTests):
    """The example of the documentation; it has no FLOPs budget."""

    config = written_class()(keep=0.8)
    models = SOME[:2]


@needs_vlms
class TestPromptMethod(PromptMethodTests):
    """The toy method for prompts, on families with whole images, frames, crops, and the toy."""

    config = Strongest()
    models = ("LLaVA-1.5", "Qwen2.5-VL", "LLaVA-OneVision", "Toy")


@needs_vlms
class TestFamilyUnderUniform(PromptMethodTests):
    """The toy family, under methods that look at nothing, at features, at the tower, and between decoder layers."""

    config = vtok.UniformGrid(keep=0.5)
    models = ("Toy",)


@needs_vlms
class TestFamilyUnderDivPrune(TestFamilyUnderUniform):
    """Chooses among features."""

    config = vtok.DivPrune(keep=0.5)


@needs_vlms
class TestFamilyUnderVisionZip(TestFamilyUnderUniform):
    """Looks into the tower, and merges."""

    config = vtok.VisionZip(keep=0.5)


@needs_vlms
class TestFamilyUnderFastV(TestFamilyUnderUniform):
    """Acts between decoder layers."""

    config = vtok.FastV(keep=0.5)


@pytest.mark.parametrize("method", ["top_rows", "loudest"])
def test_a_registered_method_is_found_by_name(method, monkeypatch):
    """By `patch`, `supports`, the support matrix, and the command line."""
    monkeypatch.setitem(METHODS._entries, "loudest", "written_method:Loudest")
    assert method in encoder_methods()
    model = tiny.build(tiny.examples(["timm"])[0]["timm: ViT"]).double()
    assert vtok.supports(model).methods[method] is None
    found = matrix.judge(model, tiny.images(tiny.examples(["timm"])[0]["timm: ViT"], 3, model.head.weight.dtype), method)
    assert (found["status"], found["reason"]) == (matrix.YES, "")
    listed = CliRunner().invoke(app, ["methods"], catch_exceptions=False)
    assert listed.exit_code == 0 and method in listed.stdout
    if method == "loudest":
        with pytest.raises(vtok.ConfigError, match="loudest has no single knob that a FLOPs budget could set"):
            vtok.patch(model, method, flops=0.6)
    else:
        assert vtok.plan(model, method, flops=0.6).estimate.fraction == pytest.approx(0.6, abs=0.03)


@needs_vlms
def test_a_registered_method_for_prompts_is_found_by_name():
    example = tiny.vlm_examples()["LLaVA-1.5"]
    model = tiny.build_vlm(example)
    assert vtok.supports(model).methods["strongest"] is None
    assert vlm_matrix.judge(model, example, "strongest")["status"] == matrix.YES
    plan = vtok.plan(model, "strongest", flops=0.8)
    assert plan.estimate.fraction == pytest.approx(0.8, abs=0.05)


@needs_vlms
def test_a_family_is_one_row():
    """It is named, priced, patched in its tower, and has cells in the support matrix."""
    assert supported().endswith("PaliGemma and Toy")
    example = tiny.vlm_examples()["Toy"]
    model = tiny.build_vlm(example)
    assert vtok.plan(model, "uniform", keep=0.5).estimate.vision is not None
    for method, status in (("uniform", matrix.YES), ("fastv", matrix.YES), ("tome", matrix.TOWER), ("ats", matrix.NO)):
        assert vlm_matrix.judge(model, example, method)["status"] == status, method


@needs_vlms
def test_a_task_is_a_file_and_a_line(tmp_path):
    lines = []
    for i, (text, said) in enumerate(ASKED):
        picture(i).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png|{text}|{said}")
    (tmp_path / "questions.txt").write_text("\n".join(lines))
    options = VQAOptions(task="toy", max_new_tokens=2, device="cpu", batch_size=2)
    base, patched = evaluate(tiny_llava(), str(tmp_path), [None, ("random", {"keep": 0.5})], options)
    assert (base["task"], base["primary"], base["n"]) == ("toy", "first_letter", 4)
    assert 0 <= patched["metrics"]["first_letter"] <= 1
    assert patched["metrics"]["first_letter_difference_stderr"] >= 0
    assert patched["tokens"] != base["tokens"]
    with pytest.raises(vtok.ConfigError, match=r"has no questions.txt; name a folder that has"):
        evaluate(tiny_llava(), str(tmp_path / "elsewhere"), [None], options)
