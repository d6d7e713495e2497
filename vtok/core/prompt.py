"""What a method sees of a vision-language model: image features, the layout of a prompt, the attention of one layer.

Shapes: B rows of a batch (at IMAGE_FEATURES: images), n visual tokens of an image, L columns of the sequence at hand, D width,
H heads. "Column" without more words means a column of the prompt as the caller passed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.core.reduction import Fold, Plan
from vtok.core.tokens import Site, at_least_fp32
from vtok.core.tower import TowerBlock, TowerFacts
from vtok.core.vlm_info import VLMInfo
from vtok.ops.crops import ViewMap

__all__ = [
    "POSITIONS",
    "Entry",
    "ImageFeatures",
    "LayerAttention",
    "Layout",
    "PromptText",
    "TowerBlock",
    "TowerFacts",
    "VLMInfo",
    "VLMReducer",
    "View",
]
POSITIONS = ("original", "compact")  # of tokens behind dropped ones
_ROWS_AT_ONCE = 64  # query rows whose probabilities are held at a time


class View(NamedTuple):
    """A rectangle of visual tokens in raster order, inside the features of one image.

    Attributes:
        start: its first token.
        rows: of the rectangle.
        columns: of the rectangle, a newline token at the end of each row included.
        newline: whether the last column holds newline tokens, which show no part of the image.
        overview: whether it shows the whole image, beside others that show parts of it.
    """

    start: int
    rows: int
    columns: int
    newline: bool = False
    overview: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


class PromptText(NamedTuple):
    """The text that is asked about B images, as the LLM embeds it.

    Attributes:
        embeds: [B, T, D], embeddings of the text behind the first visual token of the prompt that an image belongs to, words of
            a chat template included; of all text where none is behind it.
        real: [B, T] bool, False = padding.
        ids: [B, T] int64, numbers of the tokens; `None` = not known.
    """

    embeds: Tensor
    real: Tensor
    ids: Tensor | None = None


class ImageFeatures(NamedTuple):
    """Visual tokens of B images that are laid out alike, as the model's own `get_image_features` returns them.

    Where a method in the vision tower has merged or dropped tokens before, and the connector works token by token, these are
    the n tokens that are left, in raster order, and `views` is one row: no raster is known of them, but `patches`.

    Attributes:
        tokens: [B, n, D], after connector and packing: in the embedding space of the LLM.
        views: what the n tokens are; together they cover 0 .. n-1. One row where no grid is known.
        modality: "image" or "video".
        tower: block of the vision tower -> what it attended to, for the blocks that the method's `tower_blocks` names.
        views_per_image: how often the tower ran for one image; 0 = not known, because no block was asked for.
        patches: [B, n] int64, rising: the patch that each token stands for, among those that an unreduced image has; `None` =
            no token is missing.
        unreduced: how many these are (a class token among them, where the model keeps it); 0 = no token is missing.
        connector: makes [.., D] of tokens that left the tower's feature block [.., C], token by token, whatever joins them
            afterwards; for methods that merge in front of it. `None` where it is not so.
        source: how patches of these views became visual tokens, where the model's adapter knows; else `None`.
        text: of the prompts that the images belong to, for a method that `reads_text`; `None` = not asked for, or not known.
    """

    tokens: Tensor
    views: tuple[View, ...]
    modality: str = "image"
    tower: Mapping[int, TowerBlock] = {}
    views_per_image: int = 0
    source: ViewMap | None = None
    patches: Tensor | None = None
    unreduced: int = 0
    text: PromptText | None = None
    connector: Callable[[Tensor], Tensor] | None = None


class Layout(NamedTuple):
    """What the L columns of a sequence inside the LLM are.

    Attributes:
        visual: [B, L] bool, image and video tokens.
        real: [B, L] bool, False = padding.
        column: [B, L] int64, column of the prompt that stands here, -1 = padding that a reduction left.
        length: columns of the prompt.
        before: [B, length] bool, the visual tokens of the prompt, those included that have left since.
        entered: [B, length] bool, those of them that entered the LLM; `None` = all.
    """

    visual: Tensor
    real: Tensor
    column: Tensor
    length: int
    before: Tensor
    entered: Tensor | None = None

    @classmethod
    def whole(cls, visual: Tensor, real: Tensor) -> Layout:
        """Of a prompt that nothing has left: both [B, L] bool."""
        batch, length = visual.shape
        return cls(visual, real, torch.arange(length, device=visual.device).expand(batch, length), length, visual)

    @property
    def text(self) -> Tensor:
        """[B, L] bool: real tokens that are not visual."""
        return self.real & ~self.visual

    @property
    def after_image(self) -> Tensor:
        """[B, L] bool: text behind the first visual token of its row."""
        return self.text & (self.visual.cumsum(1) > 0)

    @property
    def last(self) -> Tensor:
        """[B] int64: where the last real token of each row stands (0 .. L-1)."""
        order = torch.arange(self.real.shape[1], device=self.real.device)
        return order.where(self.real, 0).amax(1)

    @property
    def num_entered(self) -> Tensor:
        """[B] int64: visual tokens of each row that entered the LLM."""
        return (self.before if self.entered is None else self.entered).sum(1)

    @property
    def number(self) -> Tensor:
        """[B, L] int64: visual tokens that stood in front of a visual token in its row, dropped ones included; -1 elsewhere."""
        return (self.before.cumsum(1) - 1).gather(1, self.column.clamp_min(0)).where(self.visual, -1)


class Entry(NamedTuple):
    """What entered the LLM.

    Attributes:
        x: [B, E, D], in front of layer 0: embeddings of the text, features of the images.
        layout: of these E columns.
    """

    x: Tensor
    layout: Layout

    def to(self, device: torch.device) -> Entry:
        """The same on another device."""
        fields: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self.layout)
        return Entry(self.x.to(device), Layout(*fields))


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one decoder layer over the L columns that enter it, worked out only as far as a method asks.

    Attributes:
        layer: its number.
        scale: factor on the logits.
        project: rows [B, R] of queries, or `None` for the keys -> [B, H, R, D] or [B, Hk, L, D], normalised and rotated.
        bias: rows [B, R] -> additive mask [B, 1, R, L], as the layer applies it.
        softcap: logits are squeezed to (-softcap, softcap) by a tanh, if given.
        final_norm: the LLM's last norm, [.., D] -> [.., D], which makes hidden states what its head reads.
        entry: what entered the LLM, if the method's `needs` ask for "embeddings".
        device: where rows are taken and all is worked out; `None` = where the layer is.
    """

    layer: int
    scale: float
    project: Callable[[Tensor | None], Tensor]
    bias: Callable[[Tensor], Tensor]
    softcap: float | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    entry: Entry | None = None
    device: torch.device | None = None

    def q(self, rows: Tensor) -> Tensor:
        """[B, H, R, D]: queries of rows [B, R]."""
        return self.project(rows)

    @cached_property
    def k(self) -> Tensor:
        """[B, Hk, L, D]."""
        return self.project(None)

    def probs(self, rows: Tensor) -> Tensor:
        """Attention probabilities of some query rows, in at least fp32.

        Args:
            rows: [B, R] int64, places in the sequence (0 .. L-1).

        Returns:
            [B, H, R, L], every row sums to 1. Rows of padding are meaningless, but finite.
        """
        q, k = at_least_fp32(self.q(rows)), at_least_fp32(self.k)
        if k.shape[1] != q.shape[1]:  # grouped-query attention
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits + self.bias(rows).to(logits.dtype)).softmax(-1)

    def mean_probs(self, rows: Tensor) -> Tensor:
        """Attention averaged over heads and chosen query rows, a few rows at a time: never L x L.

        Args:
            rows: [B, L] bool, at least one in every row of the batch.

        Returns:
            [B, L] in at least fp32.
        """
        order = (~rows).long().argsort(dim=1, stable=True)[:, : int(rows.sum(1).max())]  # the chosen rows first
        weight = rows.gather(1, order)
        total = None
        for part, w in zip(order.split(_ROWS_AT_ONCE, 1), weight.split(_ROWS_AT_ONCE, 1)):
            probs = self.probs(part).mean(1)  # [B, r, L]
            share = (w.to(probs.dtype)[:, None] @ probs).squeeze(1)
            total = share if total is None else total + share
        assert total is not None
        return total / rows.sum(1, keepdim=True)


class VLMReducer:
    """Base of a config resolved for one vision-language model: pure, stateless, frozen.

    Attributes:
        reads_reduced: whether `features` can do with blocks of the vision tower, and with features, where tokens are missing
            that were merged or dropped in the tower before. Asked only of methods with `tower_blocks`.
        needs: "attention" if decisions in front of decoder layers look at a layer's attention; also "embeddings" if they look
            at what entered the LLM.
        exact: whether the counts below are exact; False = upper bounds, the true numbers depend on the images or the text.
        fixed_rows: whether the layout of an image alone says which rows `features` keeps. What they become may depend on the
            image all the same.
    """

    reads_reduced: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    fixed_rows: ClassVar[bool] = False

    @property
    def fixed_counts(self) -> bool:
        """Whether `features` keeps as many tokens of all images that are laid out alike, even where `feature_count` does not
        know how many. Engines that lay out a prompt before an image is encoded ask for it."""
        return self.exact

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """0-based blocks of the vision tower whose attention `features` looks at; nothing is kept of others."""
        return ()

    @property
    def reads_text(self) -> bool:
        """Whether `features` looks at the text of the prompts."""
        return False

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where visual tokens leave: in front of the tower, image features, decoder layers; sites that would change nothing are
        left out."""
        raise NotImplementedError

    def probe(self, at: Site) -> int:
        """The decoder layer whose attention decides at a decoder site: that layer itself or one in front of it."""
        return at.index

    def patches(self, units: Tensor) -> Tensor:
        """Decides at PATCHES, for images and frames of videos of one size, each by itself.

        Args:
            units: [B, R, C, P], R rows of C squares of patches, of each of which the model makes one visual token: all pixel
                values, as the processor made them, in the type of the tower.

        Returns:
            [B, R, C] bool, False = leaves. Of every image at least one stays.
        """
        raise NotImplementedError

    def features(self, images: ImageFeatures) -> Plan | None:
        """Decides at IMAGE_FEATURES, for images that are laid out alike; `None` = all tokens stay.

        The plan's rows index the n tokens of an image; whatever its order, tokens keep their order in the prompt. With `src`
        and `dst`, tokens are folded into kept ones first. Every image keeps at least one token.
        """
        raise NotImplementedError

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor | Fold | None:
        """Decides in front of a decoder layer, while the prompt is read; `None` = all tokens stay.

        Args:
            x: [B, L, D], what enters the layer.
            layout: of its columns.
            attention: of the layer that `probe` names, if `needs` asks for it.
            at: the site.

        Returns:
            [B, L] bool; only the values at visual tokens count, text always stays. Rows may keep different numbers, also none.
            A `Fold` (not in front of layer 0) averages tokens that leave into ones that stay.
        """
        raise NotImplementedError

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        """Tokens of an image (or video) of n that stay at IMAGE_FEATURES."""
        return n

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        """Multiply-accumulates of the matrix products that `features` makes for an image (or video) of n tokens."""
        return 0

    def layer_count(self, at: Site, visual: int, entered: int) -> int:
        """Visual tokens of a prompt that go on at a decoder site when so many arrive, of those that entered the LLM."""
        return visual

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        """Multiply-accumulates that deciding at a decoder site costs for a prompt of so many tokens, the probe's included.

        entered: visual tokens that entered the LLM.
        """
        return 0
