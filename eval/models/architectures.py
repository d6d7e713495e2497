"""Architectures of checkpoints on the Hugging Face hub that papers quote, as their configuration files state them.

It is what planning needs, without asking the hub and without a weight.

Only what sets shapes and token counts is here. `vtok.eval.models.by_name.load_model(..., meta=True)` builds from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtok.errors import MissingExtraError


def _clip_tower(**changes: Any) -> dict[str, Any]:
    """CLIP ViT-L/14 at 336 px, the tower of LLaVA."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return {"model_type": "clip_vision_model", **size, "image_size": 336, "patch_size": 14, "projection_dim": 768, **changes}


def _vicuna(width: int, hidden: int, depth: int) -> dict[str, Any]:
    """Vicuna 1.5 with the two tokens that LLaVA adds and padding to a multiple of 64; heads are 128 wide."""
    return {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "max_position_embeddings": 4096,
    }


_VICUNA_7B, _VICUNA_13B = _vicuna(4096, 11008, 32), _vicuna(5120, 13824, 40)


def _llava(text: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config = {"vision_config": _clip_tower(), "text_config": dict(text), "image_token_index": 32000, "vision_feature_layer": -2}
    return "LlavaForConditionalGeneration", config


def _llava_next(text: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _, config = _llava(text)
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return "LlavaNextForConditionalGeneration", {**config, "image_grid_pinpoints": grids}


_BLIP = (
    "BlipForImageTextRetrieval",
    {
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 384,
            "patch_size": 16,
        },
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 30524},
        "image_text_hidden_size": 256,
    },
)
_QWEN_2_5_VL_7B = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    },
)
_QWEN_3_VL_8B = (
    "Qwen3VLForConditionalGeneration",
    {
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    },
)
_LLAVA_ONEVISION_7B = (
    "LlavaOnevisionForConditionalGeneration",
    {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "image_grid_pinpoints": [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
)
# Name on the hub -> (class of transformers, what its configuration says).
PUBLISHED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN_2_5_VL_7B,
    "Qwen/Qwen3-VL-8B-Instruct": _QWEN_3_VL_8B,
    "Salesforce/blip-itm-base-coco": _BLIP,
    "Salesforce/blip-itm-base-flickr": _BLIP,
    "llava-hf/llava-1.5-13b-hf": _llava(_VICUNA_13B),
    "llava-hf/llava-1.5-7b-hf": _llava(_VICUNA_7B),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _LLAVA_ONEVISION_7B,
    "llava-hf/llava-v1.6-vicuna-13b-hf": _llava_next(_VICUNA_13B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(_VICUNA_7B),
}


def build_published(name: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of `PUBLISHED` in eval mode.

    Args:
        name: on the hub.
        device: "meta": without weights; elsewhere they are random.
        dtype: of the weights.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    kind, config = PUBLISHED[name]
    cls: Any = getattr(transformers, kind)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return cls(cls.config_class(**config)).eval()
    finally:
        torch.set_default_dtype(before)
