"""Speed of patched vision-language models against the unpatched one: prefill, first token, decoding.

Models are timed as `vtok.eval.benchmarks.throughput` times encoders. A round times the prefill alone (pixels in, logits of one
position out), then one `generate()`, whose first step gives the time to the first token and whose later steps give the time of
each further token.

What was measured: assets/docs/results/prefill.md in the repository.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.benchmarks import throughput
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.flops import watched_prompt, watched_reduction
from vtok.eval.benchmarks.result import PromptResult
from vtok.eval.benchmarks.throughput import (
    PAIRS,
    baseline_check,
    checked_settings,
    clocked,
    described_run,
    dtype_of,
    interleave,
    synchronise,
    threads_set,
)
from vtok.eval.common.settings import evaluating, moved, to_device, weight_sharing_copy
from vtok.eval.common.statistics import paired_ratio
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
        warmup: untimed rounds.
        new_tokens: of every answer, 2 at least; ends of sequence are ignored.
        compiler: compiles the steps of all answers, over static caches, before they are timed; the prefill is timed as it is.
        settings, pairs, dtype, device, threads, name, seed, progress: as for `vtok.eval.benchmarks.throughput.measure`.

    Returns:
        One result a setting, in order.

    Raises:
        ConfigError: too few pairs or tokens, an unknown type, a patched model, no setting.
        UnsupportedModelError: no vision-language model, or a method does not work on it.
    """
    chosen = checked_settings(settings, pairs)
    _check(model, new_tokens)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    how = {} if compiler is None else compiler.decoding()
    with threads_set(threads), evaluating(model), torch.no_grad():
        base: Any = to_device(model, dtype_of(dtype), device)
        first = next(base.parameters())
        values = moved(inputs, first)
        patched = [setting.apply(weight_sharing_copy(base)) for setting in chosen]
        for one in patched:
            _prefill(one, values)  # the costs below describe this pass
        passes = [_last_pass(one) for one in patched]
        selection = [selection_seconds(one, values) for one in patched]
        ran = [base, *patched]
        answers = [partial(_answer, one, values, new_tokens, how) for one in ran]
        compiled = None if compiler is None else [compiler.watched(answer) for answer in answers]
        for answer in answers:
            for _ in range(warmup):
                answer()
        answered: list[list[tuple[float, float]]] = [[] for _ in ran]
        prefill, plain = interleave(
            ran,
            pairs,
            lambda one: _prefill(one, values),
            first.device,
            progress,
            lambda i: answered[i].append(answers[i]()),
        )
        times = [Times(own, *map(list, zip(*both))) for own, both in zip(prefill, answered)]
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
                **passes[i],
                **compare(times[0], times[i + 1], passes[i]["implied_speedup"], seed),
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
    prefill = throughput.compare(base.prefill, patched.prefill, implied, 1, seed)
    decode = paired_ratio(base.decode, patched.decode, seed=seed)

    def milliseconds(field: str) -> dict[str, float]:
        both = {"base": getattr(base, field), "patched": getattr(patched, field)}
        return {key: 1000 * statistics.median(seconds) for key, seconds in both.items()}

    return {
        "prefill_ms": prefill["step_time_ms"],
        "first_token_ms": milliseconds("first"),
        "decode_ms": milliseconds("decode"),
        "prefill_spread": prefill["spread"],
        "decode_ratio": decode.point,
        "decode_ratio_ci": decode.ends,
        **{name: prefill[name] for name in ("speedup", "speedup_ci", "achieved", "achieved_ci", "verdict")},
    }


def selection_seconds(model: nn.Module, inputs: Inputs) -> float:
    """Median time of a batch spent deciding which tokens go, before and inside the LLM and inside the tower."""
    spent: list[float] = []
    clock = clocked(spent, inputs["input_ids"].device)
    with watched_reduction(model, clock), watched_prompt(model, clock):
        for _ in range(_WATCHED):
            spent.append(0.0)
            _prefill(model, inputs)
    return statistics.median(spent)


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


def _last_pass(model: nn.Module) -> dict[str, Any]:
    """The fields of a result that say what the last pass of a patched model held and cost."""
    (found,) = vtok.info(model).prompts
    e = found.estimate
    if e is None:
        raise ConfigError("nothing is shortened: the setting keeps every visual token, so there is nothing to measure")
    params = [config.to_dict() for config in found.configs]
    gmacs = {
        "base": e.base_macs,
        "model": e.macs,
        "selection": e.reduction_macs,
        "tower": 0.0 if e.vision is None else e.vision.macs,
        "connector": 0.0 if e.vision is None else e.vision.connector_macs,
        "llm": e.llm_macs,
    }
    return {
        "method": " + ".join(config.name for config in found.configs),
        "params": params[0] if len(params) == 1 else params,
        "visual_tokens": {
            "in": sum(found.visual) / len(found.visual),
            "per_layer": [row.visual for row in e.layers],
        },
        "text_tokens": sum(found.text) / len(found.text),
        "gmacs": {key: value / 1e9 for key, value in gmacs.items()},
        "implied_speedup": e.implied_speedup,
        "kv_mb": {"base": e.base_kv_bytes / 1e6, "patched": e.kv_bytes / 1e6},
    }
