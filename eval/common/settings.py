"""What one measurement is about: a model, a setting, and what a forward pass under it costs. For benchmarks and tasks."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import vtok
from vtok.config import MethodConfig
from vtok.cost.encoder import Estimate, estimate
from vtok.errors import ConfigError, shown
from vtok.eval.common.control import RandomChoice
from vtok.eval.common.records import AT_RANDOM, key_of
from vtok.patches import find_adapters
from vtok.patches.protocol import Adapter, Tower
from vtok.targets.lifecycle import weight_sharing_copy as weight_sharing_copy  # other modules of vtok.eval look for it here
from vtok.targets.resolve import Method, Size, run_of, towers

# Floating-point types under torch's names, which flags and options use, and the short ones of run files.
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FINGERPRINT = 64  # values of every parameter that identify weights


@dataclass(frozen=True)
class Setting:
    """What to patch: the arguments of `vtok.patch`."""

    # name, config object, list of these, or path of a saved config; `None` = leave the model unpatched
    method: Method | None = None
    params: Mapping[str, Any] = field(default_factory=dict)  # of a method given by name; `flops` for a budget
    at_random: bool = False  # keep as many tokens at the same places, but draw them (`vtok.eval.common.control`)

    @classmethod
    def of(cls, value: Any) -> Setting:
        """Reads what a caller may write: a `Setting`, a method, `None` or (method, params); raises `ConfigError` for others."""
        if isinstance(value, cls):
            return value
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
            return cls(*value)
        if value is None or isinstance(value, (str, MethodConfig, list, tuple)) or hasattr(value, "__fspath__"):
            return cls(value)
        raise ConfigError(f"a setting is None (unpatched), a method or (method, parameters), got {shown(value)}")

    @classmethod
    def several(cls, values: Sequence[Any]) -> list[Setting]:
        """What a task is to evaluate, see `of`. Raises `ConfigError`: nothing, or something that is no setting."""
        if not values:
            raise ConfigError("nothing to evaluate: name at least one setting, None for the unpatched model")
        return [cls.of(value) for value in values]

    @property
    def name(self) -> str:
        """What was asked for: method names joined by " + ", "unpatched" if there is none."""
        if self.method is None:
            return "unpatched"
        parts = self.method if isinstance(self.method, (list, tuple)) else [self.method]
        names = " + ".join(part.name if isinstance(part, MethodConfig) else str(part) for part in parts)
        return names + AT_RANDOM if self.at_random else names

    @property
    def title(self) -> str:
        """ "tome(r=13)": what the caller asked for, without what follows from it or was left at its default."""
        if isinstance(self.method, (list, tuple)):
            return " + ".join(Setting(part).title for part in self.method) + (AT_RANDOM if self.at_random else "")
        given = {key: value for key, value in self.params.items() if key not in ("calibration", "prompt")}
        if isinstance(self.method, MethodConfig):
            defaults = type(self.method)().to_dict()
            given = {key: value for key, value in self.method.to_dict().items() if value != defaults[key]}
        text = ", ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in given.items())
        return f"{self.name}({text})" if text else self.name

    def apply(self, model: nn.Module, input_size: Size | None = None, trace: bool = False) -> nn.Module:
        """Patches (or unpatches) the model in place; a budget is solved for `input_size`. Errors are those of `vtok.patch`."""
        if self.method is None:
            return vtok.unpatch(model)
        if self.at_random:
            chosen = vtok.plan(model, self.method, input_size=input_size, **self.params).configs
            return vtok.patch(model, [RandomChoice(config) for config in chosen], input_size=input_size, trace=trace)
        return vtok.patch(model, self.method, input_size=input_size, trace=trace, **self.params)


@dataclass(frozen=True)
class PassCost:
    """Tokens and MACs of a model's last forward pass, per image; of the first tower where there are several, MACs of all."""

    tokens_in: float  # tokens that enter block 0, prefix included
    mean_per_layer: tuple[float, ...]  # mean number of real tokens that leave each block
    base_macs: float  # of the unpatched model
    macs: float  # of the patched one, as implied by each image's own token count, the reduction left out
    computed_macs: float  # the same with padding, at most what was computed: behind `ats` some layers see none
    reduction_macs: float  # the reduction's own
    ragged: bool  # whether images kept different numbers of tokens, so that another batch costs something else

    @property
    def implied_speedup(self) -> float:
        """MACs of the unpatched model / MACs of the patched one, the reduction's own left out."""
        return self.base_macs / self.macs

    def fields(self) -> dict[str, Any]:
        """`tokens`, `gmacs`, `gflops` (2 x) and `implied_speedup`, as result files have them."""
        macs = {"base": self.base_macs, "model": self.macs, "computed": self.computed_macs, "pruner": self.reduction_macs}
        layers = list(self.mean_per_layer)
        return {"tokens": {"in": self.tokens_in, "out": layers[-1], "mean_per_layer": layers}, **macs_fields(macs)}


def macs_fields(macs: Mapping[str, float]) -> dict[str, Any]:
    """`gmacs`, `gflops` (2 x) and `implied_speedup` of a record, from MACs: of "base", the patched "model", and others."""
    return {
        "gmacs": {name: value / 1e9 for name, value in macs.items()},
        "gflops": {name: 2 * value / 1e9 for name, value in macs.items()},
        "implied_speedup": macs["base"] / macs["model"],
    }


def pass_cost(model: nn.Module, input_size: Size | None = None) -> PassCost:
    """What the last forward pass of this thread cost; an unpatched model's cost follows from `input_size` alone. Raises
    `UnsupportedModelError`: vtok knows no tower in the model."""
    found = towers(model, input_size)
    if run_of(model) is None:
        first = found[0][1]
        count = float(first.info.num_prefix + first.info.num_patches)
        macs = sum(_unpatched(adapter, tower).base_macs for adapter, tower in found)
        return PassCost(count, (count,) * len(first.blocks), macs, macs, macs, 0.0, False)
    seen = [t for t in vtok.info(model).towers if t.estimate is not None]
    if not seen:
        raise ConfigError("the patched model has not run yet in this thread; call it before asking what the pass cost")
    pairs = [(t.mean_estimate or t.estimate, t.estimate) for t in seen]
    return PassCost(
        tokens_in=float(seen[0].blocks[0].tokens_in),
        mean_per_layer=tuple(float(b.mean_tokens) for b in seen[0].blocks),
        base_macs=sum(e.base_macs for _, e in pairs if e),
        macs=sum(e.macs for e, _ in pairs if e),
        computed_macs=sum(e.macs for _, e in pairs if e),
        reduction_macs=sum(e.reduction_macs for _, e in pairs if e),
        ragged=any(t.mean_estimate is not None for t in seen),
    )


def mean_cost(costs: Sequence[PassCost], images: Sequence[int]) -> PassCost:
    """Mean over the images of several passes; `images` says how many each had."""
    share = [n / sum(images) for n in images]

    def mean(values: Sequence[float]) -> float:
        return sum(value * part for value, part in zip(values, share))

    numbers = ("tokens_in", "base_macs", "macs", "computed_macs", "reduction_macs")
    return PassCost(
        mean_per_layer=tuple(mean(layer) for layer in zip(*(c.mean_per_layer for c in costs))),
        ragged=any(c.ragged for c in costs),
        **{name: mean([getattr(c, name) for c in costs]) for name in numbers},
    )


def model_name(model: nn.Module) -> str:
    """timm's name of an architecture, else the class name."""
    config = getattr(model, "pretrained_cfg", None)
    known = config.get("architecture") if isinstance(config, Mapping) else None
    return known or type(model).__name__


def backend(model: nn.Module) -> str:
    """Name of the adapter that patches the model: "timm", ..., or "" if none does."""
    return next((name for name, _ in find_adapters(model)), "")


def _unpatched(adapter: Adapter, tower: Tower) -> Estimate:
    info = tower.info
    return estimate(adapter.cost(tower), {}, info.num_prefix + info.num_patches, info.num_prefix)


def method_name(model: nn.Module) -> str:
    """Names of what is patched, joined by " + "; "unpatched" if nothing is."""
    run = run_of(model)
    return "unpatched" if run is None else " + ".join(config.name for config in run.patch.configs)


def resolved_params(model: nn.Module) -> Any:
    """Parameters of what is patched, every number resolved: a mapping (empty if unpatched), or a list for several methods."""
    run = run_of(model)
    configs: Sequence[MethodConfig] = () if run is None else run.patch.configs
    values = [{k: v for k, v in config.to_dict().items() if len(configs) > 1 or k != "method"} for config in configs]
    return values[0] if len(values) == 1 else values or {}


def usable_device(device: str | torch.device) -> torch.device:
    """The device, tried out. Raises `ConfigError`: torch knows no such device, or this machine has none."""
    if str(device).split(":")[0] == "meta":
        raise ConfigError("device 'meta' holds no values and computes nothing; name one that does, such as cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(f"device {shown(str(device))} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def to_device(model: nn.Module, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> nn.Module:
    """The model on a device in a type (`None` = its own): the same object, or a copy if it would have to change."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    dtype, where = dtype or first.dtype, first.device if device is None else usable_device(device)
    if (dtype, where) == (first.dtype, first.device):
        return model
    return copy.deepcopy(model).to(where, dtype)


def pixels_of(inputs: Any) -> torch.Tensor:
    """[B, C, H, W]: the images among the inputs of a model, which are these images or a mapping that holds them. Raises
    `ConfigError`: there are none, or they have another form."""
    found = inputs
    if isinstance(inputs, Mapping):
        images = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim == 4]
        found = inputs["pixel_values"] if "pixel_values" in inputs else images[0] if len(images) == 1 else None
    if not isinstance(found, torch.Tensor) or found.ndim != 4:
        form = f" of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else ""
        held = f" with {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else form
        raise ConfigError(
            "images are a tensor [B, C, H, W], or the mapping that a processor makes, with pixel_values [B, C, H, W]; got "
            f"{type(inputs).__name__}{held}"
        )
    return found


def moved(inputs: Any, like: torch.Tensor) -> Any:
    """Images, or a mapping that holds them, on the device of `like` and in its type; ids and masks keep theirs."""
    if not isinstance(inputs, Mapping):
        return inputs.to(like) if isinstance(inputs, torch.Tensor) else inputs

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    return {name: one(value) for name, value in inputs.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fingerprint(net: nn.Module) -> str:
    """Short hash of a few values of every parameter: equal weights give the same, trained further they do not."""
    values = {name: p.detach().flatten()[:_FINGERPRINT].double().tolist() for name, p in net.named_parameters()}
    return key_of(values)[:8]


def versions() -> dict[str, str]:
    """Versions of everything a number may depend on, as far as it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "vtok": vtok.__version__}
    for name in ("timm", "open_clip_torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of one of torch's names; `None` stays."""
    return None if name is None else TYPES[name]


def fastest_on_cpu() -> str:
    """ "bf16" where the processor multiplies in it, else "fp32": without such instructions bf16 takes five times as long."""
    able = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # other processors, and older releases of torch: fp32
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in able) else "fp32"
