"""The result of a benchmark: its fields, as JSON, and as tables for the terminal or, in GitHub markdown, for a README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtok.eval.benchmarks import table as bench_table
from vtok.eval.benchmarks.table import arrow, interval, software, speed, trust

if TYPE_CHECKING:
    from rich.table import Table

HEADER = (
    "method",
    "tokens",
    "GMACs",
    "GFLOPs (2x)",
    "images/s",
    "speed-up [95 %]",
    "implied",
    "achieved [95 %]",
    "reduction",
    "memory MB",
    "attention",
)


@dataclass(frozen=True)
class Result:
    """One setting against the unpatched model. Mappings have the keys `base` (unpatched) and `patched` unless said otherwise.

    Attributes:
        model: name.
        backend: adapter.
        method: name(s) of the method.
        setting: what was asked for, e.g. "tome(r=13)".
        params: parameters of the method, resolved.
        tokens: `in`, `out`, `mean_per_layer` (mean over images of the real tokens that leave each block).
        gmacs: per image: `base`, `model` (patched), `computed` (padding included), `pruner` (the reduction's own).
        gflops: the same, 2 x.
        implied_speedup: base / model, the reduction's own MACs left out.
        samples_per_sec: images a second, from median step times.
        step_time_ms: median time of a batch.
        spread: distance of the quartiles of the step times, as a share of their median.
        speedup: median over the pairs of unpatched time / patched time.
        speedup_ci: 95 % interval, percentile bootstrap over the pairs.
        achieved: speedup / implied_speedup.
        achieved_ci: its interval.
        slower: whether the whole interval of the speed-up lies below 1.
        verdict: the same in words.
        kernel: what computed attention, by number of blocks.
        dtype, device, device_name, threads, batch_size, img_size, pairs, seed: of the run.
        versions: of python, torch, vtok and the backends.
        peak_memory_mb: see `vtok.eval.benchmarks.memory`; `None` if it was left out.
        reduction_share: part of the forward pass spent deciding and moving tokens, by the profiler, whose own cost per operator
            makes it an upper bound; `None` if it was left out.
        baseline_check: `plain_ms` (median step of a plain loop), `ratio` (interleaved / plain), `ok` (within 3 %).
    """

    model: str
    backend: str
    method: str
    setting: str
    params: Any
    tokens: dict[str, Any]
    gmacs: dict[str, float]
    gflops: dict[str, float]
    implied_speedup: float
    samples_per_sec: dict[str, float]
    step_time_ms: dict[str, float]
    spread: dict[str, float]
    speedup: float
    speedup_ci: list[float] | None
    achieved: float
    achieved_ci: list[float] | None
    slower: bool
    verdict: str
    kernel: dict[str, str]
    dtype: str
    device: str
    device_name: str
    threads: int
    batch_size: int
    img_size: int
    pairs: int
    seed: int
    versions: dict[str, str]
    peak_memory_mb: dict[str, float] | None
    reduction_share: float | None
    baseline_check: dict[str, Any]


to_json = bench_table.to_json


def from_json(text: str) -> list[Result]:
    """The inverse of `to_json`."""
    return [Result(**values) for values in json.loads(text)]


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Cells under `HEADER`, one row a result."""
    return [
        (
            r.setting,
            f"{r.tokens['in']:.0f} -> {_short(r.tokens['out'])}",
            f"{arrow(r.gmacs, 3, ('base', 'model'))} + {r.gmacs['pruner']:.3f}",
            f"{arrow(r.gflops, 3, ('base', 'model'))} + {r.gflops['pruner']:.3f}",
            arrow(r.samples_per_sec, 1),
            speed(r.speedup, r),
            f"{r.implied_speedup:.2f}x",
            interval(r.achieved, r.achieved_ci, ""),
            "-" if r.reduction_share is None else f"{100 * r.reduction_share:.1f} %",
            "-" if r.peak_memory_mb is None else arrow(r.peak_memory_mb, 0),
            r.kernel["patched"] if len(set(r.kernel.values())) == 1 else f"{r.kernel['base']} -> {r.kernel['patched']}",
        )
        for r in results
    ]


def caption(results: Sequence[Result]) -> str:
    """What all rows share: model, machine, versions, and whether the baseline can be trusted."""
    r = results[0]
    return (
        f"{r.model}, {r.img_size} px, batch {r.batch_size}, {r.dtype}, {r.device} ({r.device_name}), {r.threads} threads, "
        f"{r.pairs} interleaved pairs; {software(r)}. Unpatched {r.step_time_ms['base']:.1f} ms a batch; a plain loop takes "
        f"{trust(r, 1)}. GMACs and GFLOPs are per image: unpatched -> "
        "patched + the reduction's own."
    )


def table(results: Sequence[Result]) -> Table:
    """A rich table; see `bench_table.table`."""
    return bench_table.table(HEADER, rows(results), results, caption(results))


def markdown(results: Sequence[Result]) -> str:
    """The same in GitHub markdown; see `bench_table.markdown`."""
    return bench_table.markdown(HEADER, rows(results), results, caption(results))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
