"""From single answers to a record: shares with standard errors, paired differences, tokens, times.

Questions about one image go together: standard errors are those of a mean over clusters, the images.

Shapes: n questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vtok.eval.intervals import paired_ratio
from vtok.eval.tasks.recall import clustered_mean_stderr
from vtok.eval.tasks.vqa_data import Question, VQAData
from vtok.eval.tasks.vqa_metrics import exact_match, loyalty, soft_accuracy

NORMAL_95 = 1.96
Line = dict[str, Any]
SCORES: dict[str, Callable[[str, Question], float]] = {
    "exact_match": lambda said, q: float(exact_match(said, q.target)),
    "soft_accuracy": lambda said, q: soft_accuracy(said, q.answers),
    "soft_accuracy_official": lambda said, q: soft_accuracy(said, q.answers, "official"),
}


class Scored:
    """All answers of one setting.

    Args:
        data: the questions.
        predictions: n answers in their order.
    """

    def __init__(self, data: VQAData, predictions: Sequence[str]):
        self.predictions = predictions
        self.cluster = np.unique([str(q.image) for q in data.questions], return_inverse=True)[1]
        self.scores = {
            name: np.array([score(said, q) for said, q in zip(predictions, data.questions)]) for name, score in SCORES.items()
        }

    def metrics(self, base: Scored | None, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Shares in [0, 1] of all questions or of some.

        Args:
            base: answers of the unpatched model to the same questions: adds paired differences and loyalty.
            rows: [n] bool; `None` = all.

        Returns:
            For each score its mean and `_stderr`; with `base` its `_difference`, `_difference_stderr` and `_difference_ci`
            (95 %, normal); `loyalty`, `loyalty_stderr`.
        """
        rows = np.ones(len(self.predictions), bool) if rows is None else rows
        cluster = self.cluster[rows]
        found: dict[str, Any] = {}
        for name, values in self.scores.items():
            found |= _mean(name, values[rows], cluster)
            if base is not None:
                found |= _mean(f"{name}_difference", values[rows] - base.scores[name][rows], cluster)
                middle, error = found[f"{name}_difference"], found[f"{name}_difference_stderr"]
                found[f"{name}_difference_ci"] = (
                    None if error is None else [middle - NORMAL_95 * error, middle + NORMAL_95 * error]
                )
        if base is not None:
            found |= _mean("loyalty", loyalty(self.predictions, base.predictions)[rows], cluster)
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
    """`n`, `metrics`, `blind` and `groups` of a record, and `correct`, one bit a question (see `report.correctness`).

    Args:
        data: the questions.
        scored: answers of the setting.
        base: of the unpatched one.
        kept: [n] visual tokens, mean over decoder layers.
    """
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
        "correct": np.packbits(scored.scores["exact_match"].astype(bool)).tobytes().hex(),
    }


def token_fields(lines: Sequence[Line], base: Sequence[Line] | None, visual: float) -> dict[str, Any]:
    """`tokens` (visual ones in the prompt, mean by decoder layer) and `kv_bytes` of a prompt, beside the unpatched model's.

    Args:
        lines: samples of the setting.
        base: of the unpatched one.
        visual: image tokens of a prompt as the processor makes it, mean.
    """
    kept = np.array([line["kept_tokens"] for line in lines], float)  # [n, layers]
    held = {"patched": _average(lines, "kv_bytes"), "base": None if base is None else _average(base, "kv_bytes")}
    return {
        "tokens": {"in": visual, "out": float(kept[:, -1].mean()), "mean_per_layer": kept.mean(0).tolist()},
        "kv_bytes": held,
    }


def cost_fields(lines: Sequence[Line]) -> dict[str, Any]:
    """`gmacs` of a question up to its first token, `gflops` (2 x) and `implied_speedup`; empty where nothing is known.

    Args:
        lines: samples of the setting.
    """
    known = [line["macs"] for line in lines if line["macs"] is not None]
    if not known:
        return {}
    mean = {name: float(np.mean([cost[name] for cost in known])) for name in known[0]}
    return {
        "gmacs": {name: value / 1e9 for name, value in mean.items()},
        "gflops": {name: 2 * value / 1e9 for name, value in mean.items()},
        "implied_speedup": mean["base"] / mean["model"],
    }


def time_fields(lines: Sequence[Line], patched: bool, seed: int = 0) -> dict[str, Any]:
    """`ttft_ms` and `decode_ms_per_token` (medians over batches) and, of a patched model, `speedup` of the first token.

    The first batch of a process is left out if there are others.

    Args:
        lines: samples of the setting; those of one batch hold the same times.
        patched: whether the unpatched model's times are another model's.
        seed: of the bootstrap.
    """
    batches = list({line["batch"]: line for line in lines}.values())
    warm = [line for line in batches if not line["cold"]] or batches
    found: dict[str, Any] = {
        name: {"patched": _median(warm, name), "base": _median(warm, f"base_{name}")}
        for name in ("ttft_ms", "decode_ms_per_token")
    }
    pairs = [(line["base_ttft_ms"], line["ttft_ms"]) for line in warm if line["base_ttft_ms"] is not None]
    if patched and pairs:
        speed = paired_ratio([base for base, _ in pairs], [own for _, own in pairs], seed=seed)
        found |= {"speedup": speed.point, "speedup_ci": [speed.low, speed.high]}
    return found


def _mean(name: str, values: np.ndarray, cluster: np.ndarray) -> dict[str, float | None]:
    number = np.unique(cluster, return_inverse=True)[1]
    mean, error = clustered_mean_stderr(values, number)
    return {name: mean, f"{name}_stderr": None if math.isnan(error) else error}


def _average(lines: Sequence[Line], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if line[name] is not None]
    return float(np.median(values)) if values else None
