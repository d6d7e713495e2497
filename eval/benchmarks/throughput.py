"""Speed of patched models against the unpatched one: what `vtok bench` measures.

All models of a run are timed batch by batch in rounds of random order, so that each patched batch has an unpatched partner
close in time. Every timed batch follows an untimed one of the same model: heap and caches are then as they are when that model
alone is served (on CPUs, the allocator's page faults after a change of model are worth several per cent). The models are
separate module trees over the same parameters. A plain loop over the unpatched model must agree with its interleaved times
within 3 % (`baseline_check`).

What was measured: assets/docs/results/throughput.md in the repository.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, shown
from vtok.eval.benchmarks.flops import watched_reduction
from vtok.eval.benchmarks.memory import peak_memory
from vtok.eval.benchmarks.programs import Change, prepare
from vtok.eval.benchmarks.result import Result
from vtok.eval.common.settings import (
    Setting,
    backend,
    evaluating,
    method_name,
    model_name,
    moved,
    pass_cost,
    pixels_of,
    resolved_params,
    to_device,
    versions,
    weight_sharing_copy,
)
from vtok.eval.common.statistics import FEWEST, Interval, paired_ratio, spread
from vtok.targets.lifecycle import call
from vtok.targets.resolve import run_of

PAIRS, FEWEST_PAIRS, WARMUP = 20, FEWEST, 3
BASELINE_TOLERANCE = 0.03
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_BLOCKS = 4  # the plain loop runs in as many stretches, spread over the run
_PROFILED = 3  # forward passes under the profiler


def measure(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
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
    compiler: Callable[[nn.Module, Any], tuple[Callable[[Any], Any], dict[str, Any]]] | None = None,
    beside: Mapping[str, nn.Module | Change] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Times settings against the unpatched model, all in one run.

    Args:
        model: unpatched; left as it is. It is run in eval mode, without gradients.
        images: one batch [B, C, H, W], or a mapping that holds one, as a processor makes it: the model then takes it by name.
            For methods that keep more of difficult images it should hold real ones.
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
        compiler: compiles all models before they are timed (`vtok.eval.benchmarks.compiled.Compiler`); memory, kernels and the
            share of the reduction are those of the models as they are.
        beside: models of other programs, timed in the same rounds: name of the row -> a model, or a function that is given a
            copy of the unpatched one and returns it changed (`vtok.eval.benchmarks.programs`).
        progress: called with (rounds done, rounds).

    Returns:
        One result a setting, in order, and one a model of another program.

    Raises:
        ConfigError: too few pairs, an unknown type, a patched model, no setting, another program that fails.
        UnsupportedModelError: a method does not work on the model.
    """
    chosen = checked_settings(settings, pairs)
    if run_of(model) is not None:
        raise ConfigError("measure patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    with ExitStack() as modes:
        modes.enter_context(threads_set(threads))
        for one in (model, *(other for other in (beside or {}).values() if isinstance(other, nn.Module))):
            modes.enter_context(evaluating(one))
        base = to_device(model, dtype_of(dtype), device)
        images = moved(images, next(base.parameters()))
        pixels = pixels_of(images)
        size = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        patched = [setting.apply(weight_sharing_copy(base), size) for setting in chosen]
        peaks = peak_memory(base, images, [Setting(), *chosen]) if memory else None
        kernels = [attention_kernel(m, images) for m in (base, *patched)]  # a pass of each: the costs below describe it
        others = prepare(base, images, beside or {}, pass_cost(base, size))
        with torch.inference_mode():
            costs = [pass_cost(m, size) for m in patched]
            shares = [reduction_share(m, images) if profile else None for m in patched]
            ran: list[Any] = [base, *patched, *(other.model for other in others)]
            compiled: list[Any] = [None] * len(ran)
            if compiler is not None:
                ran, compiled = (list(column) for column in zip(*(compiler(one, images) for one in ran)))
            for one in ran:
                for _ in range(warmup):
                    call(one, images)
            times, plain = interleave(ran, pairs, lambda one: call(one, images), pixels.device, progress)
        common = described_run(next(base.parameters()), len(pixels), pairs, seed) | {
            "model": name or model_name(model),
            "backend": backend(model),
            "img_size": int(size[2]),
            "baseline_check": baseline_check(times[0], plain),
        }
        rows: list[dict[str, Any]] = [
            {
                "method": method_name(patched[i]),
                "setting": chosen[i].title,
                "params": resolved_params(patched[i]),
                "reduction_share": shares[i],
                "peak_memory_mb": None if peaks is None else {"base": peaks[0], "patched": peaks[i + 1]},
                **costs[i].fields(),
            }
            for i in range(len(chosen))
        ]
        unseen: dict[str, Any] = {"params": {}, "reduction_share": None, "peak_memory_mb": None}
        rows += [{"method": other.name, "setting": other.name, **unseen, **other.fields} for other in others]
        kernels += [other.kernel for other in others]
        return [
            Result(
                kernel={"base": kernels[0], "patched": kernels[i]},
                compiled=None if compiler is None else {"base": compiled[0], "patched": compiled[i]},
                **compare(times[0], times[i], row["implied_speedup"], len(pixels), seed),
                **row,
                **common,
            )
            for i, row in enumerate(rows, start=1)
        ]


def checked_settings(settings: Sequence[Any], pairs: int) -> list[Setting]:
    """What is to be timed; a `ConfigError` if nothing is, or too few times for an interval."""
    chosen = [Setting.of(value) for value in settings]
    if not chosen:
        raise ConfigError("nothing to measure: name at least one method")
    if pairs < FEWEST_PAIRS:
        raise ConfigError(f"an interval from {pairs} pairs says nothing; take {PAIRS} or more ({FEWEST_PAIRS} at least)")
    return chosen


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type by its short name; a `ConfigError` if there is none."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def described_run(first: Tensor, batch_size: int, pairs: int, seed: int) -> dict[str, Any]:
    """What all results of a run share; `first` is a parameter of the model."""
    return {
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "device_name": device_name(first.device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "pairs": pairs,
        "seed": seed,
        "versions": versions(),
    }


def compare(base: Sequence[float], patched: Sequence[float], implied: float, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Step times in seconds, pair by pair, and the speed-up that the MACs imply -> the timing fields of a `Result`."""
    speedup = paired_ratio(base, patched, seed=seed)
    achieved = speedup.scaled(1 / implied)
    step = {"base": median(base), "patched": median(patched)}
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


def attention_kernel(model: nn.Module, images: Tensor | Mapping[str, Any]) -> str:
    """Runs the model once and names the attention kernels with their number of blocks: "flash (cpu) x12"."""
    kernels = [block.kernel or "-" for tower in vtok.info(model, probe=images).towers for block in tower.blocks]
    return ", ".join(f"{kernel} x{kernels.count(kernel)}" for kernel in dict.fromkeys(kernels))


def reduction_share(model: nn.Module, images: Tensor | Mapping[str, Any]) -> float:
    """Part of the forward pass spent in the reduction step, by torch's profiler, in passes that are not timed otherwise."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its own progress, and missing GPUs, on stderr
    device = pixels_of(images).device
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.no_grad(), watched_reduction(model, lambda _: record_function("vtok.core.reduction")):
        call(model, images)
        with profiler(activities=activities) as recorded:
            for _ in range(_PROFILED):
                with record_function("vtok.forward"):
                    call(model, images)
            synchronise(device)
    spent = {event.key: event.device_time_total if cuda else event.cpu_time_total for event in recorded.key_averages()}
    return spent.get("vtok.core.reduction", 0.0) / spent["vtok.forward"]


def interleave(
    models: Sequence[Any],
    pairs: int,
    once: Callable[[Any], Any],
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    then: Callable[[int], None] = lambda number: None,
) -> tuple[list[list[float]], list[float]]:
    """(seconds of every batch of every model, seconds of the plain loop's batches over the first one).

    Args:
        models: modules, or whatever `once` runs on the batch; warm already.
        then: called with the number of a model behind each of its timed batches.
    """
    times: list[list[float]] = [[] for _ in models]
    plain: list[float] = []

    def timed(model: Any) -> float:
        return seconds_of(lambda: once(model), device)

    stretch, order = -(-pairs // _PLAIN_BLOCKS), random.Random(0)
    for done in range(pairs):
        if done % stretch == 0:
            once(models[0])
            plain += [timed(models[0]) for _ in range(stretch)]
        for i in order.sample(range(len(models)), len(models)):
            once(models[i])
            times[i].append(timed(models[i]))
            then(i)
        if progress is not None:
            progress(done + 1, pairs)
    return times, plain


def seconds_of(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one call, by the GPU's own clock where it runs on one; `None` = the CPU."""
    device = device or torch.device("cpu")
    synchronise(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def clocked(spent: list[float], device: torch.device) -> Callable[[Any], AbstractContextManager[None]]:
    """For `watched_reduction` and `watched_prompt`: adds the seconds of what they watch to the last of `spent`."""

    @contextmanager
    def clock(_: Any) -> Iterator[None]:
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        spent[-1] += time.perf_counter() - start

    return clock


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def baseline_check(interleaved: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Whether interleaved times agree with those of a plain loop."""
    ratio = median(interleaved) / median(plain)
    return {"plain_ms": 1000 * median(plain), "ratio": ratio, "ok": abs(ratio - 1) <= BASELINE_TOLERANCE}


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
def threads_set(count: int | None) -> Iterator[None]:
    """So many CPU threads inside (`None` = as set), and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
