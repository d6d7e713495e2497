"""Tiny random vision-language models with their processors, saved as vLLM loads them. Needs transformers alone.

Standard initialisation is so small that every prompt gets one answer: weights are drawn wider.
"""

import re

import torch
from safetensors.torch import load_file, save_file

WORDS = 200
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LLAVA_CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "patch_size": 4}


def tokenizer(marks, **names):
    """Words w0 .. w199 and special tokens, in the order of `marks` behind the common ones; `names`: attribute -> mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *marks, *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
        padding_side="left",
    )
    return made, len(vocabulary)


def widen(model, seed=0):
    """Draws all weights anew, the same under every release of torch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if value.ndim > 1 and "embed" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 1.6 / value[0].numel() ** 0.5)
            elif value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.7)
    return model.eval()


def with_newline(model):
    """Makes the newline token the mean of visual tokens. Methods that keep what is unlike the rest would keep one of the copies
    of another one, and which copy only rounding decides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        pixels, sizes = torch.randn(1, 5, 3, 32, 32, generator=generator), torch.tensor([[64, 64]])
        features = model.model.get_image_features(pixels, image_sizes=sizes, return_dict=True).pooler_output[0]
        model.model.image_newline.copy_(features[:64].mean(0))
    return model


def save(model, processor, folder, rename=None):
    """rename: (pattern, replacement) of weights, where published checkpoints name them otherwise than transformers 5 does."""
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    if rename is not None:
        file = folder / "model.safetensors"
        save_file({re.sub(*rename, name): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    processor.save_pretrained(folder)


_TOWER = (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")


def _clip_images(size):
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def llava(folder, vision="clip", size=32, layer=-2, patch=4, wide=None):
    """LLaVA-1.5 with 64 visual tokens. size, patch: of the vision tower, in pixels; wide: other sizes of the LLM."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    words, count = tokenizer(["<image>"], image_token="<image>")
    kinds = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    strategy, extra = ("default", 1) if vision == "clip" else ("full", 0)
    config = LlavaConfig(
        vision_config=kinds[vision](**{**VISION, "patch_size": patch}, num_hidden_layers=3, image_size=size),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": count, "tie_word_embeddings": False, **(wide or {})}),
        image_token_index=4,
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )
    images = _clip_images(size) if vision == "clip" else SiglipImageProcessor(size={"height": size, "width": size})
    processor = LlavaProcessor(
        images,
        words,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        image_token="<image>",
        chat_template=LLAVA_CHAT,
    )
    save(widen(LlavaForConditionalGeneration(config)), processor, folder, _TOWER)


PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96]]


def llava_next(folder):
    """LLaVA-NeXT with views of 64 tokens."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words, count = tokenizer(["<image>"], image_token="<image>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, num_hidden_layers=3, image_size=32),
        text_config=LlamaConfig(**TEXT, vocab_size=count, tie_word_embeddings=False),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=64,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_CHAT,
    )
    save(with_newline(widen(LlavaNextForConditionalGeneration(config))), processor, folder, _TOWER)


def onevision(folder):
    """LLaVA-OneVision with views of 64 tokens, crops of large images shrunk."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    words, count = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    pinpoints = [*PINPOINTS, [96, 96], [128, 128]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, num_hidden_layers=3, image_size=32, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, num_key_value_heads=2, vocab_size=count, tie_word_embeddings=False),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_CHAT,
    )
    save(with_newline(widen(LlavaOnevisionForConditionalGeneration(config))), processor, folder, _TOWER)


QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> "
    "<|vision_end|> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def qwen(folder, family, vision, text=None, processed=None):
    """A Qwen-VL: family is the name of its classes in transformers, `processed` of its processors where that is another;
    vision, text: what its configs need beside."""
    import transformers

    words, count = tokenizer(QWEN_MARKS, image_token="<|image_pad|>", video_token="<|video_pad|>")
    if family == "Qwen3_5":  # is loaded with a tokenizer of its own, that takes whole words from here alone
        words.add_tokens([*QWEN_MARKS, *(f"w{i}" for i in range(WORDS))], special_tokens=True)
    text = {**TEXT, "num_key_value_heads": 2, "vocab_size": count, "rope_parameters": _ROPE, **(text or {})}
    tower = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    config = getattr(transformers, f"{family}Config")(
        text_config={**text, "tie_word_embeddings": False},
        vision_config=tower,
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    side = tower["patch_size"]
    size = {"shortest_edge": 16 * side * side, "longest_edge": 4 * side * side * 200}
    options = {"patch_size": side, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processed = processed or family
    videos = transformers.Qwen3VLVideoProcessor if processed == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{processed}Processor")(
        transformers.Qwen2VLImageProcessor(**options), words, videos(**options), chat_template=QWEN_CHAT
    )
    save(widen(model), processor, folder)


def qwen2(folder):
    qwen(folder, "Qwen2VL", {"embed_dim": 64, "hidden_size": 128, "in_channels": 3, "mlp_ratio": 2})


def qwen25(folder):
    vision = {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128, "in_channels": 3}
    qwen(folder, "Qwen2_5_VL", {**vision, "window_size": 112, "fullatt_block_indexes": [1]})


def qwen3(folder):
    vision = {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128, "in_channels": 3, "patch_size": 14}
    deep = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {"head_dim": 32, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
    qwen(folder, "Qwen3VL", {**vision, **deep}, text)


def qwen35(folder):
    """Without layers of linear attention, which vLLM runs in bf16 alone on a CPU; these see no positions."""
    vision = {
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 128,
        "in_channels": 3,
        "num_position_embeddings": 64,
    }
    rope = {**_ROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = {"layer_types": ["full_attention"] * 3}
    qwen(folder, "Qwen3_5", vision, {"head_dim": 32, "rope_parameters": rope, **linear, **kinds}, "Qwen3VL")


def internvl(folder):
    """InternVL with tiles of 64 tokens, up to six and a thumbnail."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words, count = tokenizer(marks.values(), **marks)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "image_size": [32, 32],
            "patch_size": [2, 2],
        },
        text_config={"model_type": "qwen2", **TEXT, "num_key_value_heads": 2, "vocab_size": count},
        image_token_id=6,
        image_seq_length=64,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = InternVLProcessor(
        images, words, InternVLVideoProcessor(size=size), image_seq_length=64, chat_template=LLAVA_CHAT
    )
    save(widen(InternVLForConditionalGeneration(config)), processor, folder)


NEWLINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]


def gemma3(folder):
    """Gemma 3 with 64 tokens a tile; wide and tall pictures are cut into crops where asked (pan and scan)."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words, count = tokenizer([*marks.values(), *NEWLINES, " "], **marks)
    words.add_tokens([*NEWLINES, " "], special_tokens=True)  # one that drops spaces would have newlines of two crops meet
    text = {
        **TEXT,
        "num_key_value_heads": 2,
        "vocab_size": count,
        "head_dim": 32,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    }
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        vision_config={**VISION, "num_hidden_layers": 3, "image_size": 32, "patch_size": 2, "vision_use_head": False},
        boi_token_index=4,
        eoi_token_index=5,
        image_token_index=6,
        mm_tokens_per_image=64,
    )
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_seq_length=64)
    processor = Gemma3Processor(images, words, image_seq_length=64, chat_template=LLAVA_CHAT)
    save(widen(Gemma3ForConditionalGeneration(config)), processor, folder, _TOWER)


def marked_tiles(folder, family, **videos):
    """Tiles of 16 tokens with their names in front, up to nine and a view of all; family: the name of its classes in
    transformers; videos: what its processor takes beside, for its tokenizer's marks."""
    import transformers

    names = [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks = [*special, *names, *NEWLINES]
    words, count = tokenizer(marks, image_token="<image>")
    words.add_tokens(marks, special_tokens=True)
    config = getattr(transformers, f"{family}Config")(
        vision_config={**VISION, "num_hidden_layers": 3, "image_size": 32},
        text_config={"model_type": "llama", **TEXT, "vocab_size": count, "tie_word_embeddings": False},
        image_token_id=5,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    images = getattr(transformers, f"{family}ImageProcessor")(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = getattr(transformers, f"{family}Processor")(images, words, **videos, image_seq_len=16, chat_template=LLAVA_CHAT)
    save(widen(getattr(transformers, f"{family}ForConditionalGeneration")(config)), processor, folder)


def smolvlm(folder):
    """SmolVLM as Idefics3, with a processor that needs num2words and says how it samples videos."""
    from transformers import SmolVLMVideoProcessor

    video = SmolVLMVideoProcessor(
        size={"longest_edge": 32},
        max_image_size={"longest_edge": 32},
        video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}},
    )
    marked_tiles(folder, "SmolVLM", video_processor=video)


BUILDERS = {
    "onevision_video": onevision,
    "qwen2_video": qwen2,
    "qwen25_video": qwen25,
    "idefics3": lambda folder: marked_tiles(folder, "Idefics3"),
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
    "llava": llava,
    "llava_siglip": lambda folder: llava(folder, "siglip", layer=-1),
    "llava_next": llava_next,
    "onevision": onevision,
    "qwen2": qwen2,
    "qwen25": qwen25,
    "qwen3": qwen3,
    "qwen35": qwen35,
}
