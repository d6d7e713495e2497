"""What vtok tells about a model: what is patched, what a method would cost, what can be patched. Plain text, no dependencies.

Counts are tokens (prefix included) per image; costs are multiply-accumulates (MACs) per image; 1 MAC = 2 FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtok.config import MethodConfig
from vtok.cost.budget import Budget
from vtok.cost.encoder import Estimate
from vtok.cost.prefill import PromptEstimate
from vtok.reports.forecast import Forecast
from vtok.reports.prompt import brief, cost_lines
from vtok.reports.text import costs, giga, keywords, listed, settings, table, tokens


@dataclass(frozen=True)
class PlanReport:
    """What a method would do to one tower. `str()` gives a table.

    Attributes:
        tower: class name.
        configs: the methods, with every number resolved.
        estimate: tokens and MACs per block.
        budget: if a budget chose the setting.
        num_patches: of the stated input size.
        forecast: how fast it will be on this device, where a batch size was given.
    """

    tower: str
    configs: tuple[MethodConfig, ...]
    estimate: Estimate
    budget: Budget | None
    num_patches: int
    forecast: Forecast | None = None

    @property
    def tokens(self) -> tuple[int | float, ...]:
        """Tokens after each block."""
        return tuple(row.tokens_out for row in self.estimate.rows)

    def __str__(self) -> str:
        e = self.estimate
        rows = [
            (
                f"block {r.block}" + (f" {r.place.value}" if r.place else ""),
                tokens(r.tokens_in),
                tokens(r.tokens_out),
                giga(r.macs),
                giga(r.reduction_macs),
            )
            for r in e.rows
        ]
        lines = [
            f"{self.tower}, {self.num_patches} patches: " + " + ".join(settings(c) for c in self.configs),
            table(("", "tokens in", "out", "GMACs", "reduction"), rows),
            costs(e),
        ]
        if not e.exact:
            lines.append("token counts depend on the image: these are upper bounds; pass calibration=images for means")
        if self.budget is not None:
            lines.append(str(self.budget))
        if self.forecast is not None:
            lines.append(str(self.forecast))
        return "\n".join([*lines, *(f"note: {told}" for config in self.configs if (told := config.advice()))])


@dataclass(frozen=True)
class BlockInfo:
    """One block of the last forward pass.

    Attributes:
        block: its number.
        site: where it reduces ("pre", "mid", "end"), or "".
        tokens_in: rows that entered, padding included.
        tokens_out: rows that left.
        per_image: real tokens that left, for each image; `None` where all images have `tokens_out`.
        kernel: what computed attention, if it was probed.
    """

    block: int
    site: str
    tokens_in: int
    tokens_out: int
    per_image: tuple[int, ...] | None = None
    kernel: str | None = None

    @property
    def mean_tokens(self) -> float:
        return self.tokens_out if self.per_image is None else sum(self.per_image) / len(self.per_image)


@dataclass(frozen=True)
class TowerInfo:
    """A tower and its last forward pass.

    Attributes:
        path: name in the model, "" = the model itself.
        tower: class name.
        configs: methods patched into it (empty: unpatched).
        blocks: of the last forward pass of this thread; empty before one.
        estimate: MACs of that pass, padding included. Behind `ats`, layers that look at one token at a time see no padding,
            and what was computed lies between the two.
        mean_estimate: MACs that the mean number of real tokens implies (differs where images are padded).
        budget: if a budget chose the setting.
        num_patches: of the input size that plans are made for.
        notes: what a user should know.
    """

    path: str
    tower: str
    configs: tuple[MethodConfig, ...]
    blocks: tuple[BlockInfo, ...] = ()
    estimate: Estimate | None = None
    mean_estimate: Estimate | None = None
    budget: Budget | None = None
    num_patches: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.path} ({self.tower})" if self.path else self.tower
        method = " + ".join(settings(c) for c in self.configs) or "not patched"
        lines = [f"{where}: {method}"]
        if self.budget is not None:
            lines.append(str(self.budget))
        if self.blocks:
            kernels = any(b.kernel for b in self.blocks)
            header = ["", "tokens in", "out", "mean"] + (["kernel"] if kernels else [])
            rows = [
                [
                    f"block {b.block}" + (f" {b.site}" if b.site else ""),
                    str(b.tokens_in),
                    str(b.tokens_out),
                    tokens(b.mean_tokens),
                ]
                + ([b.kernel or "-"] if kernels else [])
                for b in self.blocks
            ]
            lines.append(table(header, rows))
        elif self.configs:
            lines.append("no forward pass yet in this thread")
        if self.estimate is not None:
            lines.append(costs(self.estimate))
        if self.mean_estimate is not None:
            lines.append(f"by mean tokens, without padding: implied speed-up {self.mean_estimate.implied_speedup:.2f}x")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class PromptRow:
    """One place where a vision-language model dropped visual tokens.

    Attributes:
        place: "vision tower", "before the LLM" or "decoder layer k".
        tokens_in: visual tokens that arrived, for each row of the batch.
        tokens_out: visual tokens that went on.
    """

    place: str
    tokens_in: tuple[int, ...]
    tokens_out: tuple[int, ...]


@dataclass(frozen=True)
class PromptInfo:
    """A vision-language model and the last prompt with images that this thread gave it.

    Attributes:
        path: name in the model, "" = the model itself.
        model: class name.
        configs: methods patched into it (empty: unpatched).
        positions: "original" or "compact".
        rows: places where tokens were dropped, in order.
        text: other tokens of every row of the batch; empty before the first prompt.
        visual: visual tokens of every row, unshortened.
        estimate: tokens, MACs and KV bytes per prompt of that batch, padding included (in a tower with `ats` at most).
        mean_estimate: what the prompts cost alone on average (differs where rows are padded).
        budget: if a budget chose the setting.
        notes: what a user should know.
        shortened: whether some method acts on prompts, or shortens them from the vision tower.
    """

    path: str
    model: str
    configs: tuple[MethodConfig, ...]
    positions: str = "original"
    rows: tuple[PromptRow, ...] = ()
    text: tuple[int, ...] = ()
    visual: tuple[int, ...] = ()
    estimate: PromptEstimate | None = None
    mean_estimate: PromptEstimate | None = None
    budget: Budget | None = None
    notes: tuple[str, ...] = ()
    shortened: bool = True

    def __str__(self) -> str:
        where = f"{self.path} ({self.model})" if self.path else self.model
        if not self.configs:
            return f"{where}: not patched"
        lines = [f"{where}: {' + '.join(settings(c) for c in self.configs)}; {self.positions} positions"]
        if self.rows:
            cells = [(r.place, listed(r.tokens_in), listed(r.tokens_out)) for r in self.rows]
            lines.append(table(("", "visual tokens in", "out"), cells))
            lines.append(f"other tokens: {listed(self.text)}")
        elif self.text:
            lines.append("the last prompt kept all its visual tokens")
        elif self.shortened:
            lines.append("no prompt with images yet in this thread")
        else:
            lines.append("prompts keep their length")
        if self.budget is not None:
            lines.insert(1, str(self.budget))
        if self.estimate is not None:
            lines += cost_lines(self.estimate)
        if self.mean_estimate is not None:
            lines.append(f"by each prompt's own tokens, without padding: {brief(self.mean_estimate)}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Info:
    """What `vtok.info` found."""

    towers: tuple[TowerInfo, ...] = ()
    prompts: tuple[PromptInfo, ...] = ()

    @property
    def patched(self) -> bool:
        return any(t.configs for t in self.towers) or any(p.configs for p in self.prompts)

    def __str__(self) -> str:
        return "\n\n".join(str(found) for found in (*self.prompts, *self.towers))


@dataclass(frozen=True)
class Support:
    """What `vtok.supports` found.

    Attributes:
        towers: (path, class name, blocks, "class of block x count") of what would be patched.
        methods: method -> `None` if it works on every tower as it is, else why not.
        reason: why nothing can be patched, or `None`.
        on_request: method -> parameters with which it works although it does not without them.
        places: method that works on a vision-language model -> where it acts there.
    """

    towers: tuple[tuple[str, str, int, str], ...] = ()
    methods: dict[str, str | None] = field(default_factory=dict)
    reason: str | None = None
    on_request: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.towers) and self.reason is None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not supported: {self.reason}"
        lines = [f"{path or 'the model itself'}: {name}, {count} blocks ({kinds})" for path, name, count, kinds in self.towers]
        lines += [f"  {name}: {self._verdict(name, why)}" for name, why in sorted(self.methods.items())]
        return "\n".join(lines)

    def _verdict(self, method: str, why: str | None) -> str:
        place = f", {self.places[method]}" if method in self.places else ""
        if why is None:
            return f"yes{place}"
        wanted = self.on_request.get(method)
        return f"no: {why}" if wanted is None else f"with {keywords(wanted)}{place}: {why}"
