"""Tiny random timm models, one for every covered kind of block, attention, prefix and head: what the contract tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vtok.patches.protocol import Example

_SIZE = (3, 64, 64)
_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
_EVA: dict[str, Any] = {**_VIT, "embed_dim": 64, "use_rot_pos_emb": True}
_BEIT: dict[str, Any] = {**_VIT, "img_size": (64, 64), "use_abs_pos_emb": False}


def _vit(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models import vision_transformer as vit

        kwargs = {**_VIT, **extra}
        if isinstance(kwargs.get("block_fn"), str):
            kwargs["block_fn"] = getattr(vit, kwargs["block_fn"])
        return vit.VisionTransformer(**kwargs)

    return build


def _eva(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.eva import Eva

        return Eva(**{**_EVA, **extra})

    return build


def _beit(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.beit import Beit

        return Beit(**{**_BEIT, **extra})

    return build


def _naflex(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        cfg = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": True, "global_pool": "token"}
        return NaFlexVit(NaFlexVitCfg(**{**cfg, **extra}), num_classes=10, img_size=64)

    return build


def _distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**_VIT)


def _hybrid() -> nn.Module:
    from functools import partial

    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import HybridEmbed

    stem = ResNetV2(layers=[], channels=(), num_classes=0, global_pool="", in_chans=3)  # four times smaller, 64 channels
    return VisionTransformer(**{**_VIT, "patch_size": 2}, embed_layer=partial(HybridEmbed, backbone=stem))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _vit(),
    "ViT qk-norm, LayerScale, 4 registers": _vit(qk_norm=True, init_values=0.1, reg_tokens=4),
    "ViT scaled norms (sub-LN)": _vit(scale_attn_norm=True, scale_mlp_norm=True),
    "ViT map pool (SigLIP)": _vit(class_token=False, global_pool="map"),
    "ViT map pool over registers": _vit(class_token=False, reg_tokens=2, global_pool="map", pool_include_prefix=True),
    "ViT average pool": _vit(class_token=False, global_pool="avg"),
    "ViT average pool with CLS": _vit(global_pool="avg"),
    "ViT average and maximum pool": _vit(class_token=False, global_pool="avgmax"),
    "ViT maximum pool": _vit(class_token=False, global_pool="max"),
    "ViT differential attention": _vit(attn_layer="diff"),
    "ViT res-post-norm": _vit(block_fn="ResPostBlock", init_values=1.0),
    "ViT parallel blocks": _vit(block_fn="ParallelScalingBlock"),
    "ViT parallel blocks, qk-norm, LayerScale": _vit(block_fn="ParallelScalingBlock", qk_norm=True, init_values=0.1),
    "ViT hybrid": _hybrid,
    "DeiT distilled": _distilled,
    "EVA-02 rotary, SwiGLU": _eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
    "EVA fused q/k/v bias": _eva(use_rot_pos_emb=False, init_values=0.1),
    "EVA map pool": _eva(global_pool="map", use_rot_pos_emb=False),
    "EVA mixed rotary": _eva(rope_type="mixed", attn_type="rope"),
    "EVA post-norm": _eva(use_post_norm=True),
    "EVA grouped queries": _eva(attn_type="rope", num_kv_heads=2, qkv_fused=False),
    "DINOv3 rotary, 4 registers": _eva(
        rope_type="dinov3",
        rope_rotate_half=True,  # as the published ones; the other rotary models turn neighbouring numbers
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        init_values=0.1,
        attn_type="rope",
    ),
    "BEiT relative bias": _beit(use_rel_pos_bias=True, init_values=0.1),
    "BEiT shared relative bias": _beit(use_shared_rel_pos_bias=True),
    "NaFlexViT": _naflex(),
    "NaFlexViT rotary, gated": _naflex(attn_type="rope", rope_type="axial", attn_gated=True, pos_embed="none"),
    "NaFlexViT average pool, registers": _naflex(class_token=False, global_pool="avg", reg_tokens=2),
    "NaFlexViT map pool": _naflex(class_token=False, global_pool="map"),
}

# Younger than the oldest supported timm: the release that first has them, or first runs them in every dtype.
_SINCE = {
    "EVA mixed rotary": "1.0.31",
    "ViT differential attention": "1.0.23",
    "EVA grouped queries": "1.0.30",
    "NaFlexViT rotary, gated": "1.0.28",
}

# Rows of the support matrix that the first word of a name does not give.
_FAMILIES = {
    "ViT, AugReg, DeiT-III, DINOv2": (
        "ViT",
        "ViT qk-norm, LayerScale, 4 registers",
        "ViT scaled norms (sub-LN)",
        "ViT average pool with CLS",
    ),
    "ViT without class token (SigLIP)": (
        "ViT map pool (SigLIP)",
        "ViT map pool over registers",
        "ViT average pool",
        "ViT average and maximum pool",
        "ViT maximum pool",
    ),
    "ViT differential attention": ("ViT differential attention",),
    "ViT res-post-norm": ("ViT res-post-norm",),
    "ViT parallel blocks": ("ViT parallel blocks", "ViT parallel blocks, qk-norm, LayerScale"),
    "ViT hybrid": ("ViT hybrid",),
    "DeiT, distilled": ("DeiT distilled",),
    "EVA, EVA-02": tuple(name for name in _BUILDERS if name.startswith("EVA")),
    "NaFlexViT without class token": ("NaFlexViT average pool, registers", "NaFlexViT map pool"),
}
_FAMILY = {name: family for family, names in _FAMILIES.items() for name in names}

EXAMPLES = tuple(Example(name, build, _SIZE, _SINCE.get(name, ""), _FAMILY.get(name, "")) for name, build in _BUILDERS.items())
