"""Callers that read more than logits, embed the prompt themselves, or generate in other ways than token by token."""

import copy
from pathlib import Path

import pytest
import torch
from helpers_errors import message_of
from vlm_zoo import (
    EXAMPLES,
    TOLERANCE,
    Columns,
    MaskOracle,
    assert_same,
    build,
    column_keeps,
    feature_keeps,
    generate,
    inputs,
    text_model,
)

import vtok
from vtok.patches.decoder.kv_cache import cache_in
from vtok.patches.hf_vlm.families import release
from vtok.patches.hf_vlm.generic.refused import REFUSED

MAIN = ["LLaVA-1.5", "Qwen2.5-VL", "Qwen3-VL", "Idefics3", "Gemma3"]
EACH = [*MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES if name not in MAIN and "window" not in name)]
ASKED = {"output_hidden_states": True, "output_attentions": True}


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


def method_of(name):
    first = EXAMPLES[name].first_layer
    return Columns(((0, 2), (first, 3), (3, 0)) if first < 3 else ((0, 2), (3, 0)))


def nearest(alive):
    """[B, L] int64: the nearest column in front that is alive, itself included; the first one alive where there is none."""
    column = torch.arange(alive.shape[1]).expand(alive.shape)
    return torch.maximum(column.masked_fill(~alive, -1).cummax(1).values, alive.int().argmax(1, keepdim=True))


def check_pass(found, expected, keeps, real):
    """Hidden states of every column, of dropped ones those of the nearest kept; attention of the columns that are left."""
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    assert len(found.attentions) == len(expected.attentions) == 4
    for i, (got, want) in enumerate(zip(found.hidden_states, expected.hidden_states)):
        rows = nearest(keeps[max(i - 1, 0)] & real)
        want = want.gather(1, rows[..., None].expand_as(want))
        close(got[real], want[real])
    for layer, (got, want) in enumerate(zip(found.attentions, expected.attentions)):
        asks = (keeps[layer] & real)[:, None, :, None].expand_as(want)
        close(got[asks], want[asks])
        assert (got.sum(-1).transpose(1, 2)[real] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", EACH)
def test_hidden_states_and_attention_have_a_place_for_every_column(name):
    values, model, method = inputs(name), build(name, "eager"), method_of(name)
    keeps = column_keeps(model, values, method.shares)
    with torch.no_grad(), MaskOracle(model, keeps):
        expected = model(**copy.copy(values), **ASKED)
    vtok.patch(model, method)
    with torch.no_grad():
        found = model(**copy.copy(values), **ASKED)
        inner = model.model(**copy.copy(values), **ASKED)
        plain = model.model(**copy.copy(values), **ASKED, return_dict=False)
    check_pass(found, expected, keeps, values["attention_mask"].bool())
    assert inner.hidden_states[-1] is inner.last_hidden_state
    for part, named in zip(plain[2:4], (inner.hidden_states, inner.attentions), strict=True):  # behind the cache
        assert all(torch.equal(a, b) for a, b in zip(part, named, strict=True))
    assert torch.equal(plain[0], inner.last_hidden_state)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_what_generate_collects(name):
    """Of every step, under beams too."""
    values, model, method = inputs(name), build(name, "eager"), method_of(name)
    keeps, real = column_keeps(model, values, method.shares), values["attention_mask"].bool()
    with MaskOracle(model, keeps):
        expected = generate(model, values, steps=3, **ASKED)
    plain = generate(build(name, "eager"), values, steps=3, num_beams=2, **ASKED)[2]
    vtok.patch(model, method)
    found = generate(model, values, steps=3, **ASKED)
    assert_same(found, expected)
    for step in range(3):
        ours, theirs = ([o[2].hidden_states[step], o[2].attentions[step]] for o in (found, expected))
        for layer, (got, want) in enumerate(zip(ours[1], theirs[1], strict=True)):
            asks = (keeps[layer] & real if step == 0 else real[:, -1:])[:, None, :, None].expand_as(want)
            close(got[asks], want[asks])
        for layer, (got, want) in enumerate(zip(ours[0], theirs[0], strict=True)):
            kept = keeps[max(layer - 1, 0)] & real if step == 0 else real[:, -1:]
            close(got[kept], want[kept])
    beams = generate(model, values, steps=3, num_beams=2, **ASKED)[2]
    for kind in ("hidden_states", "attentions"):
        for got, want in zip(beams[kind], plain[kind], strict=True):
            assert [x.shape for x in got] == [x.shape for x in want]


def test_the_last_token_of_rows_padded_on_the_right():
    """What embedding models read."""
    values = inputs("LLaVA-1.5")
    shift = values["attention_mask"].argmax(1).tolist()
    for key in ("input_ids", "attention_mask"):
        values[key] = torch.stack([row.roll(-by) for row, by in zip(values[key], shift)])
    model = build("LLaVA-1.5")
    alive, last = feature_keeps(model, values, 0.4), values["attention_mask"].sum(1) - 1
    with torch.no_grad(), MaskOracle(model, dict.fromkeys(range(4), alive)):
        expected = model(**values, output_hidden_states=True).hidden_states
    with torch.no_grad():
        found = vtok.patch(model, "uniform", keep=0.4)(**values, output_hidden_states=True).hidden_states
    for got, want in zip(found, expected, strict=True):
        close(got[range(2), last], want[range(2), last])


@pytest.mark.skipif(release() < (5, 24), reason="transformers 5.24 lets hidden states be chosen by number")
def test_hidden_states_by_number():
    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.4), inputs("LLaVA-1.5")
    with torch.no_grad():
        every = model(**copy.copy(values), output_hidden_states=True).hidden_states
        some = model(**copy.copy(values), output_hidden_states=[0, -1]).hidden_states
    assert [x is None for x in some] == [False, True, True, True, False]
    assert torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])


def test_attention_of_windows():
    """Of the prompt it can be told; of later text it cannot, because the cache has let columns go."""
    name, values = "LLaVA, Mistral text, window 9", inputs("LLaVA, Mistral text, window 9")
    model = build(name, "eager")
    alive = feature_keeps(model, values, 0.4)
    with torch.no_grad(), MaskOracle(model, dict.fromkeys(range(4), alive)):
        expected = model(**copy.copy(values), output_attentions=True).attentions
    vtok.patch(model, "uniform", keep=0.4)
    with torch.no_grad():
        found = model(**copy.copy(values), output_attentions=True).attentions
    asks = (alive & values["attention_mask"].bool())[:, None, :, None]
    for got, want in zip(found, expected, strict=True):
        close(got[asks.expand_as(got)], want[asks.expand_as(want)])
    words = message_of(vtok.UnsupportedModelError, generate, model, values, output_attentions=True)
    assert "output_attentions: layers of MistralModel look back over a window" in words


@pytest.mark.parametrize("name", EACH)
def test_prompts_given_as_embeddings(name):
    """Placeholders are found among embeddings as the models find them."""
    values, model = inputs(name), vtok.patch(build(name), "uniform", keep=0.4)
    if "image_grid_thw" in values:
        call = {k: values[k] for k in ("image_grid_thw", "attention_mask", "mm_token_type_ids")}
        values["position_ids"] = model.model.get_rope_index(values["input_ids"], **call)[0]
    with torch.no_grad():
        embedded = {k: v for k, v in values.items() if k != "input_ids"}
        embedded["inputs_embeds"] = model.get_input_embeddings()(values["input_ids"])
        expected = model(**copy.copy(values))
        found = model(**embedded)
    assert torch.equal(found.logits, expected.logits)
    cache = cache_in(found)
    assert type(cache).get_seq_length(cache) < values["input_ids"].shape[1]


def test_features_that_the_caller_put_into_the_prompt():
    """vtok cannot see them, and says so; a prompt of text alone runs as it is."""

    class Merged(torch.nn.Module):
        def __init__(self, vlm):
            super().__init__()
            self.vlm = vlm

        def forward(self, input_ids, pixel_values, **kwargs):
            x = self.vlm.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                features = torch.cat(list(self.vlm.get_image_features(pixel_values, **kwargs).pooler_output))
                x = x.masked_scatter((input_ids == 119)[..., None], features)
            return self.vlm(inputs_embeds=x)[0]

    for name in ("LLaVA-1.5", "Qwen2-VL"):
        values = inputs(name)
        model = vtok.patch(Merged(build(name).model), "uniform", keep=0.4)
        call = {k: values[k] for k in ("input_ids", "pixel_values", "image_grid_thw") if k in values}
        text = model(values["input_ids"][:, -3:], None)
        assert torch.equal(text, Merged(build(name).model)(values["input_ids"][:, -3:], None))
        words = message_of(vtok.UnsupportedModelError, model, **call)
        assert f"{type(model.vlm).__name__} got a prompt as inputs_embeds without any" in words
        assert model.eval() and vtok.unpatch(model)(**call).isfinite().all()


def test_retrieval_models():
    """Those that hand the whole prompt to their model act; those that put features into it themselves are refused."""
    import transformers

    config = transformers.ColQwen2Config(vlm_config=build("Qwen2-VL").config.to_dict(), embedding_dim=8)
    model = transformers.ColQwen2ForRetrieval(config).eval()
    for method in ("uniform", "todre", "random"):
        words = message_of(vtok.UnsupportedModelError, vtok.patch, model, method)
        assert "ColQwen2ForRetrieval cannot be patched: it puts image features into the prompt itself" in words
    assert not vtok.supports(model)
    config = transformers.ColPaliConfig(vlm_config=build("PaliGemma").config.to_dict(), embedding_dim=8)
    model, values = transformers.ColPaliForRetrieval(config).eval(), inputs("PaliGemma")
    alive = feature_keeps(build("PaliGemma"), values, 0.4) & values["attention_mask"].bool()
    keeps = dict.fromkeys(range(4), alive)
    with torch.no_grad(), MaskOracle(model, keeps):
        expected = model(**copy.copy(values)).embeddings
    with torch.no_grad():
        found = vtok.patch(model, "uniform", keep=0.4)(**copy.copy(values)).embeddings
    close(found[alive], expected[alive])
    assert vtok.info(model).prompts[0].rows[0].tokens_out == (6, 6)


def test_every_model_around_another_is_known():
    """Models of the installed transformers around a whole vision-language model either hand it pixels or are refused."""
    import transformers

    around = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "from_config(config.vlm_config)" in text:
            call = text.split("self.vlm(", 1)[1].split(")", 1)[0]
            around[path.parent.name] = "pixel_values" in call
    assert around["colpali"] and not around["colqwen2"]
    refused = {name.split(".")[2] for name in REFUSED}
    assert {name for name, hands_over in around.items() if not hands_over} <= refused


def test_models_that_score_a_prompt():
    """They read the last token of every row, wherever it stands."""
    import transformers

    config = copy.deepcopy(build("Gemma3").config)
    config.num_labels = 3
    torch.manual_seed(0)
    model, values = transformers.Gemma3ForSequenceClassification(config).eval(), inputs("Gemma3")
    alive = feature_keeps(model, values, 0.4)
    with torch.no_grad(), MaskOracle(model, dict.fromkeys(range(4), alive)):
        expected = model(**copy.copy(values)).logits
    with torch.no_grad():
        close(vtok.patch(model, "uniform", keep=0.4)(**copy.copy(values)).logits, expected)


@pytest.mark.parametrize("method", ["uniform", "todre"])
def test_ways_to_generate_for_text_alone(method):
    """Nothing would be dropped, so nothing is refused."""
    model = vtok.patch(build("LLaVA-1.5"), method, keep=0.4, **({"probe": 1} if method == "todre" else {}))
    ids = torch.tensor([[1, 6, 7, 9, 6, 7, 9, 6, 7]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for options in ({"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}):
        assert torch.equal(generate(model, text, **options)[0], generate(build("LLaVA-1.5"), text, **options)[0])


def test_guesses_at_the_answer_where_nothing_is_dropped():
    model = vtok.patch(build("LLaVA-1.5"), "todre", keep_tokens=16, probe=None)  # as many as every image has
    one = {k: v[:1] if k != "pixel_values" else v[:2] for k, v in inputs("LLaVA-1.5").items()}
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=2)[0], generate(build("LLaVA-1.5"), one)[0])


def test_text_in_pieces_behind_a_shortened_prompt():
    model = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.4)
    one = {k: v[:1] if k != "pixel_values" else v[:2] for k, v in inputs("LLaVA-1.5").items()}

    def talk(**options):
        out = generate(model, one, steps=3)[2]
        ids = torch.cat([out.sequences, torch.tensor([[7, 8, 9, 10, 11, 12]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, turn, steps=4, past_key_values=cache_in(out), **options)

    assert_same(talk(prefill_chunk_size=2), talk())


def test_static_caches_without_room_for_the_long_prompt():
    """generate() makes masks for the long prompt; whoever calls the model itself needs room for the short one alone."""
    from transformers import StaticCache

    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.3), inputs("LLaVA-1.5")
    expected = generate(model, values, steps=2)
    config, length = text_model(model).config, values["input_ids"].shape[1]
    words = message_of(vtok.ConfigError, generate, model, values, past_key_values=StaticCache(config=config, max_cache_len=30))
    assert f"30 keys for a prompt of {length} columns" in words
    assert "raise max_cache_len" in words
    cache = StaticCache(config=config, max_cache_len=30)
    with torch.no_grad():
        first = model(**values, past_key_values=cache).logits[:, -1]
        mask = torch.nn.functional.pad(values["attention_mask"], (0, 1), value=1)
        second = model(input_ids=expected[0][:, :1], attention_mask=mask, past_key_values=cache).logits[:, -1]
    close(torch.stack([first, second], 1), expected[1])
