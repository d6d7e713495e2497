"""Tiny random models of transformers' image-text-to-text classes, made from the defaults of their configs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 128, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 512, "sliding_window": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "block_ff_dim": 48, "block_dim": 32, "conv_dim": 32, "conv_dim_out": 32,
    "num_hidden_layers": 4,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32,
    "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "num_key_value_heads": 4,
    "head_dim": 8, "projection_dim": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1], "window_size": 32, "spatial_patch_size": 8, "text_hidden_size": 32,
}  # fmt: skip
_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_start_token_id",
    "vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_id", "eoi_token_id", "boi_token_index",
    "eoi_token_index", "audio_token_id", "audio_token_index", "video_start_token_id", "video_end_token_id",
)  # fmt: skip


def _rope(sections: list[int], share: float = 1.0) -> dict[str, Any]:
    return {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
            "partial_rotary_factor": share,
        }
    }


# Name of the class as AutoModelForImageTextToText knows it -> what its default needs beside small numbers.
CLASSES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr"), _rope([2, 1, 1])),
    "glm4v_moe": _rope([1, 1, 0], 0.5),
    "aria": {"projector_patch_to_query_dict": {16: 6}},
    "got_ocr2": {"vision_config.image_size": 256},
    **{name: {"text_config.num_key_value_heads": 4} for name in ("glm5_next", "hy_v4_vl")},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    **{
        name: {}
        for name in (
            "aya_vision", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "exaone4_5", "hyperclovax_vision_v2",
            "lfm3_vl", "lighton_ocr", "mistral3", "qianfan_ocr", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "video_llava",
        )
    },
}  # fmt: skip


def _shrink(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(getattr(type(config), key, None), property) or getattr(config, key, None) is None:
            continue
        old = getattr(config, key)
        each = isinstance(old, (list, tuple)) and not isinstance(value, (list, tuple))  # one value for every layer
        setattr(config, key, [value] * len(old) if each else value)


def _few_layers(config: Any) -> None:
    """Every kind of layer of the default, in turn; sections of M-RoPE that fit small heads."""
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            kinds = list(dict.fromkeys(getattr(config, name)))
            setattr(config, name, [kinds[i % len(kinds)] for i in range(config.num_hidden_layers)])
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):
        half = int(config.head_dim // 2 * rope.get("partial_rotary_factor", 1.0))
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def config_of(name: str) -> Any:
    """The config of a class, with few and small layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name]()
    parts = {key: getattr(config, key, None) for key in type(config).sub_configs}
    for key, part in parts.items():
        if part is not None and any(word in key for word in ("vision", "vq", "audio")):
            _shrink(part, _VISION)
        elif part is not None:
            _shrink(part, _COMMON)
            _few_layers(part)
    for i, key in enumerate(_TOKENS):
        if getattr(config, key, None) is not None:
            setattr(config, key, 127 - i)
    for path, value in CLASSES[name].items():
        owner, last = config, path.split(".")[-1]
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


def build(name: str) -> Any:
    """A tiny model with weights far from those that make all attention alike; it generates words alone, and no end."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    torch.manual_seed(0)
    model = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])(config_of(name)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.normal_(0, 0.3 if p.shape[-1] < 64 else 0.1)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=list(range(100, 128)))
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """Two prompts with two images and one, the second padded on the left."""
    config, base, generator = model.config, model.base_model, torch.Generator().manual_seed(0)
    vision, named = config.vision_config, inspect.signature(base.get_image_features).parameters
    patch, side = (v if isinstance(v := getattr(vision, key, 8), int) else v[0] for key in ("patch_size", "image_size"))
    if "image_grid_thw" in named:
        channels = next(c for key in ("in_channels", "in_chans", "num_channels") if (c := getattr(vision, key, None)))
        grid = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])
        width = channels * (getattr(vision, "temporal_patch_size", 1) or 1) * patch * patch
        values = {"pixel_values": torch.randn(int(grid.prod(1).sum()), width, generator=generator), "image_grid_thw": grid}
    else:
        values = {"pixel_values": torch.randn(3, 3, side, side, generator=generator)}
        if "image_sizes" in named:
            values["image_sizes"] = torch.tensor([[side, side]] * 3)
    with torch.no_grad():
        a, b, c = (len(x) for x in base.get_image_features(**values, return_dict=True).pooler_output)
    token = config.image_token_id
    start = next((t for key in _TOKENS if "start" in key and (t := getattr(config, key, None)) is not None), 50)
    rows = [
        [5, 6, start, *[token] * a, 51, 7, start, *[token] * b, 51, 8, 9],
        [10, 11, 12, start, *[token] * c, 51, 13, 14, 15],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    values |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if "mm_token_type_ids" in inspect.signature(base.forward).parameters:
        values["mm_token_type_ids"] = (ids == token).int()
    return values
