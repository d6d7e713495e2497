"""Ctrl-C at any moment: a model is patched as asked, or exactly what it was before."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import BACKENDS, build, images

import vtok
from vtok.patches.module_swap import Mixin
from vtok.patches.transaction import _HOOKS, Snapshot, to_the_end

HERE = {str(Path(vtok.__file__).parent)} | {str(Path(p)) for p in vtok.patches.__path__}
# What decides and looks, and changes no module, need not be interrupted at each of its lines.
CHANGING = ("api.py", "lifecycle.py", "encoder.py", "vlm/target.py", "vlm/resolve.py", "vlm/tower.py", "transaction.py")
CHANGING += ("block.py", "module_swap.py", "adapter.py", "install.py", "tower/bridge.py", "tower/taps.py", "attention.py")


def state(model: nn.Module) -> list:
    """What tells whether a model was changed: classes, attributes, hooks in their order."""
    return [
        (type(m), {n: id(v) for n, v in m.__dict__.items() if n not in _HOOKS}, [list(m.__dict__[n].items()) for n in _HOOKS])
        for m in model.modules()
    ]


def anatomy(model: nn.Module) -> list:
    """The same for what was made anew: kinds, not objects."""
    return [
        (type(m), sorted(m.__dict__), [[type(hook) for hook in m.__dict__[n].values()] for n in _HOOKS])
        for m in model.modules()
    ]


@functools.cache
def changing(file: str) -> bool:
    return any(file.endswith(f"/{name}") for name in CHANGING) and any(file.startswith(root) for root in HERE)


class Interrupts:
    """Raises KeyboardInterrupt at the line of vtok's that comes `at`-th; `again` raises it once more, so many lines later."""

    def __init__(self, at: int, again: int | None = None):
        self.left, self.again, self.hit = at, again, False

    def trace(self, frame, event, arg):
        if not changing(frame.f_code.co_filename):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.hit = True
                self.left = self.again or 0
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def interrupted(model: nn.Module, call, step: int, again: int | None = None) -> int:
    """Runs `call` once for every line at which it is interrupted, `step` lines apart; returns how often that was.

    Each time the model must be what it was before, or what it is when nothing interrupts.
    """
    before, start = Snapshot(model), state(model)
    call(model)
    finished = anatomy(model)
    before.restore()
    assert state(model) == start
    at, times = 1, 0
    while True:
        with Interrupts(at, again) as trap, contextlib.suppress(KeyboardInterrupt):
            call(model)
        if not trap.hit:
            before.restore()
            return times
        times += 1
        assert state(model) == start or anatomy(model) == finished, f"half of it is left at line {at}"
        before.restore()
        at += step


CASES = [
    (name, method)
    for name, method in (
        ("timm: ViT", "tome"),
        ("timm: ViT map pool (SigLIP)", "pitome"),
        ("open_clip: ViT attention pool (CoCa)", "random"),
        ("transformers: SigLIP classifier, average pool", "tome"),
    )
    if name.partition(":")[0] in BACKENDS
]
KNOBS = {"tome": {"r": 4}, "pitome": {"ratio": 0.8}, "random": {"keep": 0.5}}


@pytest.mark.parametrize("again", [None, 3])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_patching_is_all_or_nothing(name, method, again):
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model(x)
        assert interrupted(model, lambda m: vtok.patch(m, method, **KNOBS[method]), 53, again) > 10
        assert torch.equal(model(x), reference)
        vtok.patch(model, "random", keep=0.7)
        reduced = model(x)
        assert interrupted(model, lambda m: vtok.patch(m, method, **KNOBS[method]), 67, again) > 10
        assert torch.equal(model(x), reduced)
        assert interrupted(model, vtok.unpatch, 29, again) > 10
        assert torch.equal(model(x), reduced)
        assert torch.equal(vtok.unpatch(model)(x), reference)


@pytest.mark.parametrize("patch", [None, ("random", {"keep": 0.7})])
def test_a_model_that_was_patched_for_a_while_is_what_it_was(patch):
    """However the `with` ends, and wherever it was interrupted: on the way in, inside, on the way out."""
    name = "timm: ViT"
    model, x = build(name), images(name)
    with torch.no_grad():
        if patch is not None:
            vtok.patch(model, patch[0], **patch[1])
        expected, kinds = model(x), anatomy(model)
        at = times = 0
        while True:
            at += 127
            with Interrupts(at) as trap:
                try:
                    with vtok.patched(model, "tome", r=4):
                        pass
                except KeyboardInterrupt:
                    pass
            if not trap.hit:
                break
            times += 1
            assert anatomy(model) == kinds, f"line {at}"
        assert times > 10
        assert torch.equal(model(x), expected)


def test_any_error_takes_everything_back():
    """An adapter of another package may fail in its last step."""
    from vtok.patches.timm_vit.adapter import TimmAdapter

    model = build("timm: ViT map pool (SigLIP)")
    before = state(model)
    attach = TimmAdapter.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimmAdapter, "attach", lambda self, tower, run: (attach(self, tower, run), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            vtok.patch(model, "tome", r=4)
    assert state(model) == before
    assert not any(isinstance(m, Mixin) for m in model.modules())


def test_what_must_get_through_does():
    tries = []

    def change():
        tries.append(1)
        if len(tries) < 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_the_end(change)
    assert len(tries) == 4
    with pytest.raises(ZeroDivisionError):
        to_the_end(lambda: 1 / 0)


@pytest.mark.skipif("transformers" not in BACKENDS, reason="needs transformers")
@pytest.mark.parametrize("again", [None, 4])
@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("LLaVA-1.5", [vtok.ToMe(r=2), vtok.ToDRE(keep=0.5)]),
        ("Qwen2-VL", [vtok.RandomDrop(keep=0.5)]),
        ("InternVL", [vtok.PiToMe(ratio=0.8)]),
    ],
)
def test_vision_language_models(name, methods, again):
    vlm_zoo = pytest.importorskip("vlm_zoo")
    model, values = vlm_zoo.build(name), vlm_zoo.inputs(name)
    with torch.no_grad():
        reference = model(**values).logits
        assert interrupted(model, lambda m: vtok.patch(m, methods), 301, again) > 10
        assert torch.equal(model(**values).logits, reference)
        reduced = vtok.patch(model, methods)(**values).logits
        assert interrupted(model, vtok.unpatch, 101, again) > 10
        assert torch.equal(model(**values).logits, reduced)
        kinds = anatomy(vtok.unpatch(model))
        for at in range(1, 30000, 997):
            with Interrupts(at) as trap:
                try:
                    with vtok.patched(model, methods):
                        pass
                except KeyboardInterrupt:
                    pass
            assert anatomy(model) == kinds
            if not trap.hit:
                break
        for at in range(1, 30000, 997):
            with Interrupts(at) as trap, contextlib.suppress(KeyboardInterrupt, vtok.VtokError):
                vtok.prune_inputs(model, values, methods[0])
            assert anatomy(model) == kinds
            if not trap.hit:
                break
        assert torch.equal(model(**values).logits, reference)
