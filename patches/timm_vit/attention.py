"""How timm's attention modules are called, looked into and priced.

A module attends through its own forward wherever possible. Only what its forward cannot do (attend with some of the queries,
take a gathered relative bias) is computed here step by step, from its children; the contract tests hold both paths together.

Shapes: B batch, N tokens, M query rows, H heads, D head dim, C width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.patches.protocol import Attend, Projected, TapSpec


class TimmAttention(Attend):
    """`Attention`, `AttentionRope`, `EvaAttention`: q, k, v fused or apart, q/k norm, rotation, gate, grouped queries."""

    # q_norm and k_norm always run (nn.Identity where there is no norm); a hook on qkv would miss EVA: it reads the weight only.
    taps: ClassVar[dict[str, TapSpec]] = {"q": TapSpec("q_norm"), "k": TapSpec("k_norm")}
    late: ClassVar[tuple[str, ...]] = ("proj", "gate")

    def heads(self, attn: Any) -> tuple[int, int]:
        width = attn.qkv.out_features // 3 if attn.qkv is not None else attn.q_proj.out_features  # weights may be packed
        return attn.num_heads, width // attn.num_heads

    def kv_heads(self, attn: Any) -> int:
        return getattr(attn, "num_kv_heads", self.heads(attn)[0])

    def scale(self, attn: Any) -> float:
        return attn.scale

    def rotate(self, attn: Any, t: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        p, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        return torch.cat([t[:, :, :p], apply_rot_embed_cat(t[:, :, p:], rope, half=half)], 2).type_as(t)

    def project(self, attn: Any, h: Tensor, rope: Tensor | None) -> Projected:
        q, k, v = self._qkv(attn, h)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is None:
            return Projected(q, k, k, v)
        return Projected(self.rotate(attn, q, rope), k, self.rotate(attn, k, rope), v)

    def _qkv(self, attn: Any, h: Tensor) -> tuple[Tensor, ...]:
        _, head_dim = self.heads(attn)
        if attn.qkv is None:
            return tuple(p(h).unflatten(-1, (-1, head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(h)
        else:  # BEiT and EVA keep the three biases apart from the weight
            qkv = F.linear(h, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
        return qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        if isinstance(getattr(attn, "norm", None), nn.Module):
            out = attn.norm(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(h).sigmoid()
        return attn.proj_drop(attn.proj(out))


class TimmBeitAttention(TimmAttention):
    """BEiT: adds an N0 x N0 bias table inside its forward, so it is always computed step by step, with the table gathered."""

    taps: ClassVar[dict[str, TapSpec]] = {}
    takes_bias: ClassVar[bool] = False


def beit_bias(block: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The relative position bias of a BEiT block at the original length, its own and the shared one: [1, H, N0, N0]."""
    shared = kwargs.get("shared_rel_pos_bias")
    if block.attn.relative_position_bias_table is None:
        return shared
    own = block.attn._get_rel_pos_bias()
    return own if shared is None else own + shared


class TimmDiffAttention(TimmAttention):
    """Differential attention: keys can be compared, but probabilities are a difference of two softmaxes."""

    taps: ClassVar[dict[str, TapSpec]] = {"k": TapSpec("k_norm")}
    splits: ClassVar[bool] = False
    softmax: ClassVar[bool] = False

    def heads(self, attn: Any) -> tuple[int, int]:
        return 2 * attn.num_heads, attn.head_dim

    def pair_macs(self, attn: Any) -> int:
        return 6 * attn.num_heads * attn.head_dim  # two maps of width D, each times values of width 2 D


def _value_columns(block: Any) -> slice:
    return slice(-block.num_heads * block.head_dim, None)


class TimmParallelBlock(TimmAttention):
    """`ParallelScalingBlock`: one projection feeds attention and MLP, which cannot be parted."""

    taps: ClassVar[dict[str, TapSpec]] = {
        "q": TapSpec("q_norm", "bnhd"),
        "k": TapSpec("k_norm", "bnhd"),
        "v": TapSpec("in_proj", "bn(hd)", _value_columns),
    }
    splits: ClassVar[bool] = False
    late: ClassVar[tuple[str, ...]] = ()

    def heads(self, attn: Any) -> tuple[int, int]:
        return attn.num_heads, attn.head_dim
