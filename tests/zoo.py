"""The tiny models and method settings that contract tests are parametrised over, read from the registries."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import vtok
from vtok.config import MethodConfig, ModelInfo, Reducer
from vtok.patches.protocol import Example
from vtok.registry import ADAPTERS, METHODS
from vtok.state import Place, Site

# Settings under which a method really reduces 64 patches in 4 blocks. A new method adds one row.
SETTINGS: dict[str, dict[str, Any]] = {
    "ats": {"num_tokens": 24},
    "pitome": {"ratio": 0.8},
    "random": {"keep": 0.8},
    "tome": {"r": 6},
    "uniform": {"keep": 0.8},
    "zero_tprune": {"layers": [0, 2], "retain": 0.8, "r": 5},
}
# What a user passes where a model has no class token.
WITHOUT_CLS: dict[str, dict[str, Any]] = {"ats": {"query": "mean"}, "zero_tprune": {"cls_init": "uniform"}}
# Static shapes, for compilation and fake tensors.
STATIC: dict[str, dict[str, Any]] = {"ats": {"mode": "mask"}}


BACKENDS = [name for name in ADAPTERS if importlib.util.find_spec(name) is not None]  # of those that are installed


def _too_new(backend: str, example: Example) -> bool:
    """Whether the installed release of a backend is older than an example."""
    return bool(example.since) and TorchVersion(importlib.import_module(backend).__version__) < example.since


_ALL = {(backend, example.name): example for backend in BACKENDS for example in ADAPTERS.get(backend)().examples()}
EXAMPLES = {": ".join(key): example for key, example in _ALL.items() if not _too_new(key[0], example)}
TOO_NEW = {": ".join(key): example for key, example in _ALL.items() if _too_new(key[0], example)}
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
# Parameters that bring queries and keys about, and weights of norms, by the names that backends give them.
_ATTENDING = ("qkv", "q_proj", "in_proj")
_NORMS = ("norm", "ln_")


@functools.cache
def _prototype(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(EXAMPLES[name].build().eval())


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, nothing zero, attention far from uniform."""
    generator = torch.Generator().manual_seed(1)
    for parameter_name, p in model.named_parameters():
        sharp = any(part in parameter_name for part in _ATTENDING)
        scale = 0.3 if p.ndim <= 1 or not p.any() else (2.5 if sharp else 1.0)
        fan = 1 if p.ndim <= 1 or not p.any() else p[0].numel()
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * scale / fan**0.5)
            if p.ndim == 1 and any(part in parameter_name for part in _NORMS) and parameter_name.endswith("weight"):
                p.add_(1)
    return model


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of an example, every parameter random, in eval mode."""
    import copy

    if name in TOO_NEW:
        pytest.skip(f"{name} needs release {TOO_NEW[name].since}")
    return copy.deepcopy(_prototype(name)).to(dtype)


def images(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random images with some structure: coarse blocks plus noise, so that tokens differ in how alike they are."""
    channels, height, width = EXAMPLES[name].input_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 4, 4, generator=generator, dtype=torch.float64)
    coarse = coarse.repeat_interleave(height // 4, 2).repeat_interleave(width // 4, 3)
    return (coarse + 0.3 * torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)).to(dtype)


def block_list(model: nn.Module) -> Any:
    """The list that a model keeps its (only) tower's blocks in."""
    first = vtok.api._towers(model, None)[0][1].blocks[0].module
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
    """The method's config for an example, with its substitute where there is no class token; `None` if it is refused."""
    for substitute in ({}, WITHOUT_CLS.get(method, {})):
        config = METHODS.get(method)(**{**SETTINGS[method], **substitute, **extra})
        try:
            vtok.plan(model, config, input_size=EXAMPLES[name].input_size)
        except vtok.UnsupportedModelError:
            continue
        return config
    return None


def pairs(names: list[str] | None = None) -> list[tuple[str, str]]:
    """(example, method) for every combination that is supported."""
    chosen = list(EXAMPLES) if names is None else names
    return [(name, method) for name in chosen for method in METHODS if config_for(name, method, _prototype(name)) is not None]


def attach(name: str, model: nn.Module, method: str, **extra: Any) -> nn.Module:
    """Patches an example with a method's setting."""
    trace = extra.pop("trace", False)
    config = config_for(name, method, model, **extra)
    assert config is not None
    return vtok.patch(model, config, input_size=EXAMPLES[name].input_size, trace=trace)


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
