"""Models that no row describes, in use: caches, later text, old names; what is read of their layers, and what is refused."""

import copy

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import BY_HAND, HYBRIDS, KEEP, LISTED, OWN_CACHE, SLOW, generate
from test_vlm_attention import Watch

import vtok
from vtok.patches.decoder.text_models import GENERIC_TEXT_MODELS, OWN_ATTENTION
from vtok.patches.hf_vlm.families import find
from vtok.patches.protocol import qualified_name
from vtok.testing import generic_models
from vtok.testing.generic_models import CLASSES, build
from vtok.testing.generic_prompts import inputs

THOSE = [name for name in CLASSES if name in LISTED]
OWN_STATIC = ("dots3_note", "gemma4_unified")  # with a static cache the unpatched models say something else than without


@SLOW
@pytest.mark.parametrize("name", [name for name in THOSE if name not in (*OWN_STATIC, "llama4")])
def test_a_static_cache(name):
    model = build(name)
    values = inputs(model)
    vtok.patch(model, "random", keep=KEEP)
    found = generate(model, values, cache_implementation="static", disable_compile=True)
    assert (found - generate(model, values)).abs().max() <= 1e-4


@SLOW
@pytest.mark.parametrize("name", ["cohere2_vision", "gemma4", "lfm2_vl", "qwen3_5"])
def test_a_static_cache_of_layers_that_hold_different_tokens(name):
    model = build(name)
    values = inputs(model)
    (vlm,) = find(model)
    vtok.patch(model, "fastv", layer=vlm.info.judged_layers()[0], keep=KEEP)
    found = generate(model, values, cache_implementation="static", disable_compile=True)
    assert (found - generate(model, values)).abs().max() <= 1e-4


def _later(model, values):
    """Logits [B, 3, V] of an answer to text behind the first answer: (read from its cache, read anew with the prompt)."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**copy.copy(values), max_new_tokens=2, **settings)
    rows = len(values["input_ids"])
    ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]]).expand(rows, -1)], 1)
    more = ids.shape[1] - values["input_ids"].shape[1]
    text = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(values["attention_mask"], (0, more), value=1)}
    cache = first.cache if hasattr(first, "cache") else first.past_key_values
    kinds = {name: torch.nn.functional.pad(x, (0, more)) for name, x in values.items() if "type_ids" in name}
    text_alone = {**text, "cache" if hasattr(first, "cache") else "past_key_values": cache}
    second = model.generate(**text_alone, max_new_tokens=3, **settings)
    anew = model.generate(**{**copy.copy(values), **text, **kinds}, max_new_tokens=3, **settings)
    return torch.stack(second.logits, 1), torch.stack(anew.logits, 1)


@SLOW
@pytest.mark.parametrize("name", [name for name in THOSE if name not in OWN_CACHE])
def test_text_in_a_later_turn(name):
    model = build(name)
    found, expected = _later(vtok.patch(model, "random", keep=KEEP), inputs(model))
    assert (found - expected).abs().max() <= 1e-4


@SLOW
@pytest.mark.parametrize("name", [name for name in THOSE if name not in BY_HAND or name in HYBRIDS])
def test_attention_of_layers_that_may_drop_is_read_right(name):
    """What methods between the layers choose by is what the layer computes itself."""
    model = build(name)
    (vlm,) = find(model)
    if vlm.info.no_layers is not None:
        assert qualified_name(type(vlm.text)) not in GENERIC_TEXT_MODELS | OWN_ATTENTION
        return
    values = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**values, use_cache=False, output_attentions=True).attentions
    attending = vlm.info.attention_layers or range(vlm.info.depth)
    for layer in set(vlm.info.judged_layers(0)):
        seen = []
        vtok.patch(model, Watch(layer=layer, back=0, seen=seen))
        with torch.no_grad():
            model(**values, use_cache=False)
        vtok.unpatch(model)
        ((layout, probs, _),) = seen
        assert (probs - expected[attending.index(layer)])[layout.real[:, None, :, None].expand_as(probs)].abs().max() <= 5e-5


@SLOW
def test_every_llm_that_may_drop_is_among_these_models():
    found = {qualified_name(type(module)) for name in CLASSES if name in LISTED for module in _texts(name)}
    assert found >= GENERIC_TEXT_MODELS | OWN_ATTENTION


def _texts(name):
    return [vlm.text for vlm in find(generic_models.empty(name))]


@SLOW
@pytest.mark.parametrize(("name", "old"), [("video_llava", "pixel_values_images"), ("fuyu", "image_patches")])
def test_pixels_under_an_old_name(name, old):
    model = build(name)
    values = inputs(model)
    expected = vtok.prune_inputs(model, values, "random", keep=KEEP)
    again = vtok.prune_inputs(
        model, {old if key == "pixel_values" else key: v for key, v in values.items()}, "random", keep=KEEP
    )
    assert expected["input_ids"].shape[1] < values["input_ids"].shape[1]
    assert again.keys() == expected.keys() and torch.equal(again["input_ids"], expected["input_ids"])
    assert old not in again and "pixel_values" not in again


def test_features_that_nothing_is_known_of_are_refused():
    model = build("mistral3")
    values = inputs(model)
    count = int((values["input_ids"] == model.config.image_token_id).sum())
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "more_features": torch.zeros(count, 3)}), with_kwargs=True
    )
    text = message_of(vtok.UnsupportedModelError, vtok.patch(model, "random", keep=KEEP), **values)
    assert "'more_features' with one entry a visual token" in text


@SLOW
def test_attention_within_chunks_and_a_static_cache():
    model = build("llama4")
    values = inputs(model)
    vtok.patch(model, "random", keep=KEEP)
    text = message_of(
        vtok.UnsupportedModelError, model.generate, **values, max_new_tokens=2, do_sample=False, cache_implementation="static"
    )
    assert "attention within chunks has their borders in other places" in text


@SLOW
def test_sparse_attention_that_takes_padding_for_tokens():
    model = build("minimax_m3_vl")
    values = inputs(model)
    twice = {key: torch.cat([value, value]) for key, value in values.items()}
    twice["attention_mask"][1, :3] = 0
    for call in (vtok.patch(model, "random", keep=KEEP), lambda **given: vtok.prune_inputs(model, given, "random", keep=KEEP)):
        assert "takes padding for tokens" in message_of(vtok.UnsupportedModelError, call, **twice)
        vtok.unpatch(model)


@pytest.mark.parametrize(
    "name", ["mistral3", "aya_vision", pytest.param("kimi_k25", marks=SLOW), pytest.param("gemma4", marks=SLOW)]
)
def test_the_refusal_of_encoder_methods_names_methods_that_work(name):
    """Every method that it names is one that `supports` does not refuse, and none is left out."""
    model = generic_models.empty(name)
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "tome")
    named = text.split("methods that act on its prompts: ")[1].split(", ")
    support = vtok.supports(model)
    prompts = {method for method in vtok.METHODS.names() if vtok.METHODS.get(method).for_vlms()}
    assert set(named) == {method for method in prompts if support.methods[method] is None or method in support.on_request}
    assert "divprune" in named and "visionzip" not in named
