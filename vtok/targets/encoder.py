"""Methods on one tower: numbers chosen and checked, blocks patched, costs foretold or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config import MethodConfig, Reducer
from vtok.core.tokens import Site
from vtok.core.tracker import Run
from vtok.cost.budget import Budget, default_target, solve, steps_of
from vtok.cost.encoder import Estimate, estimate
from vtok.errors import ConfigError, UnsupportedModelError, VtokError
from vtok.patches.block import install
from vtok.patches.protocol import Adapter, Tower
from vtok.targets.resolve import run_of


@dataclass(frozen=True)
class Patch:
    """What was patched into one tower: kept on its `Run`, and all that `info` and `save_config` need."""

    path: str
    configs: tuple[MethodConfig, ...]
    steps: dict[int, tuple[Site, Reducer]]
    budget: Budget | None

    @property
    def merges(self) -> bool:
        """Whether some method folds tokens into others."""
        return any(config.merges for config in self.configs)


def put(adapter: Adapter, tower: Tower, made: Patch, trace: bool, spare: bool = False) -> Run:
    """Installs what `fit` resolved; `check` comes first. For `trace` and `spare` see `Run`, which is returned."""
    run = Run(len(tower.blocks), tower.num_prefix, any(r.prop_attn for _, r in made.steps.values()), trace, spare)
    run.patch = made
    install(tower.blocks, run, made.steps)
    adapter.attach(tower, run)
    return run


def fit(adapter: Adapter, tower: Tower, configs: tuple[MethodConfig, ...], flops: float | None, calibration: Any) -> Patch:
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

            config, budget = solve(config, target, info_, adapter.cost(tower), measure if calibration is not None else None)
        chosen.append(config.resolved(info_))
    reducers = [config.build(info_) for config in chosen]
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
    return Patch(tower.path, tuple(chosen), steps_of(reducers), budget)


def foretell(adapter: Adapter, tower: Tower, steps: dict[int, tuple[Site, Reducer]]) -> Estimate:
    """What a forward pass at the tower's input size costs."""
    info_ = tower.info
    return estimate(adapter.cost(tower), steps, info_.num_prefix + info_.num_patches, info_.num_prefix)


def check_finite(values: Mapping[str, Any], what: str) -> None:
    """Raises if some tensor of numbers that a model is to be measured on holds NaN or infinity; masks may."""
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in name:
            continue
        broken = int((~value.isfinite()).sum())
        if broken:
            raise ConfigError(
                f"{what}: {name} holds {broken} numbers that are NaN or infinite; what it would measure is nothing"
            )


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
    from vtok.api import patched
    from vtok.targets.inspection import tower_info

    if not isinstance(images, Mapping):
        _check_images(images, tower)
    check_finite(images if isinstance(images, Mapping) else {"the batch of images": images}, "calibration")
    one = configs if len(configs) > 1 else configs[0]
    with evaluated(tower.module), patched(tower.module, one, input_size=tower.input_size), torch.no_grad():
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


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """The module is in eval mode for a while."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def call(module: nn.Module, inputs: Any) -> Any:
    """Runs a model on one tensor, or on a mapping: by name."""
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
