"""Tiny random vision-language models, and prompts for them: one for every supported family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vtok.patches.hf_vlm.examples import pages, videos
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, PAD, START, Inputs
from vtok.patches.hf_vlm.examples.videos import VIDEO

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP: dict[str, Any] = {"model_type": "clip_vision_model", **_VISION, "patch_size": 4}
_SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", **_VISION, "patch_size": 4, "vision_use_head": False}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SPECIAL: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


class VLMExample(NamedTuple):
    """A tiny vision-language model.

    Attributes:
        build: makes it, in eval mode.
        inputs: makes a batch of two prompts of different length, the shorter one padded on the left, from a generator.
        first_layer: lowest decoder layer in front of which tokens may be dropped.
        kernels: attention implementations that the family has.
        pages: makes such a batch of pages that are cut into crops; `None` = the model never crops.
        videos: makes such a batch with videos alone; `None` = the model reads none.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any, torch.Generator], Inputs]
    first_layer: int = 1
    kernels: tuple[str, ...] = ("eager", "sdpa")
    pages: Callable[[Any, torch.Generator], Inputs] | None = None
    videos: Callable[[Any, torch.Generator], Inputs] | None = None


def _model(family: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        settings = getattr(transformers, f"{family}Config")(**config)
        return getattr(transformers, f"{family}ForConditionalGeneration")(settings).eval()

    return build


def _words(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, 110, (count,), generator=generator).tolist()


def _padded(rows: list[list[int]]) -> Inputs:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def prompts(generator: torch.Generator, counts: list[int], token: int = IMAGE) -> Inputs:
    """Two prompts; the first holds all images but the last, text before, between and behind them. counts: tokens of each."""
    rows = [_words(generator, 3), [1, *_words(generator, 2)]]
    for i, count in enumerate(counts):
        rows[i == len(counts) - 1] += [START, *[token] * count, END, *_words(generator, 2)]
    return _padded([rows[0] + _words(generator, 5), rows[1] + _words(generator, 2)])


def _fixed(count: int, size: int) -> Callable[[Any, torch.Generator], Inputs]:
    """Three images that always give the same number of tokens."""

    def inputs(model: Any, generator: torch.Generator) -> Inputs:
        return {**prompts(generator, [count] * 3), "pixel_values": torch.randn(3, 3, size, size, generator=generator)}

    return inputs


def _tiles(model: Any, generator: torch.Generator) -> Inputs:
    pixels = torch.randn(2, 2, 3, 32, 32, generator=generator)
    pixels[1, 1] = 0  # the second row has one image
    return {**prompts(generator, [16] * 3), "pixel_values": pixels}


def _gemma(model: Any, generator: torch.Generator) -> Inputs:
    inputs = _fixed(16, 32)(model, generator)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def _prefix(model: Any, generator: torch.Generator) -> Inputs:
    inputs = _padded([[IMAGE] * 16 + _words(generator, 7), [IMAGE] * 16 + _words(generator, 4)])
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {**inputs, "pixel_values": pixels, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _qwen(model: Any, generator: torch.Generator) -> Inputs:
    sizes = torch.tensor([[1, 8, 8], [1, 4, 8], [1, 4, 8]])
    inputs = prompts(generator, (sizes.prod(1) // 4).tolist())
    pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    kinds = (inputs["input_ids"] == IMAGE).int()
    return {**inputs, "pixel_values": pixels, "image_grid_thw": sizes, "mm_token_type_ids": kinds}


def _next(model: Any, generator: torch.Generator) -> Inputs:
    sizes = torch.tensor([[16, 32], [14, 32]])
    pixels = torch.randn(2, 3, 3, 16, 16, generator=generator)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True).pooler_output
    return {**prompts(generator, [len(x) for x in features]), "pixel_values": pixels, "image_sizes": sizes}


def _onevision(model: Any, generator: torch.Generator) -> Inputs:
    sizes = torch.tensor([[16, 32]])
    image, video = (torch.randn(1, 3, 3, 16, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        first = model.model.get_image_features(image, image_sizes=sizes, return_dict=True).pooler_output[0]
        second = model.model.get_video_features(video, return_dict=True).pooler_output[0]
    rows = [[*_words(generator, 3), *[IMAGE] * len(first)], [1, *_words(generator, 2), *[VIDEO] * len(second)]]
    inputs = _padded([rows[0] + _words(generator, 6), rows[1] + _words(generator, 3)])
    return {**inputs, "pixel_values": image, "image_sizes": sizes, "pixel_values_videos": video}


def _llava(text: dict[str, Any]) -> VLMExample:
    vision = {**_CLIP, "image_size": 16}
    return VLMExample(
        _model("Llava", vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1), _fixed(16, 16)
    )


_ANYRES: dict[str, Any] = {"image_token_id": IMAGE, "image_grid_pinpoints": [[16, 32], [32, 16]], "vision_feature_layer": -1}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_GEMMA_TEXT: dict[str, Any] = {**_TEXT, "head_dim": 16}


def _gemma3(window: int) -> VLMExample:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {**_GEMMA_TEXT, "sliding_window": window, "layer_types": kinds}
    build = _model(
        "Gemma3",
        text_config=text,
        vision_config={**_VISION, "image_size": 32, "patch_size": 4},
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        mm_tokens_per_image=16,
    )
    return VLMExample(build, _gemma)


def _idefics(family: str) -> VLMExample:
    vision = {**_VISION, "image_size": 32, "patch_size": 4}
    text = {"model_type": "llama", **_TEXT}
    return VLMExample(
        _model(family, vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD),
        _tiles,
        pages=pages.marked_tiles,
    )


# One table for each family, which its row in `families` names: name -> tiny model.
Examples = dict[str, VLMExample]

LLAVA: Examples = {
    "LLaVA-1.5": _llava({"model_type": "llama", **_TEXT}),
    "LLaVA, Qwen2 text": _llava({"model_type": "qwen2", **_TEXT}),
    "LLaVA, Qwen3 text": _llava({"model_type": "qwen3", **_TEXT, "head_dim": 16}),
    "LLaVA, Mistral text, window 9": _llava({"model_type": "mistral", **_TEXT, "sliding_window": 9}),
    "LLaVA, Qwen2 text, window 9 first": _llava(
        {
            "model_type": "qwen2",
            **_TEXT,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }
    ),
}
LLAVA_NEXT: Examples = {
    "LLaVA-NeXT": VLMExample(
        _model(
            "LlavaNext",
            vision_config={**_CLIP, "image_size": 16},
            text_config={"model_type": "mistral", **_TEXT, "sliding_window": None},
            vision_feature_select_strategy="default",
            **_ANYRES,
        ),
        _next,
        pages=pages.any_resolution,
    ),
}
LLAVA_ONEVISION: Examples = {
    "LLaVA-OneVision": VLMExample(
        _model(
            "LlavaOnevision",
            vision_config={**_SIGLIP, "image_size": 16},
            text_config={"model_type": "qwen2", **_TEXT},
            video_token_id=VIDEO,
            vision_feature_select_strategy="full",
            **_ANYRES,
        ),
        _onevision,
        pages=pages.any_resolution,
        videos=videos.framed,
    ),
}
QWEN2_VL: Examples = {
    "Qwen2-VL": VLMExample(
        _model(
            "Qwen2VL",
            text_config={**_TEXT, "rope_parameters": _ROPE, "tie_word_embeddings": False},
            vision_config={**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "in_channels": 3, "mlp_ratio": 2},
            **_SPECIAL,
        ),
        _qwen,
        videos=videos.whole,
    ),
}
QWEN2_5_VL: Examples = {
    "Qwen2.5-VL": VLMExample(
        _model(
            "Qwen2_5_VL",
            text_config={**_TEXT, "rope_parameters": _ROPE, "tie_word_embeddings": False},
            vision_config={
                **_QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "in_channels": 3,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_SPECIAL,
        ),
        _qwen,
        videos=videos.whole,
    ),
}
QWEN3_VL: Examples = {
    "Qwen3-VL": VLMExample(
        _model(
            "Qwen3VL",
            text_config={**_TEXT, "head_dim": 16, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
            vision_config={
                **_QWEN_VISION,
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "in_channels": 3,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **_SPECIAL,
        ),
        _qwen,
        first_layer=2,
        videos=videos.timed,
    ),
}
INTERNVL: Examples = {
    "InternVL": VLMExample(
        _model(
            "InternVL",
            vision_config={**_VISION, "image_size": [32, 32], "patch_size": [4, 4]},
            text_config={"model_type": "qwen2", **_TEXT},
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
        ),
        _fixed(16, 32),
        pages=pages.plain_tiles,
    ),
}
IDEFICS3: Examples = {
    "Idefics3": _idefics("Idefics3"),
}
SMOLVLM: Examples = {
    "SmolVLM": _idefics("SmolVLM"),
}
GEMMA3: Examples = {
    "Gemma3": _gemma3(256),
    "Gemma3, window 9": _gemma3(9),
}
PALIGEMMA: Examples = {
    "PaliGemma": VLMExample(
        _model(
            "PaliGemma",
            text_config={"model_type": "gemma", **_GEMMA_TEXT},
            projection_dim=64,
            vision_config={**_SIGLIP, "image_size": 16},
            image_token_id=IMAGE,
        ),
        _prefix,
    ),
    "PaliGemma 2, window 9": VLMExample(
        _model(
            "PaliGemma",
            text_config={"model_type": "gemma2", **_GEMMA_TEXT, "sliding_window": 9, "query_pre_attn_scalar": 16},
            projection_dim=64,
            vision_config={**_SIGLIP, "image_size": 16},
            image_token_id=IMAGE,
        ),
        _prefix,
        kernels=("eager",),
    ),
}
