"""Tiny dual encoders of both backends: random weights, tokenizers that need no file."""

from dataclasses import replace

import pytest
import torch

from vtok.eval.models.clip import DualEncoder, hugging_face_encoder
from vtok.eval.models.reference import PageCLIP, preprocess_config

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")


def tiny_native():
    """open_clip's own tower, 64 pixels."""
    torch.manual_seed(0)
    anatomy = PageCLIP(image_size=64, patch_size=16, width=32, layers=2, head_width=16, text_width=32, text_layers=1)
    anatomy = replace(anatomy, vocab_size=49408, context_length=16)
    model = open_clip.CLIP(**anatomy.model_config()).eval()
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**{**preprocess_config(), "size": 64}), False
    )
    return DualEncoder(model, transform, open_clip.tokenizer.SimpleTokenizer(context_length=16), "tiny")


class Letters:
    """A tokenizer in the manner of transformers: a number a letter."""

    def __call__(self, texts, padding, truncation, return_tensors):
        assert truncation and return_tensors == "pt"
        self.padding = padding
        rows = [[1, *[2 + ord(c) % 90 for c in text][:14], 95] for text in texts]
        longest = 16 if padding == "max_length" else max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def processor(size=32):
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}


def tiny_hugging_face(kind):
    torch.manual_seed(0)
    if kind == "blip":
        text = {**TEXT, "encoder_hidden_size": 16, "max_position_embeddings": 16, "projection_dim": 8}
        config = transformers.BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=8)
        model = transformers.BlipForImageTextRetrieval(config)
    elif kind == "siglip":
        config = transformers.SiglipConfig(text_config={**TEXT, "max_position_embeddings": 16}, vision_config=VISION)
        model = transformers.SiglipModel(config)
    else:
        text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 95}
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
        model = transformers.CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():  # as transformers initialises them, all inputs look alike
            weight.normal_(std=0.5)
    return hugging_face_encoder(model, processor(), Letters(), kind)
