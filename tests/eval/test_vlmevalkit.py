"""Names with a method for VLMEvalKit's program, against a stand-in of its interface: the dictionary of models, `generate`."""

import json
import sys

import pytest

pytest.importorskip("transformers")

from helpers_vqa import tiny_net
from torch import nn

import vtok
from vtok.eval.vlmevalkit import held_model, main, patched, register


class OfTheKit:
    """A model of the kit: it holds one of transformers, and answers messages of its own form."""

    def __init__(self, path="tiny", **kwargs):
        self.model, self.path, self.kwargs = tiny_net(), path, kwargs
        self.projection = nn.Linear(2, 2)

    def generate(self, message, dataset=None):
        configs = vtok.info(self.model).patched
        return f"{dataset}: {len(message)} parts, patched {configs}"


class Api:
    def __init__(self):
        self.key = "none"


def test_a_name_with_a_method_patches_the_model_in_it():
    known = {"LLaVA": OfTheKit, "API": Api}
    register(["MMBench_DEV_EN", "LLaVA@divprune:keep=0.25", "LLaVA@none", "LLaVA@pitome:ratio=0.9+todre:keep=0.5"], known)
    assert set(known) == {"LLaVA", "API", "LLaVA@divprune:keep=0.25", "LLaVA@none", "LLaVA@pitome:ratio=0.9+todre:keep=0.5"}
    made = known["LLaVA@divprune:keep=0.25"](path="other", top_p=1)
    assert (made.path, made.kwargs) == ("other", {"top_p": 1})
    (config,) = vtok.info(made.model).prompts[0].configs
    assert config == vtok.DivPrune(keep=0.25)
    assert not vtok.info(known["LLaVA@none"]().model).patched and not vtok.info(known["LLaVA"]().model).patched
    both = vtok.info(known["LLaVA@pitome:ratio=0.9+todre:keep=0.5"]().model)
    assert [c.name for c in both.towers[0].configs] == ["pitome"]
    assert [c.name for c in both.prompts[0].configs] == ["pitome", "todre"]


def test_what_cannot_be_patched():
    known = {"LLaVA": OfTheKit, "API": Api}
    with pytest.raises(vtok.UnknownNameError, match=r"unknown model of VLMEvalKit 'Llava'.*LLaVA"):
        register(["Llava@todre"], known)
    with pytest.raises(vtok.UnknownNameError, match="todra"):
        patched(OfTheKit, "todra")()
    with pytest.raises(vtok.ConfigError, match=r"Api holds 0 vision-language models that vtok knows .* \(none\)"):
        patched(Api, "todre")()
    assert isinstance(held_model(OfTheKit()), nn.Module)


PROGRAM = """
import json, pathlib, sys
from vlmeval.config import supported_VLM

assert __name__ == "__main__"
name = sys.argv[sys.argv.index("--model") + 1]
answer = supported_VLM[name]().generate([dict(type="image", value="a.jpg"), dict(type="text", value="?")], "MMBench_DEV_EN")
pathlib.Path(sys.argv[-1]).write_text(json.dumps([sys.argv[1:-1], answer]))
"""


def test_the_program_of_the_kit_runs_with_the_names(tmp_path, monkeypatch):
    kit = tmp_path / "VLMEvalKit"
    (kit / "vlmeval").mkdir(parents=True)
    (kit / "vlmeval" / "__init__.py").write_text("")
    (kit / "vlmeval" / "config.py").write_text("from test_vlmevalkit import OfTheKit\nsupported_VLM = {'LLaVA': OfTheKit}\n")
    (kit / "run.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["vtok"])
    out = tmp_path / "said.json"
    try:
        main([str(kit / "run.py"), "--model", "LLaVA@uniform:keep=0.5", str(out)])
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
            del sys.modules[name]
    assert json.loads(out.read_text()) == [["--model", "LLaVA@uniform:keep=0.5"], "MMBench_DEV_EN: 2 parts, patched True"]


def test_a_program_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(vtok.ConfigError, match=r"name VLMEvalKit's program, then its arguments: .* nothing is no file"):
        main([])
    (tmp_path / "run.py").write_text("")
    with pytest.raises(vtok.ConfigError, match="holds no VLMEvalKit that can be imported, nor is it installed"):
        main([str(tmp_path / "run.py"), "--model", "x@todre"])
