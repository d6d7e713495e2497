"""What is said of saved patches, calibration, files and compilers that do not fit; see also test_errors."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers_errors import message_of
from zoo import build, images

import vtok


@pytest.fixture
def model():
    return build("timm: ViT")


def test_config_files(model, tmp_path):
    path = tmp_path / "run.json"
    assert "does not exist; methods are: atp, ats" in message_of(vtok.ConfigError, vtok.patch, model, str(path))
    path.write_text("{not json")
    assert "is not a JSON file" in message_of(vtok.ConfigError, vtok.patch, model, path)
    path.write_text("[1, 2]")
    assert "expected a file of vtok.save_config with format 1, found 'list'" in message_of(
        vtok.ConfigError, vtok.patch, model, path
    )
    vtok.save_config(vtok.patch(model, "tome", r=4), path)
    saved = json.loads(path.read_text())

    def rewritten(**changes):
        path.write_text(json.dumps({**saved, **changes}))
        return message_of(vtok.VtokError, vtok.patch, model, path)

    assert "format 1, found 9" in rewritten(format=9)

    def tower(**changes):
        return rewritten(towers=[{**saved["towers"][0], **changes}])

    assert "'towers' must be a list of mappings" in rewritten(towers=3)
    assert "'methods' must be a list" in tower(methods=[])
    assert "'methods' must be a list" in tower(methods=[{"method": ["tome"]}])
    text = tower(methods=[{"method": "tome", "rr": 3}])
    assert str(path) in text
    assert "unknown parameter of tome 'rr'" in text
    assert "unknown method 'tom'" in tower(methods=[{"method": "tom"}])
    assert "saved from VisionTransformer with 12 blocks, this VisionTransformer has 4" in tower(depth=12)
    assert "saved from VisionTransformer with 2 prefix tokens, this VisionTransformer has 1" in tower(num_prefix=2)
    assert "saved from a model with 2 towers, this one has 1" in rewritten(towers=saved["towers"] * 2)
    path.write_text(json.dumps({**saved, "towers": [{**saved["towers"][0], "num_patches": 9}]}))
    with pytest.warns(UserWarning, match="saved for 9 patches"):
        vtok.patch(model, path)
    for more in ({"r": 3}, {"flops": 0.5}):
        assert "is a saved patch, which holds all its numbers; leave out" in message_of(
            vtok.ConfigError, vtok.patch, model, path, **more
        )
    assert "does not exist" in message_of(vtok.ConfigError, vtok.save_config, model, tmp_path / "missing" / "run.json")


def test_nothing_to_save(model, tmp_path):
    assert "not patched; there is nothing to save" in message_of(vtok.StateError, vtok.save_config, model, tmp_path)


def test_unmerge_before_a_pass(model):
    text = message_of(vtok.StateError, vtok.unmerge, vtok.patch(model, "tome", r=4, trace=True), torch.zeros(1, 3, 4))
    assert "has just run" in text


def test_a_missing_extra(monkeypatch):
    from vtok.eval.tasks.timm_pipeline import Options, create_model

    monkeypatch.setitem(sys.modules, "timm", None)
    assert 'pip install "vtok[timm]"' in message_of(vtok.MissingExtraError, create_model, "vit_tiny_patch16_224", Options())


def test_registries_refuse_collisions():
    text = message_of(vtok.ConfigError, vtok.METHODS.register("tome"), object())
    assert "method 'tome' is already registered" in text


def test_vision_language_models_need_a_younger_transformers_than_encoders(monkeypatch):
    from vtok.patches.hf_vlm import families as hf_vlm

    model = hf_vlm.examples()["LLaVA-1.5"].build()
    monkeypatch.setattr(hf_vlm, "OLDEST", (99, 0))
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "uniform", keep=0.5)
    assert "need transformers 99.0 or newer, found 5." in text
    assert "patch the model's vision tower by itself" in text
    vtok.patch(model.model.vision_tower, "tome", r=2)


BROKEN = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("call", [vtok.plan, vtok.patch])
def test_calibration_that_measures_nothing(model, call):
    x = images("timm: ViT")
    for value in BROKEN:
        broken = x.clone()
        broken[1, 0, 3, 3] = value
        text = message_of(vtok.ConfigError, call, model, "ats", flops=0.6, calibration=broken)
        assert "holds 1 numbers that are NaN or infinite" in text
    for odd in (x.double(), x.half(), (255 * x).byte()):
        text = message_of(vtok.ConfigError, call, model, "ats", flops=0.6, calibration=odd)
        assert f"calibration images are {odd.dtype}, VisionTransformer takes torch.float32" in text
    small = message_of(vtok.ConfigError, call, model, "ats", flops=0.6, calibration=x[..., :30, :30])
    assert "cannot run the calibration images (AssertionError: " in small
    assert not vtok.info(model).patched


def test_files_with_keys_that_nobody_reads(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vtok.save_config(vtok.patch(model, "tome", r=4), ".")
    vtok.unpatch(model)
    good = json.loads(Path("vtok.json").read_text())
    tower = good["towers"][0]
    for change, words in (
        ({"tracing": True}, "unknown key 'tracing'; did you mean 'trace'?"),
        ({"trace": "false"}, "trace is true or false, found 'false'"),
        ({"trace": 1}, "trace is true or false, found 1"),
        ({"positions": 5}, "positions is one of original, compact, found 5"),
        ({"positions": "orignal"}, "positions is one of original, compact, found 'orignal'"),
        ({"towers": [{**tower, "deph": 3}]}, "unknown key 'deph'; did you mean 'depth'?"),
        ({"towers": [{**tower, "methods": []}]}, "those of every tower are empty"),
        ({"towers": [{**tower, "methods": {}}]}, "'methods' must be a list"),
        ({"towers": [{**tower, "methods": [{"method": "tome", "rr": 3}]}]}, "unknown parameter of tome 'rr'"),
    ):
        Path("vtok.json").write_text(json.dumps({**good, **change}))
        text = message_of(vtok.VtokError, vtok.patch, model, "vtok.json")
        assert "vtok.json: " in text and words in text, text
    for content, words in (
        ('{"format": 1, "format": 1}', "the key 'format' is written twice"),
        ("[" * 100_000, "is not a JSON file"),
    ):
        Path("vtok.json").write_text(content)
        assert words in message_of(vtok.ConfigError, vtok.patch, model, "vtok.json")
    os.mkfifo("pipe.json")
    assert "pipe.json is a pipe; name a file" in message_of(vtok.ConfigError, vtok.patch, model, "pipe.json")
    assert "unknown method ''" in message_of(vtok.UnknownNameError, vtok.patch, model, "")
    assert not vtok.info(model).patched


@pytest.mark.parametrize("name", ["timm: ViT", "timm: NaFlexViT"])
def test_compilers_that_read_source(name):
    """What torch says of a patched block, or a made-up reason, helps nobody."""
    model = vtok.patch(build(name), "random", keep=1.0, input_size=(3, 64, 64))
    text = message_of(vtok.UnsupportedModelError, torch.jit.script, model)
    assert "torch.jit.script cannot compile" in text
    assert "torch.jit.trace, or call vtok.unpatch(model) first" in text
    text = message_of(vtok.UnsupportedModelError, torch.fx.symbolic_trace, model)
    assert "symbolic tracing cannot follow" in text
    vtok.unpatch(model)


def test_scripting_of_one_block(model):
    vtok.patch(model, "tome", r=4)
    assert "cannot compile Block" in message_of(vtok.UnsupportedModelError, torch.jit.script, model.blocks[1])
    vtok.unpatch(model)
    assert torch.jit.script(model.blocks[1]) is not None
