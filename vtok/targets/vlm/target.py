"""`VLMTarget`: a vision-language model, whose prompts are shortened and whose vision tower may be patched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo
from vtok.cost.prefill import Prompt
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.hf_vlm.families import VLM, supported
from vtok.patches.hf_vlm.install import pruner_of, short_inputs
from vtok.reports.prompt import PromptPlan
from vtok.reports.results import Info
from vtok.targets.base import Layers, Request, Target
from vtok.targets.resolve import run_of
from vtok.targets.vlm import budget as budgets
from vtok.targets.vlm.estimate import describe
from vtok.targets.vlm.resolve import calibrated, install, resolve
from vtok.targets.vlm.tower import ON_GRID, describe_tower, place, tower_patched


class VLMTarget(Target):
    """One vision-language model.

    Args:
        model: holds it and its language head.
        vlm: the model without its head, described.
    """

    reads_prompts = True

    def __init__(self, model: nn.Module, vlm: VLM):
        self.model, self.vlm = model, vlm

    @property
    def info(self) -> VLMInfo:
        return self.vlm.info

    @property
    def layers(self) -> Layers:
        modules = tuple(self.vlm.text.layers)
        return Layers(self.vlm.path, type(self.vlm.module).__name__, modules, tuple(type(m).__name__ for m in modules))

    def resolve(self, configs: tuple[MethodConfig, ...], request: Request) -> Pruner:
        stated = Prompt.of(request.prompt, request.input_size)
        free = request.prompt is None and request.input_size is None
        measures = free and request.flops is not None
        vlm = self.vlm.sized(stated.input_size)
        configs = calibrated(vlm, configs, request.calibration, measures)
        inputs = request.calibration if free else None
        configs, budget = budgets.budgeted(self.model, vlm, configs, request.flops, stated, inputs)
        pruner = resolve(vlm, configs, request.positions, request.trace)
        pruner.budget = budget
        return pruner

    def install(self, resolved: Pruner) -> None:
        install(self.model, self.vlm, resolved)

    def installed(self) -> Pruner | None:
        return pruner_of(self.vlm)

    def plan(self, configs: tuple[MethodConfig, ...], request: Request) -> PromptPlan:
        if request.batch_size is not None:
            raise ConfigError("batch_size is for vision encoders, whose passes are timed; vtok.benchmark times prompts")
        free = request.prompt is None and request.input_size is None
        vlm = self.vlm.sized(Prompt.of(request.prompt, request.input_size).input_size)
        configs = calibrated(vlm, configs, request.calibration, measures=free)
        return budgets.plan(self.model, vlm, configs, request.flops, request.prompt, request.input_size, request.calibration)

    def describe(self, kernels: Sequence[str] | None = None) -> Info:
        tower = describe_tower(self.vlm)
        return Info(() if tower is None else (tower,), (describe(self.model, self.vlm),))

    def place(self, configs: tuple[MethodConfig, ...], resolved: Pruner) -> str:
        return " and ".join(dict.fromkeys(place(config, resolved) for config in configs))

    def warnings(self, resolved: Pruner) -> Sequence[str]:
        on_grid = resolved.joint is not None and not resolved.has_dropped_tokens
        return (f"{self.info.name}: {ON_GRID}",) if on_grid else ()

    def shortened_inputs(
        self, inputs: Mapping[str, Any], configs: tuple[MethodConfig, ...], request: Request, pad: int | None
    ) -> dict[str, Any]:
        model: Any = self.model
        vlm = self.vlm
        if not hasattr(model, "_prepare_position_ids_for_generation"):
            raise UnsupportedModelError(
                f"prune_inputs takes one vision-language model with its language head, got {type(model).__name__}; supported: "
                f"{supported()}"
            )
        if self.installed() is not None or run_of(vlm.module) is not None:
            raise ConfigError("the model is patched and would shorten the prompt a second time; call vtok.unpatch(model) first")
        pruner = resolve(vlm, calibrated(vlm, configs, request.calibration), request.positions, request.trace)
        places = " and ".join(str(site) for site, _ in pruner.layers.values())
        names = " + ".join(config.name for config in pruner.configs)
        if pruner.features is None and pruner.joint is None and pruner.pixels is None:
            if places:
                raise UnsupportedModelError(f"{names} drops tokens {places}, inside the LLM, which needs hooks: use vtok.patch")
            return dict(inputs)
        if places:
            warnings.warn(
                f"prune_inputs does what {names} does before the LLM; dropping tokens {places} as well needs hooks: use "
                "vtok.patch",
                stacklevel=3,
            )
        if pad is None:
            pad = getattr(model.generation_config, "pad_token_id", None)
        if pad is None:
            pad = model.config.get_text_config().pad_token_id
        with tower_patched(vlm, pruner):
            return short_inputs(model, vlm, inputs, pruner, 0 if pad is None else int(pad))
