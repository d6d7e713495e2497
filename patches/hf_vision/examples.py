"""Tiny random Hugging Face models, one for every covered encoder and head: what the contract tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.patches.module_swap import Mixin
from vtok.patches.protocol import Example

_SIZE, _PATCH = (3, 64, 64), 8
_TINY: dict[str, Any] = {
    "image_size": 64,
    "patch_size": _PATCH,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Reader(nn.Module):
    """A model that maps images to one tensor: what a field of the wrapped model's output holds.

    Args:
        model: a transformers model.
        field: "logits", "pooler_output", ...; "cls" for the first token, "mean" for the mean patch, of the last hidden state.
        method: of the model to call; "" = its forward.
        inputs: makes what the model takes besides or in place of pixel values, from the images.
    """

    def __init__(self, model: nn.Module, field: str, method: str = "", inputs: Callable[[Tensor], dict] | None = None):
        super().__init__()
        self.model, self.field, self.method, self.inputs = model, field, method, inputs

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, ...]."""
        call = getattr(self.model, self.method) if self.method else self.model
        out = call(**{"pixel_values": images, **(self.inputs(images) if self.inputs else {})})
        if self.field == "cls":
            return out.last_hidden_state[:, 0]
        return self._mean(out.last_hidden_state) if self.field == "mean" else getattr(out, self.field)

    def _mean(self, tokens: Tensor) -> Tensor:
        """What a user must do whose encoder has no pool: weigh the tokens by the state of the pass."""
        link = next((m.__dict__["_vtok"] for m in self.model.modules() if isinstance(m, Mixin)), None)
        state = None if link is None else link.run.current.final
        if state is None or (state.size is None and state.keep is None):
            return tokens.mean(1)
        weight = torch.ones_like(tokens[:, :, 0]) if state.size is None else state.size
        weight = weight if state.keep is None else weight * state.keep
        weight = weight / weight.sum(1, keepdim=True)
        return (tokens * weight[..., None]).sum(1).to(tokens.dtype)  # no matrix product: nothing for the FLOP counter


def naflex(images: Tensor) -> dict[str, Tensor]:
    """Images as SigLIP2 takes them: patches [B, N, 3 p p], a mask [B, N] and the grid of every image [B, 2]."""
    batch, channels, height, width = images.shape
    grid = (height // _PATCH, width // _PATCH)
    patches = images.reshape(batch, channels, grid[0], _PATCH, grid[1], _PATCH).permute(0, 2, 4, 3, 5, 1)
    pixels = patches.reshape(batch, grid[0] * grid[1], -1)
    mask = torch.ones(pixels.shape[:2], dtype=torch.int64, device=images.device)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([grid] * batch, device=images.device),
    }


def _in_order(images: Tensor) -> dict[str, Tensor]:
    """ViT-MAE's noise, by which it shuffles and drops patches: none."""
    patches = images.shape[2] * images.shape[3] // _PATCH**2
    return {"noise": torch.arange(patches, device=images.device).expand(len(images), -1)}


def _alone(
    family: str, field: str, model: str = "", config: str = "", inputs: Callable | None = None, **extra: Any
) -> Callable[[], nn.Module]:
    """A model with one config: `<family>Model` of a `<family>Config` unless other names are given."""

    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config or f"{family}Config")(**{**_TINY, **extra})
        return Reader(getattr(transformers, model or f"{family}Model")(settings), field, inputs=inputs)

    return build


def _pair(family: str, model: str, field: str, method: str = "", inputs: Callable | None = None) -> Callable[[], nn.Module]:
    """A model that holds an image tower and, where it needs one, a text tower."""

    def build() -> nn.Module:
        import transformers

        vision = {k: v for k, v in _TINY.items() if family != "Siglip2" or k != "image_size"}
        if family == "Siglip2":
            vision["num_patches"] = 64
        config = getattr(transformers, f"{family}Config")(
            text_config={**_TEXT, "projection_size": 24}, vision_config=vision, projection_dim=24, num_labels=10
        )
        return Reader(getattr(transformers, model)(config), field, method, inputs)

    return build


def _smolvlm() -> nn.Module:
    from transformers import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    return Reader(SmolVLMVisionTransformer(SmolVLMVisionConfig(**_TINY)), "mean")


def _idefics3() -> nn.Module:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    return Reader(Idefics3VisionTransformer(Idefics3VisionConfig(**_TINY)), "mean")


def _labelled(family: str, **extra: Any) -> Callable[[], nn.Module]:
    return _alone(family, "logits", f"{family}ForImageClassification", num_labels=10, **extra)


_DINO: dict[str, Any] = {"mlp_ratio": 2, "layerscale_value": 0.5}
_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _labelled("ViT"),
    "ViT encoder, pooler": _alone("ViT", "pooler_output"),
    "CLIP tower": _alone("CLIPVision", "pooler_output"),
    "CLIP tower, projection": _alone("CLIPVision", "image_embeds", "CLIPVisionModelWithProjection", projection_dim=24),
    "CLIP, both towers": _pair("CLIP", "CLIPModel", "pooler_output", "get_image_features"),
    "CLIP classifier, average pool": _pair("CLIP", "CLIPForImageClassification", "logits"),
    "SigLIP tower, attention pool": _alone("SiglipVision", "pooler_output"),
    "SigLIP, both towers": _pair("Siglip", "SiglipModel", "pooler_output", "get_image_features"),
    "SigLIP classifier, average pool": _pair("Siglip", "SiglipForImageClassification", "logits"),
    "SigLIP2, both towers": _pair("Siglip2", "Siglip2Model", "pooler_output", "get_image_features", naflex),
    "SigLIP2 classifier, average pool": _pair("Siglip2", "Siglip2ForImageClassification", "logits", "", naflex),
    "DINOv2": _alone("Dinov2", "pooler_output", **_DINO),
    "DINOv2 classifier, CLS and average": _labelled("Dinov2", use_swiglu_ffn=True, **_DINO),
    "DINOv2 classifier, registers": _labelled("Dinov2WithRegisters", num_register_tokens=4, **_DINO),
    "DeiT distilled": _alone("DeiT", "logits", "DeiTForImageClassificationWithTeacher", num_labels=10),
    "DeiT": _labelled("DeiT"),
    "BEiT relative bias, average pool": _labelled("Beit", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "BEiT average pool": _labelled("Beit", use_absolute_position_embeddings=True),
    "BEiT shared relative bias, CLS": _labelled("Beit", use_shared_relative_position_bias=True, use_mean_pooling=False),
    "ViT-MAE": _alone("ViTMAE", "cls", inputs=_in_order, mask_ratio=0.0),
    "ViT-MSN": _labelled("ViTMSN"),
    "DINOv3 rotary, registers": _alone("DINOv3ViT", "pooler_output", num_register_tokens=4, layerscale_value=0.5),
    "DINOv3 gated": _alone("DINOv3ViT", "pooler_output", use_gated_mlp=True),
    "InternVL tower": _alone("InternVLVision", "cls", image_size=(64, 64), patch_size=(8, 8), layer_scale_init_value=0.5),
    "InternVL tower, qk-norm": _alone(
        "InternVLVision", "cls", image_size=(64, 64), patch_size=(8, 8), use_qk_norm=True, norm_type="rms_norm"
    ),
    "Idefics3 tower": _idefics3,
    "SmolVLM tower": _smolvlm,
    "BLIP tower": _alone("BlipVision", "pooler_output"),
}

EXAMPLES = tuple(Example(name, build, _SIZE) for name, build in _BUILDERS.items())
