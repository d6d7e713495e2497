"""Closed-form multiply-accumulates (MACs) of a vision-language model that reads one prompt and answers with one token.

Counted is what torch's counter counts, matrix products: causal attention of L tokens as all L x L pairs, query heads as many as
they are. The language head runs at one position, as `generate()` asks. Rotary tables are left out, which some releases of
transformers make by a product and others do not.

Shapes: L tokens of a prompt, text and visual. All figures are for one prompt; a KV cache holds keys and values of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from vtok.core.prompt import View
from vtok.cost.encoder import Row
from vtok.errors import ConfigError, shown, unknown


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer.

    Attributes:
        per_token: MACs of a token: q, k, v and output projection, MLP.
        per_pair: MACs of a (query, key) pair over all query heads, scores and weighted values.
        kv_values: numbers that the KV cache holds of a token, keys and values.
        window: columns that the layer looks back, itself included; its cache holds one less. `None` = all.
    """

    per_token: int
    per_pair: int
    kv_values: int
    window: int | None = None

    def prefill(self, tokens: float) -> float:
        """MACs when a prompt of so many tokens is read."""
        return tokens * self.per_token + tokens * tokens * self.per_pair

    def stored(self, tokens: float) -> float:
        """Tokens that the cache keeps of so many."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def decode(self, tokens: float) -> float:
        """MACs of the first token that follows a prompt of so many tokens."""
        return self.per_token + (self.stored(tokens) + 1) * self.per_pair


@dataclass(frozen=True)
class LLMCost:
    """A language model.

    Attributes:
        layers: its decoder layers.
        head: MACs of the language head at one position; 0 = the model has none.
        kv_bytes: bytes of one number in the KV cache.
        dtype: their type, for reports.
    """

    layers: tuple[LayerCost, ...]
    head: int
    kv_bytes: int
    dtype: str


@dataclass(frozen=True)
class VisionCost:
    """The vision side, for all images of one prompt.

    Attributes:
        rows: blocks of the tower, with the tokens of one view and the MACs of all views.
        views: times that the tower ran, once an image, crop, tile or frame. A Qwen tower reads all images as one sequence.
        macs: of the tower, its stem included, the reduction left out.
        reduction_macs: of what reduces inside the tower.
        connector_macs: of what brings its tokens into the embedding space of the LLM.
        exact: False if tokens inside the tower are an upper bound.
    """

    rows: tuple[Row, ...]
    views: float
    macs: float
    reduction_macs: float
    connector_macs: float
    exact: bool = True

    def divided(self, prompts: int) -> VisionCost:
        """The share of one of so many prompts."""
        rows = tuple(replace(r, macs=r.macs / prompts, reduction_macs=r.reduction_macs / prompts) for r in self.rows)
        numbers = {name: getattr(self, name) / prompts for name in ("views", "macs", "reduction_macs", "connector_macs")}
        return replace(self, rows=rows, **numbers)


def mean_vision(each: Sequence[VisionCost | None]) -> VisionCost | None:
    """Mean over prompts that a tower read by itself; `None` if some are not known."""
    known = [cost for cost in each if cost is not None]
    if len(known) < len(each):
        return None
    means = ("tokens_in", "tokens_out", "macs", "reduction_macs")
    rows = tuple(
        replace(same[0], **{name: sum(getattr(row, name) for row in same) / len(same) for name in means})
        for same in zip(*(cost.rows for cost in known))
    )
    numbers = ("views", "macs", "reduction_macs", "connector_macs")
    mean = {name: sum(getattr(cost, name) for cost in known) / len(known) for name in numbers}
    return VisionCost(rows, exact=all(cost.exact for cost in known), **mean)


@dataclass(frozen=True)
class Prompt:
    """A prompt that costs are stated for.

    Attributes:
        images: in the prompt (whole number, default 1). For models whose processor cuts an image into tiles by itself
            (InternVL, Idefics3, SmolVLM) these are tiles.
        text_tokens: all other tokens: words, template, image markers (whole number, default 64).
        input_size: (channels, height, width) of each image; default: the tower's own size, for models that read any resolution
            twice that in both directions, for Qwen-VL 448 x 448.
    """

    images: int = 1
    text_tokens: int = 64
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("images", "text_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} of a prompt is a whole number from 1 on, got {shown(value)}")
        size = self.input_size
        if size is None:
            return
        if not isinstance(size, (tuple, list)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ConfigError(f"input_size is (channels, height, width), got {shown(size)}")
        object.__setattr__(self, "input_size", tuple(size))

    @classmethod
    def of(cls, value: Any, input_size: Any = None) -> Prompt:
        """Reads what a caller may write: a `Prompt`, a mapping of its fields, `None` = the defaults; `input_size` besides it.

        Raises:
            ConfigError: it is none of these.
            UnknownNameError: a key is no field.
        """
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for name in value:
                if name not in known:
                    raise unknown("field of a prompt", str(name), known)
            value = cls(**value)
        if value is not None and not isinstance(value, cls):
            raise ConfigError(f"prompt is {{'images': ..., 'text_tokens': ..., 'input_size': ...}}, got {shown(value)}")
        made = value or cls()
        return made if input_size is None else replace(made, input_size=input_size)


class StatedImage(NamedTuple):
    """What an image of a stated size is to a model.

    Attributes:
        size: (channels, height, width) of the image.
        views: times that the tower runs for it.
        grid: (frames, rows, columns) of patches in one view.
        layout: of its visual tokens.
    """

    size: tuple[int, int, int]
    views: int
    grid: tuple[int, int, int]
    layout: tuple[View, ...]

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.layout[-1].stop


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer while the prompt is read.

    Attributes:
        layer: its number.
        tokens: that enter, text and visual.
        visual: of these, visual.
        macs: of the layer.
        reduction_macs: spent in front of it on deciding which visual tokens go on.
        kv_bytes: that its cache holds afterwards.
        base_kv_bytes: the same, unpatched.
    """

    layer: int
    tokens: float
    visual: float
    macs: float
    reduction_macs: float
    kv_bytes: float
    base_kv_bytes: float


@dataclass(frozen=True)
class PromptEstimate:
    """What a prompt costs with and without reduction.

    Attributes:
        vision: the vision side; `None` = not run for this prompt (its features were given), or not known.
        base_vision: the same, unpatched.
        selection_macs: of what chooses among image features.
        layers: one row a decoder layer.
        base_layer_macs: MACs of every decoder layer, unpatched.
        head_macs: of the language head, at one position.
        decode_macs, base_decode_macs: of the first token of the answer.
        dtype: of the KV cache.
        exact: False if token counts are an upper bound.
    """

    vision: VisionCost | None
    base_vision: VisionCost | None
    selection_macs: float
    layers: tuple[LayerRow, ...]
    base_layer_macs: tuple[float, ...]
    head_macs: float
    decode_macs: float
    base_decode_macs: float
    dtype: str
    exact: bool = True

    @property
    def llm_macs(self) -> float:
        """Prefill of the LLM: decoder layers and head, the reduction left out."""
        return sum(row.macs for row in self.layers) + self.head_macs

    @property
    def base_llm_macs(self) -> float:
        """The same, unpatched."""
        return sum(self.base_layer_macs) + self.head_macs

    @property
    def macs(self) -> float:
        """Tower, connector and prefill, the reduction left out."""
        return self.llm_macs + _vision(self.vision)

    @property
    def base_macs(self) -> float:
        """The same, unpatched."""
        return self.base_llm_macs + _vision(self.base_vision)

    @property
    def reduction_macs(self) -> float:
        """Of everything that decides which tokens go."""
        inside = 0.0 if self.vision is None else self.vision.reduction_macs
        return inside + self.selection_macs + sum(row.reduction_macs for row in self.layers)

    @property
    def implied_speedup(self) -> float:
        """Of the prefill, tower included: unpatched MACs / patched MACs, the reduction's own left out."""
        return self.base_macs / self.macs

    @property
    def fraction(self) -> float:
        """Patched MACs, reduction included, as a share of the unpatched ones: what a FLOPs budget limits."""
        return (self.macs + self.reduction_macs) / self.base_macs

    @property
    def kv_bytes(self) -> float:
        """Of the KV cache behind the prompt, all layers."""
        return sum(row.kv_bytes for row in self.layers)

    @property
    def base_kv_bytes(self) -> float:
        """The same, unpatched."""
        return sum(row.base_kv_bytes for row in self.layers)


def _vision(cost: VisionCost | None) -> float:
    return 0.0 if cost is None else cost.macs + cost.connector_macs


def prompt_estimate(
    llm: LLMCost,
    base_tokens: float,
    tokens: Sequence[tuple[float, float]],
    reductions: Mapping[int, float],
    vision: VisionCost | None = None,
    base_vision: VisionCost | None = None,
    selection_macs: float = 0.0,
    exact: bool = True,
) -> PromptEstimate:
    """Costs of one prompt.

    Args:
        llm: closed form of the language model.
        base_tokens: of the whole prompt.
        tokens: (all, visual) tokens that enter each decoder layer.
        reductions: decoder layer -> MACs spent in front of it on deciding.
        vision: the vision side as patched.
        base_vision: unpatched.
        selection_macs: of the choice among image features.
        exact: whether `tokens` is.
    """
    rows = tuple(
        LayerRow(
            i,
            n,
            visual,
            layer.prefill(n),
            reductions.get(i, 0.0),
            layer.stored(n) * layer.kv_values * llm.kv_bytes,
            layer.stored(base_tokens) * layer.kv_values * llm.kv_bytes,
        )
        for i, (layer, (n, visual)) in enumerate(zip(llm.layers, tokens))
    )
    return PromptEstimate(
        vision=vision,
        base_vision=base_vision,
        selection_macs=selection_macs,
        layers=rows,
        base_layer_macs=tuple(layer.prefill(base_tokens) for layer in llm.layers),
        head_macs=llm.head,
        decode_macs=sum(layer.decode(n) for layer, (n, _) in zip(llm.layers, tokens)) + llm.head,
        base_decode_macs=sum(layer.decode(base_tokens) for layer in llm.layers) + llm.head,
        dtype=llm.dtype,
        exact=exact and (vision is None or vision.exact),
    )


def mean_estimate(each: Sequence[PromptEstimate]) -> PromptEstimate:
    """Mean over prompts of what each costs alone (attention is quadratic: not the cost of the mean)."""
    first = each[0]

    def mean(value: Callable[[PromptEstimate], float]) -> float:
        return sum(value(e) for e in each) / len(each)

    layers = tuple(
        LayerRow(i, *(mean(lambda e, i=i, name=name: getattr(e.layers[i], name)) for name in _LAYER_MEANS))  # type: ignore[misc]
        for i in range(len(first.layers))
    )
    numbers: dict[str, Any] = {name: mean(lambda e, name=name: getattr(e, name)) for name in _MEANS}  # type: ignore[misc]
    base = tuple(mean(lambda e, i=i: e.base_layer_macs[i]) for i in range(len(first.layers)))  # type: ignore[misc]
    return replace(
        first,
        vision=mean_vision([e.vision for e in each]),
        base_vision=mean_vision([e.base_vision for e in each]),
        layers=layers,
        base_layer_macs=base,
        exact=all(e.exact for e in each),
        **numbers,
    )


_LAYER_MEANS = ("tokens", "visual", "macs", "reduction_macs", "kv_bytes", "base_kv_bytes")
_MEANS = ("selection_macs", "head_macs", "decode_macs", "base_decode_macs")
