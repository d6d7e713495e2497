"""A sweep: the runs that a grid over dotted keys, or a list of FLOPs budgets, stands for."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

from vtok.eval.runs.loader import RunConfig, checked, put
from vtok.eval.runs.methods import with_budget

BUDGET = "flops"  # the key that is no place in the file: a budget for every setting


def points(config: RunConfig) -> list[RunConfig]:
    """Every combination of a run's `sweep`, each a run without one; the run itself if it has none.

    The first key varies slowest. Settings that say `flops: null` keep their own numbers under every budget.

    Raises:
        ConfigError: a combination that is no valid run.
    """
    if not config.sweep:
        return [config]
    keys = list(config.sweep)
    found = []
    for values in itertools.product(*config.sweep.values()):
        where = f"{config.path}: sweep point " + ", ".join(f"{key}={value}" for key, value in zip(keys, values))
        content: dict[str, Any] = copy.deepcopy({key: value for key, value in config.content.items() if key != "sweep"})
        for key, value in zip(keys, values):
            if key == BUDGET:
                _set_budget(content, value, where)
            else:
                put(content, key, copy.deepcopy(value), where)
        found.append(replace(checked(where, config.name, content), output=config.output))
    return found


def _set_budget(content: dict[str, Any], flops: Any, where: str) -> None:
    if content.get("methods") is not None:
        content["methods"] = [with_budget(where, f"methods.{i}", one, flops) for i, one in enumerate(content["methods"])]
    else:
        content["method"] = with_budget(where, "method", content.get("method"), flops)
