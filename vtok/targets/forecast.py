"""How fast a method will be on this device: whole passes of a tower, unpatched and patched, timed for about a second.

MACs do not say it: at small widths and batches a pass is a few hundred small operators, and a method adds operators of its own.
Passes are timed at the batch asked for where they are short. Where they are long, two smaller batches are timed, and a line is
drawn through them: a pass costs something whatever the batch, and something for every image. In seconds of one CPU
thread, on widths of 48 to 384, what was timed at its own batch came within 7 % of what `vtok bench` then measured; what was
extrapolated was 12 to 25 % too low: unpatched passes lose more by large batches than a line knows. Wherever both intervals were
clear of 1 they lay on the same side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import comb
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vtok.cost.encoder import Estimate
from vtok.errors import ConfigError, VtokError, brief, shown
from vtok.patches.block import ReducingBlock
from vtok.reports.forecast import Forecast
from vtok.targets.lifecycle import call, evaluated, unpatch, weight_sharing_copy

SECONDS = 1.0  # of timing, begun rounds and warming up not counted
LONGEST = 0.15  # seconds of an unpatched pass that is timed, if a smaller batch makes it so short
FEWEST, MOST = 6, 60  # rounds; fewer than 6 have no 95 % interval
_WATCHED = 3  # passes in which decisions and moves are timed
_LEVEL = 0.95
clock = time.perf_counter


def forecast(
    module: nn.Module,
    install: Callable[[nn.Module], None],
    batch_size: int,
    images: Tensor | Mapping[str, Any],
    cost: Estimate,
) -> Forecast:
    """Times a tower with and without methods.

    Args:
        module: the tower; left as it is, but hooks on its modules run in copies, too.
        install: patches a copy of it.
        batch_size: of the pass to foresee.
        images: [B, C, H, W], as the tower takes them; repeated to fill a batch. Or a whole batch by name: it alone is timed.
        cost: what methods leave of the MACs.

    Raises:
        ConfigError: it has no weights to run with, or cannot run the images.
    """
    first = next(module.parameters())
    if first.is_meta:
        raise ConfigError(
            "batch_size asks for times, and this model holds no weights (device 'meta'): load it, random weights will do, or "
            "leave batch_size out"
        )
    base = unpatch(weight_sharing_copy(module))
    patched = weight_sharing_copy(base)
    install(patched)
    batch_of = _batches(images, batch_size, first)

    def seconds(model: nn.Module, count: int) -> float:
        batch = batch_of(count)
        _synchronise(first.device)
        start = clock()
        call(model, batch)
        _synchronise(first.device)
        return clock() - start

    drawing = torch.random.fork_rng([first.device] if first.device.type == "cuda" else [])  # some models draw in every pass
    with evaluated(base), evaluated(patched), torch.inference_mode(), drawing:
        whole = isinstance(images, Mapping)
        try:
            seconds(base, batch_size if whole else 1)
        except VtokError:
            raise
        except Exception as error:  # upstream's, of any kind
            what = "the calibration inputs" if isinstance(images, Mapping) else f"images of {list(images.shape[1:])}"
            raise ConfigError(
                f"{type(module).__name__} cannot run {what} ({type(error).__name__}: {brief(error)}); pass as calibration "
                "what it takes, or leave batch_size out"
            ) from error
        largest = batch_size if whole else _largest(batch_size, lambda count: seconds(base, count))
        sizes = (largest,) if largest in (1, batch_size) else (largest // 2, largest)
        for count in sizes:
            seconds(patched, count)
        ratios: list[float] = []
        begun = clock()
        while len(ratios) < FEWEST or (len(ratios) < MOST and clock() - begun < SECONDS):
            pair = (base, patched) if len(ratios) % 2 else (patched, base)
            took: dict[tuple[bool, int], float] = {}
            for model in pair:
                seconds(model, largest)  # leaves heap and caches as they are where this model alone is served
                took |= {(model is patched, count): seconds(model, count) for count in reversed(sizes)}
            alone, shorter = (_at(batch_size, [(n, took[kind, n]) for n in sizes]) for kind in (False, True))
            ratios.append(alone / shorter)
        steps, passes = _step_times(patched, lambda: seconds(patched, largest), first.device)
    low, high = median_interval(ratios)
    return Forecast(
        batch_size=batch_size,
        timed=sizes,
        speedup=median(ratios),
        low=low,
        high=high,
        step_ms=1000 * steps,
        patched_ms=1000 * passes,
        steps=sum(row.place is not None for row in cost.rows),
        saved=1 - 1 / cost.implied_speedup,
        rounds=len(ratios),
        device=first.device.type,
        threads=torch.get_num_threads(),
    )


def _batches(images: Tensor | Mapping[str, Any], batch_size: int, like: Tensor) -> Callable[[int], Any]:
    """What gives a batch of so many images, on the device of `like` and in its type."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    if isinstance(images, Mapping):
        counts = {len(value) for value in images.values() if isinstance(value, Tensor) and value.ndim}
        if counts != {batch_size}:
            raise ConfigError(
                f"calibration by name is timed as it is: its tensors must have {batch_size} rows, as batch_size says, got "
                f"{', '.join(map(str, sorted(counts))) or 'none'}"
            )
        named = {name: moved(value) for name, value in images.items()}
        return lambda count: named
    pixels = moved(images)
    return lambda count: pixels.repeat(-(-count // len(pixels)), *[1] * (pixels.ndim - 1))[:count]


def checked_batch(batch_size: object) -> int:
    """The same number.

    Raises:
        ConfigError: it is none, or no batch has so many images.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is a number of images, 1 or more, got {shown(batch_size)}")
    return batch_size


def _largest(batch_size: int, seconds: Callable[[int], float]) -> int:
    """The largest batch whose pass is short enough to be timed over and over: `batch_size`, or a power of two below it."""
    count, took = 1, seconds(1)
    while count < batch_size:
        more = min(2 * count, batch_size)
        if took * more / count > LONGEST:
            break
        count, took = more, seconds(more)
    return count


def _at(batch_size: int, points: list[tuple[int, float]]) -> float:
    """Seconds of a pass, on the line through what was timed; a single batch stands for its share of images."""
    (before, less), (count, took) = points[0], points[-1]
    if count == before:
        return took * batch_size / count
    each = max((took - less) / (count - before), 0.0)
    return took + (batch_size - count) * each


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a median, whatever the distribution: two of the values themselves, as far from both ends as may be.

    Args:
        values: 6 or more independent ones; of fewer it is all that they span.
    """
    ordered, n, outside, rank = sorted(values), len(values), 0.0, 0
    while rank < (n - 1) // 2:
        outside += 2 * comb(n, rank) / 2**n
        if outside > 1 - _LEVEL:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def _step_times(patched: nn.Module, one_pass: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Seconds of a patched pass spent deciding and moving, and those of the whole pass: medians of a few passes."""
    spent: list[float] = []
    parts, wholes = [], []
    with _timed_steps(patched, spent, device):
        for _ in range(_WATCHED):
            spent.clear()
            wholes.append(one_pass())
            parts.append(sum(spent))
    return median(parts), median(wholes)


@contextmanager
def _timed_steps(patched: nn.Module, spent: list[float], device: torch.device) -> Iterator[None]:
    """Inside, seconds of every decision and every move are appended to `spent`."""
    links = [module._vtok for module in patched.modules() if isinstance(module, ReducingBlock)]

    def watch(step: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object) -> object:
            _synchronise(device)
            start = clock()
            out = step(*args)
            _synchronise(device)
            spent.append(clock() - start)
            return out

        return watched

    try:
        for link in links:
            for name in ("decide", "move"):
                link.__dict__[name] = watch(getattr(link, name))
        yield
    finally:
        for link in links:
            for name in ("decide", "move"):
                link.__dict__.pop(name, None)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
