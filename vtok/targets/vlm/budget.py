"""Methods on a vision-language model: the setting that a FLOPs budget chooses, and what prompts cost, estimated or measured."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from vtok.config import MethodConfig
from vtok.cost.budget import Budget, solve_prompt
from vtok.cost.prefill import Prompt, PromptEstimate, mean_estimate
from vtok.errors import ConfigError
from vtok.patches import find_vlms
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import calibration_inputs, pruner_of, runs_calibration
from vtok.patches.hf_vlm.macs import stated_image
from vtok.patches.transaction import all_or_nothing
from vtok.reports.prompt import PromptPlan, averaged, stated
from vtok.targets.lifecycle import evaluated, temporarily, unpatch
from vtok.targets.vlm.estimate import describe, planned
from vtok.targets.vlm.resolve import POSITIONS, install, resolve
from vtok.targets.vlm.tower import budget_candidates


def budgeted(
    model: nn.Module,
    vlm: VLM,
    configs: tuple[MethodConfig, ...],
    flops: float | None,
    prompt: Prompt,
    calibration: Any = None,
) -> tuple[tuple[MethodConfig, ...], Budget | None]:
    """The methods with the setting that a budget chooses, and what it needs; see `vtok.patch`.

    Args:
        model: holds the vision-language model.
        vlm: the model, described.
        configs: methods.
        flops: share of tower, connector and prefill to leave, in (0, 1]; `None` = no budget.
        prompt: that it is solved for.
        calibration: inputs to solve it on instead, for methods whose counts depend on image or text; `None` = none.
    """
    if flops is None:
        return configs, None
    if len(configs) > 1:
        raise ConfigError("a FLOPs budget sets the knob of one method; with several, give each its own numbers")
    candidates = budget_candidates(vlm, configs[0])

    def estimated(config: MethodConfig) -> PromptEstimate:
        return planned(model, vlm, resolve(vlm, (config,), POSITIONS[0]), prompt)

    def measured(config: MethodConfig) -> PromptEstimate:
        result = estimated(config)  # a setting under which nothing happens needs no pass
        return result if result.exact else mean_estimate(measured_on(model, vlm, (config,), calibration))

    if calibration is not None and not estimated(candidates[-1]).exact:
        price, where = measured, averaged(sum(len(values["input_ids"]) for values in calibration_inputs(calibration)))
    else:
        price, where = estimated, stated(prompt, stated_image(vlm, prompt.input_size))
    config, budget = solve_prompt(configs[0], flops, candidates, vlm.info.name, price, where)
    return (config,), budget


def measured_on(model: nn.Module, vlm: VLM, configs: tuple[MethodConfig, ...], calibration: Any) -> list[PromptEstimate]:
    """What the prompts of calibration inputs cost; the model is patched for a pass over each input and left as it was."""
    before = [(found, pruner) for found in find_vlms(model) if (pruner := pruner_of(found)) is not None]

    resolved, each = resolve(vlm, configs, POSITIONS[0]), list[PromptEstimate]()

    def patch() -> None:
        all_or_nothing(model, lambda: install(unpatch(model), vlm, resolved))

    def restore() -> None:
        for found, pruner in before:
            install(model, found, pruner)

    with evaluated(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with temporarily(model, patch, restore), torch.no_grad():
            for values in calibration_inputs(calibration):
                with runs_calibration(vlm):
                    model(**values)
                found = describe(model, vlm)
                cost = found.mean_estimate or found.estimate
                assert cost is not None
                each += [cost] * len(found.text)
    return each


def plan(
    model: nn.Module,
    vlm: VLM,
    configs: tuple[MethodConfig, ...],
    flops: float | None,
    prompt: Any,
    input_size: Any,
    calibration: Any = None,
) -> PromptPlan:
    """See `vtok.plan`. A prompt goes before calibration inputs."""
    stated_prompt, given = Prompt.of(prompt, input_size), prompt is not None or input_size is not None
    inputs = None if given else calibration
    configs, budget = budgeted(model, vlm, configs, flops, stated_prompt, inputs)
    pruner, prompts = resolve(vlm, configs), 0
    result = planned(model, vlm, pruner, stated_prompt)
    if inputs is not None and not result.exact:
        each = measured_on(model, vlm, configs, inputs)
        result, prompts = mean_estimate(each), len(each)
    image = stated_image(vlm, stated_prompt.input_size)
    return PromptPlan(type(vlm.module).__name__, pruner.configs, stated_prompt, image, result, budget, given, prompts)
