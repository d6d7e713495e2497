"""Methods on vision-language models: the setting that a FLOPs budget chooses, and what prompts cost, foretold or measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vtok.config import MethodConfig
from vtok.core.prompt import POSITIONS
from vtok.cost.budget import Budget, solve_prompt
from vtok.cost.prefill import Prompt, PromptEstimate, mean_estimate
from vtok.errors import ConfigError
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import calibration_inputs
from vtok.patches.hf_vlm.macs import stated_image
from vtok.reports.prompt import PromptPlan, averaged, stated
from vtok.targets.encoder import evaluated
from vtok.targets.vlm import describe, resolve
from vtok.targets.vlm_estimate import planned
from vtok.targets.vlm_tower import ladder


def budgeted(
    model: nn.Module,
    vlms: Sequence[VLM],
    wanted: Sequence[tuple[MethodConfig, ...]],
    flops: float | None,
    prompt: Prompt,
    calibration: Any = None,
) -> tuple[list[tuple[MethodConfig, ...]], list[Budget | None]]:
    """The methods with the setting that a budget chooses, and what it needs; see `vtok.patch`.

    Args:
        model: holds the vision-language models.
        vlms: these models.
        wanted: methods for each.
        flops: share of tower, connector and prefill to leave, in (0, 1]; `None` = no budget.
        prompt: that it is solved for.
        calibration: inputs to solve it on instead, for methods whose counts depend on image or text; `None` = none.
    """
    if flops is None:
        return list(wanted), [None] * len(vlms)
    chosen: list[tuple[MethodConfig, ...]] = []
    budgets: list[Budget | None] = []
    for vlm, configs in zip(vlms, wanted):
        if len(configs) > 1:
            raise ConfigError("a FLOPs budget sets the knob of one method; with several, give each its own numbers")
        steps = ladder(vlm, configs[0])

        def foretold(config: MethodConfig, vlm: VLM = vlm) -> PromptEstimate:
            return planned(model, vlm, resolve(vlm, (config,), POSITIONS[0]), prompt)

        def measured(config: MethodConfig, vlm: VLM = vlm) -> PromptEstimate:
            result = foretold(config, vlm)  # a setting under which nothing happens needs no pass
            return result if result.exact else mean_estimate(measured_on(model, vlm, (config,), calibration))

        if calibration is not None and not foretold(steps[-1]).exact:
            price, where = measured, averaged(sum(len(values["input_ids"]) for values in calibration_inputs(calibration)))
        else:
            price, where = foretold, stated(prompt, stated_image(vlm, prompt.input_size))
        config, budget = solve_prompt(configs[0], flops, steps, vlm.info.name, price, where)
        chosen.append((config,))
        budgets.append(budget)
    return chosen, budgets


def measured_on(model: nn.Module, vlm: VLM, configs: tuple[MethodConfig, ...], calibration: Any) -> list[PromptEstimate]:
    """What the prompts of calibration inputs cost; the model is patched for a pass over each input and left as it was."""
    from vtok.api import patched

    each: list[PromptEstimate] = []
    with evaluated(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that prompts keep their length is said when the model is patched to stay so
        with patched(model, list(configs)), torch.no_grad():
            for values in calibration_inputs(calibration):
                model(**values)
                found = describe(model, vlm)
                cost = found.mean_estimate or found.estimate
                assert cost is not None
                each += [cost] * len(found.text)
    return each


def plan(
    model: nn.Module,
    vlms: Sequence[VLM],
    wanted: Sequence[tuple[MethodConfig, ...]],
    flops: float | None,
    prompt: Any,
    input_size: Any,
    calibration: Any = None,
) -> PromptPlan:
    """See `vtok.plan`; of several models it describes the first. A prompt goes before calibration inputs."""
    vlm, stated_prompt = vlms[0], Prompt.of(prompt, input_size)
    given = prompt is not None or input_size is not None
    inputs = None if given else calibration
    (configs,), (budget,) = budgeted(model, [vlm], wanted[:1], flops, stated_prompt, inputs)
    pruner, prompts = resolve(vlm, configs, POSITIONS[0]), 0
    result = planned(model, vlm, pruner, stated_prompt)
    if inputs is not None and not result.exact:
        each = measured_on(model, vlm, configs, inputs)
        result, prompts = mean_estimate(each), len(each)
    image = stated_image(vlm, stated_prompt.input_size)
    return PromptPlan(type(vlm.module).__name__, pruner.configs, stated_prompt, image, result, budget, given, prompts)
