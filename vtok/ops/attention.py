"""Attention that patches receive: from the class token, or from everywhere.

Shapes: V images or views, n patches, P prefix tokens, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.core.tokens import AttentionView, at_least_fp32


def cls_attention(q: Tensor, k: Tensor, num_prefix: int = 1, scale: float | None = None, joint: bool = False) -> Tensor:
    """Attention of the class token to the patches: a softmax over all tokens, averaged over heads, the prefix left out.

    Args:
        q: [V, H, d] queries of the class token.
        k: [V, H, P + n, d] keys, prefix first.
        num_prefix: P.
        scale: factor on the logits; `None` = d^-0.5.
        joint: one softmax over keys of all heads side by side, scale (H d)^-0.5, as LLaVA-PruMerge takes it.

    Returns:
        [V, n], in at least fp32; sums to less than 1.
    """
    if joint:
        q, k = q.flatten(1)[:, None], k.transpose(1, 2).flatten(2)[:, None]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probs = AttentionView(q[:, :, None], None, k, None, scale, None).probs()
    return probs[:, :, 0, num_prefix:].mean(1)


def received_attention(
    q: Tensor, k: Tensor, num_prefix: int = 0, scale: float | None = None, valid: Tensor | None = None
) -> Tensor:
    """Attention that each patch receives, averaged over heads and queries: for encoders without a class token.

    Args:
        q, k: [V, H, P + n, d].
        num_prefix: P.
        scale: factor on the logits; `None` = d^-0.5.
        valid: [V, n] bool, False = padding, which neither asks nor is seen; `None` = all real.

    Returns:
        [V, n], in at least fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = []
    for view in range(max(1, len(q))):  # one H N x N matrix at a time
        here, real, bias = slice(view, view + 1), None, None
        if valid is not None:
            real = F.pad(valid[here], (num_prefix, 0), value=True)
            bias = at_least_fp32(q).new_zeros(real.shape).masked_fill(~real, float("-inf"))[:, None, None]
        found.append(AttentionView(q[here], None, k[here], None, scale, bias).received(real).mean(1))
    return torch.cat(found)[:, num_prefix:]
