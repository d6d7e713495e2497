"""Hugging Face transformers' vision encoders as data: blocks, attentions, towers, and the models that hold a tower.

A new layer class is one row in `BLOCKS` and one in `ATTENTIONS`, a new encoder one row in `TOWERS`; a model that holds one
is patched only if it stands in `OWNERS`, because others may need every patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vtok.patches.hf_vision.attention import BlipAttention, HfAttention, InternVLAttention, beit_mask
from vtok.patches.padding import by_rows
from vtok.patches.protocol import Attend, BlockSpec

_MASK: dict[str, Any] = {"args": ("attention_mask",), "mask": "attention_mask", "padding_mask": by_rows}
_CLIP = BlockSpec(attn="self_attn", pre1=("layer_norm1",), pre2=("layer_norm2",), **_MASK)
_NORMS: dict[str, Any] = {"attn": "attention", "pre1": ("layernorm_before",), "pre2": ("layernorm_after",)}
_VIT = BlockSpec(**_NORMS, post1=("dropout",), post2=("dropout",), **_MASK)
_DINO: dict[str, Any] = {
    "attn": "attention",
    "pre1": ("norm1",),
    "post1": ("layer_scale1", "drop_path"),
    "pre2": ("norm2",),
    "post2": ("layer_scale2", "drop_path"),
    **_MASK,
}


def _in(model: str, file: str | None = None) -> str:
    return f"transformers.models.{model}.modeling_{file or model}."


BLOCKS: dict[str, BlockSpec] = {
    _in("beit") + "BeitLayer": BlockSpec(
        **_NORMS,
        post1=("dropout", "lambda_1", "drop_path"),
        post2=("dropout", "lambda_2", "drop_path"),
        **_MASK,
        own_mask=beit_mask,
        passes_mask=False,
    ),
    _in("blip") + "BlipEncoderLayer": _CLIP,
    _in("clip") + "CLIPEncoderLayer": _CLIP,
    _in("deit") + "DeiTLayer": _VIT,
    _in("dinov2") + "Dinov2Layer": BlockSpec(**_DINO),
    _in("dinov2_with_registers") + "Dinov2WithRegistersLayer": BlockSpec(**_DINO),
    _in("dinov3_vit") + "DINOv3ViTLayer": BlockSpec(
        **{**_DINO, "args": ("attention_mask", "position_embeddings")}, rope="position_embeddings"
    ),
    _in("idefics2") + "Idefics2EncoderLayer": _CLIP,
    _in("idefics3") + "Idefics3EncoderLayer": _CLIP,
    _in("internvl") + "InternVLVisionLayer": BlockSpec(
        **_NORMS, post1=("lambda_1",), post2=("dropout", "lambda_2"), **_MASK, passes_mask=False
    ),
    _in("siglip") + "SiglipEncoderLayer": _CLIP,
    _in("siglip2") + "Siglip2EncoderLayer": _CLIP,
    _in("smolvlm") + "SmolVLMEncoderLayer": _CLIP,
    _in("vit") + "ViTLayer": _VIT,
    _in("vit_mae") + "ViTMAELayer": _VIT,
    _in("vit_msn") + "ViTMSNLayer": _VIT,
}

ATTENTIONS: dict[str, Attend] = {
    _in("beit") + "BeitAttention": HfAttention(),
    _in("blip") + "BlipAttention": BlipAttention(),
    _in("clip") + "CLIPAttention": HfAttention(),
    _in("deit") + "DeiTAttention": HfAttention(),
    _in("dinov2") + "Dinov2Attention": HfAttention(),
    _in("dinov2_with_registers") + "Dinov2WithRegistersAttention": HfAttention(),
    _in("dinov3_vit") + "DINOv3ViTAttention": HfAttention(),
    _in("idefics2") + "Idefics2VisionAttention": HfAttention(),
    _in("idefics3") + "Idefics3VisionAttention": HfAttention(),
    _in("internvl") + "InternVLVisionAttention": InternVLAttention(),
    _in("siglip") + "SiglipAttention": HfAttention(),
    _in("siglip2") + "Siglip2Attention": HfAttention(),
    _in("smolvlm") + "SmolVLMVisionAttention": HfAttention(),
    _in("vit") + "ViTAttention": HfAttention(),
    _in("vit_mae") + "ViTMAEAttention": HfAttention(),
    _in("vit_msn") + "ViTMSNAttention": HfAttention(),
}


@dataclass(frozen=True)
class TowerSpec:
    """Where an encoder keeps its parts.

    Attributes:
        layers: path of the list of blocks.
        embed: path of the layer that turns patches into tokens.
        num_prefix: class and distillation tokens; register tokens are read from the config.
        mean_pooler: path of a child that averages patches it is given, if its config says so.
        attn_pool: path of a child that attends over the tokens with one query.
        positions: path of the position embeddings if they are resized to every image by a matrix product.
        positions_since: release of transformers from which on they are; earlier ones interpolate.
        shapes: second parameter of the embeddings, if it tells the rows and columns of every image's patches.
    """

    layers: str = "encoder.layers"
    embed: str = "embeddings.patch_embedding"
    num_prefix: int = 1
    mean_pooler: str = ""
    attn_pool: str = ""
    positions: str = ""
    positions_since: tuple[int, int] = (0, 0)
    shapes: str = ""


_PROJECTION = "embeddings.patch_embeddings.projection"
_FLAT = TowerSpec("layers", _PROJECTION)  # ViT since transformers 5: the layers hang on the model itself
_STACKED = TowerSpec("encoder.layer", _PROJECTION)
_SIGLIP = TowerSpec(num_prefix=0, attn_pool="head")
_IDEFICS = TowerSpec(num_prefix=0)

TOWERS: dict[str, TowerSpec] = {
    _in("beit") + "BeitModel": TowerSpec("layers", _PROJECTION, mean_pooler="pooler"),
    _in("blip") + "BlipVisionModel": TowerSpec(),
    _in("clip") + "CLIPVisionModel": TowerSpec(),
    _in("deit") + "DeiTModel": TowerSpec("layers", _PROJECTION, num_prefix=2),
    _in("dinov2") + "Dinov2Model": _STACKED,
    _in("dinov2_with_registers") + "Dinov2WithRegistersModel": _STACKED,
    _in("dinov3_vit") + "DINOv3ViTModel": TowerSpec("model.layer", "embeddings.patch_embeddings"),
    _in("idefics2") + "Idefics2VisionTransformer": _IDEFICS,
    _in("idefics3") + "Idefics3VisionTransformer": _IDEFICS,
    _in("internvl") + "InternVLVisionModel": _STACKED,
    _in("siglip") + "SiglipVisionModel": _SIGLIP,
    _in("siglip2") + "Siglip2VisionModel": replace(
        _SIGLIP, positions="embeddings.position_embedding", positions_since=(5, 24), shapes="spatial_shapes"
    ),
    _in("smolvlm") + "SmolVLMVisionTransformer": _IDEFICS,
    _in("vit") + "ViTModel": _FLAT,
    _in("vit_mae") + "ViTMAEModel": _FLAT,
    _in("vit_msn") + "ViTMSNModel": _FLAT,
}


@dataclass(frozen=True)
class OwnerSpec:
    """A model that holds a tower and uses what comes out of it.

    Attributes:
        heads: children that run once an image, for costs.
        averages: whether its own forward averages the tower's patches.
        blind: why its attention to the tower's tokens can see neither sizes nor padding.
    """

    heads: tuple[str, ...] = ()
    averages: bool = False
    blind: str | None = None


_CLASSIFIER = OwnerSpec(("classifier",))
_AVERAGE = OwnerSpec(("classifier",), averages=True)
_PROJECTED = OwnerSpec(("visual_projection",))
_CROSS = OwnerSpec(
    blind="its text model attends to the image tokens, and its mask there can only hide them, not weigh them; choose a method "
    "that prunes, or one with prop_attn=False"
)

OWNERS: dict[str, OwnerSpec] = {
    _in("beit") + "BeitForImageClassification": _CLASSIFIER,
    _in("blip") + "BlipForConditionalGeneration": _CROSS,
    _in("blip") + "BlipForImageTextRetrieval": _CROSS,
    _in("blip") + "BlipForQuestionAnswering": _CROSS,
    _in("blip") + "BlipModel": _PROJECTED,
    _in("clip") + "CLIPForImageClassification": _AVERAGE,
    _in("clip") + "CLIPModel": _PROJECTED,
    _in("clip") + "CLIPVisionModelWithProjection": _PROJECTED,
    _in("deit") + "DeiTForImageClassification": _CLASSIFIER,
    _in("deit") + "DeiTForImageClassificationWithTeacher": OwnerSpec(("cls_classifier", "distillation_classifier")),
    _in("dinov2") + "Dinov2ForImageClassification": _AVERAGE,
    _in("dinov2_with_registers") + "Dinov2WithRegistersForImageClassification": _AVERAGE,
    _in("siglip") + "SiglipForImageClassification": _AVERAGE,
    _in("siglip") + "SiglipModel": OwnerSpec(),
    _in("siglip2") + "Siglip2ForImageClassification": _AVERAGE,
    _in("siglip2") + "Siglip2Model": OwnerSpec(),
    _in("vit") + "ViTForImageClassification": _CLASSIFIER,
    _in("vit_msn") + "ViTMSNForImageClassification": _CLASSIFIER,
}


def release() -> tuple[int, ...]:
    """The release of transformers that is installed: (major, minor); (0, 0) = none."""
    try:
        return tuple(int(part) for part in version("transformers").split(".")[:2])
    except PackageNotFoundError:
        return 0, 0
