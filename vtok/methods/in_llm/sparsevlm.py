"""SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (Zhang et al., ICML 2025). Behind three
decoder layers visual tokens leave to which the text pays little attention: not all of the text, but those of its tokens that
look like the image, the raters. Some of what leaves is recycled: clustered, averaged, and kept as a few tokens.

Written from a description of the authors' program in its version 1; it reproduces that program's raters, scores, choices and
clusters (`tests/golden`). What differs:

* Every prompt of a batch decides for itself; the program takes one at a time.
* The average of a cluster stands where its centre stood; in the program, and under `preset="official"`, it follows on all kept
  tokens of the image.
* Positions are kept. The program numbers the columns of each layer from 0 on, so that in decoding one token has another
  position in every layer; `positions="compact"`, which the preset stands for, does the same.
* Where densities are equal the first token counts as denser. The program adds noise of up to 1e-6, so that two runs may differ:
  with two clusters, tokens that are nearest to each other have equal densities, and noise chooses (it does in the golden
  file). Densities too small for a float are told apart by their logarithms here.
* Attention is worked out for the raters' rows alone; the program runs every layer with the full matrix.
* A prompt without text behind its image is rated by its last token. All images of a prompt compete together.

The paper derives how many tokens leave from the rank of the attention; the program has tables, as here. Its version 2 (other
scores, nothing recycled) is not covered.

Shapes: B prompts, L columns in front of a layer, E columns that entered the LLM, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.config import block_numbers, flag, whole
from vtok.core.prompt import Entry, LayerAttention, Layout, VLMInfo, VLMReducer
from vtok.core.reduction import Fold
from vtok.core.search_space import Blocks, BudgetCandidates, Point, Space
from vtok.core.tokens import Place, Site, at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.methods.in_llm.density_peaks import density_peaks
from vtok.methods.in_llm.stages import check_stages, shares
from vtok.methods.preset import Official
from vtok.ops.rows import rows_where, take_rows
from vtok.ops.selection import kept_counts, kept_tokens, largest

if TYPE_CHECKING:
    from typing_extensions import Self

LAYERS, OF = (2, 6, 15), 32
TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}  # of the 576 tokens of LLaVA-1.5
DEFAULT_KEEP = tuple(count / 576 for count in TABLES[192])
_SHARE, _PER_CLUSTER = 0.3, 10  # of the tokens that leave are recycled; recycled tokens for each cluster


@dataclass(frozen=True)
class SparseVLM(Official):
    """Config of SparseVLM.

    Attributes:
        keep: shares of the visual tokens that entered the LLM which go on behind each of `layers`, recycled ones not counted
            (falling numbers in (0, 1], rounded to whole tokens; default: 300, 200 and 110 of 576, the authors' setting "192").
            Layers with 1.0 do nothing.
        keep_tokens: the same as counts, one for each layer, or one of 192, 128, 96 and 64, the names of the authors' tables for
            LLaVA-1.5; without recycling these leave 203, 141, 110 and 79 tokens on average over its 32 layers. Give one of the
            two.
        layers: 0-based decoder layers whose attention decides, and behind which tokens leave (default 2, 6 and 15, as the
            program has them; LLMs of 16 layers or fewer: the same shares of 32, rounded down and at least one apart).
        recycle: whether 0.3 of the tokens that leave, those of highest relevance, go on as averages of clusters of about ten
            (default True).
        preset: `"official"`: averages follow on the kept visual tokens, in the order of their clusters, at the places of those
            that stay; positions are numbered anew in every layer unless `positions` is given. Noise stays out.
    """

    name: ClassVar[str] = "sparsevlm"
    set_by_budget: ClassVar[tuple[str, ...]] = ("keep", "keep_tokens")

    keep: Sequence[float] | None = None
    keep_tokens: Sequence[int] | int | None = None
    layers: Sequence[int] | None = None
    recycle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep_tokens is not None:
            raise ConfigError(f"give keep or keep_tokens, not both (got {self.keep} and {self.keep_tokens})")
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", _counts(self.keep_tokens))
        else:
            object.__setattr__(self, "keep", DEFAULT_KEEP if self.keep is None else shares(self.keep, "keep"))
        if self.layers is not None:
            layers = block_numbers(self.layers)
            check_stages(tuple(layer + 1 for layer in layers), self.stages)
            object.__setattr__(self, "layers", layers)
        elif self.stages != len(LAYERS):
            raise ConfigError(f"{self.stages} numbers of tokens need layers, one for each; the default is {list(LAYERS)}")
        flag(self.recycle, "recycle")

    @property
    def stages(self) -> int:
        """How often tokens leave."""
        listed = self.keep if self.keep_tokens is None else self.keep_tokens
        assert isinstance(listed, tuple)
        return len(listed)

    @classmethod
    def alternatives(cls, info: VLMInfo) -> Sequence[Mapping[str, Any]]:
        """Other layers, where a model lets no token go behind the default ones."""
        layers, usual = tuple(i - 1 for i in info.judged_layers())[: len(LAYERS)], cls().stage_layers(info)
        if {layer + 1 for layer in usual} <= set(info.judged_layers()) or not layers:
            return ()
        return ({"keep": list(DEFAULT_KEEP[: len(layers)]), "layers": list(layers)},)

    def budget_candidates(self, info: VLMInfo) -> Sequence[Self]:
        """Powers of the default shares, or of those that were given."""
        base = self.keep if self.keep is not None and self.keep[-1] < 1 else DEFAULT_KEEP
        if len(base) != self.stages:
            base = tuple(2.0 ** -(i + 1) for i in range(self.stages))
        assert base is not None
        return BudgetCandidates(lambda s: self.replace(keep=tuple(share**s for share in base), keep_tokens=None), 4.0)

    def search_space(self, info: VLMInfo) -> Space:
        """Behind which layers; given ones are left alone."""
        layers = tuple(i - 1 for i in info.judged_layers())
        if self.layers is not None or len(layers) < self.stages:
            return {}
        return {"layers": Blocks(layers, self.stages, self.stages, self.stage_layers(info))}

    def candidates_at(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        return self.replace(layers=point.get("layers", self.layers)).budget_candidates(info)

    def stage_layers(self, info: VLMInfo) -> tuple[int, ...]:
        """The decoder layers whose attention decides."""
        if self.layers is not None:
            return tuple(self.layers)
        if info.depth > LAYERS[-1] + 1:
            return LAYERS
        found: list[int] = []
        for layer in LAYERS:
            found.append(max(info.depth * layer // OF, found[-1] + 1 if found else 0))
        return tuple(found)

    def build_vlm(self, info: VLMInfo) -> SparseVLMReducer:
        layers = self.stage_layers(info)
        if self.layers is not None and layers[-1] + 1 >= info.depth > layers[-1]:
            raise ConfigError(
                f"layers names decoder layer {layers[-1]}, the last one of {info.name}: tokens leave behind the layers that "
                f"are named, so {info.depth - 2} is the last that can be"
            )
        if isinstance(self.keep_tokens, tuple):
            return SparseVLMReducer(
                tuple((layer + 1, None, n) for layer, n in zip(layers, self.keep_tokens)), self.recycle, info, self.official
            )
        assert self.keep is not None
        found = tuple((layer + 1, share, None) for layer, share in zip(layers, self.keep) if share < 1)
        return SparseVLMReducer(found, self.recycle, info, self.official)


def _counts(value: Any) -> tuple[int, ...]:
    """Counts of every stage, from a table's name or a list."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value not in TABLES:
            raise ConfigError(f"keep_tokens is one of {', '.join(map(str, TABLES))}, or one count a layer; got {shown(value)}")
        return TABLES[value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"keep_tokens is one of {', '.join(map(str, TABLES))}, or one count a layer; got {shown(value)}")
    for count in value:
        whole(count, "keep_tokens", 1)
    return tuple(value)


def rater_scores(x: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """How much visual tokens look like each text token: softmax over the text of H_v H_t^T, unscaled, averaged over H_v.

    Args:
        x: [B, E, D], what entered the LLM; compared in at least fp32.
        visual: [B, E] bool.
        text: [B, E] bool, the text behind the image.

    Returns:
        [B, E]: sums to 1 over the text, 0 elsewhere; all 0 without text or image. The number of text tokens costs one host
        synchronisation.
    """
    x = at_least_fp32(x)
    rows, real = rows_where(text, max(1, int(text.sum(1).max())))
    logits = x @ take_rows(x, rows).transpose(1, 2)  # [B, E, T]
    share = logits.masked_fill(~real[:, None], float("-inf")).softmax(2)
    share = share.masked_fill(~(visual[..., None] & real[:, None]), 0)  # a row without text is nothing but NaN
    mean = share.sum(1) / visual.sum(1, keepdim=True).clamp_min(1)
    return torch.zeros_like(x[..., 0]).scatter_add(1, rows, mean)


def raters(entry: Entry) -> Tensor:
    """[B, E] bool: text tokens behind the image that look more like it than the text does on average; where there are none, the
    last token of the prompt."""
    layout = entry.layout
    text = layout.after_image
    score = rater_scores(entry.x, layout.visual, text)
    chosen = text & (score > score.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp_min(1))
    last = torch.zeros_like(chosen).scatter(1, layout.last[:, None], True)
    return torch.where(chosen.any(1, keepdim=True), chosen, last)


def recycled(dropped: int) -> tuple[int, int]:
    """(how many of so many dropped tokens are recycled, into how many clusters): floor(0.3 d) + 1, and a tenth + 1."""
    if not dropped:
        return 0, 0
    tokens = int(_SHARE * dropped) + 1
    return tokens, tokens // _PER_CLUSTER + 1


def recycled_counts(dropped: Tensor) -> tuple[Tensor, Tensor]:
    """`recycled` of every row: [B] int64 -> two of them."""
    some = dropped > 0
    tokens = ((dropped.double() * _SHARE).floor().long() + 1).where(some, 0)
    return tokens, (tokens // _PER_CLUSTER + 1).where(some, 0)


class Recycled(NamedTuple):
    """What becomes of dropped tokens.

    Attributes:
        into: [B, L] int64, as `Fold.into`: the centre of each recycled token's cluster, -1 elsewhere.
        rank: [B, L] int64, the number of that cluster, the clusters by falling density times distance; -1 elsewhere.
    """

    into: Tensor
    rank: Tensor


def recycle(x: Tensor, relevance: Tensor, dropped: Tensor, noise: Tensor | None = None) -> Recycled:
    """Which dropped tokens are averaged into which of them.

    Args:
        x: [B, L, D], what enters the layer.
        relevance: [B, L].
        dropped: [B, L] bool.
        noise: [B, T], added to the densities of the T tokens that are recycled at most, by falling relevance.

    """
    length = dropped.shape[1]
    tokens, clusters = recycled_counts(dropped.sum(1))
    width, most = recycled(length)  # bounds that no row exceeds
    lowest = torch.finfo(relevance.dtype).min
    order = relevance.clamp_min(lowest).masked_fill(~dropped, float("-inf")).argsort(dim=1, descending=True, stable=True)
    order = order[:, :width]
    valid = torch.arange(order.shape[1], device=x.device) < tokens[:, None]
    centre, home = density_peaks(take_rows(x, order), clusters, min(most, order.shape[1]), valid, noise)
    target = order.gather(1, centre.gather(1, home)).where(valid, -1)
    nowhere, places = target.new_full((len(target), length + 1), -1), order.where(valid, length)
    into, rank = (nowhere.scatter(1, places, found)[:, :length] for found in (target, home.where(valid, -1)))
    return Recycled(into, rank)


def program_order(kept: Tensor, recycled: Recycled) -> Fold:
    """Kept tokens as they stood, then the averages of clusters by rank, at the places of kept tokens and centres.

    Args:
        kept: [B, L] bool, visual tokens that go on as they are.
        recycled: what becomes of the others.
    """
    place = torch.arange(kept.shape[1], device=kept.device)
    stays = kept | (recycled.into == place)
    behind = (kept.sum(1, keepdim=True) + recycled.rank).where(recycled.rank >= 0, -1)
    number = (kept.cumsum(1) - 1).where(kept, behind)  # in the program's sequence
    slots = (~stays).int().argsort(dim=1, stable=True)
    return Fold(stays, slots.gather(1, number.clamp_min(0)).where(number >= 0, -1))


@dataclass(frozen=True)
class SparseVLMReducer(VLMReducer):
    """SparseVLM for one model.

    Attributes:
        stages: (decoder layer in front of which tokens leave, share of the tokens that entered the LLM or `None`, count).
        recycles: whether some of what leaves is averaged.
        info: of the model.
        official: whether averages stand as in the program.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "embeddings"})
    exact: ClassVar[bool] = True

    stages: tuple[tuple[int, float | None, int | None], ...]
    recycles: bool
    info: VLMInfo
    official: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.DECODER_IN, layer) for layer, _, _ in self.stages)

    def probe(self, at: Site) -> int:
        return at.index - 1

    def _wanted(self, at: Site) -> tuple[float | None, int | None]:
        return next((share, count) for layer, share, count in self.stages if layer == at.index)

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor | Fold:
        assert attention is not None and attention.entry is not None
        relevance = attention.mean_probs(_now(raters(attention.entry), attention.entry.layout, layout))
        top = largest(relevance, kept_counts(layout.num_entered, *self._wanted(at)), layout.visual)
        if not self.recycles:
            return top
        top = top & layout.visual
        found = recycle(x, relevance, layout.visual & ~top)
        if self.official:
            return program_order(top, found)
        centres = found.into == torch.arange(found.into.shape[1], device=x.device)
        return Fold(top | centres, found.into)

    def layer_count(self, at: Site, visual: int, entered: int) -> int:
        top = min(visual, kept_tokens(entered, *self._wanted(at)))
        return top + (recycled(visual - top)[1] if self.recycles else 0)

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        """As if all text stood behind the image and rated; distances between recycled tokens are no matrix products."""
        length = visual + text
        return self.info.probe_macs(text, length) + text * length + (entered + text) * text * self.info.width


def _now(chosen: Tensor, then: Layout, layout: Layout) -> Tensor:
    """[B, L] bool: columns chosen among the E that entered the LLM [B, E], where they stand in front of a layer."""
    length, device = then.length, layout.real.device  # layers may be spread over devices
    columns = torch.zeros(len(chosen), length + 1, dtype=torch.bool, device=chosen.device)
    columns = columns.scatter(1, then.column.where(then.column >= 0, length), chosen).to(device)
    return columns.gather(1, layout.column.where(layout.column >= 0, length)) & layout.real
