"""The tiny models and method settings that contract tests are parametrised over, read from the registries."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import vtok
from vtok.config import MethodConfig, ModelInfo, Reducer
from vtok.core.tokens import Place, Site
from vtok.registry import METHODS, encoder_methods
from vtok.targets.resolve import towers
from vtok.testing import tiny
from vtok.testing.trials import trial

# Settings under which a method really reduces 64 patches in 4 blocks.
SETTINGS: dict[str, dict[str, Any]] = {name: dict(trial(name).encoder) for name in encoder_methods()}
# Static shapes, for compilation and fake tensors.
STATIC: dict[str, dict[str, Any]] = {"ats": {"mode": "mask"}}


def _first_built(method: str, info: ModelInfo) -> tuple[dict[str, Any], Reducer] | None:
    """(parameters that a model asks for, reducer), or `None` if the method refuses such a model."""
    for extra, config in METHODS.get(method).variants(info, **SETTINGS[method]):
        with contextlib.suppress(vtok.UnsupportedModelError):
            return extra, config.build(info)
    return None


_VIT = ModelInfo("ViT", 4, 1, 64, (8, 8), True, 48, 12, 4, 4)
_POOLED = {name: _first_built(name, dataclasses.replace(_VIT, num_prefix=0, has_cls=False)) for name in encoder_methods()}
# What a user passes where a model has no class token.
WITHOUT_CLS: dict[str, dict[str, Any]] = {name: made[0] for name, made in _POOLED.items() if made is not None}
MERGING = [name for name in encoder_methods() if (made := _first_built(name, _VIT)) is not None and made[1].sizes]

BACKENDS = tiny.backends()
EXAMPLES, TOO_NEW = tiny.examples()
# One example for every class of block and of attention.
_FAMILIES = [
    "timm: ViT",
    "timm: ViT differential attention",
    "timm: ViT res-post-norm",
    "timm: ViT parallel blocks",
    "timm: EVA-02 rotary, SwiGLU",
    "timm: EVA mixed rotary",
    "timm: EVA post-norm",
    "timm: EVA grouped queries",
    "timm: BEiT relative bias",
    "timm: NaFlexViT rotary, gated",
    "open_clip: ViT",
    "open_clip: ViT sequence first",
    "open_clip: ViT custom blocks, all norms",
    "transformers: ViT",
    "transformers: CLIP tower",
    "transformers: SigLIP tower, attention pool",
    "transformers: DINOv2 classifier, registers",
    "transformers: DINOv3 rotary, registers",
    "transformers: BEiT relative bias, average pool",
    "transformers: InternVL tower, qk-norm",
    "transformers: BLIP tower",
]
FAMILIES = [name for name in _FAMILIES if name in EXAMPLES]


@functools.cache
def _prototype(name: str) -> nn.Module:
    return tiny.build(EXAMPLES[name])


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of an example, every parameter random, in eval mode."""
    if name in TOO_NEW:
        pytest.skip(f"{name} needs release {TOO_NEW[name].since}")
    return copy.deepcopy(_prototype(name)).to(dtype)


def images(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random images; see `tiny.images`."""
    return tiny.images(EXAMPLES[name], batch, dtype, seed)


def block_list(model: nn.Module) -> Any:
    """The list that a model keeps its (only) tower's blocks in."""
    first = towers(model, None)[0][1].blocks[0].module
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return next(m for m in lists if any(block is first for block in m))


def checkpointing(model: nn.Module) -> None:
    """Switches a model's own gradient checkpointing on."""
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):
            return module.set_grad_checkpointing(True)
        for switch in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the new name and the old
            if hasattr(module, switch):
                return getattr(module, switch)()
    raise TypeError(f"{type(model).__name__} has no gradient checkpointing")


def config_for(name: str, method: str, model: nn.Module, **extra: Any) -> MethodConfig | None:
    """The method's config for an example, with one of its alternatives where the default is refused; `None` if all are."""
    info = towers(model, EXAMPLES[name].input_size)[0][1].info
    for _, config in METHODS.get(method).variants(info, **{**SETTINGS[method], **extra}):
        try:
            vtok.plan(model, config, input_size=EXAMPLES[name].input_size)
        except vtok.UnsupportedModelError:
            continue
        return config
    return None


@functools.cache
def _supported(name: str, method: str) -> bool:
    return config_for(name, method, _prototype(name)) is not None


def pairs(names: list[str] | None = None) -> list[tuple[str, str]]:
    """(example, method) for every combination that is supported."""
    chosen = list(EXAMPLES) if names is None else names
    return [(name, method) for name in chosen for method in encoder_methods() if _supported(name, method)]


def covering(combinations: list[tuple[str, str]], shift: int, of: int = 3) -> list[Any]:
    """One in `of` of the combinations (example, method) runs at once, the others are slow: every example occurs, every method
    with one in `of` of the examples. Tests with other shifts take other combinations, so that each is taken by some test."""
    names, methods = (list(dict.fromkeys(column)) for column in zip(*combinations))
    return [
        pytest.param(
            name, method, marks=() if (names.index(name) + methods.index(method) + shift) % of == 0 else pytest.mark.slow
        )
        for name, method in combinations
    ]


def attach(name: str, model: nn.Module, method: str, **extra: Any) -> nn.Module:
    """Patches an example with a method's setting."""
    trace = extra.pop("trace", False)
    config = config_for(name, method, model, **extra)
    assert config is not None
    return vtok.patch(model, config, input_size=EXAMPLES[name].input_size, trace=trace)


def run(check: Callable[..., None], name: str, method: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> None:
    """One of `vtok.testing.encoder_checks` for an example and a method's setting."""
    model = build(name, dtype)
    check(model, images(name, batch, dtype), config_for(name, method, model), EXAMPLES[name].input_size)


@dataclass(frozen=True)
class Nothing(MethodConfig):
    """Acts in every block and changes nothing: runs the split path alone."""

    name: ClassVar[str] = "nothing"
    place: Place = Place.BLOCK_MID
    needs: frozenset[str] = frozenset()

    def build(self, info: ModelInfo) -> Reducer:
        return _NothingReducer(self.place, info.depth, self.needs)


@dataclass(frozen=True)
class _NothingReducer(Reducer):
    place: Place
    depth: int
    needs: frozenset[str]  # type: ignore[misc]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(self.place, i) for i in range(self.depth))

    def plan(self, x: Any, state: Any, view: Any, at: Site) -> None:
        return None

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n
