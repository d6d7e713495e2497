"""Speed of patched models against the unpatched one: what `vtok bench` measures.

All models of a run are timed batch by batch in rounds, so that each patched batch has an unpatched partner close in time. Every
timed batch follows an untimed one of the same model: heap and caches are then as they are when that model alone is served (on
CPUs, the allocator's page faults after a change of model are worth several per cent). The order within a round is drawn anew
every time. The models are separate module trees over the same parameters: nothing is patched or unpatched between batches, and
weights take memory once. What interleaving does to the unpatched model itself is measured too: a plain loop over it, in the
same run, must agree with its interleaved times within 3 % (`baseline_check`).

# What was measured

Random weights, 224 px, fp32, two CPU cores ("Intel Xeon", AVX-512), torch 2.14.1, timm 1.0.31; unpatched and patched models are timed
in one run, in random order, each batch after an untimed one of the same model. Intervals are 95 % bootstrap intervals of the
median ratio. GMACs are "unpatched -> patched + the reduction's own". Run it on your machine:

```bash
vtok bench deit_small_patch16_224 tome:r=13 tome:r=0 pitome:ratio=0.9075 zero_tprune ats:num_tokens=108 random \\
    -b 16 --threads 2 --pairs 30 --markdown
```

DeiT-S/16, batch 16:

| method | GMACs | images/s | speed-up [95 %] | implied | achieved [95 %] |
| --- | ---: | ---: | ---: | ---: | ---: |
| tome(r=13) | 4.599 -> 2.703 + 0.003 | 21.2 -> 36.8 | 1.72x [1.65, 1.79] | 1.70x | 1.01 [0.97, 1.05] |
| tome(r=0) | 4.599 -> 4.599 + 0.000 | 21.2 -> 20.8 | 0.99x [0.97, 1.02] | 1.00x | 0.99 [0.97, 1.02] |
| pitome(ratio=0.9075) | 4.599 -> 2.706 + 0.013 | 21.2 -> 36.2 | 1.70x [1.65, 1.77] | 1.70x | 1.00 [0.97, 1.04] |
| zero_tprune | 4.599 -> 3.117 + 0.066 | 21.2 -> 28.7 | 1.36x [1.33, 1.40] | 1.48x | 0.92 [0.90, 0.95] |
| ats(num_tokens=108) | 4.599 -> 2.980 + 0.000 | 21.2 -> 30.8 | 1.46x [1.42, 1.49] | 1.54x | 0.95 [0.92, 0.97] |
| random | 4.599 -> 2.873 + 0.000 | 21.2 -> 36.4 | 1.74x [1.67, 1.79] | 1.60x | 1.09 [1.04, 1.12] |

ViT-B/16, batch 16 (`vit_base_patch16_224 ... -b 16 --pairs 20`):

| method | GMACs | images/s | speed-up [95 %] | implied | achieved [95 %] |
| --- | ---: | ---: | ---: | ---: | ---: |
| tome(r=13) | 17.564 -> 10.367 + 0.003 | 6.5 -> 10.2 | 1.57x [1.54, 1.64] | 1.69x | 0.92 [0.91, 0.97] |
| tome(r=0) | 17.564 -> 17.564 + 0.000 | 6.5 -> 6.4 | 1.01x [0.97, 1.03] | 1.00x | 1.01 [0.97, 1.03] |
| pitome(ratio=0.9075) | 17.564 -> 10.394 + 0.013 | 6.5 -> 10.4 | 1.59x [1.55, 1.64] | 1.69x | 0.94 [0.91, 0.97] |
| zero_tprune | 17.564 -> 11.977 + 0.131 | 6.5 -> 8.5 | 1.30x [1.27, 1.33] | 1.47x | 0.89 [0.87, 0.91] |
| ats(num_tokens=108) | 17.564 -> 11.364 + 0.001 | 6.5 -> 9.8 | 1.53x [1.46, 1.56] | 1.55x | 0.99 [0.94, 1.01] |
| random | 17.564 -> 11.033 + 0.000 | 6.5 -> 10.6 | 1.66x [1.58, 1.70] | 1.59x | 1.04 [0.99, 1.07] |

ViT-B/16, batch 1 (`-b 1 --pairs 40`):

| method | GMACs | images/s | speed-up [95 %] | implied | achieved [95 %] |
| --- | ---: | ---: | ---: | ---: | ---: |
| tome(r=13) | 17.564 -> 10.367 + 0.003 | 5.0 -> 6.6 | 1.37x [1.28, 1.40] | 1.69x | 0.81 [0.75, 0.83] |
| tome(r=0) | 17.564 -> 17.564 + 0.000 | 5.0 -> 5.0 | 1.01x [0.98, 1.05] | 1.00x | 1.01 [0.98, 1.05] |
| pitome(ratio=0.9075) | 17.564 -> 10.394 + 0.013 | 5.0 -> 6.8 | 1.35x [1.33, 1.39] | 1.69x | 0.80 [0.79, 0.82] |
| zero_tprune | 17.564 -> 11.977 + 0.131 | 5.0 -> 6.0 | 1.23x [1.21, 1.26] | 1.47x | 0.84 [0.83, 0.86] |
| ats(num_tokens=108) | 17.564 -> 11.422 + 0.001 | 5.0 -> 6.3 | 1.26x [1.23, 1.30] | 1.54x | 0.82 [0.80, 0.85] |
| random | 17.564 -> 11.033 + 0.000 | 5.0 -> 6.8 | 1.39x [1.34, 1.43] | 1.59x | 0.87 [0.84, 0.90] |

DeiT-S/16, batch 1 (`-b 1 --pairs 60`): at 50 ms a pass, a few dozen small operations a block are what counts, not FLOPs.

| method | GMACs | images/s | speed-up [95 %] | implied | achieved [95 %] |
| --- | ---: | ---: | ---: | ---: | ---: |
| tome(r=13) | 4.599 -> 2.703 + 0.003 | 18.7 -> 21.9 | 1.18x [1.17, 1.20] | 1.70x | 0.69 [0.69, 0.70] |
| tome(r=0) | 4.599 -> 4.599 + 0.000 | 18.7 -> 18.5 | 0.98x [0.98, 1.00] SLOWER | 1.00x | 0.98 [0.98, 1.00] |
| pitome(ratio=0.9075) | 4.599 -> 2.706 + 0.013 | 18.7 -> 20.9 | 1.13x [1.10, 1.15] | 1.70x | 0.66 [0.65, 0.67] |
| zero_tprune | 4.599 -> 3.117 + 0.066 | 18.7 -> 20.0 | 1.06x [1.04, 1.08] | 1.48x | 0.72 [0.70, 0.73] |
| ats(num_tokens=108) | 4.599 -> 2.980 + 0.000 | 18.7 -> 20.7 | 1.09x [1.07, 1.12] | 1.54x | 0.71 [0.69, 0.73] |
| random | 4.599 -> 2.873 + 0.000 | 18.7 -> 22.7 | 1.22x [1.19, 1.24] | 1.60x | 0.76 [0.75, 0.77] |

ViT-B/16 of the other two homes, batch 16, two CPU cores ("AMD EPYC", AVX-512, bf16 in hardware), torch 2.14.1, open_clip 3.3.0,
transformers 5.23.0 (`vtok bench NAME tome:r=8 -b 16 --threads 2 --pairs 8`, `--dtype bf16`):

| model | type | images/s | speed-up [95 %] | implied | achieved [95 %] | plain loop agrees |
|---|---|---:|---:|---:|---:|---|
| `open_clip:ViT-B-16` | fp32 | 3.4 -> 5.1 | 1.48x [1.47, 1.80] | 1.34x | 1.11 [1.10, 1.34] | yes, 1.02 |
| `open_clip:ViT-B-16` | bf16 | 5.8 -> 8.5 | 1.43x [1.28, 1.57] | 1.34x | 1.06 [0.95, 1.17] | no, 1.10 |
| `transformers:clip-vit-base-patch16` | fp32, 20 pairs | 3.7 -> 4.6 | 1.26x [1.15, 1.33] | 1.34x | 0.94 [0.86, 0.99] | yes, 1.00 |
| `transformers:clip-vit-base-patch16` | bf16 | 6.0 -> 7.6 | 1.30x [1.06, 1.49] | 1.34x | 0.97 [0.79, 1.11] | no, 0.95 |
| `transformers:vit-base-patch16-224` | fp32 | 3.7 -> 4.5 | 1.27x [1.09, 1.35] | 1.34x | 0.95 [0.81, 1.01] | yes, 1.01 |
| `transformers:vit-base-patch16-224` | bf16 | 6.5 -> 9.5 | 1.45x [1.35, 1.54] | 1.34x | 1.08 [1.01, 1.15] | no, 1.07 |

The last column is the run's own check: interleaved batches of the unpatched model against a plain loop over it, within 3 %. Where
it says no, something else took the machine for a while and the interval says more than the point. open_clip gains more than its
MACs imply because its unpatched attention does not run on the fused kernel and the patched one does.

Small gaps between runs are the machine's: with the default allocator, the unpatched DeiT-S pays for fresh pages in some runs
and not in others, which moved ToMe's achieved fraction between 0.88 and 1.10 over the runs made. Compare within a table.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, shown
from vtok.eval.benchmarks.flops import watched_reduction
from vtok.eval.benchmarks.memory import peak_memory
from vtok.eval.benchmarks.throughput_result import Result
from vtok.eval.common.settings import (
    Setting,
    backend,
    evaluating,
    method_name,
    model_name,
    pass_cost,
    placed,
    resolved_params,
    twin,
    versions,
)
from vtok.eval.common.statistics import FEWEST, Interval, paired_ratio, spread
from vtok.targets.resolve import run_of

PAIRS, FEWEST_PAIRS, WARMUP = 20, FEWEST, 3
BASELINE_TOLERANCE = 0.03
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_BLOCKS = 4  # the plain loop runs in as many stretches, spread over the run
_PROFILED = 3  # forward passes under the profiler


def measure(
    model: nn.Module,
    images: Tensor,
    settings: Sequence[Any],
    *,
    pairs: int = PAIRS,
    warmup: int = WARMUP,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    name: str | None = None,
    seed: int = 0,
    memory: bool = True,
    profile: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Times settings against the unpatched model, all in one run.

    Args:
        model: unpatched; left as it is. It is run in eval mode, without gradients.
        images: one batch [B, C, H, W]; for methods that keep more of difficult images it should hold real ones.
        settings: each a `Setting`, a method, or (method, parameters).
        pairs: timed batches of every model, 20 or more for a result to quote, 5 at least.
        warmup: untimed batches of every model.
        dtype: "fp32", "bf16", "fp16" or a torch type; `None` = the model's own.
        device: `None` = the model's own.
        threads: of torch's CPU operators; `None` = as set. Set back afterwards.
        name: of the model, for the records.
        seed: of the bootstrap.
        memory: whether to measure peak memory (on the CPU a process for each setting, some seconds each).
        profile: whether to measure the share of the reduction step.
        progress: called with (rounds done, rounds).

    Returns:
        One result a setting, in order.

    Raises:
        ConfigError: too few pairs, an unknown type, a patched model, no setting.
        UnsupportedModelError: a method does not work on the model.
    """
    chosen = [Setting.of(value) for value in settings]
    if not chosen:
        raise ConfigError("nothing to measure: name at least one method")
    if pairs < FEWEST_PAIRS:
        raise ConfigError(f"an interval from {pairs} pairs says nothing; take {PAIRS} or more ({FEWEST_PAIRS} at least)")
    if run_of(model) is not None:
        raise ConfigError("measure patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    with _threads(threads), evaluating(model):
        base = placed(model, dtype, device)
        images = images.to(next(base.parameters()))
        height, width = images.shape[-2:]
        size = (images.shape[1], height, width)
        patched = [setting.apply(twin(base), size) for setting in chosen]
        peaks = peak_memory(base, images, [Setting(), *chosen]) if memory else None
        kernels = [attention_kernel(m, images) for m in (base, *patched)]  # a pass of each: the costs below describe it
        with torch.inference_mode():
            costs = [pass_cost(m, size) for m in patched]
            shares = [reduction_share(m, images) if profile else None for m in patched]
            times, plain = _interleave([base, *patched], images, pairs, warmup, progress)
        check = _baseline_check(times[0], plain)
        common: dict[str, Any] = {
            "model": name or model_name(model),
            "backend": backend(model),
            "dtype": str(images.dtype).removeprefix("torch."),
            "device": str(images.device),
            "device_name": device_name(images.device),
            "threads": torch.get_num_threads(),
            "batch_size": len(images),
            "img_size": int(width),
            "pairs": pairs,
            "seed": seed,
            "versions": versions(),
            "baseline_check": check,
        }
        return [
            Result(
                method=method_name(patched[i]),
                setting=chosen[i].title,
                params=resolved_params(patched[i]),
                kernel={"base": kernels[0], "patched": kernels[i + 1]},
                peak_memory_mb=None if peaks is None else {"base": peaks[0], "patched": peaks[i + 1]},
                reduction_share=shares[i],
                **costs[i].fields(),
                **compare(times[0], times[i + 1], costs[i].implied_speedup, len(images), seed),
                **common,
            )
            for i in range(len(chosen))
        ]


def compare(base: Sequence[float], patched: Sequence[float], implied: float, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Step times in seconds, pair by pair, and the speed-up that the MACs imply -> the timing fields of a `Result`."""
    speedup = paired_ratio(base, patched, seed=seed)
    achieved = speedup.scaled(1 / implied)
    step = {"base": _median(base), "patched": _median(patched)}
    return {
        "samples_per_sec": {key: batch_size / value for key, value in step.items()},
        "step_time_ms": {key: 1000 * value for key, value in step.items()},
        "spread": {"base": spread(base), "patched": spread(patched)},
        "speedup": speedup.point,
        "speedup_ci": speedup.ends,
        "achieved": achieved.point,
        "achieved_ci": achieved.ends,
        "slower": speedup.high is not None and speedup.high < 1,
        "verdict": verdict(speedup, achieved),
    }


def verdict(speedup: Interval, achieved: Interval) -> str:
    """What the interval supports, in words. More than the MACs imply is possible (memory traffic), but wants an explanation."""
    if speedup.low is None or speedup.high is None:
        return f"timed in fewer than {FEWEST} pairs, too few to tell ({speedup.point:.2f}x)"
    if speedup.high < 1:
        return f"SLOWER than unpatched ({speedup.point:.2f}x)"
    if speedup.low <= 1:
        return f"no measurable difference to unpatched ({speedup.point:.2f}x)"
    beyond = "; more than its MACs imply" if achieved.low is not None and achieved.low > 1 else ""
    return f"faster than unpatched ({speedup.point:.2f}x){beyond}"


def attention_kernel(model: nn.Module, images: Tensor) -> str:
    """Runs the model once and names the attention kernels with their number of blocks: "flash (cpu) x12"."""
    kernels = [block.kernel or "-" for tower in vtok.info(model, probe=images).towers for block in tower.blocks]
    return ", ".join(f"{kernel} x{kernels.count(kernel)}" for kernel in dict.fromkeys(kernels))


def reduction_share(model: nn.Module, images: Tensor) -> float:
    """Part of the forward pass spent in the reduction step, by torch's profiler, in passes that are not timed otherwise."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its own progress, and missing GPUs, on stderr
    cuda = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.no_grad(), watched_reduction(model, lambda _: record_function("vtok.core.reduction")):
        model(images)
        with profiler(activities=activities) as recorded:
            for _ in range(_PROFILED):
                with record_function("vtok.forward"):
                    model(images)
            synchronise(images.device)
    spent = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in recorded.key_averages()}
    return spent.get("vtok.core.reduction", 0.0) / spent["vtok.forward"]


def _interleave(
    models: Sequence[nn.Module],
    images: Tensor,
    pairs: int,
    warmup: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[list[float]], list[float]]:
    """(seconds of every batch of every model, seconds of the plain loop's batches)."""
    for model in models:
        for _ in range(warmup):
            model(images)
    times: list[list[float]] = [[] for _ in models]
    plain: list[float] = []
    stretch, order = -(-pairs // _PLAIN_BLOCKS), random.Random(0)
    for done in range(pairs):
        if done % stretch == 0:
            models[0](images)
            plain += [_timed(models[0], images) for _ in range(stretch)]
        for i in order.sample(range(len(models)), len(models)):
            models[i](images)
            times[i].append(_timed(models[i], images))
        if progress is not None:
            progress(done + 1, pairs)
    return times, plain


def _timed(model: nn.Module, images: Tensor) -> float:
    synchronise(images.device)
    start = time.perf_counter()
    model(images)
    synchronise(images.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _baseline_check(interleaved: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    ratio = _median(interleaved) / _median(plain)
    return {"plain_ms": 1000 * _median(plain), "ratio": ratio, "ok": abs(ratio - 1) <= BASELINE_TOLERANCE}


def _median(values: Sequence[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def device_name(device: torch.device) -> str:
    """What a device calls itself: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
