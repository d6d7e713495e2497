"""From single answers to a record: shares with standard errors, paired differences, tokens, times.

Questions about one image go together: standard errors are those of a mean over clusters, the images.

Shapes: n questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vtok.eval.common.records import bits
from vtok.eval.common.settings import macs_fields
from vtok.eval.common.statistics import Interval, clustered_mean_stderr, paired_difference, paired_ratio, share
from vtok.eval.common.timing import Step, throughput
from vtok.eval.tasks.vqa.data import VQAData
from vtok.eval.tasks.vqa.metrics import agreement, exact_match
from vtok.eval.tasks.vqa.plain import TASK
from vtok.eval.tasks.vqa.task import QuestionTask
from vtok.eval.tasks.vqa.totals import total_fields

RIGHT = 0.5  # a score from here on makes an answer right
Line = dict[str, Any]


class Scored:
    """All answers of one setting, in the order of the questions; `seed` is that of the bootstrap of totals."""

    def __init__(self, data: VQAData, predictions: Sequence[str], task: QuestionTask = TASK, seed: int = 0):
        self.predictions, self.task, self.seed = predictions, task, seed
        # questions without an image stand alone
        images = [f"{i}/" if q.image is None else str(q.image) for i, q in enumerate(data.questions)]
        self.cluster = np.unique(images, return_inverse=True)[1]
        self.scores = {
            name: np.array([task.score_one(name, said, q) for said, q in zip(predictions, data.questions)])
            for name in task.scores
        }
        self.parts = {name: total.parts(predictions, data.questions) for name, total in task.totals.items()}
        self.strata = {name: total.strata_of(data.questions) for name, total in task.totals.items()}

    def metrics(self, base: Scored | None, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Shares in [0, 1], or percent where the task has it so, of all questions or of some rows ([n] bool).

        For each score its mean over the questions where it counts, `_stderr` and `_ci` (95 %, a score interval); with `base`,
        the unpatched model's answers to the same questions, the same of the paired `_difference` and of `agreement`; for each
        total the same by a bootstrap over images. `None` where no question counts, and instead of intervals of fewer than five
        images.
        """
        rows = np.ones(len(self.predictions), bool) if rows is None else rows
        cluster, scale = self.cluster[rows], self.task.scale
        found: dict[str, Any] = {}
        for name, values in self.scores.items():
            found |= _mean(name, values[rows], cluster, scale)
            if base is not None:
                found |= _mean(f"{name}_difference", (values - base.scores[name])[rows], cluster, scale, paired_difference)
        for name, total in self.task.totals.items():
            before = None if base is None else base.parts[name][rows]
            found |= total_fields(name, total, self.parts[name][rows], before, cluster, self.strata[name][rows], self.seed)
        if base is not None:
            same = _mean("agreement", agreement(self.predictions, base.predictions)[rows], cluster, scale)
            found |= same | {name.replace("agreement", "loyalty"): value for name, value in same.items()}  # its old name
        return found


def groups_of(data: VQAData) -> dict[str, dict[str, np.ndarray]]:
    """grouping -> group -> [n] bool, which questions belong to it; groupings that hold one group alone are left out."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for grouping in dict.fromkeys(name for q in data.questions for name in q.groups):
        labels = np.array([q.groups.get(grouping, "") for q in data.questions])
        names = [str(name) for name in np.unique(labels) if name]
        if len(names) > 1:
            found[grouping] = {name: labels == name for name in names}
    return found


def blind_scores(data: VQAData) -> np.ndarray | None:
    """[n] float64: whether the best answer without the image is right; `None` where no such answers are known."""
    if not data.blind:
        return None
    return np.array([float(exact_match(data.blind.get(q.text, ""), q.target)) for q in data.questions])


def accuracy_fields(data: VQAData, scored: Scored, base: Scored | None, kept: np.ndarray | None) -> dict[str, Any]:
    """`n`, `metrics`, `blind` and `groups` of a record, and `correct`, one bit a question; `kept` [n], mean over layers."""
    blind, groups = blind_scores(data), groups_of(data)
    by_group = {
        grouping: {
            name: {
                "n": int(rows.sum()),
                **scored.metrics(base, rows),
                "blind": None if blind is None else float(blind[rows].mean()),
                "kept_tokens": None if kept is None else float(kept[rows].mean()),
            }
            for name, rows in parts.items()
        }
        for grouping, parts in groups.items()
    }
    return {
        "n": len(data.questions),
        "n_images": int(scored.cluster.max()) + 1,
        "metrics": scored.metrics(base),
        "blind": None if blind is None else float(blind.mean()),
        "groups": by_group,
        "correct": bits(scored.scores[scored.task.correct] >= RIGHT),
    }


def token_fields(lines: Sequence[Line], base: Sequence[Line] | None, visual: float) -> dict[str, Any]:
    """`tokens` (visual ones in the prompt, mean by decoder layer) and `kv_bytes` of a prompt, beside the unpatched model's."""
    kept = np.array([line["kept_tokens"] for line in lines], float)  # [n, layers]
    held = {"patched": _average(lines, "kv_bytes"), "base": None if base is None else _average(base, "kv_bytes")}
    return {
        "tokens": {"in": visual, "out": float(kept[:, -1].mean()), "mean_per_layer": kept.mean(0).tolist()},
        "kv_bytes": held,
    }


def cost_fields(lines: Sequence[Line]) -> dict[str, Any]:
    """`gmacs` of a question up to its first token, `gflops` (2 x) and `implied_speedup`; empty where nothing is known."""
    known = [line["macs"] for line in lines if line["macs"] is not None]
    if not known:
        return {}
    mean = {name: float(np.mean([cost[name] for cost in known])) for name in known[0]}
    return macs_fields(mean)


def time_fields(lines: Sequence[Line], patched: bool, seed: int = 0, world: int = 1) -> dict[str, Any]:
    """`ttft_ms` and `decode_ms_per_token` (medians over batches) and, of a patched model, `speedup` of the first token.

    `throughput` counts whole answers. The first batch of a process is left out if there are others; the samples of one batch
    hold the same times.
    """
    batches = list({line["batch"]: line for line in lines}.values())
    warm = [line for line in batches if not line["cold"]] or batches
    found: dict[str, Any] = {
        name: {"patched": _median(warm, name), "base": _median(warm, f"base_{name}")}
        for name in ("ttft_ms", "decode_ms_per_token")
    }
    found |= _answered(lines, world)
    pairs = [(line["base_ttft_ms"], line["ttft_ms"]) for line in warm if line["base_ttft_ms"] is not None]
    if patched and pairs:
        speed = paired_ratio([base for base, _ in pairs], [own for _, own in pairs], seed=seed)
        found |= {"speedup": speed.point, "speedup_ci": speed.ends, "pairs": len(pairs)}
    return found


def _answered(lines: Sequence[Line], world: int) -> dict[str, Any]:
    """`throughput` in whole answers; those that an earlier start gave in more processes than there are now are left out."""
    count = Counter(line["batch"] for line in lines)
    batches = [line for line in {line["batch"]: line for line in lines}.values() if line.get("rank", world) < world]
    timed = [Step(0, count[line["batch"]], line["seconds"], line["cold"], line["rank"]) for line in batches]
    return {"throughput": throughput(timed, world)} if timed else {}


def _mean(
    name: str,
    values: np.ndarray,
    cluster: np.ndarray,
    scale: float,
    interval: Callable[[np.ndarray, np.ndarray], Interval] = share,
) -> dict[str, Any]:
    counts = ~np.isnan(values)
    if not counts.any():
        return {name: None, f"{name}_stderr": None, f"{name}_ci": None}
    values, number = values[counts], np.unique(cluster[counts], return_inverse=True)[1]
    mean, error = clustered_mean_stderr(values, number)
    return {
        name: scale * mean,
        f"{name}_stderr": None if math.isnan(error) else scale * error,
        f"{name}_ci": interval(values, number).scaled(scale).ends,
    }


def _average(lines: Sequence[Line], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if line[name] is not None]
    return float(np.median(values)) if values else None
