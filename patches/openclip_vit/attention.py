"""How the attention modules of open_clip's blocks are called, looked into and priced.

Both keep the weight of q, k and v as a bare parameter, so no hook sees values, and `nn.MultiheadAttention` shows no keys
either. Its mask would have to be [B H, N, N] for a bias that differs from image to image: it is computed step by step here,
with fused attention and a [B, 1, 1, N] bias.

Shapes: B batch, N tokens, M query rows, H heads, D head dim, C width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.patches.protocol import Attend, Projected, TapSpec


class TorchAttention(Attend):
    """`nn.MultiheadAttention` used as self-attention. Always batch first here: the block has turned its input round."""

    takes_bias: ClassVar[bool] = False
    late: ClassVar[tuple[str, ...]] = ("out_proj",)
    weights: ClassVar[tuple[str, ...]] = ("in_proj_weight",)

    def heads(self, attn: Any) -> tuple[int, int]:
        return attn.num_heads, attn.head_dim

    def scale(self, attn: Any) -> float:
        return attn.head_dim**-0.5

    def dropout(self, attn: Any) -> float:
        return attn.dropout

    def project(self, attn: Any, h: Tensor, rope: Tensor | None) -> Projected:
        qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return Projected(q, k, k, v)

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        return attn.out_proj(out)


class OpenClipAttention(TorchAttention):
    """open_clip's own `Attention`: q/k norm, a scale for every head, a norm before the output projection."""

    taps: ClassVar[dict[str, TapSpec]] = {"q": TapSpec("ln_q"), "k": TapSpec("ln_k")}  # nn.Identity where there is no norm
    takes_bias: ClassVar[bool] = True

    def dropout(self, attn: Any) -> float:
        return attn.attn_drop.p

    def project(self, attn: Any, h: Tensor, rope: Tensor | None) -> Projected:
        q, _, k, v = super().project(attn, h, rope)
        q, k = attn.ln_q(q), attn.ln_k(k)
        return Projected(q, k, k, v)

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        if attn.head_scale is not None:
            out = (out.unflatten(-1, (attn.num_heads, attn.head_dim)) * attn.head_scale[:, 0]).flatten(-2)
        return attn.out_drop(attn.out_proj(attn.ln_inner(out)))


def added_mask(block: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask handed to a `ResidualAttentionBlock`, which casts whatever it gets and adds it: [N, N] or [B, H, N, N]."""
    mask = _by_heads(kwargs.get("attn_mask"), block)
    return None if mask is None else mask.to(block.attn.in_proj_weight.dtype)


def excluding_mask(block: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask handed to a `CustomResidualAttentionBlock`, where True means "do not attend", in additive form."""
    mask = _by_heads(kwargs.get("attn_mask"), block)
    if mask is None or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros_like(mask, dtype=block.attn.in_proj_weight.dtype)
    return zeros.masked_fill(mask, float("-inf"))


def _by_heads(mask: Tensor | None, block: Any) -> Tensor | None:
    """torch writes masks that differ from head to head as [B H, N, N]."""
    return mask.unflatten(0, (-1, block.attn.num_heads)) if mask is not None and mask.ndim == 3 else mask
