"""transformers' common tests for a tiny model of every family that can be shortened.

Every row of a batch holds one image, so that tests which cut a batch, split it or fill it up keep rows and images together.
Imported by `run.py`, beside the package `tests` that the source distribution of transformers holds.
"""

import copy
import random
import unittest

import numpy as np
import torch
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin

from vtok.patches.hf_vlm_examples import EXAMPLES

ROWS = 7  # to which some tests fill a batch up, with rows that have no image
LAYERS = 2  # they take no deeper models
START, END, IMAGE, VIDEO = 6, 7, 8, 9  # small: they shrink vocabularies, and fill up with ids below 5
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "boi_token_id": START,
    "eoi_token_id": END,
}


class Tester:
    """Config and inputs of a family, under the names that the tests ask for."""

    is_training = True
    batch_size = ROWS

    def __init__(self, name: str):
        torch.manual_seed(0)
        model = EXAMPLES[name].build()
        self.config = type(model.config).from_dict(model.config.to_dict())  # no kernel has been chosen in it yet
        for key, token in TOKENS.items():
            if hasattr(self.config, key):
                setattr(self.config, key, token)
        text = self.config.text_config
        text.num_hidden_layers = LAYERS
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:LAYERS]
        if getattr(self.config.vision_config, "deepstack_visual_indexes", None):
            self.config.vision_config.depth = LAYERS
        self.num_hidden_layers, self.num_attention_heads, self.hidden_size = LAYERS, text.num_attention_heads, text.hidden_size
        self.text_config, self.vision_config = text.to_dict(), self.config.vision_config.to_dict()
        self.vision_config.setdefault("num_hidden_layers", self.vision_config.get("depth"))
        self.classes = (type(model.model), type(model))
        self.picture = self._picture(model, EXAMPLES[name].inputs(model, torch.Generator().manual_seed(0)))
        with torch.no_grad():
            self.count = len(model.model.get_image_features(**self.picture, return_dict=True).pooler_output[0])
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    @staticmethod
    def _picture(model, inputs):
        """What the model takes for one image, beside the text."""
        picture = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        if "image_grid_thw" in picture:
            patches = int(picture["image_grid_thw"][-1].prod())
            return {"pixel_values": picture["pixel_values"][-patches:], "image_grid_thw": picture["image_grid_thw"][-1:]}
        picture = {k: v[:1] for k, v in picture.items()}
        if "image_sizes" not in picture and picture["pixel_values"].ndim == 5:  # several images in a row
            picture["pixel_values"] = picture["pixel_values"][:, :1]
        return picture

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        draw = torch.Generator().manual_seed(1)
        words = torch.randint(10, 100, (ROWS, 10), generator=draw)
        start, image, end = (torch.full((ROWS, n), token) for n, token in ((1, START), (self.count, IMAGE), (1, END)))
        prefix = "PaliGemma" in self.classes[0].__name__  # its prompts begin with the image
        ids = torch.cat([image, words] if prefix else [words[:, :4], start, image, end, words[:, 4:]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for key, value in self.picture.items():
            rows = value.repeat(ROWS, *[1] * (value.ndim - 1))
            inputs[key] = torch.randn(rows.shape, generator=draw) if value.is_floating_point() else rows
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        elif "Gemma" in self.classes[0].__name__:
            inputs["token_type_ids"] = torch.zeros_like(ids) if prefix else (ids == IMAGE).long()
        return self.get_config(), inputs


def suite(name: str) -> type[unittest.TestCase]:
    """The tests, for one of `EXAMPLES`."""
    tester = Tester(name)
    packed = "image_grid_thw" in tester.picture  # as many rows of pixels as patches: no batch to be cut

    class Suite(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
        all_model_classes = tester.classes
        model_tester = tester
        _is_composite = True
        additional_model_inputs = () if packed else ("pixel_values", "image_sizes", "token_type_ids")
        skip_test_image_features_output_shape = skip_test_video_features_output_shape = (
            packed or "image_sizes" in tester.picture
        )
        test_all_params_have_gradient = tester.vision_config["model_type"] != "clip_vision_model"  # LLaVA skips its last norm

        def setUp(self):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)

    return Suite
