"""How time and memory of every method grow with the number of tokens, beside the attention that it saves.

Encoders: a random ViT of a few blocks; timed is what deciding and moving take in a pass, beside the attention of all blocks
unpatched. Prompts: the choice among visual tokens (`vtok.eval.benchmarks.selectors`), beside the products of a 7B prefill.
Peaks are bytes of the tensors that a step makes.

What was measured: assets/docs/results/growth.md in the repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import vtok
from vtok.errors import VtokError
from vtok.eval.benchmarks.flops import watched_reduction
from vtok.eval.benchmarks.selectors import Held, Synthetic, configs
from vtok.eval.benchmarks.selectors import measure as measure_choices
from vtok.eval.benchmarks.throughput import clocked, seconds_of
from vtok.eval.report.tables import Column, Table
from vtok.registry import METHODS
from vtok.writing import replacing

TOKENS = (256, 1024, 4096, 16384)
VISUAL = (576, 2880, 8192, 32768)
ATTENTION = "attention"
DEPTH, HEADS, PATCH = 4, 6, 4
_MIB = 2**20


class Grown(NamedTuple):
    """One method at one number of tokens.

    Attributes:
        method: its name, `ATTENTION` for what it is compared with.
        tokens: patches of the image, or visual tokens of the prompt.
        seconds: the fastest of the calls.
        peak: bytes of the tensors that it makes.
        share: of the attention of the unpatched pass (time), or of a 7B prefill (products).
        refused: why it does not run here; everything else is 0 then.
    """

    method: str
    tokens: int
    seconds: float = 0.0
    peak: int = 0
    share: float = 0.0
    refused: str = ""


def _encoder(tokens: int, width: int, seed: int) -> nn.Module:
    """A random ViT whose image has so many patches; the side of their grid is rounded down."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    side = PATCH * math.isqrt(tokens)
    return VisionTransformer(side, PATCH, embed_dim=width, depth=DEPTH, num_heads=HEADS, num_classes=0).eval()


def _attention(tokens: int, width: int, calls: int) -> Grown:
    """Attention of all blocks of the unpatched encoder, as torch computes it."""
    q = torch.randn(3, 1, HEADS, tokens, width // HEADS)
    with torch.inference_mode():
        with Held() as held:
            F.scaled_dot_product_attention(*q)
        seconds = [seconds_of(lambda: F.scaled_dot_product_attention(*q)) for _ in range(calls)]
    return Grown(ATTENTION, tokens, DEPTH * min(seconds), held.peak, 1.0)


def _step(model: nn.Module, name: str, tokens: int, calls: int, beside: float) -> Grown:
    """What a method's reduction takes in one pass."""
    side = PATCH * math.isqrt(tokens)
    image, spent, peaks = torch.randn(1, 3, side, side), [0.0], [0]

    @contextmanager
    def hold(_: Any) -> Iterator[None]:
        with Held() as held:
            yield
        peaks.append(held.peak)

    try:
        with torch.inference_mode(), vtok.patched(model, name):
            with watched_reduction(model, hold):
                model(image)
            with watched_reduction(model, clocked(spent, image.device)):
                for _ in range(calls):
                    spent.append(0.0)
                    model(image)
    except VtokError as error:
        return Grown(name, tokens, refused=str(error))
    seconds = min(spent[1:])
    return Grown(name, tokens, seconds, max(peaks), seconds / beside)


def measure_encoders(
    tokens: Sequence[int] = TOKENS,
    width: int = 384,
    calls: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Grown]:
    """Every method for encoders (or those named) at its default, at every number of tokens, attention first.

    Args:
        tokens: patches of one image, each a square number or rounded down to one.
        calls: of which the fastest counts, after one that warms up.
        progress: called with steps done and steps in all.
    """
    every = [name for name in METHODS.names() if getattr(METHODS.get(name), "build", None) is not None]
    names = every if methods is None else list(methods)
    found: list[Grown] = []
    for count in tokens:
        count = math.isqrt(count) ** 2
        model = _encoder(count, width, seed)
        attention = _attention(count + 1, width, calls)._replace(tokens=count)
        found.append(attention)
        for name in names:
            if vtok.supports(model).methods.get(name, "") is None:
                found.append(_step(model, name, count, calls, attention.seconds))
            if progress is not None:
                progress(len(found), len(tokens) * (len(names) + 1))
    return found


def measure_prompts(
    tokens: Sequence[int] = VISUAL,
    width: int = 1024,
    calls: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Grown]:
    """Every method for prompts that keeps a tenth of the visual tokens of one image, at every number of them.

    Args:
        tokens: of one view, each a square number or rounded down to one.
        calls: of which the median counts, after one that warms up.
        progress: called with sizes done and sizes in all.
    """
    found: list[Grown] = []
    for i, count in enumerate(tokens):
        count = math.isqrt(count) ** 2
        prompt = Synthetic.of(count, 1, width, False, seed, "cpu")
        for r in measure_choices(configs(0.1), prompt, calls):
            if not r.refused:
                found.append(Grown(str(r.method.name), count, r.seconds, r.peak, r.share))
        if progress is not None:
            progress(i + 1, len(tokens))
    return found


def exponent(results: Sequence[Grown], method: str, value: Callable[[Grown], float]) -> float | None:
    """x of growth as tokens^x, between the two largest sizes at which a method ran; `None` = it ran at fewer."""
    ran = [r for r in results if r.method == method and not r.refused and value(r) > 0]
    if len(ran) < 2:
        return None
    small, large = ran[-2:]
    return math.log(value(large) / value(small)) / math.log(large.tokens / small.tokens)


def table(results: Sequence[Grown], share: str, title: str) -> Table:
    """A line a method: milliseconds and MiB at every size, and how both grow at the end; `share` is what `Grown.share` is a
    part of."""
    sizes = sorted({r.tokens for r in results})
    at = {(r.method, r.tokens): r for r in results}

    def cell(name: str, size: int) -> str:
        r = at.get((name, size))
        return "-" if r is None else "refused" if r.refused else f"{_plain(_milliseconds(r))} / {_plain(_mebibytes(r))}"

    def part(name: str) -> str:
        ran = [r for r in results if r.method == name and not r.refused]
        ends = [ran[0], ran[-1]] if len(ran) > 1 else ran
        return "-" if name == ATTENTION else " .. ".join(f"{r.share:.2%}" for r in ends)

    def grows(name: str) -> str:
        found = (exponent(results, name, value) for value in (_milliseconds, _mebibytes))
        return " / ".join("-" if x is None else f"{x:.1f}" for x in found)

    columns = [Column("method", lambda name: name, left=True)]
    columns += [Column(f"{size:,}", partial(cell, size=size)) for size in sizes]
    columns += [Column(f"of {share}", part), Column("grows as N^", grows)]
    caption = f"ms / peak MiB of one image; of {share}: at the smallest and the largest size"
    return Table.of(dict.fromkeys(r.method for r in results), columns, title=title, caption=caption)


def _plain(value: float) -> str:
    """Three digits, whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(r: Grown) -> float:
    return 1000 * r.seconds


def _mebibytes(r: Grown) -> float:
    return r.peak / _MIB


def plot(kinds: Sequence[tuple[str, Sequence[Grown]]], path: Path) -> None:
    """Writes one picture: a row a kind of measurement, time on the left and memory on the right, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4 * len(kinds)), layout="constrained")
    for row, (title, results) in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds):
        for axis, label, value in ((row[0], "milliseconds", _milliseconds), (row[1], "peak MiB", _mebibytes)):
            for i, name in enumerate(dict.fromkeys(r.method for r in results)):
                ran = [(r.tokens, value(r)) for r in results if r.method == name and not r.refused and value(r) > 0]
                look: dict[str, Any] = {"color": "black", "lw": 2.5} if name == ATTENTION else {"color": f"C{i % 10}"}
                axis.plot(*zip(*ran), marker="os^vD"[i // 10 % 5], ms=4, label=name, **look) if ran else None
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=title)
            axis.grid(alpha=0.3)
        row[1].legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, bbox_inches="tight")
