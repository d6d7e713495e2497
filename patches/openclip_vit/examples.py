"""Tiny random open_clip towers, one for every covered kind of block, layout, pool and wrapper, for the contract tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vtok.patches.protocol import Example

_SIZE = (3, 64, 64)
_VIT: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "width": 48,
    "layers": 4,
    "heads": 4,
    "mlp_ratio": 4.0,
    "output_dim": 10,
}
_TIMM: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 0}
_POOL: dict[str, Any] = {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 2}
_POOLS: dict[str, Any] = {**_POOL, "output_dim": 48}  # open_clip 3.3 runs two pools only where input and output are as wide


def _vit(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip import transformer

        kwargs = {**_VIT, **extra}
        if isinstance(kwargs.get("act_layer"), str):
            kwargs["act_layer"] = getattr(transformer, kwargs["act_layer"])
        return transformer.VisionTransformer(**kwargs)

    return build


def _seq_first() -> nn.Module:
    from open_clip.transformer import Transformer

    visual: Any = _vit()()
    visual.transformer = Transformer(width=48, layers=4, heads=4, batch_first=False)
    return visual


def _wrapped(**extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.timm_model import TimmModel
        from timm.models.vision_transformer import VisionTransformer

        visual = TimmModel("test_vit", embed_dim=10, image_size=64, pool="")  # the smallest that timm makes by name
        visual.trunk = VisionTransformer(**{**_TIMM, **extra})
        visual.head = nn.Sequential(nn.Linear(48, 10, bias=False))
        return visual

    return build


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _vit(),
    "ViT QuickGELU, LayerScale, no first norm": _vit(act_layer="QuickGELU", ls_init_value=0.1, no_ln_pre=True),
    "ViT sequence first": _seq_first,
    "ViT custom blocks": _vit(block_type="custom", pos_embed_type="sin_cos_2d"),
    "ViT custom blocks, all norms": _vit(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True, ls_init_value=0.1
    ),
    "ViT average pool": _vit(pool_type="avg"),
    "ViT average pool, last norm after it": _vit(pool_type="avg", final_ln_after_pool=True),
    "ViT attention pool (CoCa)": _vit(**_POOL),
    "ViT attention pool, mean of queries": _vit(**_POOL, pool_type="avg"),
    "ViT attention pool, all queries": _vit(**_POOL, pool_type="none"),
    "ViT attention pools in parallel": _vit(**{**_POOLS, "attentional_pool": "parallel"}),
    "ViT attention pools in cascade": _vit(**{**_POOLS, "attentional_pool": "cascade"}),
    "timm trunk": _wrapped(),
    "timm trunk, map pool (SigLIP)": _wrapped(class_token=False, global_pool="map"),
}

# Rows of the support matrix that the first word of a name does not give.
_FAMILIES = {
    "ViT with attention pool (CoCa)": tuple(name for name in _BUILDERS if name.startswith("ViT attention pool")),
    "ViT (CLIP, CLIPA, MetaCLIP)": tuple(
        name for name in _BUILDERS if name.startswith("ViT") and not name.startswith("ViT attention pool")
    ),
    "timm trunk": ("timm trunk",),
    "timm trunk, map pool (SigLIP)": ("timm trunk, map pool (SigLIP)",),
}
_FAMILY = {name: family for family, names in _FAMILIES.items() for name in names}

EXAMPLES = tuple(Example(name, build, _SIZE, family=_FAMILY.get(name, "")) for name, build in _BUILDERS.items())
