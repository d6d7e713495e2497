"""Tiny random models of transformers' image-text-to-text classes, made from the defaults of their configs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

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
TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "vision_start_token_id",
    "vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_id", "eoi_token_id", "boi_token_index",
    "eoi_token_index", "audio_token_id", "audio_token_index", "video_start_token_id", "video_end_token_id",
)  # fmt: skip


_KINDS = ("sliding_attention", "full_attention")
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TEXT = {key: _COMMON[key] for key in (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_hidden_layers", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings",
)}  # fmt: skip
_SIGHT = {key: _VISION[key] for key in (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size", "num_key_value_heads",
    "head_dim",
)}  # fmt: skip


def _rope(sections: list[int], share: float = 1.0) -> dict[str, Any]:
    return {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
            "partial_rotary_factor": share,
        }
    }


_INKLING = {
    "text_config.unpadded_vocab_size": 128, "vision_config.projection_hidden_dim": 32, "text_config.swa_num_attention_heads": 4,
    "text_config.swa_num_key_value_heads": 2, "text_config.swa_head_dim": 8,
}  # fmt: skip
_MUSE = {"out_hidden_size": 128, "projector_hidden_size": 32}

# Name of the class as AutoModelForImageTextToText knows it -> what its default needs beside small numbers. "make" = keywords
# that its config is built from, where later changes would come too late; those parts are taken as they are.
CLASSES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), _rope([2, 1, 1])),
    "glm4v_moe": _rope([1, 1, 0], 0.5),
    "aria": {"projector_patch_to_query_dict": {16: 6}},
    "got_ocr2": {"vision_config.image_size": 256},
    "glm5_next": {
        "text_config.num_key_value_heads": 4, "text_config.index_topk": 6, "text_config.linear_head_dim": 8,
        "text_config.linear_num_heads": 4,
    },
    "hy_v4_vl": {"text_config.num_key_value_heads": 4, "text_config.index_topk": 6},
    "qwen2_5_omni_thinker": _rope([2, 1, 1]) | {"vision_start_token_id": 110},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    "ernie4_5_vl_moe": _rope([1, 1, 2]),
    "cohere_compass": {
        "text_config.rope_parameters": {kind: _MROPE | {"mrope_section": [2, 1, 1]} for kind in _KINDS},
        "text_config.layer_types": [*_KINDS, *_KINDS],
        "text_config.sliding_window": 64,
    },
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [32, 32], "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
        "text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1,
    },
    "fast_vlm": {"make": {"vision_config": {"architecture": "test_convnext", "hidden_size": 64, "do_pooling": True,
                                            "model_args": {}}}, "vision_config.image_size": 64},
    "gemma3n": {
        "make": {
            "text_config": _TEXT | {
                "layer_types": [*_KINDS, *_KINDS], "num_kv_shared_layers": 2, "laurel_rank": 8,
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "sliding_window": 64,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
                "intermediate_size": 48,
            },
            "vision_config": {"architecture": "test_efficientnet", "hidden_size": 64, "vocab_size": 8, "vocab_offset": 112,
                              "model_args": {}},
            "audio_config": {"hidden_size": 32, "vocab_size": 8, "vocab_offset": 120, "conf_num_hidden_layers": 1,
                             "conf_num_attention_heads": 4},
            "vision_soft_tokens_per_image": 4,
        },
        "image_token_id": 115, "audio_token_id": 125,
    },
    "gemma4": {
        "make": {
            "text_config": _TEXT | {
                "num_hidden_layers": 8, "layer_types": [*_KINDS * 4], "num_kv_shared_layers": 2, "sliding_window": 64,
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "global_head_dim": 16,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": _SIGHT | {"pooling_kernel_size": 2, "position_embedding_size": 64},
        },
    },
    "gemma4_unified": {
        "make": {
            "text_config": _TEXT | {"layer_types": [*_KINDS, *_KINDS], "sliding_window": 64, "global_head_dim": 16},
            "vision_config": {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16,
                              "output_proj_dims": 32},
        },
    },
    "granite4_vision": {
        "make": {"image_grid_pinpoints": [[32, 64], [64, 32]], "downsample_rate": "1/2",
                 "deepstack_layer_map": [[1, 0], [2, 1]], "spatial_target_layers": [0, 0, 1, 1], "spatial_vision_layer": -1},
        "qformer_config.encoder_hidden_size": 32,
    },
    "granite_docling": {"vision_config.image_size": 64},
    "idefics2": {"perceiver_config.resampler_n_latents": 4},
    "hunyuan_vl": _rope([1, 1, 1, 1]) | {"text_config.head_dim": 8},
    "llama4": {
        "vision_config.vision_output_dim": 32, "vision_config.projector_input_dim": 32,
        "vision_config.projector_output_dim": 32, "vision_config.intermediate_size": 128, "text_config.attention_chunk_size": 8,
    },
    "janus": {"vq_config.channel_multiplier": [1, 1]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "minicpmv4_6": {"vision_config.insert_layer_id": 0, "insert_layer_id": 0},
    "ovis2": {"vision_config.vocab_size": 32, "visual_indicator_token_ids": [105, 106, 107, 108, 109], "hidden_size": 32,
              "vocab_size": 128},
    "perception_lm": {
        "make": {"vision_config": {"architecture": "test_vit", "num_classes": 0, "global_pool": "",
                                   "model_args": {"embed_dim": 64, "img_size": 64, "patch_size": 16}}},
    },
    "pp_chart2table": {"vision_config.image_size": 256},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "fuyu": {"image_size": 16, "patch_size": 8},
    "inkling2": _INKLING,
    "inkling2_loop": _INKLING,
    "qwen4_exp": _rope([2, 1, 1]) | {
        "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 8,
        "text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 2,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 127, "<|extra_200|>": 3} | {f"<|visual token {i:06d}|>": 60 + i for i in range(16)},
        "vq_config.codebook_size": 16, "vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1, "image_token_id": 127,
    },
    "apertus1p5": {
        "vision_config.codebook_size": 16, "vision_config.base_channels": 32, "vision_config.channel_multiplier": [1, 1],
        "vision_config.num_res_blocks": 1, "vision_config.latent_channels": 32, "vision_config.spatial_scale_factor": 2,
        "vision_config.attn_resolutions": [], "image_token_offset": 60,
    },
    "dots3_note": {"make": {"text_config": _TEXT | {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2, "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "index_topk": 6,
        "index_head_dim": 16, "index_n_heads": 2, "head_dim": 16, "sliding_window": 128, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 8, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    }, "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
        "moe_intermediate_size": 16, "pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32,
    }, "audio_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32,
    }}},
    "step3p7": {
        "vision_config.image_size": 64, "text_config.layer_types": ["full_attention"] * 4, "text_config.sliding_window": 64,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [1]},
    "kimi_k25": {"projection_hidden_size": 32, "text_config.num_key_value_heads": 4},
    "paddleocr_vl": _rope([2, 1, 1]),
    "minimax_m3_vl": {
        "projector_hidden_size": 32, "merged_hidden_size": 128,
        "text_config.layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "text_config.index_block_size": 4,
        "text_config.index_topk_blocks": 2, "text_config.index_n_heads": 2,
        "text_config.index_head_dim": 8, "text_config.rotary_dim": 8,
    },
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32, "vision_config.patch_dim": 192,
                        "vision_config.video_patch_dim": 384},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "adapter_config.hidden_size": 32,
               "adapter_config.text_hidden_size": 32, "adapter_config.intermediate_size": 48},
    "mistral_large4": {"text_config.num_key_value_heads": 4, "text_config.index_topk": 6},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"] * 2},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [32, 32]},
    **{
        name: {}
        for name in (
            "aya_vision", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "exaone4_5",
            "hyperclovax_vision_v2", "lfm3_vl", "lighton_ocr", "minicpm_ocr", "minicpmv4_7", "mistral3",
            "qianfan_ocr", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "video_llama_3", "video_llava",
        )
    },
}  # fmt: skip


def _has_no_image_outputs(model: Any) -> None:
    """transformers 5.24 reads from the output of the LLM of Llama 4 a field that this lacks."""
    model.language_model.register_forward_hook(lambda module, args, output: setattr(output, "image_outputs", None))


# Class -> what makes a model of it run at all.
REPAIRS: dict[str, Callable[[Any], None]] = {"llama4": _has_no_image_outputs}

# Classes that are refused -> what their configs need to be built at all.
REFUSED: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 127}},
    "diffusion_gemma": {"make": {"text_config": _TEXT | {
        "layer_types": [*_KINDS, *_KINDS], "sliding_window": 64, "global_head_dim": 16, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }, "vision_config": {"model_type": "gemma4_vision", **_SIGHT, "pooling_kernel_size": 2, "position_embedding_size": 64}}},
    **{
        name: {}
        for name in (
            "blip", "blip-2", "evolla", "florence2", "git", "idefics", "inkling_mm_model", "instructblip", "instructblipvideo",
            "kosmos-2", "kosmos-2.5", "mistral4", "mllama", "pi0", "pix2struct", "pp_formulanet", "t5gemma2", "udop",
            "vision-encoder-decoder",
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
    count = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if count and getattr(config, name, None):
            kinds = list(dict.fromkeys(getattr(config, name)))
            setattr(config, name, [kinds[i % len(kinds)] for i in range(count)])
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):
        half = int(config.head_dim // 2 * rope.get("partial_rotary_factor", 1.0))
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _shrink_all(config: Any, made: Mapping[str, Any], vision: bool = False) -> None:
    """The parts of a config, and their parts."""
    for key in type(config).sub_configs:
        part = getattr(config, key, None)
        if part is None or key in made:
            continue
        sees = vision or any(word in key for word in ("vision", "vq", "audio"))
        _shrink(part, _VISION if sees else _COMMON)
        _few_layers(part)
        _shrink_all(part, {}, sees)


def config_of(name: str) -> Any:
    """The config of a class, with few and small layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    changes = {**CLASSES, **REFUSED}[name].copy()
    made = changes.pop("make", {})
    config = CONFIG_MAPPING[name](**copy.deepcopy(made))
    _shrink_all(config, made)
    for i, key in enumerate(TOKENS):
        if hasattr(config, key):
            setattr(config, key, 127 - i)
    for path, value in changes.items():
        owner, last = config, path.split(".")[-1]
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


def listed() -> dict[str, str]:
    """Name -> class, of all image-text-to-text classes of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def empty(name: str) -> Any:
    """A model of a class without memory for its weights (device "meta")."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, listed()[name])(config_of(name))


def build(name: str) -> Any:
    """A tiny model with weights far from those that make all attention alike; it generates words alone, and no end."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, listed()[name])(config_of(name)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.normal_(0, 0.3 if p.shape[-1] < 64 else 0.1)
    if name in REPAIRS:
        REPAIRS[name](model)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=list(range(100, 128)))
    return model
