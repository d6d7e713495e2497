"""`EncoderTarget`: methods on one vision tower: numbers chosen and checked, blocks patched, costs estimated or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.capabilities import EncoderMethod, encoder_reducer
from vtok.config import MethodConfig, ModelInfo, Reducer
from vtok.config.numbers import check_numbers
from vtok.core.tokens import Site
from vtok.core.tracker import TokenTracker
from vtok.cost.budget import Budget, default_target, solve, steps_of
from vtok.cost.encoder import Estimate, estimate
from vtok.errors import BudgetError, ConfigError, UnsupportedModelError, VtokError
from vtok.patches.block import check
from vtok.patches.block import install as install_blocks
from vtok.patches.module_swap import own_class
from vtok.patches.protocol import Adapter, Tower
from vtok.patches.transaction import all_or_nothing
from vtok.reports.forecast import Forecast
from vtok.reports.results import Info, PlanReport
from vtok.targets.base import Layers, Request, Target
from vtok.targets.forecast import checked_batch, forecast
from vtok.targets.last_pass import tower_info
from vtok.targets.lifecycle import call, evaluated, temporarily, unpatch
from vtok.targets.resolve import run_of, towers

_DRAWN = 64  # random images that a batch is made of


@dataclass(frozen=True)
class ResolvedMethods:
    """Methods resolved for one tower: kept on its `TokenTracker`, and all that `info` and `save_config` need.

    Attributes:
        path: of the tower inside the model.
        configs: the methods, with every number chosen.
        steps: block -> (site, reducer).
        budget: if a budget chose the setting.
        trace: whether the map from original to reduced tokens is kept.
    """

    path: str
    configs: tuple[MethodConfig, ...]
    steps: dict[int, tuple[Site, Reducer]]
    budget: Budget | None
    trace: bool = False

    @property
    def merges(self) -> bool:
        """Whether some method folds tokens into others."""
        return any(config.merges for config in self.configs)


class EncoderTarget(Target):
    """One vision tower.

    Args:
        adapter: of its backend.
        tower: described for the input size that plans and budgets are for.
        no_prompt: of the vision-language model that it is in: why its prompts stay as they are.
    """

    def __init__(self, adapter: Adapter, tower: Tower, no_prompt: str | None = None):
        self.adapter, self.tower, self.no_prompt = adapter, tower, no_prompt

    @property
    def info(self) -> ModelInfo:
        return self.tower.info

    @property
    def layers(self) -> Layers:
        modules = tuple(block.module for block in self.tower.blocks)
        kinds = tuple(own_class(module).__name__ for module in modules)
        return Layers(self.tower.path, own_class(self.tower.module).__name__, modules, kinds)

    def resolve(self, configs: tuple[MethodConfig, ...], request: Request) -> ResolvedMethods:
        self._check(request)
        alone = [config.name for config in configs if not isinstance(config, EncoderMethod)]
        if self.no_prompt is not None and alone:
            raise UnsupportedModelError(f"{' + '.join(alone)} acts on prompts, but {self.no_prompt}")
        resolved = resolve(self.adapter, self.tower, configs, request.flops, request.calibration)
        check(self.tower, resolved.steps)
        return replace(resolved, trace=request.trace)

    def _check(self, request: Request) -> None:
        for name in ("positions", "prompt"):
            if getattr(request, name) is not None:
                raise ConfigError(f"{name} is for vision-language models; {self.layers.name} is none that vtok knows")

    def install(self, resolved: ResolvedMethods) -> None:
        install(self.adapter, self.tower, resolved)

    def installed(self) -> ResolvedMethods | None:
        run = run_of(self.tower.module)
        return None if run is None else run.patch

    def plan(self, configs: tuple[MethodConfig, ...], request: Request) -> PlanReport:
        self._check(request)
        adapter, tower = self.adapter, self.tower
        resolved = resolve(adapter, tower, configs, request.flops, request.calibration)
        cost = estimate_cost(adapter, tower, resolved.steps)
        if request.calibration is not None and not cost.exact:
            cost = measured(adapter, tower, resolved.configs, request.calibration)
        foreseen = None if request.batch_size is None else self._foreseen(resolved.configs, request, cost)
        return PlanReport(
            type(tower.module).__name__, resolved.configs, cost, resolved.budget, tower.info.num_patches, foreseen
        )

    def _foreseen(self, configs: tuple[MethodConfig, ...], request: Request, cost: Estimate) -> Forecast:
        """How fast the tower will be on the device that it is on."""
        tower, images, count = self.tower, request.calibration, checked_batch(request.batch_size)
        if images is None:
            images = torch.randn(
                min(count, _DRAWN), *tower.input_size, generator=torch.Generator().manual_seed(0), device="cpu"
            )
        elif not isinstance(images, Mapping):
            _check_images(images, tower)

        def install_all(module: nn.Module) -> None:
            for target in (EncoderTarget(*found) for found in towers(module, tower.input_size)):
                target.install(target.resolve(configs, Request()))

        return forecast(tower.module, install_all, count, images, cost)

    def describe(self, kernels: Sequence[str] | None = None) -> Info:
        return Info((tower_info(self.adapter, self.tower, run_of(self.tower.module), kernels),))


def install(adapter: Adapter, tower: Tower, resolved: ResolvedMethods, spare: bool = False) -> TokenTracker:
    """Patches a tower. For `spare` see `TokenTracker`, which is returned."""
    prop_attn = any(reducer.prop_attn for _, reducer in resolved.steps.values())
    run = TokenTracker(len(tower.blocks), tower.num_prefix, prop_attn, resolved.trace, spare)
    run.patch = resolved
    install_blocks(tower.blocks, run, resolved.steps)
    adapter.attach(tower, run)
    return run


def resolve(
    adapter: Adapter, tower: Tower, configs: tuple[MethodConfig, ...], flops: float | None, calibration: Any
) -> ResolvedMethods:
    """Configs with every number chosen, and where they act, checked against the tower."""
    info_, budget = tower.info, None
    if flops is not None and len(configs) > 1:
        raise ConfigError("a FLOPs budget sets the knob of one method; with several, give each its own numbers")
    chosen = []
    for config in configs:
        target = flops
        if target is None and config.default_flops is not None and config.needs_budget():
            target = default_target(config.default_flops, adapter.cost(tower), info_)
        if target is not None:

            def measure(candidate: MethodConfig) -> Estimate:
                assert calibration is not None
                return measured(adapter, tower, (candidate,), calibration)

            try:
                config, budget = solve(config, target, info_, adapter.cost(tower), measure if calibration is not None else None)
            except BudgetError as error:
                if flops is not None:
                    raise
                given = " or ".join(config.set_by_budget)
                raise ConfigError(
                    f"the default of {config.name} leaves {config.default_flops:g} of the blocks' FLOPs, for which "
                    f"{info_.name} is too shallow; give {given}, or a budget such as flops=0.8 ({error})"
                ) from error
        chosen.append(config.resolved(info_))
    reducers = [encoder_reducer(config, info_) for config in chosen]
    if len(reducers) > 1 and any(r.ragged for r in reducers):
        raise UnsupportedModelError(
            "a method that keeps a different number of tokens for every image leaves padding, which other methods do not "
            "handle; patch it alone"
        )
    if info_.blind_pool is not None:
        for config, reducer in zip(chosen, reducers):
            if reducer.sites and (reducer.sizes or reducer.ragged):
                raise UnsupportedModelError(f"{config.name} cannot be used on {info_.name}: {info_.blind_pool}")
    if info_.blind_attention is not None:
        for config, reducer in zip(chosen, reducers):
            if reducer.sites and (reducer.ragged or (reducer.sizes and reducer.prop_attn)):
                raise UnsupportedModelError(f"{config.name} cannot be used on {info_.name}: {info_.blind_attention}")
    return ResolvedMethods(tower.path, tuple(chosen), steps_of(reducers), budget)


def estimate_cost(adapter: Adapter, tower: Tower, steps: dict[int, tuple[Site, Reducer]]) -> Estimate:
    """What a forward pass at the tower's input size costs."""
    info_ = tower.info
    return estimate(adapter.cost(tower), steps, info_.num_prefix + info_.num_patches, info_.num_prefix)


def _check_images(images: Any, tower: Tower) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = f"shape {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(f"calibration is a batch of images [B, C, H, W] as the tower takes them, got {got}")
    channels = (tower.input_size or images.shape[1:])[0]
    if images.shape[1] != channels:
        raise ConfigError(f"calibration images have {images.shape[1]} channels, {tower.info.name} takes {channels}")
    weight = next((p for p in tower.module.parameters() if p.is_floating_point()), None)
    if not images.is_floating_point() or (weight is not None and images.dtype != weight.dtype):
        takes = "" if weight is None else f", {tower.info.name} takes {weight.dtype}"
        raise ConfigError(f"calibration images are {images.dtype}{takes}: normalise and convert them as for a forward pass")


def measured(adapter: Adapter, tower: Tower, configs: tuple[MethodConfig, ...], images: Any) -> Estimate:
    """What calibration images cost on average; the tower is patched for one pass and left as it was."""
    if not isinstance(images, Mapping):
        _check_images(images, tower)
    check_numbers(images if isinstance(images, Mapping) else {"the batch of images": images}, "calibration")
    inside = [EncoderTarget(*found) for found in towers(tower.module, tower.input_size)]  # of the tower alone
    before = [(target, resolved) for target in inside if (resolved := target.installed()) is not None]

    ready = [(target, target.resolve(configs, Request())) for target in inside]

    def install_all() -> None:
        unpatch(tower.module)
        for target, resolved in ready:
            target.install(resolved)

    def patch() -> None:
        all_or_nothing(tower.module, install_all)

    def restore() -> None:
        for target, resolved in before:
            target.install(resolved)

    with evaluated(tower.module), temporarily(tower.module, patch, restore), torch.no_grad():
        try:
            call(tower.module, images)
        except VtokError:
            raise
        except Exception as error:  # upstream's, of any kind
            first = str(error).partition("\n")[0]
            raise ConfigError(
                f"{tower.info.name} cannot run the calibration images ({type(error).__name__}: {first}); pass what it takes"
            ) from error
        found = tower_info(adapter, tower, run_of(tower.module), None)
    result = found.mean_estimate or found.estimate
    assert result is not None
    return result
