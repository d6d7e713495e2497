"""PiToMe's presets as slow loops over numpy arrays, written from the method's equations: nothing of vtok is used here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Rows = list[int]


class Step(NamedTuple):
    """What one block of a preset does."""

    margin: float
    matching: str  # "energy"; "sorted": ToMe's matching on tokens ranked by energy; "bsm": ToMe's matching, CLS counted
    metric: str  # "keys" or "hidden"
    place: str  # "mid": between attention and MLP; "end": after the MLP
    weighted: bool  # means weighted by size


PRESETS = ("official_deit", "official_mae", "official_clip", "official_blip", "official_llava")


def step(preset: str, i: int, depth: int) -> Step:
    """Block i (0-based) of a tower with `depth` blocks."""
    first_half = i < math.ceil(depth / 2)
    if preset == "official_deit":
        return Step(0.75 - 0.75 * i / depth, "sorted" if first_half else "energy", "keys", "mid", True)
    if preset == "official_mae":
        return Step(0.75 - 0.75 * i / depth, "energy" if first_half else "sorted", "keys", "mid", True)
    if preset == "official_clip":
        return Step(0.95 - 0.95 * i / depth, "energy", "hidden", "mid", True)
    if preset == "official_blip":
        return Step(0.9 - 0.9 * i / depth, "energy", "hidden", "mid", True)
    assert preset == "official_llava"
    return Step(0.9 - 0.9 * i / depth, "bsm" if i <= 12 else "energy", "hidden", "end", False)


def removed(matching: str, n: int, num_prefix: int, ratio: float) -> int:
    """k: of the patches, or of all tokens; never more than half of the patches."""
    counted = n if matching == "bsm" else n - num_prefix
    return min(math.floor(counted - counted * ratio), (n - num_prefix) // 2)


def unit_rows(metric: np.ndarray) -> list[np.ndarray]:
    return [row / max(np.linalg.norm(row), 1e-12) for row in metric]


def energies(u: Sequence[np.ndarray], margin: float) -> list[float]:
    """E_i = mean over all j, i included, of ELU(cos_ij - m)."""
    found = []
    for a in u:
        total = 0.0
        for b in u:
            z = float(a @ b) - margin
            total += z if z > 0 else math.exp(z) - 1
        found.append(total / len(u))
    return found


def partners(u: Sequence[np.ndarray], a: Rows, b: Rows) -> dict[int, tuple[float, int]]:
    """Token of A -> (its largest cosine to any of B, which)."""
    found = {}
    for i in a:
        cosines = [float(u[i] @ u[j]) for j in b]
        best = max(range(len(b)), key=lambda place: cosines[place])
        found[i] = (cosines[best], b[best])
    return found


def groups(metric: np.ndarray, k: int, matching: str, margin: float, num_prefix: int) -> list[Rows]:
    """Input rows of every output token, the one that received first, in output order. metric [N, d]."""
    n, p = len(metric), num_prefix
    if k == 0:
        return [[i] for i in range(n)]
    if matching == "bsm":
        u = dict(enumerate(unit_rows(metric)))
        a, b = [i for i in range(p, n) if i % 2 == 0], [i for i in range(p, n) if i % 2 == 1]
    else:
        u = {p + i: row for i, row in enumerate(unit_rows(metric[p:]))}
        energy = dict(zip(u, energies(list(u.values()), margin)))
        rank = sorted(u, key=lambda i: -energy[i])
        a, b = (rank[: 2 * k : 2], rank[1 : 2 * k : 2]) if matching == "energy" else (rank[::2], rank[1::2])
    best = partners(u, a, b)
    if matching == "energy":  # all of A merge; what has less energy is protected
        merging, stay = a, rank[2 * k :]
    else:  # the k most similar of A merge
        by_score = sorted(a, key=lambda i: -best[i][0])
        merging, stay = by_score[:k], by_score[k:]
        if matching == "bsm" and p:
            stay = sorted(stay)
    received = [[j, *[i for i in merging if best[i][1] == j]] for j in b]
    return [[i] for i in range(p)] + [[i] for i in stay] + received


def merge(x: np.ndarray, size: np.ndarray, found: Sequence[Rows], weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Means of the groups and their sizes: x [N, C], size [N]."""
    rows, sizes = [], []
    for members in found:
        weight = [float(size[i]) if weighted else 1.0 for i in members]
        rows.append(sum(w * x[i] for w, i in zip(weight, members)) / sum(weight))
        sizes.append(sum(float(size[i]) for i in members))
    return np.stack(rows), np.array(sizes)


def merged(x: Tensor, size: Tensor, metric: Tensor, known: Step, ratio: float) -> tuple[Tensor, Tensor]:
    """A block's reduction of a batch that has a class token: tokens [B, N, C], sizes [B, N], metric [B, N, d]."""
    k = removed(known.matching, x.shape[1], 1, ratio)
    rows = []
    for image, weight, compared in zip(x.numpy(), size.numpy(), metric.numpy()):
        rows.append(merge(image, weight, groups(compared, k, known.matching, known.margin, 1), known.weighted))
    tokens, sizes = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    return tokens, sizes
