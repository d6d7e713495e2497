"""How the attention modules of Hugging Face vision encoders are called, looked into and priced.

Nearly all of them have one shape: three projections, an exchangeable kernel (`config._attn_implementation`), an output
projection. They differ in names, which are looked up here. A module attends through its own forward wherever possible.

Shapes: B batch, N tokens, M query rows, H heads, D head dim, C width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.core.tokens import Rope
from vtok.patches.protocol import Attend, Projected, TapSpec

ADDITIVE = ("eager", "sdpa")  # kernels that add any broadcastable mask to their logits; flash and flex kernels cannot
_OUTPUTS = ("out_proj", "o_proj", "projection_layer", "projection")


def _first(module: Any, names: tuple[str, ...]) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


class HfAttention(Attend):
    """`q_proj`, `k_proj`, `v_proj`, a kernel, an output projection: ViT, CLIP, SigLIP, DINOv2 and most others."""

    taps: ClassVar[dict[str, TapSpec]] = {n: TapSpec(f"{n}_proj", "bn(hd)") for n in ("q", "k", "v")}
    late: ClassVar[tuple[str, ...]] = _OUTPUTS

    def heads(self, attn: Any) -> tuple[int, int]:
        return _first(attn, ("num_heads", "num_attention_heads")), attn.head_dim

    def scale(self, attn: Any) -> float:
        return _first(attn, ("scaling", "scale"))

    def dropout(self, attn: Any) -> float:
        drop = _first(attn, ("attention_dropout", "dropout"))
        return drop.p if isinstance(drop, nn.Dropout) else drop

    def refuses_bias(self, attn: Any) -> str | None:
        kernel = getattr(attn.config, "_attn_implementation", None) or "eager"
        if kernel in ADDITIVE:
            return None
        return (
            f"attn_implementation={kernel!r} takes no additive mask; call model.set_attn_implementation('sdpa'), or choose "
            "a method that prunes, or one with prop_attn=False"
        )

    def call(self, attn: Any, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return attn(h, **kwargs)[0]

    def rotate(self, attn: Any, t: Tensor, rope: Rope) -> Tensor:
        cos, sin = rope
        p = t.shape[-2] - cos.shape[-2]  # prefix tokens have no place on the grid
        a, b = t[:, :, p:].chunk(2, -1)
        return torch.cat([t[:, :, :p], t[:, :, p:] * cos + torch.cat([-b, a], -1) * sin], 2)

    def project(self, attn: Any, h: Tensor, rope: Rope | None) -> Projected:
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in self._qkv(attn, h))
        if rope is None:
            return Projected(q, k, k, v)
        return Projected(self.rotate(attn, q, rope), k, self.rotate(attn, k, rope), v)

    def _qkv(self, attn: Any, h: Tensor) -> tuple[Tensor, ...]:
        """[B, N, C] -> three of [B, N, H D]."""
        return attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        return _first(attn, _OUTPUTS)(out)


class InternVLAttention(HfAttention):
    """InternVL: queries and keys normalised over all heads, dropout after the projection."""

    taps: ClassVar[dict[str, TapSpec]] = {
        "q": TapSpec("q_norm", "bn(hd)"),  # nn.Identity where there is no norm
        "k": TapSpec("k_norm", "bn(hd)"),
        "v": TapSpec("v_proj", "bn(hd)"),
    }

    def _qkv(self, attn: Any, h: Tensor) -> tuple[Tensor, ...]:
        return attn.q_norm(attn.q_proj(h)), attn.k_norm(attn.k_proj(h)), attn.v_proj(h)

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        return attn.projection_dropout(attn.projection_layer(out))


class BlipAttention(HfAttention):
    """BLIP: one projection, and no mask at all, so blocks that need one are computed step by step."""

    taps: ClassVar[dict[str, TapSpec]] = {}
    takes_bias: ClassVar[bool] = False

    def refuses_bias(self, attn: Any) -> str | None:
        return None

    def _qkv(self, attn: Any, h: Tensor) -> tuple[Tensor, ...]:
        return attn.qkv(h).chunk(3, -1)


def beit_mask(block: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of a BEiT block at the original length: [1, H, N0, N0] relative position bias, added to what came in.

    Takes the image's resolution out of the arguments: the attention does not know it.
    """
    mask, resolution = kwargs.get("attention_mask"), kwargs.pop("resolution", None)
    interpolate = kwargs.pop("interpolate_pos_encoding", False)
    if block.relative_position_bias is None:
        return mask
    rows, columns = (int(side) // block.patch_size for side in resolution)
    own = block.relative_position_bias((rows, columns), interpolate, dim_size=rows * columns + 1)
    return own if mask is None else own + mask
