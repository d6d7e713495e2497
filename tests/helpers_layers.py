"""The attention of one decoder layer, and prompts, made of given arrays: what a method that acts in the LLM is asked with."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.core.prompt import LayerAttention, Layout, VLMInfo


def info(width: int = 32, depth: int = 32, heads: int = 4) -> VLMInfo:
    return VLMInfo("Golden", depth, width, heads)


def layout(length: int, start: int, count: int, real: Tensor | None = None) -> Layout:
    """Prompts [B, length] with `count` visual tokens from `start` on; real [B, length] bool, default: one, without padding."""
    real = torch.ones(1, length, dtype=torch.bool) if real is None else real
    column = torch.arange(length).expand(real.shape)
    return Layout.whole((column >= start) & (column < start + count), real)


def given_probs(probs: Tensor) -> LayerAttention:
    """Attention whose probabilities are these [B, H, L, L] (rows sum to 1): their logarithm is put into the scores."""
    batch, heads, length, _ = probs.shape
    one_hot = torch.eye(length, dtype=probs.dtype).expand(batch, heads, -1, -1)
    logits = probs.log().clamp_min(-1e4)

    def project(rows: Tensor | None) -> Tensor:
        if rows is None:
            return one_hot
        return logits.gather(2, rows[:, None, :, None].expand(-1, heads, -1, length))

    def bias(rows: Tensor) -> Tensor:
        return torch.zeros(batch, 1, rows.shape[1], length, dtype=probs.dtype)

    return LayerAttention(0, 1.0, project, bias)
