"""What choosing diverse tokens costs, against loops that do it step by step as methods' programs do.

| selector | of | the loop, from one image's features |
|---|---|---|
| `max_sum`, `k_center` | todre | in every step the cosines of all tokens with all chosen ones again |
| `max_min` | divprune | cosines of all with all once; in every step the rows of all chosen ones again, and their maximum |
| `dpp` | cdpruner | the kernel once; in every step what the chosen ones explain of it, from the rows kept so far |

The last is what its program does, and no more can be left out of it: only its matrix is made in half the products here.

`max_min` and `dpp` need cosines of all with all, in their programs and here: at the width of a 7B model that product is nearly
all of the time, and an exact choice that makes half of it is at most about twice as fast as the loop. "its steps" compares what
comes behind it, both sides given the matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.errors import unknown
from vtok.eval.common.statistics import Interval, in_brackets, paired_ratio
from vtok.eval.report.tables import Column, Table
from vtok.methods.todre.selection import SELECTORS
from vtok.ops.determinantal import NEAR, greedy_dpp
from vtok.ops.diversity import all_with_all, max_min, max_min_among
from vtok.ops.matching import unit

GROWN = ("tokens", "keep", "width")


class SelectorTime(NamedTuple):
    """One selector at one size.

    Attributes:
        selector: its name.
        seconds: median of one call.
        loop_seconds: median of the loop.
        faster: loop / call, of pairs timed one right after the other.
        same: whether both choose the same tokens in the same order, in fp64 (in fp32 rounding orders what is almost equal).
        scaling: what was doubled -> by how much a call got longer; 2 where it costs keep x tokens x width.
        steps: as `faster`, both given the products of all with all; `None` where the loop does not make them.
    """

    selector: str
    seconds: float
    loop_seconds: float
    faster: Interval
    same: bool
    scaling: dict[str, float]
    steps: Interval | None = None


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


def max_min_loop(features: Tensor, k: int) -> Tensor:
    """DivPrune's choice for one image, the nearest chosen token looked for again in every step: k k n / 2 comparisons.

    Args:
        features: [n, D].
        k: tokens to keep.

    Returns:
        [k] int64, in order of choice.
    """
    x = features / features.norm(dim=1, keepdim=True)
    return _max_min_steps(1 - x @ x.T, k)


def _max_min_steps(distance: Tensor, k: int) -> Tensor:
    chosen, free = torch.empty(k, dtype=torch.int64), torch.ones(len(distance), dtype=torch.bool)
    for step in range(k):
        if step == 0:
            nearest = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            nearest = distance.index_select(0, chosen[:step]).amin(0)
        chosen[step] = nearest.masked_fill(~free, float("-inf")).argmax()
        free[chosen[step]] = False
    return chosen


def dpp_loop(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """CDPruner's choice for one image, with the whole kernel and a Cholesky row a step (of equal gains the first token).

    Where k is above the rank of the features it breaks down, as the program does: roots of nothing.

    Args:
        features: [n, D].
        quality: [n].
        k: tokens to keep.

    Returns:
        [k] int64, in order of choice.
    """
    x = features / features.norm(dim=1, keepdim=True)
    return _dpp_steps(quality[:, None] * (x @ x.T) * quality, quality, k)


def _dpp_steps(kernel: Tensor, quality: Tensor, k: int) -> Tensor:
    rows, gain, chosen = kernel.new_zeros(k, len(kernel)), quality.square(), torch.empty(k, dtype=torch.int64)
    for step in range(k):
        j = int((gain >= gain.amax() * (1 - NEAR)).long().argmax())
        explained = torch.einsum("s,sn->n", rows[:step, j], rows[:step])
        rows[step] = (kernel[j] - explained) / gain[j].sqrt()
        gain = gain - rows[step].square()
        gain[j] = float("-inf")
        chosen[step] = j
    return chosen


def _with_pivot(name: str, features: Tensor, k: int) -> Tensor:
    return SELECTORS[name](features, k, 0)


def _loop_with_pivot(name: str, features: Tensor, k: int) -> Tensor:
    return loop_select(features[0], k, 0, name)


def _quality(features: Tensor) -> Tensor:
    """[B, n]: made of the features, so that both sides of a contest have the same."""
    length = features.norm(dim=2)
    return length / length.amax(1, keepdim=True)


# selector -> (the choice for [1, n, D], the loop for the same)
CONTESTS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    **{name: (partial(_with_pivot, name), partial(_loop_with_pivot, name)) for name in SELECTORS},
    "max_min": (max_min, lambda x, k: max_min_loop(x[0], k)),
    "dpp": (lambda x, k: greedy_dpp(x, _quality(x), k), lambda x, k: dpp_loop(x[0], _quality(x)[0], k)),
}


def _of_cosines(x: Tensor, k: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    cosines = all_with_all(unit(x))
    distance = 1 - cosines[0]
    return lambda: max_min_among(cosines, k), lambda: _max_min_steps(distance, k)


def _of_kernel(x: Tensor, k: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    quality = _quality(x)
    kernel = all_with_all(unit(x) * quality[..., None])
    return lambda: greedy_dpp(x, quality, k, kernel), lambda: _dpp_steps(kernel[0], quality[0], k)


# selector -> (features, k) -> (the choice, the loop), both given the products of all with all
STEPS = {"max_min": _of_cosines, "dpp": _of_kernel}


def measure(
    tokens: int,
    keep: int,
    width: int,
    pairs: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    names: Sequence[str] = (),
) -> list[SelectorTime]:
    """Times every selector on random features of one image (with a common part, so that cosines are positive, as real ones).

    Args:
        tokens: n.
        keep: k.
        width: D.
        pairs: calls, each followed by the loop.
        seed: of the features.
        progress: called with pairs done and pairs in all.
        names: of selectors; none = all.

    Raises:
        UnknownNameError: no such selector.
    """
    wrong = [name for name in names if name not in CONTESTS]
    if wrong:
        raise unknown("selector", wrong[0], CONTESTS)
    results, contests = [], {name: contest for name, contest in CONTESTS.items() if not names or name in names}
    for number, (name, (select, loop)) in enumerate(contests.items()):
        x = _features(tokens, width, seed)
        ours, loops, exact = [], [], x.double()
        same = torch.equal(select(exact, keep)[0], loop(exact, keep))
        for i in range(pairs):
            seconds, slow = _timed(select, x, keep)[1], _timed(loop, x, keep)[1]
            ours.append(seconds)
            loops.append(slow)
            if progress is not None:
                progress(number * pairs + i + 1, len(contests) * pairs)
        faster = paired_ratio(loops, ours, seed=seed)
        scaling = _scaling(name, tokens, keep, width, pairs, seed)
        steps = _steps(name, x, keep, pairs, seed) if name in STEPS else None
        results.append(SelectorTime(name, median(ours), median(loops), faster, same, scaling, steps))
    return results


def _steps(name: str, x: Tensor, keep: int, pairs: int, seed: int) -> Interval:
    choice, loop = STEPS[name](x, keep)
    times = [(_timed(lambda: loop())[1], _timed(lambda: choice())[1]) for _ in range(pairs)]
    return paired_ratio([slow for slow, _ in times], [fast for _, fast in times], seed=seed)


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
            found.append(_timed(CONTESTS[name][0], x, count)[1])
    return {what: median(seconds[0]) / median(found) for what, found in zip(GROWN, seconds[1:])}


def table(results: Sequence[SelectorTime], tokens: int, keep: int, width: int) -> Table:
    """For people."""
    columns = [
        Column("selector", lambda r: r.selector, left=True),
        Column("ms", lambda r: f"{1000 * r.seconds:.0f}"),
        Column("loop, ms", lambda r: f"{1000 * r.loop_seconds:.0f}"),
        Column("faster [95 %]", lambda r: f"{r.faster.point:.1f}x{in_brackets(r.faster.ends, '.1f')}"),
        Column("its steps", lambda r: "-" if r.steps is None else f"{r.steps.point:.1f}x{in_brackets(r.steps.ends, '.1f')}"),
        Column("same tokens", lambda r: "yes" if r.same else "no"),
        *(Column(f"{what} x 2", partial(_grown, what=what)) for what in GROWN),
    ]
    return Table.of(
        results, columns, f"{tokens} -> {keep} tokens of width {width}, {torch.get_num_threads()} CPU threads, fp32"
    )


def _grown(r: SelectorTime, what: str) -> str:
    return f"{r.scaling[what]:.2f}x"
