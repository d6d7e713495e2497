"""What ATP-LLaVA (Ye et al., CVPR 2025) reads from attention, and how it gates attention in training. See `vtok.methods.atp`
for what is known of the paper and what is our interpretation.

Shapes: B samples, N tokens of the sequence, H heads, Hk key heads, D head width. Attention is causal: a token sees the real
tokens up to itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32
from vtok.methods.atp.scores import Slots
from vtok.ops.rows import rows_where

SELF_SCORES = ("probs", "debiased", "logits")
QUERY_CHUNK = 128  # query rows whose attention is in memory at once
_FLOOR = 1e-30  # of a gate: its logarithm, -69, fits every dtype, and no probability survives it


class Attention(Protocol):
    """What scores are read from: `vtok.core.prompt.LayerAttention`, or `CausalAttention`."""

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        ...

    @property
    def k(self) -> Tensor:
        """[B, Hk, N, D], rotated."""
        ...

    def q(self, rows: Tensor) -> Tensor:
        """[B, H, R, D], rotated queries of rows [B, R]."""
        ...

    def probs(self, rows: Tensor) -> Tensor:
        """[B, H, R, N] of rows [B, R], in at least fp32."""
        ...


class CausalAttention(NamedTuple):
    """Attention of q [B, H, N, D] and k [B, Hk, N, D], both rotated, under a causal mask.

    Attributes:
        queries: q.
        k: keys.
        real: [B, N] bool, False = padding.
        scale: factor on the logits.
        gate: [B, N], soft masks of earlier modules that this layer's attention was run with; `None` = none.
    """

    queries: Tensor
    k: Tensor
    real: Tensor
    scale: float
    gate: Tensor | None = None

    def q(self, rows: Tensor) -> Tensor:
        """[B, H, R, D]."""
        return self.queries.gather(2, rows[:, None, :, None].expand(-1, self.queries.shape[1], -1, self.queries.shape[3]))

    def probs(self, rows: Tensor) -> Tensor:
        """[B, H, R, N], as `soft_attention` has them."""
        q, k = at_least_fp32(self.q(rows)), at_least_fp32(self.k)
        batch, heads, _, width = q.shape
        n = k.shape[2]
        q = q.reshape(batch, k.shape[1], -1, width)
        logits = ((q * self.scale) @ k.transpose(-2, -1)).view(batch, heads, -1, n)  # heads of one group share a key head
        columns = torch.arange(n, device=q.device)
        if self.gate is not None:
            bias = self.gate.to(q.dtype).clamp_min(_FLOOR).log()[:, None]
            logits = logits + bias.masked_fill(columns == rows[..., None], 0)[:, None]
        seen = (columns <= rows[..., None]) & self.real[:, None]
        return logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1)


def attention_scores(attention: Attention, slots: Slots, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention that visual tokens receive from visual and from text queries (Eq. 3 and 4), in at least fp32.

    S_self_j is the mean over heads and over all visual queries i of A_ij, zeros of the causal mask included; S_cross_j the mean
    over heads and text queries. Only these query rows are computed, `QUERY_CHUNK` at a time; no [H, N, N] is built.

    Args:
        attention: of the layer in front of the module.
        slots: what its columns hold.
        rows: at least as many as the visual and text queries of any sample; `None` = counted, one host synchronisation.

    Returns:
        (S_self, S_cross), both [B, N], 0 outside `slots.visual`; S_cross is 0 in a sample without text.
    """
    visual = slots.visual
    asked = visual | slots.text
    if rows is None:
        rows = int(asked.sum(-1).max())
    index, valid = rows_where(asked, rows)
    with full_precision(asked.device):
        total = at_least_fp32(attention.k).new_zeros(len(asked), 2, asked.shape[1])
        weight = torch.stack([who.gather(1, index) & valid for who in (visual, slots.text)], 1).to(total.dtype)
        weight = weight / torch.stack([visual, slots.text], 1).sum(-1, keepdim=True).clamp_min(1)  # [B, 2, rows]
        for start in range(0, rows, QUERY_CHUNK):
            chunk = slice(start, start + QUERY_CHUNK)
            total = total + weight[:, :, chunk] @ attention.probs(index[:, chunk]).mean(1)
    self_score, cross = total.masked_fill(~visual[:, None], 0).unbind(1)
    return self_score, cross


def debiased(self_score: Tensor, slots: Slots) -> Tensor:
    """The self score [B, N] as a mean over the visual queries that see a token: of n, the j-th is seen by n - j."""
    visual = slots.visual.to(self_score.dtype)
    seen = visual.flip(-1).cumsum(-1).flip(-1)
    return self_score * visual.sum(-1, keepdim=True) / seen.clamp_min(1)


def self_logits(q: Tensor, k: Tensor, slots: Slots, scale: float) -> Tensor:
    """Mean over heads and visual queries of the logits q_i k_j, without causal mask: [B, N], 0 outside `slots.visual`.

    The mean is taken over the queries first, so this costs O(N D).
    """
    with full_precision(q.device):
        q, k = at_least_fp32(q), at_least_fp32(k)
        visual = slots.visual
        mean = q.masked_fill(~visual[:, None, :, None], 0).sum(2) / visual.sum(-1).clamp_min(1)[:, None, None]  # [B, H, D]
        mean = mean.unflatten(1, (k.shape[1], -1)).sum(2)
        score = (k @ mean[..., None]).sum(1).squeeze(-1) * (scale / q.shape[1])
    return score.masked_fill(~visual, 0)


def gate_bias(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, N] -> [B, 1, N, N]: what to add to the logits of every layer behind a module in training, log G_ij.

    G_ij is the gate of token j, and 1 for i = j.
    """
    bias = at_least_fp32(gate).clamp_min(_FLOOR).log()[:, None].expand(-1, gate.shape[1], -1)
    return (bias - torch.diag_embed(bias.diagonal(dim1=1, dim2=2)))[:, None].to(dtype)


def soft_attention(q: Tensor, k: Tensor, gate: Tensor, real: Tensor, scale: float, renormalise: bool = True) -> Tensor:
    """Causal attention probabilities under a gate, the slow way: what a layer computes that is given `gate_bias`.

    P_ij = exp(l_ij) G_ij / sum_k exp(l_ik) G_ik.

    Args:
        q: [B, H, N, D].
        k: [B, Hk, N, D].
        gate: [B, N], 1 at text.
        real: [B, N] bool, False = padding.
        scale: factor on the logits.
        renormalise: False multiplies the probabilities by the gate, the token's own included, and leaves it at that: rows no
            longer sum to 1, and a 0/1 gate does not equal pruning. For comparison.

    Returns:
        [B, H, N, N]; rows of padding are 0.
    """
    rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
    probs = CausalAttention(q, k, real, scale, gate if renormalise else None).probs(rows)
    if not renormalise:
        probs = probs * gate[:, None, None].to(probs.dtype)
    return probs.masked_fill(~real[:, None, :, None], 0)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switches autocast off, which would push scores below fp32."""
    return torch.autocast(device.type, enabled=False)
