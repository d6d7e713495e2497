"""What is tuned: a method on a vision encoder. A search asks it for schedules at a budget, patches it, looks at its outputs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtok.capabilities import candidates_at, encoder_reducer, search_space
from vtok.config import MethodConfig
from vtok.core.search_space import Point, Space
from vtok.cost.budget import solve, steps_of, within
from vtok.cost.encoder import Estimate
from vtok.errors import BudgetError, ConfigError, UnsupportedModelError
from vtok.eval.common.settings import Setting, backend, fingerprint, mean_cost, pass_cost, weight_sharing_copy
from vtok.eval.tune.samples import Samples
from vtok.eval.tune.score import class_values, classifies, embedding_values, run
from vtok.targets.encoder import estimate_cost, measured
from vtok.targets.resolve import Size, towers

SLACK = 0.005  # how far under the default a candidate's cost may stay, as a share of the model's FLOPs
DRAWS = 100  # points that are tried for one candidate before there are no more
PRICED = 64  # calibration images that say what a method costs whose counts depend on the image

Priced = tuple[MethodConfig, float]  # a setting, its share of the unpatched model's FLOPs


class Subject(ABC):
    """A model and a method on it.

    Attributes:
        name: of the model.
        backend: whose it is.
        identity: plain values that tell this model from others.
        config: of the method, as it was asked for.
        patched: a copy of the model to patch, over the same weights.
        objective: what a search minimises unless told otherwise.
    """

    identity: dict[str, Any]
    objective: str

    def __init__(self, model: nn.Module, name: str, config: MethodConfig, calibration: Samples):
        self.name, self.config, self._calibration = name, config, calibration
        self.patched, self.backend = weight_sharing_copy(model), backend(model)
        self._prices: dict[str, Any] = {}

    @abstractmethod
    def space(self) -> Space:
        """What may vary."""

    @abstractmethod
    def default(self, flops: float) -> Priced:
        """The setting that `vtok.patch` takes at this budget."""

    @abstractmethod
    def at(self, point: Point, limit: float) -> Priced:
        """The mildest setting of a point's shape that costs at most `limit`; errors are those of `vtok.cost.budget.within`."""

    @abstractmethod
    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """[b, K] of one batch, by the unpatched model or the patched copy."""

    @abstractmethod
    def values(self, outputs: Tensor, unpatched: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
        """Measures of one batch; see `vtok.eval.tune.score`."""

    @abstractmethod
    def cost(self, model: nn.Module) -> Any:
        """What the last pass cost."""

    @abstractmethod
    def cost_fields(self, costs: list[Any], counts: list[int]) -> dict[str, Any]:
        """`tokens`, `gmacs`, `implied_speedup` of several passes, as records have them."""

    @abstractmethod
    def apply(self, config: MethodConfig | None) -> nn.Module:
        """The copy, patched so (`None` = unpatched)."""

    def _once(self, config: MethodConfig, price: Callable[[], Any]) -> Any:
        """A price, remembered: other candidates' points may ask for the same."""
        key = json.dumps(config.to_dict())
        if key not in self._prices:
            self._prices[key] = price()
        return self._prices[key]


class Encoder(Subject):
    """A vision encoder with one tower, in eval mode; of calibration samples the first `PRICED` say what a method costs whose
    counts depend on the image. size: (channels, height, width).

    Raises:
        ConfigError: nothing to search, or several towers.
        UnsupportedModelError: the method does not work on the model.
    """

    def __init__(self, model: nn.Module, name: str, config: MethodConfig, calibration: Samples, size: Size):
        super().__init__(model, name, config, calibration)
        found = towers(model, size)
        if len(found) != 1:
            paths = ", ".join(tower.path for _, tower in found)
            raise ConfigError(f"{name} holds {len(found)} towers ({paths}); tune them one at a time: pass one of these modules")
        if not config.for_encoders():
            raise UnsupportedModelError(f"{config.name} acts on prompts of vision-language models; {name} is a vision encoder")
        self.model, self.size, (self.adapter, self.tower) = model, size, found[0]
        self.identity = {"model": name, "weights": fingerprint(model), "size": list(size)}
        self.classifies = classifies(model)
        self.objective = "kl" if self.classifies else "distance"

    def space(self) -> Space:
        return search_space(self.config, self.tower.info)

    def default(self, flops: float) -> Priced:
        config, budget = solve(self.config, flops, self.tower.info, self.adapter.cost(self.tower), self._measure)
        return config.resolved(self.tower.info), budget.reached

    def at(self, point: Point, limit: float) -> Priced:
        config, cost = within(candidates_at(self.config, self.tower.info, point), limit, self._price)
        return config.resolved(self.tower.info), cost.fraction

    def _price(self, config: MethodConfig) -> Estimate:
        cost = estimate_cost(self.adapter, self.tower, steps_of([encoder_reducer(config, self.tower.info)]))
        return cost if cost.exact else self._measure(config)

    def _measure(self, config: MethodConfig) -> Estimate:
        return self._once(config, lambda: measured(self.adapter, self.tower, (config,), self._images))

    @cached_property
    def _images(self) -> Tensor:
        """Those that say what a method costs."""
        count = min(PRICED, len(self._calibration))
        images = torch.cat([images for images, _ in self._calibration.read(0, count, count)])
        first = next(p for p in self.model.parameters() if p.is_floating_point())
        return images.to(first.device, first.dtype)

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        return run(model, inputs)

    def values(self, outputs: Tensor, unpatched: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
        return (class_values if self.classifies else embedding_values)(outputs, unpatched, labels)

    def apply(self, config: MethodConfig | None) -> nn.Module:
        return Setting(config).apply(self.patched, self.size)

    def cost(self, model: nn.Module) -> Any:
        return pass_cost(model, self.size)

    def cost_fields(self, costs: list[Any], counts: list[int]) -> dict[str, Any]:
        return mean_cost(costs, counts).fields()


def at_budget(subject: Subject, point: Point, limit: float, taken: list[MethodConfig]) -> Priced | None:
    """The setting of a drawn point that costs `limit`, or up to `SLACK` less; `None` if there is none, or another candidate has
    it."""
    try:
        config, fraction = subject.at(point, limit)
    except BudgetError:
        return None
    return (config, fraction) if fraction >= limit - SLACK and config not in taken else None
