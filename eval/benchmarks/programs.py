"""Other programs beside vtok in one benchmark: their checkouts, or a file of the user's, run on a copy of the model.

Nothing of these programs is part of vtok: a path is given, and what lies there is imported. ToMe's and PiToMe's checkouts are
known; any other program takes a file of a few lines.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vtok.errors import ConfigError, VtokError, brief, shown
from vtok.eval.benchmarks.flops import count_macs
from vtok.eval.common.settings import PassCost, Setting, macs_fields, pixels_of, to_device
from vtok.eval.runs.methods import parse_method
from vtok.reading import is_file
from vtok.targets import find_targets
from vtok.targets.kernels import attention_kernels
from vtok.targets.lifecycle import call

Change = Callable[[nn.Module], nn.Module | None]  # is given a copy of the model; `None` = it changed the copy in place
FUNCTION = "change"  # what a file of the user's defines
FORM = "NAME:key=value,...@PATH, e.g. tome:r=13@../ToMe or mine:r=13@mine.py"


class Program(NamedTuple):
    """A model that another program made or changed, and what a pass of it was seen to do.

    Attributes:
        name: of its row.
        model: in eval mode.
        kernel: what computed attention, by number of blocks.
        fields: of a result: `tokens` (those that leave blocks are `None` where the program does not run the model's own),
            `gmacs`, `gflops` and `implied_speedup`, by torch's counter: the whole pass, with whatever the program multiplies
            to choose tokens, so that there is no part of its own for the reduction.
    """

    name: str
    model: nn.Module
    kernel: str
    fields: dict[str, Any]


def prepare(
    base: nn.Module, images: Tensor | Mapping[str, Any], beside: Mapping[str, nn.Module | Change], unpatched: PassCost
) -> list[Program]:
    """Makes the models of other programs and runs each once.

    Args:
        base: unpatched, in eval mode; stays as it is.
        beside: name -> what to time: a model that shares no module with `base`, or a function that is given a copy of `base`
            (weights and all) and returns the changed one.
        unpatched: what a pass of `base` costs.

    Raises:
        ConfigError: it is none of these, fails, or changes what the unpatched model runs, too.
    """
    return [_prepared(base, images, name, other, unpatched) for name, other in beside.items()]


def _prepared(
    base: nn.Module, images: Tensor | Mapping[str, Any], name: str, other: nn.Module | Change, unpatched: PassCost
) -> Program:
    if not callable(other):
        raise ConfigError(f"beside {name}: pass a model, or a function that is given a copy of one, got {shown(other)}")
    first = next(base.parameters())
    given = isinstance(other, nn.Module)
    own = copy.deepcopy(base)  # not only another module tree: a program may change weights in place
    blocks = [module for target in find_targets(own) for module in target.layers.modules]
    with _unchanged_baseline(base, images, name):
        try:
            with redirect_stdout(sys.stderr):  # programs print, and tables go to stdout
                made = other if isinstance(other, nn.Module) else other(own)
        except VtokError:
            raise
        except Exception as error:  # another program's, of any kind
            raise ConfigError(f"{name} cannot change this {type(base).__name__}: {_said(error)}") from error
        model = own if made is None else made
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"beside {name}: the function must return a model, or None if it changed its own, got {shown(made)}"
            )
        if not {id(module) for module in base.modules()}.isdisjoint(id(module) for module in model.modules()):
            raise ConfigError(
                f"{name} shares modules with the unpatched model; let it change a copy: beside={{name: function}}"
            )
        model = to_device(model, first.dtype, first.device) if given else model.eval()
        try:
            layers, kernel = _seen(model, images, blocks)
            macs = count_macs(model, images).total
        except Exception as error:
            raise ConfigError(f"{name} cannot run what the unpatched {type(base).__name__} runs: {_said(error)}") from error
    tokens = {"in": unpatched.tokens_in, "out": None if layers is None else layers[-1], "mean_per_layer": layers}
    counted = macs_fields({"base": unpatched.base_macs, "model": macs, "computed": macs})
    return Program(name, model, kernel, {"tokens": tokens, **counted})


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {brief(error)}"


def _seen(model: nn.Module, images: Tensor | Mapping[str, Any], blocks: Sequence[nn.Module]) -> tuple[list[float] | None, str]:
    """(tokens behind each block if every one of them ran once, attention kernels) of one pass."""
    batch = len(pixels_of(images))
    found: list[list[int]] = [[] for _ in blocks]

    def watch(i: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            rows = out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(rows, Tensor) and rows.ndim == 3 and len(rows) == batch:
                found[i].append(rows.shape[1])

        return hook

    handles = [block.register_forward_hook(watch(i)) for i, block in enumerate(blocks)]
    try:
        kernels = attention_kernels(blocks, lambda: call(model, images))
    finally:
        for handle in handles:
            handle.remove()
    names = ", ".join(f"{kernel} x{kernels.count(kernel)}" for kernel in dict.fromkeys(kernels))
    if not all(len(counts) == 1 for counts in found):
        return None, names if set(kernels) != {"-"} else "-"
    return [float(counts[0]) for counts in found], names


@contextmanager
def _unchanged_baseline(base: nn.Module, images: Tensor | Mapping[str, Any], name: str) -> Iterator[None]:
    """The unpatched model, what its classes do and torch's settings are the same afterwards; what can be put back is.

    Raises:
        ConfigError: a program changed what the unpatched model runs, or left torch otherwise.
    """
    kinds = {kind for module in base.modules() for kind in type(module).__mro__ if kind is not object}
    homes = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules} | {nn.functional, torch}
    settings, computed = {what: get() for what, (get, _) in _SETTINGS.items()}, _computed(base, images)
    before: dict[Any, dict[str, Any]] = {holder: dict(vars(holder)) for holder in (*kinds, *homes)}
    replaced: list[str] = []
    reset: list[str] = []
    try:
        yield
    finally:
        for holder, values in before.items():
            now = dict(vars(holder))
            new = [key for key in now if key not in values and _is_code(now[key])] if isinstance(holder, type) else []
            other = [key for key, value in values.items() if _is_code(value) and now.get(key) is not value]
            for key in new:
                delattr(holder, key)
            for key in other:
                setattr(holder, key, values[key])
            replaced += [f"{holder.__name__}.{key}" for key in (*other, *new)]
        for what, (get, put) in _SETTINGS.items():
            if get() != settings[what]:
                put(settings[what])
                reset.append(what)
    if replaced:
        raise ConfigError(
            f"{name} replaces {replaced[0]} for the whole process, which the unpatched model runs too (put back now); let it "
            "change the model that it is given alone"
        )
    if reset:
        raise ConfigError(f"{name} changes torch's {reset[0]} for the whole process (put back now); let it leave it as it is")
    kernels, out = _computed(base, images)
    if computed[0] != kernels or not all(map(_equal, computed[1], out)):
        raise ConfigError(
            f"the unpatched model computes something else once {name} was made: it changes what both run, such as a registry "
            "of attention functions; time it in a process of its own"
        )


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default type": (torch.get_default_dtype, torch.set_default_dtype),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "precision of fp32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "recording of gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
}


def _computed(base: nn.Module, images: Tensor | Mapping[str, Any]) -> tuple[list[str], list[Tensor]]:
    """(kernels of attention, all tensors that come out) of one pass, whatever is drawn in it drawn alike."""
    blocks = [module for target in find_targets(base) for module in target.layers.modules]
    device = pixels_of(images).device
    out: list[Any] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(0)
        kernels = attention_kernels(blocks, lambda: out.append(call(base, images)))
    return kernels, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


class Checkout(NamedTuple):
    """A program that is known by the layout of its repository: a `file` of it, and what changes a model in place."""

    repository: str
    file: str
    change: Callable[..., None]


def _tome(checkout: Path, model: Any, r: Any, prop_attn: bool = True) -> None:
    with _importing(checkout, "tome"):
        patch = import_module("tome.patch.timm").apply_patch
    patch(model, prop_attn=prop_attn)
    model.r = r


def _pitome(checkout: Path, model: Any, ratio: float) -> None:
    # Its packages import salesforce-lavis at once; what changes a DeiT needs none of it.
    with _importing(checkout, "algo", "algo.pitome", "algo.pitome.patch"):
        patch = import_module("algo.pitome.patch.deit").apply_patch
    _as_its_timm_had_it(model)
    patch(model)
    model.ratio = ratio


def _as_its_timm_had_it(model: Any) -> None:
    """Lets a model of today's timm run what was written for that of 2021: features came pooled, only the head followed."""

    class Pooled(type(model)):  # type: ignore[misc]  # a base class that only the model tells
        def forward(self, x: Tensor) -> Tensor:
            features = self.forward_features(x)
            return self.head(features) if features.ndim == 2 else self.forward_head(features)

    model.__class__ = Pooled
    for attribute, value in (("dist_token", None), ("pre_logits", nn.Identity())):
        if not hasattr(model, attribute):
            setattr(model, attribute, value)


CHECKOUTS = {
    "tome": Checkout("https://github.com/facebookresearch/ToMe", "tome/patch/timm.py", _tome),
    "pitome": Checkout("https://github.com/hchautran/PiToMe", "algo/pitome/patch/deit.py", _pitome),
}


@contextmanager
def _importing(folder: Path, package: str, *bare: str) -> Iterator[None]:
    """A package of a folder can be imported, and is forgotten afterwards; those in `bare` without running their `__init__`."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == package]

    before, path = {name: sys.modules.pop(name) for name in ours()}, str(folder)
    sys.path.insert(0, path)
    for name in bare:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")))]
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def parse_beside(texts: Sequence[str]) -> dict[str, Change]:
    """Reads what the command line names: `NAME:key=value,...@PATH`, the checkout of a known program or a Python file.

    A file defines `change(model, **parameters)`, which is given a copy of the model and returns the changed one (`None`: it
    changed the copy). It is run here, so that what is wrong with it is said before anything is timed.

    Raises:
        ConfigError: another form, nothing there, or something else than is expected; two of one name.
    """
    found: dict[str, Change] = {}
    for text in texts:
        title, change = _parsed(text)
        if title in found:
            raise ConfigError(f"--beside {shown(text)}: {title} is there already; give it another name")
        found[title] = change
    return found


def _parsed(text: str) -> tuple[str, Change]:
    spec, at, where = text.partition("@")
    if not spec or not at or not where:
        raise ConfigError(f"--beside takes {FORM}, got {shown(text)}")
    name, params = parse_method(spec)
    title, path = Setting(name, params).title, Path(os.path.expanduser(where))
    if path.suffix == ".py":
        return title, _bound(_function(path), params, text)
    known = CHECKOUTS.get(name)
    if known is None:
        raise ConfigError(f"--beside {shown(text)}: checkouts are known of {', '.join(CHECKOUTS)}; for others name a .py file")
    if not is_file(path / known.file):
        raise ConfigError(f"{brief(where)} holds no {known.file}; clone {known.repository} and name its folder")
    return f"official {title}", _bound(partial(known.change, path.resolve()), params, text)


def _bound(function: Callable[..., Any], params: Mapping[str, Any], text: str) -> Change:
    try:
        inspect.signature(function).bind(None, **params)
    except TypeError as error:
        raise ConfigError(f"--beside {shown(text)}: {error}") from error
    return lambda model: function(model, **params)


def _function(path: Path) -> Callable[..., Any]:
    """`change` of a file."""
    if not is_file(path):
        raise ConfigError(f"{brief(path)} is no file; name one that defines {FUNCTION}(model, **parameters)")
    spec = spec_from_file_location(f"vtok_beside_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look for their module there
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise ConfigError(f"{path} cannot be run: {_said(error)}") from error
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise ConfigError(f"{path} defines no {FUNCTION}(model, **parameters), which is given a copy of the model")
    return function
