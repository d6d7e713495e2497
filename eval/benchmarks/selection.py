"""What choosing diverse tokens costs, against loops that do it step by step as methods' programs do.

`max_sum` and `k_center` are todre's, `max_min` divprune's, `dpp` cdpruner's. `max_min` and `dpp` need products of all tokens
with all, in their programs and here; "its steps" compares what comes behind them, both sides given the matrix.

What was measured: assets/docs/results/selectors.md in the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.errors import unknown
from vtok.eval.benchmarks.throughput import seconds_of
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
    """The choice of a name of `SELECTORS` for one image [n, D], every step from all rows chosen so far, `pivot` first: [k] in
    order.

    k^2 n D / 2 multiply-accumulates.
    """
    x = _unit(features)
    chosen, free = [pivot], torch.ones(len(x), dtype=torch.bool)
    free[pivot] = False
    while len(chosen) < k:
        cosines = x @ x[chosen].T
        closeness = cosines.sum(1) if selector == "max_sum" else cosines.amax(1)
        chosen.append(int(closeness.masked_fill(~free, float("inf")).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


def max_min_loop(distance: Tensor, k: int) -> Tensor:
    """DivPrune's choice [k], in its order, of distances [n, n]: the nearest chosen token looked for again in every step."""
    chosen, free = torch.empty(k, dtype=torch.int64), torch.ones(len(distance), dtype=torch.bool)
    for step in range(k):
        if step == 0:
            nearest = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            nearest = distance.index_select(0, chosen[:step]).amin(0)
        chosen[step] = nearest.masked_fill(~free, float("-inf")).argmax()
        free[chosen[step]] = False
    return chosen


def dpp_loop(kernel: Tensor, quality: Tensor, k: int) -> Tensor:
    """CDPruner's choice [k], in its order, of a kernel [n, n] and qualities [n]: of equal gains the first token.

    Where k is above the rank of the features it breaks down, as the program does: roots of nothing.
    """
    rows, gain, chosen = kernel.new_zeros(k, len(kernel)), quality.square(), torch.empty(k, dtype=torch.int64)
    for step in range(k):
        j = int((gain >= gain.amax() * (1 - NEAR)).long().argmax())
        explained = torch.einsum("s,sn->n", rows[:step, j], rows[:step])
        rows[step] = (kernel[j] - explained) / gain[j].sqrt()
        gain = gain - rows[step].square()
        gain[j] = float("-inf")
        chosen[step] = j
    return chosen


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _with_pivot(name: str, features: Tensor, k: int) -> Tensor:
    return SELECTORS[name](features, k, 0)


def _loop_with_pivot(name: str, features: Tensor, k: int) -> Tensor:
    return loop_select(features[0], k, 0, name)


def _max_min_whole(features: Tensor, k: int) -> Tensor:
    x = _unit(features[0])
    return max_min_loop(1 - x @ x.T, k)


def _dpp_whole(features: Tensor, k: int) -> Tensor:
    x, quality = _unit(features[0]), _quality(features)[0]
    return dpp_loop(quality[:, None] * (x @ x.T) * quality, quality, k)


def _quality(features: Tensor) -> Tensor:
    """[B, n]: made of the features, so that both sides of a contest have the same."""
    length = features.norm(dim=2)
    return length / length.amax(1, keepdim=True)


# selector -> (the choice for [1, n, D], the loop for the same)
CONTESTS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    **{name: (partial(_with_pivot, name), partial(_loop_with_pivot, name)) for name in SELECTORS},
    "max_min": (max_min, _max_min_whole),
    "dpp": (lambda x, k: greedy_dpp(x, _quality(x), k), _dpp_whole),
}


def _of_cosines(x: Tensor, k: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    cosines = all_with_all(unit(x))
    distance = 1 - cosines[0]
    return lambda: max_min_among(cosines, k), lambda: max_min_loop(distance, k)


def _of_kernel(x: Tensor, k: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    quality = _quality(x)
    kernel = all_with_all(unit(x) * quality[..., None])
    return lambda: greedy_dpp(x, quality, k, kernel), lambda: dpp_loop(kernel[0], quality[0], k)


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
    """Times every selector (or those named) on random features of one image, with a common part, so that cosines are positive.

    Args:
        tokens, keep, width: n, k and D.
        pairs: calls, each followed by the loop.
        progress: called with pairs done and pairs in all.

    Raises:
        UnknownNameError: no such selector.
    """
    wrong = [name for name in names if name not in CONTESTS]
    if wrong:
        raise unknown("selector", wrong[0], CONTESTS)
    results, contests = [], {name: contest for name, contest in CONTESTS.items() if not names or name in names}

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, len(contests) * pairs)

    for number, (name, (select, loop)) in enumerate(contests.items()):
        x = _features(tokens, width, seed)
        exact = x.double()
        same = torch.equal(select(exact, keep)[0], loop(exact, keep))
        times = []
        for i in range(pairs):
            times.append((seconds_of(partial(select, x, keep)), seconds_of(partial(loop, x, keep))))
            advance(number * pairs + i + 1)
        ours, loops = zip(*times)
        faster, steps = paired_ratio(loops, ours, seed=seed), None
        scaling = _scaling(select, tokens, keep, width, pairs, seed)
        if name in STEPS:
            choice, given_loop = STEPS[name](x, keep)
            slow, fast = zip(*((seconds_of(given_loop), seconds_of(choice)) for _ in range(pairs)))
            steps = paired_ratio(slow, fast, seed=seed)
        results.append(SelectorTime(name, median(ours), median(loops), faster, same, scaling, steps))
    return results


def _features(tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def _scaling(
    select: Callable[[Tensor, int], Tensor], tokens: int, keep: int, width: int, pairs: int, seed: int
) -> dict[str, float]:
    """How a call grows from half the size in one direction to the full one; sizes take turns."""
    whole = {"tokens": tokens, "keep": keep, "width": width}
    sizes = [whole, *({**whole, what: max(whole[what] // 2, 1)} for what in GROWN)]
    inputs = [_features(size["tokens"], size["width"], seed) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(pairs):
        for size, x, found in zip(sizes, inputs, seconds):
            found.append(seconds_of(partial(select, x, min(size["keep"], size["tokens"]))))
    return {what: median(seconds[0]) / median(found) for what, found in zip(GROWN, seconds[1:])}


def table(results: Sequence[SelectorTime], tokens: int, keep: int, width: int) -> Table:
    """For people."""

    def times(ratio: Interval | None) -> str:
        return "-" if ratio is None else f"{ratio.point:.1f}x{in_brackets(ratio.ends, '.1f')}"

    def grown(what: str, r: SelectorTime) -> str:
        return f"{r.scaling[what]:.2f}x"

    columns = [
        Column("selector", lambda r: r.selector, left=True),
        Column("ms", lambda r: f"{1000 * r.seconds:.0f}"),
        Column("loop, ms", lambda r: f"{1000 * r.loop_seconds:.0f}"),
        Column("faster [95 %]", lambda r: times(r.faster)),
        Column("its steps", lambda r: times(r.steps)),
        Column("same tokens", lambda r: "yes" if r.same else "no"),
        *(Column(f"{what} x 2", partial(grown, what)) for what in GROWN),
    ]
    title = f"{tokens} -> {keep} tokens of width {width}, {torch.get_num_threads()} CPU threads, fp32"
    return Table.of(results, columns, title)
