"""What choosing diverse tokens costs, against the loop that compares every token with all chosen ones again in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.eval.common.statistics import Interval, in_brackets, paired_ratio
from vtok.eval.report.tables import Column, Table
from vtok.methods.todre.selection import SELECTORS

GROWN = ("tokens", "keep", "width")


class SelectorTime(NamedTuple):
    """One selector at one size.

    Attributes:
        selector: its name.
        seconds: median of one call.
        loop_seconds: median of the loop.
        faster: loop / call, of pairs timed one right after the other.
        same: whether both chose the same tokens in the same order.
        scaling: what was doubled -> by how much a call got longer; 2 where it costs keep x tokens x width.
    """

    selector: str
    seconds: float
    loop_seconds: float
    faster: Interval
    same: bool
    scaling: dict[str, float]


def loop_select(features: Tensor, k: int, pivot: int, selector: str) -> Tensor:
    """The same choice for one image, every step from all rows chosen so far: k^2 n D / 2 multiply-accumulates.

    Args:
        features: [n, D].
        k: tokens to keep.
        pivot: the first one.
        selector: a name of `SELECTORS`.

    Returns:
        [k] int64, in order of choice.
    """
    x = features / features.norm(dim=1, keepdim=True)
    chosen, free = [pivot], torch.ones(len(x), dtype=torch.bool)
    free[pivot] = False
    while len(chosen) < k:
        cosines = x @ x[chosen].T
        closeness = cosines.sum(1) if selector == "max_sum" else cosines.amax(1)
        chosen.append(int(closeness.masked_fill(~free, float("inf")).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


def measure(
    tokens: int, keep: int, width: int, pairs: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[SelectorTime]:
    """Times every selector on random features of one image (with a common part, so that cosines are positive, as real ones).

    Args:
        tokens: n.
        keep: k.
        width: D.
        pairs: calls, each followed by the loop.
        seed: of the features.
        progress: called with pairs done and pairs in all.
    """
    results = []
    for number, name in enumerate(SELECTORS):
        x = _features(tokens, width, seed)
        ours, loops, same = [], [], True
        for i in range(pairs):
            order, seconds = _timed(SELECTORS[name], x, keep, 0)
            again, slow = _timed(loop_select, x[0], keep, 0, name)
            ours.append(seconds)
            loops.append(slow)
            same = same and torch.equal(order[0], again)
            if progress is not None:
                progress(number * pairs + i + 1, len(SELECTORS) * pairs)
        faster = paired_ratio(loops, ours, seed=seed)
        results.append(
            SelectorTime(name, median(ours), median(loops), faster, same, _scaling(name, tokens, keep, width, pairs, seed))
        )
    return results


def _features(tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def _timed(call: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = call(*args)
    return result, time.perf_counter() - start


def _scaling(name: str, tokens: int, keep: int, width: int, pairs: int, seed: int) -> dict[str, float]:
    """How a call grows from half the size in one direction to the full one; sizes take turns."""
    whole = {"tokens": tokens, "keep": keep, "width": width}
    sizes = [whole, *({**whole, what: max(whole[what] // 2, 1)} for what in GROWN)]
    inputs = [_features(size["tokens"], size["width"], seed) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(pairs):
        for size, x, found in zip(sizes, inputs, seconds):
            count = min(size["keep"], size["tokens"])
            found.append(_timed(SELECTORS[name], x, count, 0)[1])
    return {what: median(seconds[0]) / median(found) for what, found in zip(GROWN, seconds[1:])}


def table(results: Sequence[SelectorTime], tokens: int, keep: int, width: int) -> Table:
    """For people."""
    columns = [
        Column("selector", lambda r: r.selector, left=True),
        Column("ms", lambda r: f"{1000 * r.seconds:.0f}"),
        Column("loop, ms", lambda r: f"{1000 * r.loop_seconds:.0f}"),
        Column("faster [95 %]", lambda r: f"{r.faster.point:.1f}x{in_brackets(r.faster.ends, '.1f')}"),
        Column("same tokens", lambda r: "yes" if r.same else "no"),
        *(Column(f"{what} x 2", partial(_grown, what=what)) for what in GROWN),
    ]
    return Table.of(
        results, columns, f"{tokens} -> {keep} tokens of width {width}, {torch.get_num_threads()} CPU threads, fp32"
    )


def _grown(r: SelectorTime, what: str) -> str:
    return f"{r.scaling[what]:.2f}x"
