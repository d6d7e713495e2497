"""From "60 % of the FLOPs" to a setting: that of a method's budget candidates whose cost comes closest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vtok.capabilities import candidates, encoder_reducer
from vtok.config import MethodConfig, ModelInfo, Reducer
from vtok.core.tokens import Site
from vtok.cost.encoder import Estimate, TowerCost, estimate
from vtok.cost.prefill import PromptEstimate
from vtok.errors import BudgetError, ConfigError, shown

_Cost = TypeVar("_Cost", Estimate, PromptEstimate)
TOLERANCE = 0.02  # how far above the budget the strongest setting may stay, as a share of the model's FLOPs
OVERSHOOT = 0.1  # how far above it the closest setting may stay, where the steps are coarse


@dataclass(frozen=True)
class Budget:
    """What a FLOPs budget was turned into.

    Attributes:
        target: share of the unpatched model's FLOPs that was asked for.
        reached: the share that the chosen setting needs.
        knob: the chosen parameters.
        num_patches: of the input size it was solved for.
        exact: False if token counts depend on the image and no calibration images were given: `reached` is an upper bound.
        prompt: that it was solved for, in words, on a vision-language model.
    """

    target: float
    reached: float
    knob: dict[str, Any]
    num_patches: int
    exact: bool
    prompt: str = ""

    def __str__(self) -> str:
        knob = ", ".join(f"{name}={_short(value)}" for name, value in self.knob.items())
        bound = "" if self.exact else " at most (counts depend on the image)"
        where = f"for {self.prompt}" if self.prompt else f"at {self.num_patches} patches"
        return f"flops={self.target:g} -> {knob}: {self.reached:.3f} of the FLOPs{bound} {where}"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def steps_of(reducers: Sequence[Reducer]) -> dict[int, tuple[Site, Reducer]]:
    """Block -> (site, reducer).

    Raises:
        ConfigError: two methods want the same block.
    """
    steps: dict[int, tuple[Site, Reducer]] = {}
    for reducer in reducers:
        for site in reducer.sites:
            if site.index in steps:
                other = steps[site.index][0]
                raise ConfigError(f"two methods reduce in block {site.index} ({other} and {site}); give them different layers")
            steps[site.index] = (site, reducer)
    return steps


def default_target(share: float, cost: TowerCost, info: ModelInfo) -> float:
    """The budget that leaves `share` of what the blocks cost; the stem of a hybrid, which no method can thin out, is added."""
    whole = estimate(cost, {}, info.num_prefix + info.num_patches, info.num_prefix)
    blocks = sum(row.macs for row in whole.rows)
    return 1 - (1 - share) * blocks / whole.base_macs


def solve(
    config: MethodConfig,
    target: float,
    info: ModelInfo,
    cost: TowerCost,
    measure: Callable[[MethodConfig], Estimate] | None = None,
) -> tuple[MethodConfig, Budget]:
    """Finds the setting of a method that meets a budget.

    Args:
        config: the method; parameters that its candidates do not vary are kept.
        target: share of the model's FLOPs, reduction included, in (0, 1].
        info: of the tower.
        cost: of the tower.
        measure: runs calibration images and returns what they cost; used for methods whose counts depend on the image.

    Returns:
        (config with the chosen setting, what it needs).

    Raises:
        BudgetError: no setting comes close.
    """

    def price(candidate: MethodConfig) -> Estimate:
        n0 = info.num_prefix + info.num_patches
        result = estimate(cost, steps_of([encoder_reducer(candidate, info)]), n0, info.num_prefix)
        return result if result.exact or measure is None else measure(candidate)

    _check(config, target)
    chosen, found = _search(config, candidates(config, info), target, info.name, price)
    return chosen, Budget(float(target), found.fraction, chosen.knob(), info.num_patches, found.exact)


def solve_prompt(
    config: MethodConfig,
    target: float,
    settings: Sequence[MethodConfig],
    model: str,
    price: Callable[[MethodConfig], PromptEstimate],
    where: str,
) -> tuple[MethodConfig, Budget]:
    """The same for a vision-language model.

    Args:
        config: the method.
        target: share of the FLOPs of tower, connector and prefill, reduction included, in (0, 1].
        settings: the method from its mildest setting to its strongest.
        model: its name.
        price: what a prompt costs under a setting.
        where: the prompt in words.

    Raises:
        BudgetError: no setting comes close: text and tower cost what they cost.
    """
    _check(config, target)
    chosen, found = _search(config, settings, target, model, price, f" for {where}")
    return chosen, Budget(float(target), found.fraction, chosen.knob(), 0, found.exact, where)


def within(
    settings: Sequence[MethodConfig], limit: float, price: Callable[[MethodConfig], _Cost]
) -> tuple[MethodConfig, _Cost]:
    """(the mildest of several settings that costs at most `limit` of the model's FLOPs, its cost).

    Raises:
        BudgetError: the strongest still costs more.
    """
    at = functools.cache(lambda i: price(settings[i]))
    if at(len(settings) - 1).fraction > limit:
        raise BudgetError(f"the strongest setting still needs {at(len(settings) - 1).fraction:.3f} of the FLOPs, not {limit:g}")
    first = _first_within(at, len(settings), limit)
    return settings[first], at(first)


def _check(config: MethodConfig, target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ConfigError(f"flops is a share of the model's FLOPs in (0, 1], got {shown(target)}")
    both = [name for name in config.set_by_budget if name in config.given()]
    if both:
        raise ConfigError(f"flops sets {' and '.join(both)} of {config.name}; give the budget or the parameter, not both")


def _search(
    config: MethodConfig,
    settings: Sequence[MethodConfig],
    target: float,
    model: str,
    price: Callable[[MethodConfig], _Cost],
    where: str = "",
) -> tuple[MethodConfig, _Cost]:
    """(the setting that comes closest to the target, its cost)."""
    at = functools.cache(lambda i: price(settings[i]))
    strongest = at(len(settings) - 1).fraction
    if strongest > target + TOLERANCE:
        raise BudgetError(
            f"{config.name} cannot bring {model} down to flops={target:g}: its strongest setting still needs "
            f"{strongest:.3f}{where}"
        )
    low = _first_within(at, len(settings), target)
    near = [i for i in (low - 1, low) if i == low or (i >= 0 and at(i).fraction <= target + OVERSHOOT)]
    best = min(near, key=lambda i: abs(at(i).fraction - target))
    if target >= at(0).fraction:  # nothing to save: the mildest settings of some methods cost more than they save
        best = 0
    return settings[best], at(best)


def _first_within(at: Callable[[int], Estimate | PromptEstimate], steps: int, limit: float) -> int:
    """The first step that costs at most `limit`, else the last; FLOPs fall along the settings."""
    low, high = 0, steps - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).fraction <= limit else (middle + 1, high)
    return low
