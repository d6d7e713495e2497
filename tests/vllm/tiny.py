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
            if "newline" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
            elif value.ndim > 1 and "embed" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 1.6 / value[0].numel() ** 0.5)
            elif value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.7)
    return model.eval()


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


def llava(folder, vision="clip", size=32, layer=-2, wide=None):
    """LLaVA-1.5 with 64 visual tokens. wide: other sizes of the LLM."""
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
        vision_config=kinds[vision](**VISION, num_hidden_layers=3, image_size=size),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": count, "tie_word_embeddings": False, **(wide or {})}),
        image_token_index=4,
        image_seq_length=(size // 4) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )
    images = _clip_images(size) if vision == "clip" else SiglipImageProcessor(size={"height": size, "width": size})
    processor = LlavaProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        image_token="<image>",
        chat_template=LLAVA_CHAT,
    )
    save(widen(LlavaForConditionalGeneration(config)), processor, folder, _TOWER)


BUILDERS = {"llava": llava, "llava_siglip": lambda folder: llava(folder, "siglip", layer=-1)}
