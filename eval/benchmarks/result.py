"""Results of benchmarks: their fields, as JSON, and as tables for a terminal or, in GitHub Markdown, for a README."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from vtok.eval.common.statistics import in_brackets
from vtok.eval.report.tables import Column, Table


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One setting against the unpatched model. Mappings have the keys `base` (unpatched) and `patched` unless said otherwise.

    Attributes:
        model: name.
        method: name(s) of the method.
        setting: what was asked for, e.g. "tome(r=13)".
        params: parameters of the method(s), resolved.
        gmacs: multiply-accumulates: `base` and `model` (patched), and the reduction's own, which of another program is part of
            `model`.
        implied_speedup: base / model, the reduction's own MACs left out.
        speedup, speedup_ci: median over the pairs of unpatched / patched time, and its 95 % interval (percentile bootstrap over
            the pairs); `None` = from too few for one.
        achieved, achieved_ci: speedup / implied_speedup.
        verdict: what the interval supports, in words.
        dtype, device, device_name, threads, batch_size, pairs, seed: of the run.
        versions: of python, torch, vtok and the backends.
        baseline_check: `plain_ms` (median of a plain loop), `ratio` (interleaved / plain), `ok` (within 3 %).
    """

    model: str
    method: str
    setting: str
    params: Any
    gmacs: dict[str, float]
    implied_speedup: float
    speedup: float
    speedup_ci: list[float] | None
    achieved: float
    achieved_ci: list[float] | None
    verdict: str
    dtype: str
    device: str
    device_name: str
    threads: int
    batch_size: int
    pairs: int
    seed: int
    versions: dict[str, str]
    baseline_check: dict[str, Any]

    columns: ClassVar[tuple[Column, ...]]

    @property
    def is_slower(self) -> bool:
        """Whether the whole interval of the speed-up lies below 1."""
        return self.speedup_ci is not None and self.speedup_ci[1] < 1

    @property
    def speed(self) -> str:
        """The speed-up with its interval, marked where it is none."""
        return interval(self.speedup, self.speedup_ci) + (" SLOWER" if self.is_slower else "")

    @property
    def software(self) -> str:
        """Versions in a line."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    @property
    def warning(self) -> str:
        """What is said where the unpatched times do not agree with those of a plain loop; "" where they do."""
        check = self.baseline_check
        return "" if check["ok"] else f"Warning: unreliable timing (loops differ by {100 * abs(check['ratio'] - 1):.0f} %)"

    def trust(self, digits: int) -> str:
        """Whether the unpatched times agree with those of a plain loop; the loop's time in ms with so many digits."""
        check = self.baseline_check
        found = f". {self.warning}" if self.warning else ": agrees"
        return f"{check['plain_ms']:.{digits}f} ms, ratio {check['ratio']:.3f}{found}"

    def caption(self) -> str:
        """What all settings of a run share: model, machine, versions, and whether the baseline can be trusted."""
        raise NotImplementedError


def interval(point: float, ends: Sequence[float] | None, unit: str = "x") -> str:
    """ "1.52x [1.48, 1.55]", or "1.52x" where no interval is known."""
    return f"{point:.2f}{unit}{in_brackets(ends)}"


def arrow(values: dict[str, float], digits: int, ends: tuple[str, str] = ("base", "patched")) -> str:
    """ "12.5 -> 8.1"."""
    return " -> ".join(f"{values[end]:.{digits}f}" for end in ends)


@dataclass(frozen=True, kw_only=True)
class Result(Timed):
    """One setting of a vision encoder.

    Attributes:
        backend: adapter.
        tokens: `in`, `out`, `mean_per_layer` (mean over images of the real tokens that leave each block); of another program
            the last two are `None` where they cannot be seen.
        gmacs: per image: `base`, `model` (patched), `computed` (padding included), `pruner` (the reduction's own;
            missing of another program, whose pass is counted as a whole).
        gflops: the same, 2 x.
        samples_per_sec: images a second, from median step times.
        step_time_ms: median time of a batch.
        spread: distance of the quartiles of the step times, as a share of their median.
        slower: whether the whole interval of the speed-up lies below 1.
        kernel: what computed attention, by number of blocks.
        img_size: in pixels.
        peak_memory_mb: see `vtok.eval.benchmarks.memory`; `None` if it was left out.
        reduction_share: part of the forward pass spent deciding and moving tokens, by the profiler, whose own cost per operator
            makes it an upper bound; `None` if it was left out.
        compiled: of the unpatched and the patched model what torch.compile took, see `vtok.eval.benchmarks.compiled`; `None` if
            they were not compiled.
    """

    backend: str
    tokens: dict[str, Any]
    gflops: dict[str, float]
    samples_per_sec: dict[str, float]
    step_time_ms: dict[str, float]
    spread: dict[str, float]
    slower: bool
    kernel: dict[str, str]
    img_size: int
    peak_memory_mb: dict[str, float] | None
    reduction_share: float | None
    compiled: dict[str, Any] | None = None

    def caption(self) -> str:
        return (
            f"{self.model}, {self.img_size} px, batch {self.batch_size}, {self.dtype}, {self.device} ({self.device_name}), "
            f"{self.threads} threads, {self.pairs} interleaved pairs; {self.software}. Unpatched "
            f"{self.step_time_ms['base']:.1f} ms a batch; a plain loop takes {self.trust(1)}. GMACs and GFLOPs are per image: "
            f"unpatched -> patched + the reduction's own.{_compiling(self.compiled)}"
        )


@dataclass(frozen=True, kw_only=True)
class PromptResult(Timed):
    """One setting of a vision-language model; `speedup` is that of the prefill.

    Attributes:
        visual_tokens: a prompt's, as they enter each decoder layer (mean over rows): `in` (unpatched) and `per_layer`.
        text_tokens: other tokens of a prompt (mean over rows).
        gmacs: per prompt: `base`, `model` (patched), `selection` (the reduction's own), `tower`, `connector`, `llm` (patched);
            the tower is part of `implied_speedup`.
        prefill_ms: median time of a batch: images to the logits of the first answer token.
        selection_ms: median time of a batch spent deciding which tokens go, attention read for it included.
        selection_share: the same as a share of the unpatched prefill.
        first_token_ms: median time until generate() has the first token.
        decode_ms: median time of a batch's later tokens, each.
        decode_ratio, decode_ratio_ci: median over the pairs of unpatched / patched time a token, and its interval.
        kv_mb: of the KV cache per prompt, MB of 10^6 bytes, padding included.
        prefill_spread: distance of the quartiles of the prefill times, as a share of their median.
        new_tokens: of the answers.
        attention: implementation of the LLM.
        load: load average of the machine before the run; `None` where the system tells none.
        compiled: of the unpatched and the patched model what compiling the steps of an answer took, see
            `vtok.eval.benchmarks.compiled`; `None` if they were not compiled.
    """

    visual_tokens: dict[str, Any]
    text_tokens: float
    prefill_ms: dict[str, float]
    selection_ms: float
    selection_share: float
    first_token_ms: dict[str, float]
    decode_ms: dict[str, float]
    decode_ratio: float
    decode_ratio_ci: list[float] | None
    kv_mb: dict[str, float]
    prefill_spread: dict[str, float]
    new_tokens: int
    attention: str
    load: float | None
    compiled: dict[str, Any] | None = None

    def caption(self) -> str:
        load = "" if self.load is None else f" (load average before the run {self.load:.1f})"
        return (
            f"{self.model}, {self.visual_tokens['in']:.0f} visual and {self.text_tokens:.0f} other tokens, batch "
            f"{self.batch_size}, {self.dtype}, {self.attention} attention, {self.device} ({self.device_name}), {self.threads} "
            f"threads{load}, {self.pairs} interleaved pairs, answers of {self.new_tokens} tokens; {self.software}. Times are "
            "medians of a batch, unpatched -> patched; the vision tower is part of prefill, bound and first token. GMACs and "
            "KV MB (10^6 bytes) are per prompt; selection is time spent deciding, as a share of the unpatched prefill. A plain "
            f"loop over the unpatched model takes {self.trust(0)}.{_compiling(self.compiled)}"
        )


def _compiling(compiled: dict[str, Any] | None) -> str:
    """How the models were compiled; nothing if they were not."""
    if compiled is None:
        return ""
    base = compiled["base"]
    dynamic = {True: ", dynamic", False: ", static", None: ""}[base["dynamic"]]
    return f" Compiled (mode {base['mode']}{dynamic}): {_compilation(base)} unpatched."


def _compilation(took: dict[str, Any]) -> str:
    """ "31 s, 1 graph", with what else was compiled if anything was."""
    text = f"{took['seconds']:.0f} s, {took['graphs']} graph{'s' * (took['graphs'] != 1)}"
    text += f", {took['breaks']} breaks" if took["breaks"] else ""
    text += f", {took['again']} compiled again" if took["again"] else ""
    return text + (f", {took['other_batches']} for other batches" if took["other_batches"] else "")


def _tokens(r: Result) -> str:
    left = r.tokens["out"]
    if left is None:
        return "-"
    return f"{r.tokens['in']:.0f} -> {f'{left:.4g}' if isinstance(left, float) else left}"


def _macs(values: dict[str, float]) -> str:
    """ "4.608 -> 2.700 + 0.004"; of another program the sum alone is known."""
    return arrow(values, 3, ("base", "model")) + (f" + {values['pruner']:.3f}" if "pruner" in values else "")


def _layers(tokens: dict[str, Any]) -> str:
    """ "576 -> 58, 0 from layer 7"."""
    per_layer = tokens["per_layer"]
    text = f"{tokens['in']:.0f} -> {per_layer[0]:.4g}"
    for layer, (before, after) in enumerate(itertools.pairwise(per_layer), start=1):
        if after != before:
            text += f", {after:.4g} from layer {layer}"
    return text


def _kernels(r: Result) -> str:
    return r.kernel["patched"] if len(set(r.kernel.values())) == 1 else f"{r.kernel['base']} -> {r.kernel['patched']}"


_SETTING = Column("method", lambda r: r.setting, left=True)
_SPEED = (
    Column("speed-up [95 %]", lambda r: r.speed),
    Column("implied", lambda r: f"{r.implied_speedup:.2f}x"),
    Column("achieved [95 %]", lambda r: interval(r.achieved, r.achieved_ci, "")),
)
_COMPILED = Column("compiled", lambda r: "-" if r.compiled is None else _compilation(r.compiled["patched"]))
Result.columns = (
    _SETTING,
    Column("tokens", _tokens),
    Column("GMACs", lambda r: _macs(r.gmacs)),
    Column("GFLOPs (2x)", lambda r: _macs(r.gflops)),
    Column("images/s", lambda r: arrow(r.samples_per_sec, 1)),
    *_SPEED,
    Column("reduction", lambda r: "-" if r.reduction_share is None else f"{100 * r.reduction_share:.1f} %"),
    Column("memory MB", lambda r: "-" if r.peak_memory_mb is None else arrow(r.peak_memory_mb, 0)),
    Column("attention", _kernels),
    _COMPILED,
)
PromptResult.columns = (
    _SETTING,
    Column("visual tokens", lambda r: _layers(r.visual_tokens)),
    Column("GMACs", lambda r: f"{arrow(r.gmacs, 2, ('base', 'model'))} + {r.gmacs['selection']:.3f}"),
    Column("prefill ms", lambda r: arrow(r.prefill_ms, 0)),
    *_SPEED,
    Column("selection", lambda r: f"{100 * r.selection_share:.2f} %"),
    Column("first token ms", lambda r: arrow(r.first_token_ms, 0)),
    Column("decode ms/token", lambda r: arrow(r.decode_ms, 1)),
    Column("decode [95 %]", lambda r: interval(r.decode_ratio, r.decode_ratio_ci)),
    Column("KV MB", lambda r: arrow(r.kv_mb, 2)),
    _COMPILED,
)


def to_json(results: Sequence[Timed]) -> str:
    """A JSON list, plain values under the names of the fields."""
    return json.dumps([asdict(result) for result in results], indent=2)


def from_json(text: str) -> list[Timed]:
    """The inverse of `to_json`."""
    kinds = [(kind, {field.name for field in fields(kind)}) for kind in (Result, PromptResult)]
    return [next(kind for kind, names in kinds if set(values) <= names)(**values) for values in json.loads(text)]


def table(results: Sequence[Timed]) -> Table:
    """One line a result, without columns of what was not measured; settings slower than the unpatched model are red."""
    first = results[0]
    columns = [column for column in first.columns if any(column.cell(result) != "-" for result in results)]
    return Table.of(results, columns, caption=caption(results), style=lambda r: "red" if r.is_slower else None)


def caption(results: Sequence[Timed]) -> str:
    """What all results share, and what is different of those of other programs."""
    others = [r.setting for r in results if "pruner" not in r.gmacs and "selection" not in r.gmacs]
    told = f" MACs of {', '.join(others)} are counted in one pass, all that the program does included." if others else ""
    return results[0].caption() + told


def markdown(results: Sequence[Timed]) -> str:
    """A GitHub table with its caption under it and one sentence a setting on its speed."""
    words = [f"- {r.setting}: {r.verdict}." for r in results]
    return "\n".join([table(results).markdown(), "", caption(results), "", *words, ""])
