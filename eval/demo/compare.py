"""Methods against each other and against the unpatched model on labelled images: accuracy, tokens, MACs, time.

Each configuration is one record. Accuracy differences are paired image by image; speed is paired batch by batch with the
unpatched model, in the same pass.

Shapes: S images, B images a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtok.config import MethodConfig
from vtok.eval.common.records import Records, key_of
from vtok.eval.common.settings import PassCost, Setting, backend, mean_cost, pass_cost, resolved_params, twin, versions
from vtok.eval.common.statistics import mean_stderr, paired_difference, paired_ratio, share
from vtok.eval.report.tables import correctness
from vtok.eval.tune.samples import digest

TIMED_EVERY = 4  # every fourth batch runs through the unpatched model too

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Data:
    """Images to classify.

    Attributes:
        name: of the data set and split.
        images: [S, C, H, W], as the model takes them.
        labels: [S] int64.
        calibration: [., C, H, W] images, disjoint from these, for budgets of methods whose counts depend on the image.
    """

    name: str
    images: Tensor
    labels: Tensor
    calibration: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Case:
    """One configuration: a setting and the budget it answers (1.0 = unpatched)."""

    setting: Setting
    budget: float

    @property
    def title(self) -> str:
        return self.setting.name if self.setting.method is None else f"{self.setting.name} at {self.budget:g}"


def cases(methods: Sequence[str], budgets: Sequence[float]) -> list[Case]:
    """The unpatched model, then every method at every budget."""
    return [Case(Setting(), 1.0)] + [Case(Setting(m, {"flops": b}), b) for b in budgets for m in methods]


class Comparison:
    """Runs configurations one by one and keeps what is finished.

    Args:
        model: unpatched, in eval mode.
        name: of the model, with what identifies its weights.
        data: what to classify.
        records: where finished configurations go; those already there are not run again.
        batch_size: B.
        command: that a record is measured again with, word by word.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        data: Data,
        records: Records,
        batch_size: int = 100,
        command: Sequence[str] = (),
    ):
        self.command = list(command)
        self.model, self.name, self.data, self.records, self.batch_size = model, name, data, records, batch_size
        self.patched = twin(model)
        channels, height, width = data.images.shape[1:]
        self.size = (channels, height, width)
        self._content = key_of({"images": digest(data.images), "labels": digest(data.labels)})

    def key(self, case: Case) -> str:
        """What identifies a configuration: everything but the machine."""
        method = case.setting.name
        return key_of(
            {
                "model": self.name,
                "method": method,
                "params": given(case.setting),
                "budget": case.budget,
                "data": self.data.name,
                "n": len(self.data),
                "content": self._content,
                "batch_size": self.batch_size,
                "dtype": str(self.data.images.dtype),
                "vtok": versions()["vtok"],
            }
        )

    def pending(self, all_cases: Sequence[Case]) -> list[Case]:
        """Configurations that have no record yet."""
        done = self.records.by_key()
        return [case for case in all_cases if self.key(case) not in done]

    def run(self, case: Case, advance: Advance = lambda images: None) -> dict[str, Any]:
        """Runs one configuration and appends its record; `advance` is told how many images were classified.

        The unpatched configuration must have been run before any other: differences are taken to it.
        """
        params = dict(case.setting.params)
        if case.setting.method is not None:
            params["calibration"] = self.data.calibration
        Setting(case.setting.method, params).apply(self.patched, self.size)
        try:
            correct, costs, pairs = self._classify(advance)
            record = self._record(case, correct, costs, pairs)
        finally:
            Setting().apply(self.patched)
        self.records.append(record)
        return record

    def _classify(self, advance: Advance) -> tuple[np.ndarray, list[tuple[int, PassCost]], list[tuple[float, float]]]:
        """Per image whether it was right; (images, cost) of every batch; (unpatched, patched) seconds of the timed ones."""
        correct, costs, pairs = [], [], []
        batches = list(zip(self.data.images.split(self.batch_size), self.data.labels.split(self.batch_size)))
        with torch.inference_mode():
            self.patched(batches[0][0])  # warm-up
            for i, (x, y) in enumerate(batches):
                unpatched = _seconds(self.model, x)[0] if i % TIMED_EVERY == 0 and len(x) == self.batch_size else None
                seconds, logits = _seconds(self.patched, x)
                if unpatched is not None:
                    pairs.append((unpatched, seconds))
                correct.append((logits.argmax(-1) == y).numpy())
                costs.append((len(x), pass_cost(self.patched, self.size)))
                advance(len(x))
        return np.concatenate(correct), costs, pairs

    def _record(
        self, case: Case, correct: np.ndarray, costs: list[tuple[int, PassCost]], pairs: list[tuple[float, float]]
    ) -> dict[str, Any]:
        n, cost = len(correct), mean_cost([c for _, c in costs], [images for images, _ in costs])
        accuracy, stderr = mean_stderr(correct)
        record = {
            "key": self.key(case),
            "model": self.name,
            "backend": backend(self.model),
            "method": case.setting.name,
            "budget": case.budget,
            "params": resolved_params(self.patched),
            "dataset": self.data.name,
            "n": n,
            "metrics": {"top1": 100 * accuracy, "top1_stderr": 100 * stderr, "top1_ci": share(correct).scaled(100).ends},
            **cost.fields(),
            "dtype": str(self.data.images.dtype).removeprefix("torch."),
            "device": str(self.data.images.device),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "versions": versions(),
            "command": self.command,
            "correct": np.packbits(correct).tobytes().hex(),
        }
        if case.setting.method is None:
            return record
        base = correctness(self.records.by_key()[self.key(Case(Setting(), 1.0))])
        change = correct.astype(float) - base.astype(float)
        difference, error = mean_stderr(change)
        record["metrics"] |= {
            "difference": 100 * difference,
            "difference_stderr": 100 * error,
            "difference_ci": paired_difference(change).scaled(100).ends,
        }
        if pairs:
            speed = paired_ratio([unpatched for unpatched, _ in pairs], [patched for _, patched in pairs])
            record |= {
                "speedup": speed.point,
                "speedup_ci": speed.ends,
                "pairs": len(pairs),
                "achieved": speed.point / cost.implied_speedup,
            }
        return record


def given(setting: Setting) -> dict[str, Any]:
    """What was asked for, as plain values: the parameters of a name, or the fields of a config object."""
    method = setting.method
    return (method.to_dict() if isinstance(method, MethodConfig) else {}) | dict(setting.params)


def _seconds(model: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = model(x)
    return time.perf_counter() - start, out
