"""The result of a benchmark of a vision-language model: its fields, as JSON, and as a table in GitHub markdown."""

from __future__ import annotations

import itertools
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
    "visual tokens",
    "GMACs",
    "prefill ms",
    "speed-up [95 %]",
    "implied",
    "achieved [95 %]",
    "selection",
    "first token ms",
    "decode ms/token",
    "decode [95 %]",
    "KV MB",
)


@dataclass(frozen=True)
class PromptResult:
    """One setting against the unpatched model. Mappings have the keys `base` (unpatched) and `patched` unless said otherwise.

    Attributes:
        model: name.
        method: name(s) of the method.
        setting: what was asked for, e.g. "todre(keep=0.1)".
        params: parameters of the method(s), resolved.
        visual_tokens: a prompt's, as they enter each decoder layer (mean over rows): `in` (unpatched) and `per_layer`.
        text_tokens: other tokens of a prompt (mean over rows).
        gmacs: per prompt: `base`, `model` (patched), `selection` (the reduction's own), `tower`, `connector`, `llm` (patched).
        implied_speedup: base / model, tower included, the reduction's own MACs left out.
        prefill_ms: median time of a batch: images to the logits of the first answer token.
        speedup, speedup_ci: of the prefill, median over the pairs of unpatched / patched time, and its 95 % interval.
        achieved, achieved_ci: speedup / implied_speedup.
        selection_ms: median time of a batch spent deciding which tokens go, attention read for it included.
        selection_share: the same as a share of the unpatched prefill.
        first_token_ms: median time until generate() has the first token.
        decode_ms: median time of a batch's later tokens, each.
        decode_ratio, decode_ratio_ci: median over the pairs of unpatched / patched time a token, and its interval.
        kv_mb: of the KV cache per prompt, MB of 10^6 bytes, padding included.
        prefill_spread: distance of the quartiles of the prefill times, as a share of their median.
        new_tokens: of the answers.
        verdict: what the interval of the prefill supports, in words.
        attention: implementation of the LLM.
        dtype, device, device_name, threads, batch_size, pairs, seed: of the run.
        load: load average of the machine before the run; `None` where the system tells none.
        versions: of python, torch, vtok and transformers.
        baseline_check: `plain_ms` (median prefill of a plain loop), `ratio` (interleaved / plain), `ok` (within 3 %).
    """

    model: str
    method: str
    setting: str
    params: Any
    visual_tokens: dict[str, Any]
    text_tokens: float
    gmacs: dict[str, float]
    implied_speedup: float
    prefill_ms: dict[str, float]
    speedup: float
    speedup_ci: list[float] | None
    achieved: float
    achieved_ci: list[float] | None
    selection_ms: float
    selection_share: float
    first_token_ms: dict[str, float]
    decode_ms: dict[str, float]
    decode_ratio: float
    decode_ratio_ci: list[float] | None
    kv_mb: dict[str, float]
    prefill_spread: dict[str, float]
    new_tokens: int
    verdict: str
    attention: str
    dtype: str
    device: str
    device_name: str
    threads: int
    batch_size: int
    pairs: int
    seed: int
    load: float | None
    versions: dict[str, str]
    baseline_check: dict[str, Any]


to_json = bench_table.to_json


def from_json(text: str) -> list[PromptResult]:
    """The inverse of `to_json`."""
    return [PromptResult(**values) for values in json.loads(text)]


def rows(results: Sequence[PromptResult]) -> list[tuple[str, ...]]:
    """Cells under `HEADER`, one row a result."""
    return [
        (
            r.setting,
            _layers(r.visual_tokens),
            f"{r.gmacs['base']:.2f} -> {r.gmacs['model']:.2f} + {r.gmacs['selection']:.3f}",
            arrow(r.prefill_ms, 0),
            speed(r.speedup, r),
            f"{r.implied_speedup:.2f}x",
            interval(r.achieved, r.achieved_ci, ""),
            f"{100 * r.selection_share:.2f} %",
            arrow(r.first_token_ms, 0),
            arrow(r.decode_ms, 1),
            interval(r.decode_ratio, r.decode_ratio_ci),
            arrow(r.kv_mb, 2),
        )
        for r in results
    ]


def caption(results: Sequence[PromptResult]) -> str:
    """What all rows share: model, prompt, machine, versions, and whether the baseline can be trusted."""
    r = results[0]
    load = "" if r.load is None else f" (load average before the run {r.load:.1f})"
    return (
        f"{r.model}, {r.visual_tokens['in']:.0f} visual and {r.text_tokens:.0f} other tokens, batch {r.batch_size}, {r.dtype}, "
        f"{r.attention} attention, {r.device} ({r.device_name}), {r.threads} threads{load}, {r.pairs} interleaved pairs, "
        f"answers of {r.new_tokens} tokens; {software(r)}. Times are medians of a batch, unpatched -> patched; the vision "
        "tower is part of prefill, bound and first token. GMACs and KV MB (10^6 bytes) are per prompt; selection is time spent "
        f"deciding, as a share of the unpatched prefill. A plain loop over the unpatched model takes {trust(r, 0)}."
    )


def table(results: Sequence[PromptResult]) -> Table:
    """A rich table; see `bench_table.table`."""
    return bench_table.table(HEADER, rows(results), results, caption(results))


def markdown(results: Sequence[PromptResult]) -> str:
    """The same in GitHub markdown; see `bench_table.markdown`."""
    return bench_table.markdown(HEADER, rows(results), results, caption(results))


def _layers(tokens: dict[str, Any]) -> str:
    """ "576 -> 58, 0 from layer 7"."""
    per_layer = tokens["per_layer"]
    text = f"{tokens['in']:.0f} -> {per_layer[0]:.4g}"
    for layer, (before, after) in enumerate(itertools.pairwise(per_layer), start=1):
        if after != before:
            text += f", {after:.4g} from layer {layer}"
    return text
