"""Patched encoders as ONNX files: onnxruntime and OpenVINO compute what the model does; what has no such file is refused."""

import builtins
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from zoo import SETTINGS, STATIC, WITHOUT_CLS, attach, build, images

import vtok
import vtok.targets.resolve
from vtok.eval.benchmarks.compiled import RUNTIMES, measure_exported
from vtok.eval.cli.program import app
from vtok.registry import encoder_methods

SHORT = {"zero_tprune": {"layers": [0, 1], "retain": 0.8}, "ats": {"layers": [0, 1]}}  # the model is cut to two blocks
QUICK = {("timm: ViT", "tome")}
EXPORTED = [
    pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
    for name in ("timm: ViT", "open_clip: ViT", "transformers: ViT", "transformers: SigLIP tower, attention pool")
    for method in encoder_methods()
]


def patched(name, method):
    model = build(name)
    if name == "timm: ViT":
        del model.blocks[2:]
    params = {**SETTINGS[method], **STATIC.get(method, {}), **(SHORT.get(method, {}) if name == "timm: ViT" else {})}
    if "SigLIP" in name:
        params |= WITHOUT_CLS.get(method, {})
    attach(name, model, method, **params)
    return model.eval()


def outputs(model, x):
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(model(x)) if torch.is_tensor(t)]


@pytest.mark.parametrize(("name", "method"), EXPORTED)
def test_runtimes_compute_what_the_model_computes(name, method, tmp_path):
    model, x = patched(name, method), images(name, batch=3)
    file = vtok.export.onnx(model, x, tmp_path / "m.onnx")
    assert file.difference <= 1e-4 and file.checked == (3, 1) and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert next(iter(file.inputs.values()))[0] == "batch"
    blocks = [block for tower in vtok.info(model).towers for block in tower.blocks]
    assert any(block.tokens_out < block.tokens_in for block in blocks), "nothing was reduced"
    for runtime in RUNTIMES.values():
        session = runtime(file.path, 1)
        for batch in (x, x[:1], images(name, batch=5, seed=1)):
            for mine, theirs in zip(outputs(model, batch), session(batch.numpy())):
                assert np.abs(mine.numpy() - theirs).max() <= 1e-4 * max(1, mine.abs().max())
    held = {entry.key: entry.value for entry in onnx.load(file.path).metadata_props}
    assert held["vtok"] == vtok.__version__ and f"'{method}'" in held["methods"]
    sorts = [node for node in onnx.load(file.path).graph.node if node.op_type == "TopK"]
    constants = {node.output[0] for node in onnx.load(file.path).graph.node if node.op_type == "Constant"}
    constants |= {one.name for one in onnx.load(file.path).graph.initializer}
    assert all(node.input[1] in constants for node in sorts), "some runtimes take a constant number alone"


@pytest.mark.slow
@pytest.mark.parametrize("method", encoder_methods())
def test_strict_export(method):
    model, x = patched("timm: ViT", method), images("timm: ViT")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=True).module()
    for other in (x, x[:1], images("timm: ViT", batch=5)):
        assert (exported(other) - outputs(model, other)[0]).abs().max() <= 1e-5


def test_a_traced_call_without_a_mask_says_nothing_of_later_ones():
    """Blocks that are compiled without their tower see the masks that they are given."""
    model = build("transformers: CLIP tower").eval()
    vtok.patch(model, "tome", r=4)
    torch.compile(model, backend="eager")(images("transformers: CLIP tower"))
    assert vtok.targets.resolve.run_of(model).unmasked is False


def test_times_of_files_leave_the_model_as_it_was():
    model = build("timm: ViT", torch.float16).eval()
    del model.blocks[1:]
    (result,) = measure_exported(model, images("timm: ViT"), [("tome", {"r": 2})], runtime="onnxruntime", pairs=5)
    assert next(model.parameters()).dtype == torch.float16 and result.kernel["patched"] == "onnxruntime"


def test_what_has_no_file_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("what stood there")
    masked = build("transformers: ViT").eval().model
    vtok.patch(masked, "tome", r=4)
    mask = torch.ones(2, 65, dtype=torch.long)
    with pytest.raises(vtok.UnsupportedModelError, match="model on images alone"):
        vtok.export.onnx(masked, {"pixel_values": images("transformers: ViT"), "attention_mask": mask}, path)
    model, x = build("timm: ViT"), images("timm: ViT")
    vtok.patch(model, "ats", **SETTINGS["ats"])
    with pytest.raises(vtok.UnsupportedModelError, match=r"fixed numbers of tokens, but ats .* mode='mask'"):
        vtok.export.onnx(model, x, path)
    vtok.patch(model, "tome", r=2)
    with pytest.raises(vtok.StateError, match=r"training mode; call model.eval\(\)"):
        vtok.export.onnx(model.train(), x, path)
    model.eval()
    with pytest.raises(vtok.ConfigError, match="two images or more"):
        vtok.export.onnx(model, x[:1], path)
    with pytest.raises(vtok.ConfigError, match="got str"):
        vtok.export.onnx(model, "image.png", path)
    for opset in (11, "20"):
        with pytest.raises(vtok.ConfigError, match="opset is a whole number, 18 or newer"):
            vtok.export.onnx(model, x, path, opset=opset)
    for other in (torch.randn(2, 3, 40, 40), x[0][None].long().expand(2, -1, -1, -1), {"pixel_values": x}):
        with pytest.raises(vtok.ConfigError, match="does not run on this example"):
            vtok.export.onnx(model, other, path)
    with pytest.raises(vtok.UnsupportedModelError, match="no bfloat16"):
        vtok.export.onnx(build("timm: ViT", torch.bfloat16).eval(), x.bfloat16(), path)
    model.blocks[0].train()
    with pytest.raises(vtok.StateError, match="or a part of it"):
        vtok.export.onnx(model, x, path)
    model.eval()
    with pytest.raises(vtok.ConfigError, match="cannot be written"):
        vtok.export.onnx(model, x, tmp_path)
    with pytest.raises(vtok.UnsupportedModelError, match="holds nothing that vtok can patch"):
        vtok.export.onnx(nn.Linear(2, 2).eval(), torch.randn(2, 2), path)
    assert path.read_text() == "what stood there"


@pytest.mark.parametrize("wrong", [lambda out: 2 * out, lambda out: np.full_like(out, np.nan)])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, wrong):
    class Wrong:
        def __init__(self, session):
            self.session = session

        def get_inputs(self):
            return self.session.get_inputs()

        def run(self, *args):
            return [wrong(out) for out in self.session.run(*args)]

    model, x = build("timm: ViT"), images("timm: ViT")
    del model.blocks[1:]
    session = vtok.export.session
    monkeypatch.setattr(vtok.export, "session", lambda path: Wrong(session(path)))
    with pytest.raises(vtok.StateError, match="differ from the model's"):
        vtok.export.onnx(model.eval(), x, tmp_path / "m.onnx")
    with pytest.raises(vtok.StateError, match="no numbers on this example"):
        vtok.export.onnx(model, x * float("nan"), tmp_path / "m.onnx", dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []


def test_without_onnxscript(tmp_path, monkeypatch):
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name.startswith("onnxscript"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(vtok.MissingExtraError, match=r"vtok\[onnx\]"):
        vtok.export.onnx(build("timm: ViT").eval(), images("timm: ViT"), tmp_path / "m.onnx")


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    path = tmp_path / "vit.onnx"
    result = run("export", "reference", "tome:r=4", path)
    assert result.exit_code == 0 and "onnxruntime differs from the model by" in result.output and path.is_file()
    assert "fixed numbers of tokens" in str(run("export", "reference", "ats", path).exception)
    for runtime in RUNTIMES:
        times = tmp_path / f"{runtime}.json"
        result = run(
            "bench", "reference", "tome:r=4", "--runtime", runtime, "--pairs", 5, "-b", 2, "--threads", 1, "--json", times
        )
        assert result.exit_code == 0, result.output
        (found,) = json.loads(times.read_text())
        assert found["kernel"] == {"base": runtime, "patched": runtime} and found["speedup"] > 0.2
        assert runtime in found["versions"] and found["tokens"]["out"] < found["tokens"]["in"]
    assert isinstance(run("bench", "reference", "tome", "--runtime", "tensorrt").exception, vtok.UnknownNameError)
    assert isinstance(run("bench", "reference", "tome", "--runtime", "openvino", "--dtype", "bf16").exception, vtok.ConfigError)
