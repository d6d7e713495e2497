"""Speed of patched vision-language models against the unpatched one: prefill, first token, decoding.

Models are timed as `vtok.eval.benchmarks.throughput` times encoders: batch by batch in rounds of random order, every timed batch behind an
untimed one of the same model, all of them module trees over the same weights, and a plain loop over the unpatched model checks
what interleaving does to it. A round times the prefill alone (pixels in, logits of one position out), then one `generate()`,
whose first step gives the time to the first token and whose later steps give the time of each further token.

# What was measured

Vision-language models are timed from pixels to the logits of the first answer token, vision tower included, and then while they
answer. `transformers:llava-1.5-scaled` is LLaVA-1.5 with 576 visual tokens and about a tenth of its width and depth (98 GMACs of
unpruned prefill at batch 8, 4 % of them in the tower, as in the 7B model), with random weights; fp32, one core ("AMD EPYC"), torch
2.14.1, transformers 5.24.0:

```bash
vtok bench transformers:llava-1.5-scaled todre:keep=0.1 todre:keep=0.25 uniform:keep=0.1 pitome+todre:keep=0.1 \\
    -b 8 --threads 1 --pairs 10 --markdown
```

| method | visual tokens | GMACs | prefill ms | speed-up [95 %] | implied | achieved [95 %] | selection | first token ms | decode ms/token | decode [95 %] | KV MB |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| todre(keep=0.1) | 576 -> 58 | 12.27 -> 2.48 + 0.059 | 4988 -> 1000 | 4.56x [4.15, 5.36] | 4.95x | 0.92 [0.84, 1.08] | 0.86 % | 5135 -> 991 | 89.6 -> 36.5 | 2.37x [1.69, 2.99] | 15.73 -> 3.00 |
| todre(keep=0.25) | 576 -> 144 | 12.27 -> 3.88 + 0.093 | 4988 -> 1559 | 3.33x [2.76, 3.50] | 3.17x | 1.05 [0.87, 1.10] | 1.60 % | 5135 -> 1550 | 89.6 -> 43.6 | 2.13x [1.63, 2.41] | 15.73 -> 5.11 |
| uniform(keep=0.1) | 576 -> 57 | 12.27 -> 2.46 + 0.000 | 4988 -> 942 | 5.07x [4.21, 5.73] | 4.98x | 1.02 [0.84, 1.15] | 0.01 % | 5135 -> 925 | 89.6 -> 46.5 | 1.97x [1.67, 2.44] | 15.73 -> 2.97 |
| pitome + todre | 576 -> 46 | 12.27 -> 2.18 + 0.087 | 4988 -> 955 | 4.58x [4.33, 5.61] | 5.63x | 0.81 [0.77, 1.00] | 1.70 % | 5135 -> 936 | 89.6 -> 35.8 | 2.52x [1.75, 3.19] | 15.73 -> 2.70 |

GMACs and KV MB (10^6 bytes) are per prompt, times per batch; selection is the time spent deciding, attention read for it included,
as a share of the unpruned prefill. Answering is faster because the layers have fewer keys to read. The machine was shared: load
average 6 on two cores, and the plain loop does not agree (1.10). The same run ten minutes earlier, at a load of 10, where it agreed
(0.97), achieved 0.80 [0.61, 0.95], 0.90 [0.79, 1.10], 0.98 [0.90, 1.05] and 0.79 [0.72, 0.90] in this order, with selection at 1.30,
3.31, 0.01 and 2.35 %. PiToMe's own step takes a quarter of the tower's CPU time here (62 of 244 ms a batch): the scaled tower is only
96 wide, and what matching costs besides products does not shrink with the width.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vtok
from vtok.cost.prefill import PromptEstimate
from vtok.errors import ConfigError, UnsupportedModelError, shown
from vtok.eval.benchmarks.flops import watched_prompt, watched_reduction
from vtok.eval.benchmarks.prefill_result import PromptResult
from vtok.eval.benchmarks.throughput import (
    DTYPES,
    FEWEST_PAIRS,
    PAIRS,
    _baseline_check,
    _threads,
    device_name,
    synchronise,
    verdict,
)
from vtok.eval.common.settings import Setting, evaluating, placed, twin, versions
from vtok.eval.common.statistics import paired_ratio, spread
from vtok.targets import vlm_targets

NEW_TOKENS = 16
_PLAIN_BLOCKS = 4  # the plain loop runs in as many stretches, spread over the run
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

    Returns:
        One result a setting, in order.

    Raises:
        ConfigError: too few pairs or tokens, an unknown type, a patched model, no setting.
        UnsupportedModelError: no vision-language model, or a method does not work on it.
    """
    chosen = [Setting.of(value) for value in settings]
    _check(model, chosen, pairs, new_tokens)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with _threads(threads), evaluating(model), torch.no_grad():
        base: Any = placed(model, dtype, device)
        first = next(base.parameters())
        values = {key: t.to(first.device, first.dtype if t.is_floating_point() else None) for key, t in inputs.items()}
        patched = [setting.apply(twin(base)) for setting in chosen]
        for one in patched:
            _prefill(one, values)  # the costs below describe this pass
        costs = [_estimate(one) for one in patched]
        selection = [selection_seconds(one, values) for one in patched]
        times, plain = _interleave([base, *patched], values, pairs, warmup, new_tokens, progress)
        common: dict[str, Any] = {
            "model": name or type(model).__name__,
            "attention": vlm_targets(base)[0].vlm.text.config._attn_implementation,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "device_name": device_name(first.device),
            "threads": torch.get_num_threads(),
            "batch_size": len(values["input_ids"]),
            "pairs": pairs,
            "seed": seed,
            "load": load,
            "new_tokens": new_tokens,
            "versions": versions(),
            "baseline_check": _baseline_check(times[0].prefill, plain),
        }
        return [
            PromptResult(
                setting=chosen[i].title,
                selection_ms=1000 * selection[i],
                selection_share=selection[i] / statistics.median(times[0].prefill),
                **_described(patched[i]),
                **_costs(costs[i]),
                **compare(times[0], times[i + 1], costs[i].implied_speedup, seed),
                **common,
            )
            for i in range(len(chosen))
        ]


def _check(model: nn.Module, settings: Sequence[Setting], pairs: int, new_tokens: int) -> None:
    if not settings:
        raise ConfigError("nothing to measure: name at least one method")
    if pairs < FEWEST_PAIRS:
        raise ConfigError(f"an interval from {pairs} pairs says nothing; take {PAIRS} or more ({FEWEST_PAIRS} at least)")
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


def _interleave(
    models: Sequence[nn.Module],
    inputs: Inputs,
    pairs: int,
    warmup: int,
    new_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Times], list[float]]:
    """(times of every model, seconds of the plain loop's prefills)."""
    device = inputs["input_ids"].device
    for model in models:
        for _ in range(warmup):
            _answer(model, inputs, new_tokens)
    times, plain = [Times([], [], []) for _ in models], []
    stretch, order = -(-pairs // _PLAIN_BLOCKS), random.Random(0)
    for done in range(pairs):
        if done % stretch == 0:
            _prefill(models[0], inputs)
            plain += [_timed(models[0], inputs, device) for _ in range(stretch)]
        for i in order.sample(range(len(models)), len(models)):
            _prefill(models[i], inputs)
            times[i].prefill.append(_timed(models[i], inputs, device))
            first, later = _answer(models[i], inputs, new_tokens)
            times[i].first.append(first)
            times[i].decode.append(later)
        if progress is not None:
            progress(done + 1, pairs)
    return times, plain


def _prefill(model: Any, inputs: Inputs) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1)


def _timed(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    _prefill(model, inputs)
    synchronise(device)
    return time.perf_counter() - start


class _Stamps:
    """A stopping criterion that never stops: it notes when each token is known."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronise(self.device)
        self.seconds.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _answer(model: Any, inputs: Inputs, new_tokens: int) -> tuple[float, float]:
    """One generate() -> (seconds to the first token, seconds of each later one)."""
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
