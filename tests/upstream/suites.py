"""transformers' common tests for a tiny model of every family that can be shortened.

Every row of a batch holds one image, so that tests which cut a batch, split it or fill it up keep rows and images together.
Imported by `run.py`, beside the package `tests` that the source distribution of transformers holds.
"""

import copy
import inspect
import random
import unittest

import numpy as np
import torch
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin

import vtok
from vtok.patches.hf_vlm.families import examples

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
        model = examples()[name].build()
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
        self.picture = self._picture(model, examples()[name].inputs(model, torch.Generator().manual_seed(0)))
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


# Ways to generate, beside those that the common tests know.
GENERATE = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 8},
    "guided": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "told": {"output_attentions": True, "output_hidden_states": True},
}


class Same:
    """Whatever a patched model is asked for is what a copy without the patch says. A patch that drops tokens may answer
    otherwise, but in tensors of the same shape."""

    drops = False

    def _pair(self, kernel="sdpa"):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = kernel
        model = self.all_model_classes[-1](config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.suppress_tokens = list(TOKENS.values())  # no image stands behind them
        return model, vtok.unpatch(copy.deepcopy(model)), inputs

    def _check(self, found, expected, what="output"):
        if isinstance(expected, torch.Tensor):
            assert found.shape == expected.shape, f"shape of {what}: {found.shape}, not {expected.shape}"
            if not self.drops:
                torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")
        elif isinstance(expected, dict):
            assert list(found) == list(expected), f"{what} has {list(found)}, not {list(expected)}"
            for name, value in expected.items():
                self._check(found[name], value, f"{what}.{name}")
        elif isinstance(expected, (tuple, list)):
            assert len(found) == len(expected), f"{what} has {len(found)} parts, not {len(expected)}"
            for i, value in enumerate(expected):
                self._check(found[i], value, f"{what}[{i}]")

    def _call(self, change=lambda inputs, model: inputs, kernel="sdpa", **options):
        model, plain, inputs = self._pair(kernel)
        with torch.no_grad():
            answers = [one(**change(dict(inputs), one), **options) for one in (model, plain)]
        self._check(*answers)

    def test_call_without_cache(self):
        self._call(use_cache=False)

    def test_call_without_mask(self):
        self._call(lambda inputs, _: {k: v for k, v in inputs.items() if k != "attention_mask"}, use_cache=False)

    def test_call_padded(self):
        def pad(side):
            def change(inputs, _):
                mask = inputs["attention_mask"].clone()
                mask[1, slice(None, 2) if side == "left" else slice(-2, None)] = 0
                return {**inputs, "attention_mask": mask}

            return change

        for side in ("left", "right"):
            self._call(pad(side))

    def test_call_positional(self):
        model, plain, inputs = self._pair()
        names = list(inspect.signature(plain.forward).parameters)
        first = names[: max(names.index(name) for name in ("input_ids", "pixel_values", "attention_mask")) + 1]
        rest = {name: value for name, value in inputs.items() if name not in first}
        with torch.no_grad():
            self._check(*(one(*[inputs.get(name) for name in first], **rest) for one in (model, plain)))

    def test_call_everything(self):
        self._call(kernel="eager", output_hidden_states=True, output_attentions=True)

    def test_call_text(self):
        def change(inputs, _):
            ids = inputs["input_ids"]
            return {"input_ids": ids.masked_fill(ids == IMAGE, 11), "attention_mask": inputs["attention_mask"]}

        self._call(change)

    def test_call_again_with_cache(self):
        """A prompt, then more text behind it, by hand."""
        model, plain, inputs = self._pair()
        more, answers = torch.arange(10, 13).expand(ROWS, -1), []
        with torch.no_grad():
            for one in (model, plain):
                cache = one(**inputs, use_cache=True).past_key_values
                answers.append(one(input_ids=more, past_key_values=cache).logits)
        self._check(*answers)

    def test_gradients(self):
        model, plain, inputs = self._pair()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        grads = []
        for one in (model, plain):
            one(**inputs, labels=labels).loss.backward()
            grads.append([p.grad for p in one.parameters() if p.grad is not None])
        assert len(grads[1]) > 10
        self._check(*grads)


def _add_generation(name, options):
    def test(self):
        model, plain, inputs = self._pair("eager" if "output_attentions" in options else "sdpa")
        answers = []
        for one in (model, plain):
            torch.manual_seed(0)
            told = {"return_dict_in_generate": True, "output_logits": True, **options}
            answers.append(one.generate(**copy.deepcopy(inputs), max_new_tokens=4, **told))
        self._check(*answers)

    setattr(Same, f"test_generate_{name}", test)


for _name, _options in GENERATE.items():
    _add_generation(_name, _options)


def suite(name: str) -> type[unittest.TestCase]:
    """The tests, for one of `examples()`."""
    tester = Tester(name)
    packed = "image_grid_thw" in tester.picture  # as many rows of pixels as patches: no batch to be cut

    class Suite(Same, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
        all_model_classes = tester.classes
        model_tester = tester
        _is_composite = True
        additional_model_inputs = () if packed else ("pixel_values", "image_sizes", "token_type_ids")
        skip_test_image_features_output_shape = skip_test_video_features_output_shape = (
            packed or "image_sizes" in tester.picture
        )
        # What follows the last block of a stock tower is not used.
        test_all_params_have_gradient = tester.vision_config["model_type"] not in ("clip_vision_model", "siglip_vision_model")

        def setUp(self):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)

    return Suite
