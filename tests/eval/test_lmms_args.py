"""What `--model_args` of lmms-eval says about vtok; lmms-eval itself is tested by `make test-lmms`."""

import subprocess
import sys
from pathlib import Path

import pytest

import vtok
from vtok.errors import ConfigError, UnknownNameError
from vtok.eval.lmms.args import Wish, read_args

KNOWN = ("pretrained", "device", "batch_size", "use_cache")


def wish(**args):
    return read_args(args, KNOWN)[0]


def test_a_method_with_parameters_and_what_is_left_for_the_class():
    found, rest = read_args({"pretrained": "a/b", "method": "todre", "keep": 0.1, "batch_size": 1, "use_cache": True}, KNOWN)
    assert found == Wish([vtok.ToDRE(keep=0.1)])
    assert rest == {"pretrained": "a/b", "batch_size": 1, "use_cache": True}


def test_none_is_the_unpatched_model():
    assert read_args({"method": "none", "device": "cpu"}, KNOWN) == (Wish(), {"device": "cpu"})


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_several_methods(quote):
    both = [vtok.PiToMe(ratio=0.9), vtok.ToDRE(keep=0.1)]
    assert wish(method=f"{quote}pitome:ratio=0.9+todre:keep=0.1{quote}").method == both
    assert wish(method=f"{quote}pitome+todre{quote}", ratio=0.9, keep=0.1).method == both
    assert wish(method=f"{quote}pitome:ratio=0.9,alpha=2+todre{quote}", keep=0.1).method == [
        vtok.PiToMe(ratio=0.9, alpha=2),
        vtok.ToDRE(keep=0.1),
    ]


def test_values_as_lmms_eval_reads_them():
    assert wish(method="tome", r="[8,7]").method == [vtok.ToMe(r=[8, 7])]
    assert wish(method="tome", r="(8,-1)").method == [vtok.ToMe(r=(8, -1))]
    assert wish(method="correlation", alpha=0.5, low_layer=-2.0).method == [vtok.Correlation(alpha=0.5, low_layer=-2)]
    assert wish(method="todre", probe="null").method == [vtok.ToDRE(probe=None)]
    assert wish(method="atp", weights="/a b/c:d.safetensors").method == [vtok.ATP(weights="/a b/c:d.safetensors")]


def test_options_of_the_patch():
    found = wish(method="uniform", flops=0.6, positions="compact", prompt="{images: 2, text_tokens: 8}")
    assert found.options == {"flops": 0.6, "positions": "compact", "prompt": {"images": 2, "text_tokens": 8}}
    assert wish(method="correlation", calibration=16).calibration == 16


def test_a_saved_patch(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "vtok.json"
    vtok.save_config(vtok.patch(timm.create_model("deit_tiny_patch16_224"), "tome", r=4), path)
    assert wish(method=str(path)).method == str(path)
    with pytest.raises(ConfigError, match="takes no parameters, got keep; leave them out"):
        wish(method=str(path), keep=0.5)
    with pytest.raises(ConfigError, match="does not exist"):
        wish(method=str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({}, ConfigError, "no method; write method=todre,keep=0.1, or method=none for the unpatched model"),
        ({"method": "todr"}, UnknownNameError, "unknown method 'todr'; did you mean 'todre'"),
        ({"method": "todre", "kep": 0.1}, UnknownNameError, "or argument 'kep'; did you mean 'keep'"),
        ({"method": "todre", "pretraind": "x"}, UnknownNameError, "'pretraind'; did you mean 'pretrained'"),
        ({"method": "todre", "keep": 7}, ConfigError, "keep"),
        ({"method": "none", "keep": 0.1}, ConfigError, "the unpatched model takes no parameters, got keep"),
        ({"method": "none", "calibration": 4}, ConfigError, "got calibration"),
        (
            {"method": "random+uniform", "keep": 0.1},
            ConfigError,
            r"random and uniform have a parameter keep.*random:keep=\.\.\.\+uniform:keep",
        ),
        ({"method": "todre:keep=0.1", "keep": 0.2}, ConfigError, "keep of todre is given twice: 0.1 and 0.2"),
        ({"method": "uniform", "flops": 2}, ConfigError, r"flops is the share .* got 2"),
        ({"method": "uniform", "flops": "half"}, ConfigError, "got 'half'"),
        ({"method": "uniform", "prompt": "{image: 1}"}, UnknownNameError, "did you mean 'images'"),
        ({"method": "uniform", "positions": "compct"}, UnknownNameError, "did you mean 'compact'"),
        ({"method": "uniform", "calibration": 4}, ConfigError, "no number to find on images; leave calibration out"),
        ({"method": "correlation"}, ConfigError, "correlation lacks a number that it finds on images: add calibration=16"),
        ({"method": "correlation", "calibration": -3.0}, ConfigError, "calibration is a number of questions, got -3"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        wish(**args)


def test_lmms_eval_finds_the_models_without_importing_them():
    """An entry point that failed to load would only be a warning in lmms-eval's log."""
    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvtok = "vtok.eval.lmms:manifests"' in text
    heavy = "'transformers' in sys.modules, 'lmms_eval' in sys.modules"
    code = f"import sys, vtok.eval.lmms as l; print(callable(l.manifests), {heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "True False False"
