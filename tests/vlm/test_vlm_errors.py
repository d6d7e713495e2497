"""What is refused on vision-language models, and in which words; prompts that are odd but fine."""

import dataclasses

import pytest
import torch
from helpers_errors import message_of
from transformers.models.llava.modeling_llava import LlavaModel
from vlm_zoo import EXAMPLES, Attended, Columns, Nearest, build, generate, inputs, text_model

import vtok
from vtok.patches.hf_vlm.families import FAMILIES
from vtok.patches.hf_vlm.generic.refused import REFUSED
from vtok.patches.hf_vlm.stated_images import VisionCosts
from vtok.patches.protocol import qualified_name
from vtok.testing import generic_models, generic_prompts


@pytest.mark.parametrize("method", ["ats", "pitome", "tome", "zero_tprune"])
def test_methods_of_vision_encoders(method):
    """Where the tower cannot be patched."""
    model = generic_models.build("aya_vision")
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, method)
    assert f"{method} reduces tokens inside the vision tower, and that of AyaVisionModel cannot be patched" in text
    assert "methods that act on its prompts: " in text
    for name in ("random", "uniform"):
        assert name in text
    assert not vtok.info(model).patched
    assert method in message_of(vtok.UnsupportedModelError, vtok.prune_inputs, model, generic_prompts.inputs(model), method)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (Columns(((7, 2),)), vtok.ConfigError, ["decoder layer 7", "LlavaModel has decoder layers 0 to 3"]),
        (Columns(((-1, 2),)), vtok.ConfigError, ["decoder layer -1", "0 to 3"]),
        (
            [Columns(((1, 2),)), Columns(((1, 3),))],
            vtok.ConfigError,
            ["two methods drop visual tokens at one place"],
        ),
        ([vtok.RandomDrop(), vtok.UniformGrid()], vtok.ConfigError, ["at one place (image features)"]),
        (Attended(layer=0, back=0), vtok.ConfigError, ["before the LLM there is no attention to decide by"]),
        (Attended(layer=1, back=2), vtok.ConfigError, ["attention of decoder layer -1 cannot decide", "in front of layer 1"]),
        (Attended(layer=1, back=-1), vtok.ConfigError, ["it must be that layer or an earlier one"]),
        (
            [Columns(((2, 2),)), Attended(layer=3, back=2)],
            vtok.ConfigError,
            ["tokens are dropped in between"],
        ),
        (vtok.UniformGrid(layers=[5]), vtok.ConfigError, ["layers names block 5, the model has blocks 0 to 1"]),
    ],
)
def test_values_that_make_no_sense(config, error, words):
    model = vtok.patch(build("LLaVA-1.5"), "random", keep=0.5)
    text = message_of(error, vtok.patch, model, config)
    for word in words:
        assert word in text, text
    assert vtok.info(model).prompts[0].configs == (vtok.RandomDrop(keep=0.5),), "the earlier patch is still there"


def test_arguments_of_vision_encoders():
    model = build("LLaVA-1.5")
    for argument in ({"calibration": torch.zeros(1)},):
        assert f"{next(iter(argument))} cannot be used on a vision-language model" in message_of(
            vtok.ConfigError, vtok.patch, model, "uniform", **argument
        )
    assert "positions is for vision-language models" in message_of(
        vtok.ConfigError, vtok.patch, model.model.vision_tower, "tome", r=1, positions="compact"
    )
    assert vtok.info(vtok.patch(model.model.vision_tower, "tome", r=1)).patched


def test_positions():
    model = build("LLaVA-1.5")
    assert "did you mean 'compact'?" in message_of(vtok.UnknownNameError, vtok.patch, model, "uniform", positions="compacted")
    assert "one rotary table for all of them" in message_of(
        vtok.UnsupportedModelError, vtok.patch, build("Gemma3"), Columns(((2, 2),)), positions="compact"
    )
    assert "time, height and width" in message_of(
        vtok.UnsupportedModelError, vtok.patch, build("Qwen2.5-VL"), "uniform", positions="compact"
    )


def test_layers_that_get_features_of_the_tower():
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("Qwen3-VL"), Columns(((1, 2),)))
    assert "in front of decoder layer 1 of Qwen3VLModel, but features of its vision tower are added" in text
    assert "from layer 2 on" in text


def test_models_that_are_refused():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    with torch.device("meta"):
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28}
        text = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 200,
        }
        text |= {"intermediate_size": 32, "cross_attention_layers": [1], "pad_token_id": 0}
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    assert "attends to the image by cross-attention" in message_of(vtok.UnsupportedModelError, vtok.patch, model, "uniform")
    assert not vtok.supports(model)
    for why in REFUSED.values():
        assert 40 < len(why) < 150


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"layer_types": ["chunked_attention", "full_attention"] * 2},
            "layers of type chunked_attention, which count stored tokens",
        ),
        ({"num_kv_shared_layers": 2}, "layers of its LLM share keys and values"),
    ],
)
def test_text_models_that_nothing_can_leave_inside(setting, words):
    model = build("LLaVA, Qwen2 text")
    for name, value in setting.items():
        object.__setattr__(text_model(model).config, name, value)
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, Columns(((2, 2),)))
    assert words in text and "methods that shorten its prompt before the LLM work" in text
    assert vtok.supports(model).methods["uniform"] is None


def test_text_models_that_were_never_tried():
    class MyLlama(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    model = build("LLaVA-1.5")
    model.model.language_model = MyLlama(model.model.language_model.config)
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "uniform")
    assert "MyLlama, keeps no list of layers" in text


def test_ways_to_generate_that_are_refused():
    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    one = {k: v[:1] if k != "pixel_values" else v[:2] for k, v in values.items()}
    text = message_of(vtok.UnsupportedModelError, generate, model, one, prompt_lookup_num_tokens=2)
    assert "cannot be cropped (assisted decoding does that)" in text
    decides = vtok.patch(build("LLaVA-1.5"), Columns(((2, 2),)))
    text = message_of(vtok.UnsupportedModelError, generate, decides, one, prompt_lookup_num_tokens=2)
    assert "would take part in what is decided in front of decoder layer 2" in text
    text = message_of(vtok.UnsupportedModelError, generate, model, values, prefill_chunk_size=8)
    assert "prefill_chunk_size reads a prompt in pieces" in text
    cache = generate(model, values, steps=2)[2].past_key_values
    assert "cannot be cropped" in message_of(vtok.UnsupportedModelError, cache.crop, -1)
    with torch.no_grad():
        new = {"inputs_embeds": torch.zeros(2, 1, 64), "past_key_values": cache}
        text = message_of(vtok.StateError, text_model(model), **new)
        assert "was called on its own with a cache that holds a shortened prompt" in text
        three = {"input_ids": torch.ones(3, 1, dtype=torch.long), "past_key_values": cache}
        assert "made for 2 rows and is used for 3" in message_of(vtok.StateError, model, **three)
    assert generate(model, values, steps=2)[1].isfinite().all()


def test_kernels_that_are_refused(monkeypatch):
    model = vtok.patch(build("LLaVA, Mistral text, window 9"), "uniform", keep=0.5)
    text_model(model).config._attn_implementation_internal = "flash_attention_2"
    text = message_of(vtok.UnsupportedModelError, model, **inputs("LLaVA, Mistral text, window 9"))
    assert "measures sliding windows in stored tokens" in text
    model = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5)
    text_model(model).config._attn_implementation_internal = "flex_attention"
    assert "attn_implementation='flex_attention'" in message_of(vtok.UnsupportedModelError, model, **inputs("LLaVA-1.5"))


def test_a_method_that_keeps_nothing(monkeypatch):
    from vtok.core.reduction import Plan

    reducer = type(Nearest().build_vlm(None))
    monkeypatch.setattr(reducer, "features", lambda self, images: Plan(torch.zeros(len(images.tokens), 0, dtype=torch.long)))
    model = vtok.patch(build("LLaVA-1.5"), Nearest())
    assert "keeps no token of an image; at least one must stay" in message_of(vtok.StateError, model, **inputs("LLaVA-1.5"))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_at_least_one_token_of_every_image_stays(name):
    """keep=0.01 of a few tokens would be none."""
    model, values = vtok.patch(build(name, EXAMPLES[name].kernels[0]), "random", keep=0.01), inputs(name)
    with torch.no_grad():
        model(**values)
    (row,) = vtok.info(model).prompts[0].rows
    assert all(1 <= left <= 5 < entered for entered, left in zip(row.tokens_in, row.tokens_out))


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_where_the_image_stands(place):
    values = inputs("LLaVA-1.5")
    before, behind = {"start": (0, 9), "middle": (4, 5), "end": (9, 0)}[place]
    ids = torch.tensor([[*range(5, 5 + before), *[119] * 16, *range(30, 30 + behind)]])
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values["pixel_values"][:1]}
    model = build("LLaVA-1.5")
    positions = "compact" if place == "end" else "original"
    short = generate(model, vtok.prune_inputs(model, one, "uniform", keep=0.3, positions=positions))
    if place == "end":
        text = message_of(vtok.StateError, vtok.prune_inputs, model, one, "uniform", keep=0.3)
        assert "a prompt ends with a visual token that is dropped" in text
    long = generate(vtok.patch(model, "uniform", keep=0.3, positions=positions), one)
    assert (short[1] - long[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "InternVL"])
def test_features_of_no_block(name):
    """transformers fails on them too, in words that say nothing."""
    model = build(name)
    model.config.vision_feature_layer = 0
    with pytest.raises(TypeError), torch.no_grad():
        model(**inputs(name))
    for call in (vtok.patch, vtok.plan):
        assert "vision_feature_layer=0 of" in message_of(vtok.UnsupportedModelError, call, model, "random")
    assert "vision_feature_layer=0 of" in vtok.supports(model).reason


def test_a_family_whose_cost_nobody_wrote_down(monkeypatch):
    """Its prompts are shortened; what needs costs says what is missing."""
    model, name = build("LLaVA-1.5"), qualified_name(LlavaModel)
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(FAMILIES[name], costs=None))
    words = "what LlavaModel costs is not known in closed form"
    assert words in message_of(vtok.UnsupportedModelError, vtok.plan, model, "random", keep=0.5)
    for method in ("random", "tome"):
        assert words in message_of(vtok.UnsupportedModelError, vtok.patch, model, method, flops=0.8)
    for method, knobs in (("random", {"keep": 0.5}), ("tome", {"r": 2})):
        vtok.patch(model, method, **knobs)
        with torch.no_grad():
            model(**inputs("LLaVA-1.5"))
        found = vtok.info(model).prompts[0]
        assert found.rows and words in " ".join(found.notes)
        assert words in str(vtok.info(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"text": "lm"},
            "LlavaModel has no module 'lm', which the row of LLaVA-1.5 in FAMILIES",
        ),
        ({"tower": "eyes.tower"}, "no module 'eyes.tower', which the row of LLaVA-1.5"),
        ({"connector": "bridge"}, "families.py) names as connector: an error there"),
        (
            {"costs": VisionCosts(("bridge",))},
            "families.py) names as costs.modules: an error there",
        ),
    ],
)
def test_a_row_that_names_what_is_not_there(changes, words, monkeypatch):
    name = qualified_name(LlavaModel)
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(FAMILIES[name], **changes))
    assert words in message_of(vtok.UnsupportedModelError, vtok.patch, build("LLaVA-1.5"), "random", keep=0.5)


def test_supports_names_what_works_on_request():
    """Qwen3-VL adds tower features to visual tokens in front of early layers."""
    support = vtok.supports(build("Qwen3-VL"))
    assert support.on_request["pyramiddrop"] == {"keep": [0.5, 0.25], "layers": [2, 3]}
    assert support.on_request["sparsevlm"]["layers"] == [1, 2]
    assert support.methods["fastv"] is None and "fastv" not in support.on_request
    model = vtok.patch(build("Qwen3-VL"), "pyramiddrop", **support.on_request["pyramiddrop"])
    assert vtok.info(model).patched


def test_what_names_nothing_to_do():
    model = build("LLaVA-1.5")
    assert "list of methods is empty" in message_of(vtok.ConfigError, vtok.patch, model, [])
    last = vtok.SparseVLM(keep=[0.5], layers=[3])
    assert "decoder layer 3, the last one of LlavaModel" in message_of(vtok.ConfigError, vtok.patch, model, last)
    assert "so 2 is the last" in message_of(vtok.ConfigError, vtok.patch, model, last)


@pytest.mark.parametrize("method", ["visionzip", "fastervlm", "vispruner", "holov", "hired", "prumerge", "downsample"])
def test_a_class_token_among_the_features_is_refused_at_patch_time(method):
    """LLaVA with "full": 17 features of 16 patches, which these methods would have to tell apart."""
    model = build("LLaVA-1.5")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(vtok.UnsupportedModelError, match="class token of its vision tower among the features"):
        vtok.patch(model, method, keep=0.4)
    assert f"{method}: no: {method} " in str(vtok.supports(model))
