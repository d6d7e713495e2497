"""`vtok bench --compile`: what compiling took is told, static methods make one graph and are not compiled again."""

import json

import pytest
from typer.testing import CliRunner
from vlm_zoo import build as build_vlm
from vlm_zoo import inputs
from zoo import build, images

import vtok
from vtok.eval.benchmarks import result as bench_result
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.prefill import measure_prompts
from vtok.eval.benchmarks.throughput import measure
from vtok.eval.cli.program import app


def test_one_graph_and_none_afterwards():
    model = build("timm: ViT").eval()
    del model.blocks[2:]
    compiler = Compiler(dynamic=True, backend="eager")
    (result,) = measure(
        model, images("timm: ViT", batch=5), [("tome", {"r": 4})], pairs=5, memory=False, profile=False, compiler=compiler
    )
    for took in result.compiled.values():
        assert took["seconds"] > 0 and took["mode"] == "default" and took["dynamic"] is True
        assert (took["graphs"], took["breaks"], took["again"], took["other_batches"]) == (1, 0, 0, 0)
    assert "1 graph" in bench_result.table([result]).markdown() and "Compiled (mode default, dynamic)" in result.caption()
    text = bench_result.to_json([result])
    assert bench_result.from_json(text) == [result]
    (earlier,) = json.loads(text)
    del earlier["compiled"]  # of a release before
    assert bench_result.from_json(json.dumps([earlier]))[0].compiled is None


def test_breaks_are_told():
    class Asking(type(build("timm: ViT"))):
        def forward(self, x):
            out = super().forward(x)
            return out + float(out.sum().item() > 0)  # a value that only a run has

    model = build("timm: ViT").eval()
    del model.blocks[1:]
    model.__class__ = Asking
    _, took = Compiler(backend="eager")(model, images("timm: ViT"))
    assert took["breaks"] >= 1 and took["graphs"] >= 2 and took["again"] == 0 and took["other_batches"] is None


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(vtok.UnknownNameError, match="did you mean 'reduce-overhead'"):
        Compiler("reduce-overheads")
    refused = CliRunner().invoke(app, ["bench", "reference", "tome", "--runtime", "onnxruntime", "--compile", "default"])
    assert "--compile is for models that torch runs" in str(refused.exception)
    refused = CliRunner().invoke(app, ["bench", "reference", "tome", "--dynamic"])
    assert "--dynamic goes with --compile" in str(refused.exception)


def test_steps_of_answers():
    """Decoding of a patched vision-language model over a static cache: one graph, as unpatched, and none afterwards."""
    model, values = build_vlm("LLaVA-1.5"), inputs("LLaVA-1.5")
    settings = [("todre", {"keep": 0.5}), ("fastv", {"layer": 1})]
    found = measure_prompts(model, values, settings, pairs=5, new_tokens=4, compiler=Compiler(backend="eager"))
    for result in found:
        for took in result.compiled.values():
            assert (took["graphs"], took["breaks"], took["again"]) == (1, 0, 0)
        assert "Compiled (mode default)" in result.caption()
    assert "1 graph" in bench_result.table(found).markdown()
    assert bench_result.from_json(bench_result.to_json(found)) == found
    with pytest.raises(vtok.ConfigError, match="--dynamic is for batches of images"):
        measure_prompts(model, values, settings, pairs=5, compiler=Compiler(dynamic=True, backend="eager"))


@pytest.mark.compile
def test_with_inductor(tmp_path):
    out = tmp_path / "times.json"
    args = ["bench", "reference", "tome:r=4", "--compile", "default", "--pairs", "5", "-b", "2", "--no-memory", "--no-profile"]
    result = CliRunner().invoke(app, [*args, "--json", str(out)])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(out.read_text())
    assert found["compiled"]["patched"]["graphs"] == 1 and found["compiled"]["patched"]["breaks"] == 0
