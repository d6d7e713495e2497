"""Runs transformers' common tests for one family, unpatched and with every model patched, and writes what failed, as JSON.

    python run.py report.json LLaVA-1.5 none kept live half

The package `tests` of transformers' source distribution must be importable.
"""

import ast
import functools
import json
import linecache
import sys
import textwrap
import traceback
import unittest
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from suites import suite
from vlm_zoo import Attended, Columns

import vtok
from vtok.config import MethodConfig
from vtok.core.prompt import VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site


@dataclass(frozen=True)
class KeepAll(MethodConfig):
    """Is asked about every token at every place, and keeps them all: no hook is left out because nothing would be dropped."""

    name: ClassVar[str] = "keep_all"

    def build_vlm(self, info):
        return _KeepAllReducer((0, *range(info.first_layer, info.depth)))


@dataclass(frozen=True)
class _KeepAllReducer(VLMReducer):
    layers: tuple[int, ...]
    asked: ClassVar[int] = 0

    @property
    def sites(self):
        return (Site(Place.IMAGE_FEATURES, 0), *(Site(Place.DECODER_IN, layer) for layer in self.layers))

    def features(self, images):
        batch, n, _ = images.tokens.shape
        return Plan(torch.arange(n, device=images.tokens.device).expand(batch, -1))

    def keep(self, x, layout, attention, at):
        _KeepAllReducer.asked += 1
        return torch.ones_like(layout.visual)


OWN = ("test_modeling_common.py", "suites.py")
PATCHES = {
    "none": lambda model: model,
    "kept": functools.partial(vtok.patch, method="uniform", keep=1.0),
    "live": functools.partial(vtok.patch, method=KeepAll()),
    "half": functools.partial(vtok.patch, method="uniform", keep=0.5),  # what enters the LLM
    "layers": functools.partial(vtok.patch, method=[Columns(((0, 2),)), Attended(layer=1, count=3)]),  # and between its layers
    "merged": functools.partial(vtok.patch, method="tome", r=4),  # in the vision tower
}
DROPS = ("half", "layers", "merged")


@contextmanager
def patching(classes, patch):
    """Every model of these classes is patched once it has been made, however it is made."""
    before = {cls: cls.__init__ for cls in classes}
    for cls, made in before.items():

        def init(self, *args, _cls=cls, _made=made, **kwargs):
            _made(self, *args, **kwargs)
            if type(self) is _cls:
                patch(self)

        cls.__init__ = functools.wraps(made)(init)
    try:
        yield
    finally:
        for cls, made in before.items():
            cls.__init__ = made


def statement(frame):
    """The source of what ran in a frame of a traceback, all lines of it."""
    text = ""
    for i in range(20):
        text += linecache.getline(frame.filename, frame.lineno + i)
        with suppress(SyntaxError):
            ast.parse(textwrap.dedent(text))
            break
    return " ".join(text.split())


class Result(unittest.TestResult):
    """Names of the tests that ran, and what each failure was."""

    def __init__(self):
        super().__init__()
        self.ran, self.skips, self.found = [], [], []

    def startTest(self, test):
        super().startTest(test)
        self.ran.append(test._testMethodName)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.skips.append(getattr(test, "test_case", test)._testMethodName)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self._add(test, subtest._subDescription(), err)

    def addFailure(self, test, err):
        self._add(test, "", err)

    addError = addFailure

    def _add(self, test, part, err):
        errors, error = [], err[1]
        while error is not None:
            errors += [f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__]
            error = error.__cause__ or error.__context__
        frames = traceback.extract_tb(err[2])
        own = next((frame for frame in reversed(frames) if frame.filename.endswith(OWN)), None)
        self.found.append(
            {
                "test": test._testMethodName,
                "part": part,
                "errors": errors,
                "message": str(err[1])[:1000],
                "statement": "" if own is None else statement(own),
                "trace": "".join(traceback.format_list(frames[-8:])),
            }
        )


def tokens(cls):
    """Tokens in front of each place where a patched model drops or merges some, and behind it; none of an unpatched one."""
    config, inputs = cls.model_tester.prepare_config_and_inputs_for_common()
    model = cls.all_model_classes[-1](config).eval()
    with torch.no_grad():
        model(**inputs)
    info = vtok.info(model)
    prompts = [(row.tokens_in[0], row.tokens_out[0]) for prompt in info.prompts for row in prompt.rows]
    return prompts + [(block.tokens_in, block.tokens_out) for tower in info.towers for block in tower.blocks]


def main(name, *ways):
    cls, report = suite(name), {}
    for way in ways:
        result, _KeepAllReducer.asked, cls.drops = Result(), 0, way in DROPS
        with patching(cls.all_model_classes, PATCHES[way]):
            unittest.defaultTestLoader.loadTestsFromTestCase(cls).run(result)
            report[way] = {"ran": result.ran, "skipped": result.skips, "failed": result.found, "tokens": tokens(cls)}
        report[way]["asked"] = _KeepAllReducer.asked
    return report


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump(main(*sys.argv[2:]), file)
