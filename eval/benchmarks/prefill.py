"""Speed of patched vision-language models against the unpatched one: prefill, first token, decoding.

Models are timed as `vtok.eval.benchmarks.throughput` times encoders: batch by batch in rounds of random order, every timed
batch behind an untimed one of the same model, all of them module trees over the same weights, and a plain loop over the
unpatched model checks what interleaving does to it. A round times the prefill alone (pixels in, logits of one position out),
then one `generate()`, whose first step gives the time to the first token and whose later steps give the time of each further
token.

What was measured: assets/docs/results/prefill.md in the repository.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vtok
from vtok.cost.prefill import PromptEstimate
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.flops import watched_prompt, watched_reduction
from vtok.eval.benchmarks.result import PromptResult
from vtok.eval.benchmarks.throughput import (
    PAIRS,
    baseline_check,
    checked_settings,
    described_run,
    dtype_of,
    interleave,
    synchronise,
    threads_set,
    verdict,
)
from vtok.eval.common.settings import evaluating, moved, to_device, weight_sharing_copy
from vtok.eval.common.statistics import paired_ratio, spread
from vtok.targets import vlm_targets

NEW_TOKENS = 16
_WATCHED = 3  # passes in which the selection is timed

Inputs = Mapping[str, Tensor]


class Times(NamedTuple):
    """Seconds of every timed batch of one model: prefill, first token, each later token."""

    prefill: list[float]
    first: list[float]
    decode: list[float]


def measure_prompts(
    model: nn.Module,
    inputs: Inputs,
    settings: Sequence[Any],
    *,
    pairs: int = PAIRS,
    warmup: int = 1,
    new_tokens: int = NEW_TOKENS,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    compiler: Compiler | None = None,
) -> list[PromptResult]:
    """Times settings against the unpatched model, all in one run.

    Args:
        model: a vision-language model with its language head, unpatched; left as it is. It is run in eval mode.
        inputs: a batch of prompts as the processor makes them, images included.
        settings: each a `Setting`, a method, or (method, parameters).
        pairs: timed batches of every model, 20 or more for a result to quote, 5 at least.
        warmup: untimed rounds.
        new_tokens: of every answer, 2 at least; ends of sequence are ignored.
        dtype: "fp32", "bf16", "fp16" or a torch type; `None` = the model's own.
        device: `None` = the model's own.
        threads: of torch's CPU operators; `None` = as set. Set back afterwards.
        name: of the model, for the records.
        seed: of the bootstrap.
        progress: called with (rounds done, rounds).
        compiler: compiles the steps of all answers, over static caches, before they are timed; the prefill is timed as it is.

    Returns:
        One result a setting, in order.

    Raises:
        ConfigError: too few pairs or tokens, an unknown type, a patched model, no setting.
        UnsupportedModelError: no vision-language model, or a method does not work on it.
    """
    chosen = checked_settings(settings, pairs)
    _check(model, new_tokens)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with threads_set(threads), evaluating(model), torch.no_grad():
        base: Any = to_device(model, dtype_of(dtype), device)
        first = next(base.parameters())
        values = moved(inputs, first)
        patched = [setting.apply(weight_sharing_copy(base)) for setting in chosen]
        for one in patched:
            _prefill(one, values)  # the costs below describe this pass
        costs = [_estimate(one) for one in patched]
        selection = [selection_seconds(one, values) for one in patched]
        how = {} if compiler is None else compiler.decoding()
        compiled = (
            None
            if compiler is None
            else [compiler.watched(partial(_answer, one, values, new_tokens, how)) for one in (base, *patched)]
        )
        times, plain = _times([base, *patched], values, pairs, warmup, new_tokens, progress, how)
        common = described_run(first, len(values["input_ids"]), pairs, seed) | {
            "model": name or type(model).__name__,
            "attention": vlm_targets(base)[0].vlm.text.config._attn_implementation,
            "load": load,
            "new_tokens": new_tokens,
            "baseline_check": baseline_check(times[0].prefill, plain),
        }
        return [
            PromptResult(
                setting=chosen[i].title,
                selection_ms=1000 * selection[i],
                selection_share=selection[i] / statistics.median(times[0].prefill),
                compiled=None if compiled is None else {"base": compiled[0], "patched": compiled[i + 1]},
                **_described(patched[i]),
                **_costs(costs[i]),
                **compare(times[0], times[i + 1], costs[i].implied_speedup, seed),
                **common,
            )
            for i in range(len(chosen))
        ]


def _check(model: nn.Module, new_tokens: int) -> None:
    if new_tokens < 2:
        raise ConfigError(f"decoding is timed from the second token on; new_tokens must be 2 or more, got {new_tokens}")
    if not vlm_targets(model) or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no vision-language model with a language head that vtok knows; encoders are measured "
            "by vtok.eval.benchmarks.throughput.measure"
        )
    if vtok.info(model).patched:
        raise ConfigError("measure_prompts patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")


def compare(base: Times, patched: Times, implied: float, seed: int = 0) -> dict[str, Any]:
    """Times, pair by pair -> the timing fields of a `PromptResult`."""
    speedup = paired_ratio(base.prefill, patched.prefill, seed=seed)
    achieved, decode = speedup.scaled(1 / implied), paired_ratio(base.decode, patched.decode, seed=seed)

    def milliseconds(field: str) -> dict[str, float]:
        both = {"base": getattr(base, field), "patched": getattr(patched, field)}
        return {key: 1000 * statistics.median(seconds) for key, seconds in both.items()}

    return {
        "prefill_ms": milliseconds("prefill"),
        "first_token_ms": milliseconds("first"),
        "decode_ms": milliseconds("decode"),
        "prefill_spread": {"base": spread(base.prefill), "patched": spread(patched.prefill)},
        "speedup": speedup.point,
        "speedup_ci": speedup.ends,
        "achieved": achieved.point,
        "achieved_ci": achieved.ends,
        "decode_ratio": decode.point,
        "decode_ratio_ci": decode.ends,
        "verdict": verdict(speedup, achieved),
    }


def selection_seconds(model: nn.Module, inputs: Inputs) -> float:
    """Median time of a batch spent deciding which tokens go, before and inside the LLM and inside the tower."""
    spent: list[float] = []
    device = inputs["input_ids"].device

    @contextmanager
    def clock(_: Any) -> Iterator[None]:
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        spent[-1] += time.perf_counter() - start

    with watched_reduction(model, clock), watched_prompt(model, clock):
        for _ in range(_WATCHED):
            spent.append(0.0)
            _prefill(model, inputs)
    return statistics.median(spent)


def _times(
    models: Sequence[nn.Module],
    inputs: Inputs,
    pairs: int,
    warmup: int,
    new_tokens: int,
    progress: Callable[[int, int], None] | None,
    how: Mapping[str, Any],
) -> tuple[list[Times], list[float]]:
    """(times of every model, seconds of the plain loop's prefills)."""
    for model in models:
        for _ in range(warmup):
            _answer(model, inputs, new_tokens, how)
    answers: list[list[tuple[float, float]]] = [[] for _ in models]
    prefill, plain = interleave(
        models,
        pairs,
        lambda model: _prefill(model, inputs),
        inputs["input_ids"].device,
        progress,
        lambda i: answers[i].append(_answer(models[i], inputs, new_tokens, how)),
    )
    return [Times(own, *map(list, zip(*both))) for own, both in zip(prefill, answers)], plain


def _prefill(model: Any, inputs: Inputs) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1)


class _Stamps:
    """A stopping criterion that never stops: it notes when each token is known."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronise(self.device)
        self.seconds.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _answer(model: Any, inputs: Inputs, new_tokens: int, how: Mapping[str, Any]) -> tuple[float, float]:
    """One generate(), with further keywords -> (seconds to the first token, seconds of each later one)."""
    from transformers import StoppingCriteriaList

    stamps = _Stamps(inputs["input_ids"].device)
    start = time.perf_counter()
    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([stamps]),
        **how,
    )
    seen = stamps.seconds
    return seen[0] - start, (seen[-1] - seen[0]) / (len(seen) - 1)


def _estimate(model: nn.Module) -> PromptEstimate:
    estimate = vtok.info(model).prompts[0].estimate
    if estimate is None:
        raise ConfigError("nothing is shortened: the setting keeps every visual token, so there is nothing to measure")
    return estimate


def _costs(e: PromptEstimate) -> dict[str, Any]:
    vision = e.vision
    gmacs = {
        "base": e.base_macs,
        "model": e.macs,
        "selection": e.reduction_macs,
        "tower": 0.0 if vision is None else vision.macs,
        "connector": 0.0 if vision is None else vision.connector_macs,
        "llm": e.llm_macs,
    }
    return {
        "gmacs": {key: value / 1e9 for key, value in gmacs.items()},
        "implied_speedup": e.implied_speedup,
        "kv_mb": {"base": e.base_kv_bytes / 1e6, "patched": e.kv_bytes / 1e6},
    }


def _described(model: nn.Module) -> dict[str, Any]:
    (found,) = vtok.info(model).prompts
    assert found.estimate is not None
    params = [config.to_dict() for config in found.configs]
    entered = sum(found.visual) / len(found.visual)
    return {
        "method": " + ".join(config.name for config in found.configs),
        "params": params[0] if len(params) == 1 else params,
        "visual_tokens": {"in": entered, "per_layer": [row.visual for row in found.estimate.layers]},
        "text_tokens": sum(found.text) / len(found.text),
    }
