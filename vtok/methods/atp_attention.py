"""What ATP-LLaVA (Ye et al., CVPR 2025) reads from attention, and how it gates attention in training. See `vtok.methods.atp`
for what is known of the paper and what is a reading of ours.

Shapes: B samples, N tokens of the sequence, H heads, Hk key heads, D head width. Attention is causal: a token sees the real
tokens up to itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vtok.methods.atp import Layout
from vtok.ops.rows import rows_where
from vtok.state import at_least_fp32

SELF_SCORES = ("probs", "debiased", "logits")
QUERY_CHUNK = 128  # query rows whose attention is in memory at once
_FLOOR = 1e-30  # of a gate: its logarithm, -69, fits every dtype, and no probability survives it


def attention_scores(
    q: Tensor, k: Tensor, layout: Layout, scale: float, gate: Tensor | None = None, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that visual tokens receive from visual and from text queries (Eq. 3 and 4), in at least fp32.

    S_self_j is the mean over heads and over all visual queries i of A_ij, zeros of the causal mask included; S_cross_j the mean
    over heads and text queries. Only these query rows are computed, `QUERY_CHUNK` at a time; no [H, N, N] is built.

    Args:
        q: [B, H, N, D], rotated.
        k: [B, Hk, N, D], rotated.
        layout: what the columns hold.
        scale: factor on the logits.
        gate: [B, N], soft masks of earlier modules that this layer's attention was run with; `None` = none.
        rows: at least as many as the visual and text queries of any sample; `None` = counted, one host synchronisation.

    Returns:
        (S_self, S_cross), both [B, N], 0 outside `layout.visual`; S_cross is 0 in a sample without text.
    """
    visual = layout.visual
    asked = visual | layout.text
    if rows is None:
        rows = int(asked.sum(-1).max())
    index, valid = rows_where(asked, rows)
    with full_precision(q.device):
        q, k = at_least_fp32(q), at_least_fp32(k)
        weights = []
        for who in (visual, layout.text):
            share = (who.gather(1, index) & valid).to(q.dtype)
            weights.append(share / who.sum(-1, keepdim=True).clamp_min(1))
        weight = torch.stack(weights, 1)  # [B, 2, rows]
        score = q.new_zeros(q.shape[0], 2, q.shape[2])
        for start in range(0, rows, QUERY_CHUNK):
            chunk = slice(start, start + QUERY_CHUNK)
            score = score + weight[:, :, chunk] @ _probs(q, k, index[:, chunk], layout.real, scale, gate).mean(1)
    self_score, cross = score.masked_fill(~visual[:, None], 0).unbind(1)
    return self_score, cross


def _probs(q: Tensor, k: Tensor, rows: Tensor, real: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    """Causal attention probabilities [B, H, M, N] of the query rows [B, M]; with a gate, as `soft_attention` has them."""
    batch, heads, n, width = q.shape
    groups = k.shape[1]
    q = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)).reshape(batch, groups, -1, width)
    logits = ((q * scale) @ k.transpose(-2, -1)).view(batch, heads, -1, n)  # heads of one group share a key head
    columns = torch.arange(n, device=q.device)
    if gate is not None:
        bias = gate.to(q.dtype).clamp_min(_FLOOR).log()[:, None]
        logits = logits + bias.masked_fill(columns == rows[..., None], 0)[:, None]
    seen = (columns <= rows[..., None]) & real[:, None]
    return logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1)


def debiased(self_score: Tensor, layout: Layout) -> Tensor:
    """The self score [B, N] as a mean over the visual queries that see a token: of n, the j-th is seen by n - j."""
    visual = layout.visual.to(self_score.dtype)
    seen = visual.flip(-1).cumsum(-1).flip(-1)
    return self_score * visual.sum(-1, keepdim=True) / seen.clamp_min(1)


def self_logits(q: Tensor, k: Tensor, layout: Layout, scale: float) -> Tensor:
    """Mean over heads and visual queries of the logits q_i k_j, without causal mask: [B, N], 0 outside `layout.visual`.

    The mean is taken over the queries first, so this costs O(N D).
    """
    with full_precision(q.device):
        q, k = at_least_fp32(q), at_least_fp32(k)
        visual = layout.visual
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
    q, k = at_least_fp32(q), at_least_fp32(k)
    rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
    probs = _probs(q, k, rows, real, scale, gate if renormalise else None)
    if not renormalise:
        probs = probs * gate[:, None, None].to(probs.dtype)
    return probs.masked_fill(~real[:, None, :, None], 0)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switches autocast off, which would push scores below fp32."""
    return torch.autocast(device.type, enabled=False)
