"""Features of a tower that dropped tokens, in the hands of a caller: finite, and right in whatever prompt they are put."""

import copy
import warnings

import pytest
import torch
from helpers_errors import message_of
from helpers_towers import METHODS, TOKENWISE, deep, left_by
from vlm_zoo import Columns, assert_same, generate, inputs, text_model, visual

import vtok
from vtok.patches.hf_vlm.tower.bridge import DROPPED, holes


def _merged(model, values):
    """(the prompt as embeddings, with features in it, as callers make it; the features)."""
    with torch.no_grad():
        encoded = model.get_image_features(values["pixel_values"], return_dict=True)
        features = torch.cat(list(encoded.pooler_output))
        embeddings = model.get_input_embeddings()(values["input_ids"]).clone()
        embeddings[visual(model, values["input_ids"])] = features
    return {"inputs_embeds": embeddings, "attention_mask": values["attention_mask"]}, features


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOKENWISE)
def test_prompts_made_by_hand(name, method):
    """The same answer as from pixels; where the tower left nothing, features are finite and hardly there."""
    values, model = inputs(name), deep(name)
    _, alive = left_by(model, values, METHODS[method])
    vtok.patch(model, METHODS[method])
    given, features = _merged(model, values)
    assert features.isfinite().all()
    assert torch.equal(holes(features), ~alive.flatten())
    assert (features[~alive.flatten()] == DROPPED).all()
    types = {k: v for k, v in values.items() if k == "token_type_ids"}
    with torch.no_grad():
        found, expected = model(**given, **types).logits, model(**values)
    assert torch.equal(found, expected.logits)
    if name != "PaliGemma":  # generate() makes other masks for it when it does not see token ids, unpatched too
        steps = generate(model, {**given, "input_ids": values["input_ids"][:, :0]}, **types)
        assert torch.equal(steps[0], generate(model, values)[0])
        assert_same(steps, generate(model, values))
    hidden = torch.cat(list(expected.image_outputs.pooler_output)) if hasattr(expected, "image_outputs") else features
    assert torch.equal(hidden, features)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_batch_is_its_rows(positions):
    values, model = inputs("LLaVA-1.5"), vtok.patch(deep("LLaVA-1.5"), METHODS["ats"], positions=positions)
    given, _ = _merged(model, values)
    with torch.no_grad():
        both = model(**given).logits
        for row in range(2):
            real = values["attention_mask"][row] == 1
            one = {key: value[row, real][None] for key, value in given.items()}
            assert (model(**one).logits[0] - both[row, real]).abs().max() <= 1e-5


def test_what_else_reads_such_a_prompt_refuses_it():
    values, model = inputs("LLaVA-1.5"), vtok.patch(deep("LLaVA-1.5"), METHODS["tome"])
    given, _ = _merged(model, values)
    assert "was called on its own with image features" in message_of(vtok.StateError, text_model(model), **given)
    cache = generate(model, values, steps=2)[2]
    cache = {name: getattr(cache, name) for name in ("cache", "past_key_values") if name in cache}
    text = message_of(vtok.UnsupportedModelError, model, inputs_embeds=given["inputs_embeds"], **cache)
    assert "the cache holds text already" in text
    for more in (vtok.UniformGrid(keep=0.5), Columns(((2, 2),))):
        other = vtok.patch(copy.deepcopy(model), [METHODS["tome"], more])
        given, _ = _merged(other, values)
        assert "must know which are visual" in message_of(vtok.UnsupportedModelError, other, **given)


def test_prompts_without_features_are_left_alone():
    """Words may have embeddings of zeros, as padding has."""
    model, plain = vtok.patch(deep("LLaVA-1.5"), METHODS["tome"]), deep("LLaVA-1.5")
    embeddings = plain.get_input_embeddings()(torch.tensor([[1, 5, 0, 6, 7]])).detach()
    embeddings[:, 2] = 0
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, plain(inputs_embeds=embeddings).logits)
        assert torch.equal(text_model(model)(inputs_embeds=embeddings)[0], text_model(plain)(inputs_embeds=embeddings)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_holes_stay_holes(dtype):
    """However features are cast and scaled."""
    x = torch.randn(6, 64)
    x[[1, 4]] = DROPPED
    expected = torch.tensor([False, True, False, False, True, False])
    for changed in (x.to(dtype), x.to(dtype) / 4096**0.5, (x.half() * 3).to(dtype), x[None].expand(2, 6, 64).to(dtype)[1]):
        assert torch.equal(holes(changed), expected)
    assert not holes(torch.zeros(2, 4)).any()


def test_features_from_elsewhere_are_not_passed_over_in_silence():
    """Merged in by another model, they cannot be told from words."""
    values, plain = inputs("LLaVA-1.5"), deep("LLaVA-1.5")
    given, _ = _merged(plain, values)
    with torch.no_grad():
        expected = plain(**given).logits
        model = vtok.patch(plain, "uniform", keep=0.5)
        with pytest.warns(UserWarning, match="as inputs_embeds without images, of which vtok drops nothing"):
            assert torch.equal(model(**given).logits, expected)
        with warnings.catch_warnings():  # a prompt of token ids, and what follows on a cache
            warnings.simplefilter("error")
            generate(model, values, steps=3)
            model(input_ids=torch.tensor([[1, 5, 6]]))
