"""What is known about the tokens between two blocks, and what a method may look at.

Shapes: B batch, N tokens now (prefix included), N0 tokens that entered block 0, P prefix tokens, H heads, D head dim.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = 2**22  # numbers of a matrix of tokens by tokens that is built whole; 16 MiB in fp32


class Place(Enum):
    """Where in a model tokens may be reduced."""

    BLOCK_PRE = "pre"  # after the block's norm and q/k/v, before attention: only kept query rows attend (ATS)
    BLOCK_MID = "mid"  # between attention and MLP (ToMe, PiToMe)
    BLOCK_END = "end"  # after the whole block, with that block's attention (Zero-TPrune)
    PATCHES = "patches"  # in front of a vision tower: pixels of patches, before anything has been computed
    IMAGE_FEATURES = "features"  # what a vision-language model's own get_image_features returns, before the LLM
    DECODER_IN = "decoder"  # in front of a decoder layer of the LLM, while the prompt is read


class Site(NamedTuple):
    """A place in a model: `Site(Place.BLOCK_MID, 3)` lies between attention and MLP of block 3 (0-based).

    `Site(Place.DECODER_IN, 3)` lies in front of decoder layer 3; at `Place.IMAGE_FEATURES` and `Place.PATCHES`
    the index is 0.
    """

    place: Place
    index: int  # type: ignore[assignment]  # shadows tuple.index on purpose

    def __str__(self) -> str:
        if self.place is Place.IMAGE_FEATURES:
            return "image features"
        if self.place is Place.PATCHES:
            return "in front of the vision tower"
        if self.place is Place.DECODER_IN:
            return f"in front of decoder layer {self.index}"
        return f"block {self.index} {self.place.value}"


Grid = tuple[int, int] | Tensor


class TokenState(NamedTuple):
    """The N tokens at a block boundary. Immutable; `None` means trivial, so an unreduced stretch of blocks costs nothing.

    Attributes:
        num_prefix: CLS, distillation and register tokens at the front; never merged, never dropped.
        length: N0, tokens that entered block 0.
        index: [B, N] int64, row of the sequence that entered block 0; `None` = 0 .. N-1.
        size: [B, N] fp32 or fp64, patches that a token stands for; `None` = ones.
        keep: [B, N] bool, False = padding; `None` = all real.
        group: [B, N0] int64, row where each original token now lives, -1 = dropped; kept only under `trace=True`.
        real: [B, N0] bool, False = padding that images came with.
        masked: whether the mask that they came with says more than `real`, so that it goes on to be added.
        grid: (rows, columns) of the patches that entered block 0; [B, 2] int64 where images differ; (1, N0 - P) where they fill
            no grid; `None` = not known.
        counts: real tokens of every row, where the host knows them; they stand in front of the padding. `None` = ask `keep`.
        entered: the same of the rows that entered block 0, of towers whose images share one sequence.
    """

    num_prefix: int
    length: int
    index: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.index on purpose
    size: Tensor | None = None
    keep: Tensor | None = None
    group: Tensor | None = None
    real: Tensor | None = None
    masked: bool = False
    grid: Grid | None = None
    counts: tuple[int, ...] | None = None
    entered: tuple[int, ...] | None = None

    def on(self, device: torch.device) -> TokenState:
        """The same on another device: the blocks of a tower may be spread over several."""
        if self.untouched and self.keep is None and self.group is None and not isinstance(self.grid, Tensor):
            return self
        if all(not isinstance(t, Tensor) or t.device == device for t in self):
            return self
        moved: dict[str, Any] = {name: t.to(device) for name, t in zip(self._fields, self) if isinstance(t, Tensor)}
        return self._replace(**moved)

    @property
    def trivial(self) -> bool:
        """True while nothing has been merged, moved, dropped or padded."""
        return self.untouched and self.keep is None

    @property
    def untouched(self) -> bool:
        """True while every token is where upstream put it; some may be padding, which upstream's own mask hides."""
        return self.index is None and self.size is None


Rope = Tensor | tuple[Tensor, ...]  # one rotary table, or several (cosines and sines)


class AttentionView(NamedTuple):
    """Queries, keys and values of one block, as its attention used them; a method sees only what it asked for.

    Attributes:
        q: [B, H, N, D] after normalisation and rotation.
        k: [B, Hk, N, D] before rotation: content alone, the similarity metric.
        k_rot: [B, Hk, N, D] as attention used it (the same as `k` where nothing rotates).
        v: [B, Hk, N, D].
        scale: factor on the logits.
        bias: additive logit bias, broadcastable to [B, H, N, N], or `None`.
        parts: what attends within each token: the last axis of all four holds so many patches side by side, D in all.
    """

    q: Tensor | None
    k: Tensor | None
    k_rot: Tensor | None
    v: Tensor | None
    scale: float
    bias: Tensor | None
    parts: int = 1

    def key_metric(self) -> Tensor:
        """[B, N, D]: keys summed over heads, in at least fp32 (ToMe section 2, step 3, takes the mean: same cosines)."""
        assert self.k is not None
        return at_least_fp32(self.k).sum(1)

    def probs(self, first: int | None = None, tau: float = 1.0) -> Tensor:
        """Attention probabilities of the first query rows, in at least fp32.

        Args:
            first: how many queries, `None` = all; one row costs O(N D), all rows build the N x N matrix.
            tau: softmax temperature; 1 gives the model's own attention.

        Returns:
            [B, H, first, N], every row sums to 1. Of tokens with parts: the mean over the parts that ask, summed over those
            that are seen.
        """
        assert self.q is not None and self.k_rot is not None
        q, k = at_least_fp32(self.q[:, :, :first]), at_least_fp32(self.k_rot)
        if k.shape[1] != q.shape[1]:  # grouped-query attention
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        bias = None
        if self.bias is not None:
            bias = (self.bias if self.bias.shape[-2] == 1 else self.bias[..., :first, :]).to(q.dtype) / tau
        if self.parts == 1:
            logits = (q * (self.scale / tau)) @ k.transpose(-2, -1)
            return (logits if bias is None else logits + bias).softmax(-1)
        k = k.unflatten(-1, (self.parts, -1)).flatten(2, 3).transpose(-2, -1)
        bias = None if bias is None else bias.repeat_interleave(self.parts, -1)
        total: Tensor | None = None
        for part in q.chunk(self.parts, -1):  # one by one: the matrix of all of them is as many times as large
            logits = (part * (self.scale / tau)) @ k
            probs = (logits if bias is None else logits + bias).softmax(-1).unflatten(-1, (-1, self.parts)).sum(-1)
            total = probs if total is None else total + probs
        assert total is not None
        return total / self.parts

    def received(self, keep: Tensor | None = None) -> Tensor:
        """[B, H, N]: attention that a token receives, averaged over the (unpadded) queries; rows of N x N, block by block."""
        assert self.q is not None
        blocks = row_blocks(self.q, self.q.shape[-2])
        if len(blocks) > 1:
            return self._received_from(blocks, keep)
        probs = self.probs()
        if keep is None:
            return probs.mean(-2)
        weight = keep.to(probs.dtype)[:, None, None]  # [B, 1, 1, N]
        return (weight @ probs).squeeze(-2) / weight.sum(-1)

    def _received_from(self, blocks: tuple[Tensor, ...], keep: Tensor | None) -> Tensor:
        """As `received`, of queries that are looked at block by block."""
        total: Any = 0.0
        start = 0
        for q in blocks:
            rows = slice(start, start + q.shape[-2])
            bias = self.bias if self.bias is None or self.bias.shape[-2] == 1 else self.bias[..., rows, :]
            probs = self._replace(q=q, bias=bias).probs()
            total = total + (probs if keep is None else probs * keep[:, None, rows, None]).sum(-2)
            start = rows.stop
        return total / (start if keep is None else keep.sum(-1).to(total.dtype)[:, None, None])


def row_blocks(t: Tensor, columns: int) -> tuple[Tensor, ...]:
    """t [..., rows, d] in blocks of rows, of which products with so many others are made one after the other.

    A matrix of up to `LARGEST` numbers is built whole: there is one block then, `t` itself.
    """
    rows = t.shape[-2]
    return (t,) if rows * columns <= LARGEST else t.split(max(1, LARGEST // (4 * columns)), -2)


def at_least_fp32(t: Tensor) -> Tensor:
    """`t` in fp32, or unchanged if it is fp32 or fp64 already."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def log_size_bias(state: TokenState, dtype: torch.dtype, sizes: bool = True) -> Tensor | None:
    """Logit bias that makes attention see a merged token as often as it has members.

    Args:
        state: the tokens.
        dtype: of the attention; the logarithm is taken in the precision of the sizes and cast last.
        sizes: False leaves the sizes out and only masks padding (proportional attention off).

    Returns:
        [B, 1, 1, N]: log(size), -inf on padding; `None` where it would be zero everywhere.
    """
    size = state.size if sizes else None
    if size is None and state.keep is None:
        return None
    if size is not None:
        bias = size.log()
    else:
        assert state.keep is not None
        bias = torch.zeros_like(state.keep, dtype=dtype)
    if state.keep is not None:
        bias = bias.masked_fill(~state.keep, float("-inf"))
    return bias.view(-1, 1, 1, bias.shape[1]).to(dtype)


def gather_mask(mask: Tensor | None, state: TokenState) -> Tensor | None:
    """Restricts a [.., N0, N0] or [.., 1, N0] mask of the original sequence to the tokens still alive: [B, 1|H, N|1, N]."""
    if mask is None or state.index is None:
        return mask
    batch, n = state.index.shape
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.expand(batch, *mask.shape[1:])
    mask = mask.gather(3, state.index[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    if mask.shape[2] > 1:
        mask = mask.gather(2, state.index[:, None, :, None].expand(-1, mask.shape[1], -1, n))
    return mask


def add_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Sum of an attention mask (bool: True = attend; or additive) and an additive bias; `None` counts as zero."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return mask.to(bias.dtype) + bias


def gather_positions(table: Rope | None, state: TokenState) -> Rope | None:
    """Rows of rotary tables for the patches still alive.

    Args:
        table: [N0-P, D] shared by batch and heads, or [H, N0-P, D], or [B, H, N0-P, D]; or several of these.
        state: the tokens.

    Returns:
        [B, 1|H, N-P, D], so that every image has its own positions; `table` itself while nothing has moved.
    """
    if table is None or state.index is None:
        return table
    rows = state.index[:, state.num_prefix :] - state.num_prefix  # [B, N-P]
    return tuple(_pick(t, rows) for t in table) if isinstance(table, tuple) else _pick(table, rows)


def _pick(table: Tensor, rows: Tensor) -> Tensor:
    if table.ndim == 2:
        return table[rows][:, None]
    table = table.expand(rows.shape[0], *table.shape[-3:])
    return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1]))
