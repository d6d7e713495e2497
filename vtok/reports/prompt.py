"""Plain-text reports of what a prompt costs a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from vtok.config import MethodConfig
from vtok.cost.budget import Budget
from vtok.cost.prefill import LayerRow, Prompt, PromptEstimate, StatedImage, VisionCost
from vtok.reports.text import costs, giga, settings, table, tokens

_HEADER = ("", "tokens", "visual", "GMACs", "unpatched", "reduction", "KV MB", "unpatched")
_CONVENTION = (
    "GMACs are per prompt; causal attention counts all pairs of tokens, the head runs at one position; tokens of the tower are "
    "per view; MB = 10^6 bytes"
)


def mega(count: float) -> str:
    """Bytes in millions."""
    return f"{count / 1e6:.3f}"


def cost_lines(e: PromptEstimate) -> list[str]:
    """A table of tower, connector and decoder layers, then the sums."""
    rows = [*_vision_rows(e), *_layer_rows(e), ("language head", "1", "", giga(e.head_macs), giga(e.head_macs), "", "", "")]
    what = "tower, connector and prefill" if e.vision is not None else "prefill alone, without tower and connector"
    return [
        table(_HEADER, rows),
        f"{what}: {costs(e)}",
        f"first token of the answer: GMACs {giga(e.base_decode_macs)} -> {giga(e.decode_macs)}",
        f"KV cache of the prompt, {e.dtype}: MB {mega(e.base_kv_bytes)} -> {mega(e.kv_bytes)}",
        _CONVENTION,
    ]


def brief(e: PromptEstimate) -> str:
    """The sums in half a line."""
    return (
        f"implied speed-up {e.implied_speedup:.2f}x, GMACs {giga(e.base_macs)} -> {giga(e.macs)}, "
        f"KV MB {mega(e.base_kv_bytes)} -> {mega(e.kv_bytes)}"
    )


def _vision_rows(e: PromptEstimate) -> Iterator[tuple[str, ...]]:
    if e.vision is None or e.base_vision is None:
        return
    after, before = e.vision, e.base_vision
    if any(row.place for row in after.rows):
        for row, plain in zip(after.rows, before.rows):
            name = f"tower block {row.block}" + (f" {row.place.value}" if row.place else "")
            yield (
                name,
                f"{tokens(row.tokens_in)} -> {tokens(row.tokens_out)}",
                "",
                giga(row.macs),
                giga(plain.macs),
                giga(row.reduction_macs),
                "",
                "",
            )
    yield (
        f"tower, {_views(after)}",
        tokens(after.rows[0].tokens_in) if after.rows else "",
        "",
        giga(after.macs),
        giga(before.macs),
        giga(after.reduction_macs),
        "",
        "",
    )
    yield "connector", "", "", giga(after.connector_macs), giga(before.connector_macs), "", "", ""
    yield "choice among features", "", "", "", "", giga(e.selection_macs), "", ""


def _views(cost: VisionCost) -> str:
    return f"{tokens(cost.views)} view" + ("" if cost.views == 1 else "s")


def _layer_rows(e: PromptEstimate) -> Iterator[tuple[str, ...]]:
    """Neighbouring layers that cost the same share a row."""
    pairs = list(zip(e.layers, e.base_layer_macs))

    def same(pair: tuple[LayerRow, float]) -> tuple[float, ...]:
        row, base = pair
        return row.tokens, row.visual, row.macs, base, row.reduction_macs, row.kv_bytes, row.base_kv_bytes

    for _, group in groupby(pairs, same):
        alike = list(group)
        row, base = alike[0]
        last = alike[-1][0].layer
        name = f"decoder layer {row.layer}" if last == row.layer else f"decoder layers {row.layer} to {last}, each"
        yield (
            name,
            tokens(row.tokens),
            tokens(row.visual),
            giga(row.macs),
            giga(base),
            giga(row.reduction_macs),
            mega(row.kv_bytes),
            mega(row.base_kv_bytes),
        )


@dataclass(frozen=True)
class PromptPlan:
    """What a method would do to a stated prompt of a vision-language model. `str()` gives a table.

    Attributes:
        model: class name.
        configs: the methods.
        prompt: what it is stated for.
        image: what each of its images is to the model.
        estimate: tokens, MACs and KV bytes.
        budget: if a budget chose the setting.
        given: whether the prompt was stated by the caller; False = defaults.
        measured: prompts of calibration inputs whose mean `estimate` is, instead of that of `prompt`; 0 = none.
    """

    model: str
    configs: tuple[MethodConfig, ...]
    prompt: Prompt
    image: StatedImage
    estimate: PromptEstimate
    budget: Budget | None = None
    given: bool = True
    measured: int = 0

    @property
    def tokens(self) -> tuple[float, ...]:
        """Tokens that enter each decoder layer, text included."""
        return tuple(row.tokens for row in self.estimate.layers)

    def __str__(self) -> str:
        where = averaged(self.measured) if self.measured else stated(self.prompt, self.image)
        lines = [
            f"{self.model}, {where}: " + " + ".join(settings(c) for c in self.configs),
            *cost_lines(self.estimate),
        ]
        if not self.given and not self.measured:
            lines.append(
                "the prompt is vtok's default; state yours: prompt={'images': ..., 'text_tokens': ..., 'input_size': ...}"
            )
        if not self.estimate.exact:
            lines.append(
                "upper bounds: what stays depends on the images or the text; after a run vtok.info(model) shows what it was"
            )
        if self.budget is not None:
            lines.append(str(self.budget))
        return "\n".join(lines)


def averaged(prompts: int) -> str:
    """ "8 calibration prompts on average"."""
    return "1 calibration prompt" if prompts == 1 else f"{prompts} calibration prompts on average"


def stated(prompt: Prompt, image: StatedImage) -> str:
    """ "1 image of 3 x 336 x 336 (576 visual tokens) and 64 other tokens"."""
    size = " x ".join(map(str, image.size))
    each = "" if prompt.images == 1 else " each"
    images = "image" if prompt.images == 1 else "images"
    return f"{prompt.images} {images} of {size} ({image.tokens} visual tokens{each}) and {prompt.text_tokens} other tokens"
