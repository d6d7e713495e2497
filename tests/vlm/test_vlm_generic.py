"""Vision-language models that no row describes: their prompts are shortened before the LLM, whatever its layers are."""

import copy
import warnings

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import (
    BY_HAND,
    CACHED_ALONE,
    FAST,
    FEW_TOKENS,
    HYBRIDS,
    KEEP,
    NEEDS_MORE,
    NUMBERED_ANEW,
    ON_FRAMES,
    OWN_CACHE,
    OWN_NUMBERS,
    by_hand,
    by_hand_between,
    chosen,
    close,
    each,
    generate,
    longer,
    patched,
)

import vtok
from vtok.patches.decoder.soft_gates import softened
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.testing import generic_models
from vtok.testing.generic_models import CLASSES, build
from vtok.testing.generic_prompts import inputs
from vtok.testing.prompt_oracle import NOTHING, MaskedPrompt, check_prompts


@pytest.mark.parametrize("name", each(CLASSES, FAST))
def test_removing_columns_by_hand(name):
    """Forward passes, generate() with and without a cache, inputs shortened ahead; and the model is itself again afterwards."""
    model = build(name)
    values = inputs(model)
    keep, features = chosen(model, values, "random")
    expected = by_hand(model, values, keep, features, name in NUMBERED_ANEW)
    with torch.no_grad():
        whole = model(**values, use_cache=False).logits[:, -1]
    assert (whole - expected).abs().max() > 1e-2
    if name in OWN_NUMBERS:
        text = message_of(vtok.UnsupportedModelError, vtok.prune_inputs, model, values, "random", keep=KEEP)
        assert "numbers the tokens of its prompt itself" in text
    else:
        short = generate(model, vtok.prune_inputs(model, values, "random", keep=KEEP))
        close(short[:, 0], expected)
    untouched = generate(model, values)

    vtok.patch(model, "random", keep=KEEP)
    with torch.no_grad():
        close(model(**values, use_cache=False).logits[:, -1], expected)
    found = generate(model, values)
    close(found[:, 0], expected)
    assert name in OWN_NUMBERS or torch.equal(found.argmax(-1), short.argmax(-1))
    if name not in CACHED_ALONE:
        uncached = generate(model, values, use_cache=False)
        close(uncached[:, 0] if name in OWN_CACHE else uncached, found[:, 0] if name in OWN_CACHE else found)
    left = (keep & (values["input_ids"] == model.config.image_token_id)).sum(1)
    assert vtok.info(model).prompts[0].rows[0].tokens_out == tuple(left.tolist())
    assert torch.equal(generate(vtok.unpatch(model), values), untouched)
    if name in CACHED_ALONE:
        with pytest.raises(IndexError):
            generate(model, values, use_cache=False)
    if name in OWN_CACHE:
        assert (generate(model, values, use_cache=False) - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("name", each([name for name in CLASSES if name not in BY_HAND], ("mistral3", "granite4_vision")))
def test_removing_equals_masking(name):
    """Whatever method is not refused: the unpatched model on the whole prompt, what was dropped hidden in every layer."""
    model = build(name)
    values, done = inputs(model), set()
    for method, why in vtok.supports(model).methods.items():
        if why is None and method not in ON_FRAMES:  # see test_vlm_generic_video
            evidence = check_prompts(patched(model, method), values, steps=3)
            vtok.unpatch(model)
            if evidence.fault == NOTHING:
                assert method in NEEDS_MORE and (method == "dart" or name in FEW_TOKENS)
                continue
            assert max(evidence.differences.values()) <= 3e-5, (method, evidence)
            assert "other words" not in (evidence.fault or "")
            done.add(method)
    assert {"cdpruner", "divprune", "downsample", "random", "uniform"} <= done


@pytest.mark.parametrize("name", each(BY_HAND))
@pytest.mark.parametrize("method", ["cdpruner", "divprune", "downsample", "uniform"])
def test_other_methods_by_hand(name, method):
    model = build(name)
    values = inputs(model)
    expected = by_hand(model, values, *chosen(model, values, method), name in NUMBERED_ANEW)
    vtok.patch(model, method, keep=KEEP)
    with torch.no_grad():
        close(model(**values, use_cache=False).logits[:, -1], expected)


@pytest.mark.parametrize("name", ["glm4v", "qwen3_5"])
def test_a_batch_is_its_rows(name):
    model = build(name)
    values = inputs(model)
    vtok.patch(model, "divprune", keep=KEEP)
    both = generate(model, values)
    grid, start = values["image_grid_thw"], [0, 2, 3]
    ends = [0, *grid.prod(1).cumsum(0).tolist()]
    for row in range(2):
        real = values["attention_mask"][row] == 1
        one = {
            key: values[key][row, real][None] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in values
        }
        images = slice(start[row], start[row + 1])
        one |= {"image_grid_thw": grid[images], "pixel_values": values["pixel_values"][ends[images.start] : ends[images.stop]]}
        close(generate(model, one)[0], both[row])


def test_both_questions_are_answered():
    """Whether its prompt may be shortened, and whether tokens may leave between its layers."""
    model = build("qwen3_5")
    support = vtok.supports(model)
    assert {"random", "uniform", "divprune", "downsample"} <= {name for name, why in support.methods.items() if why is None}
    assert support.methods["fastv"] is None
    why = vtok.supports(build("glm5_next")).methods["fastv"]
    assert "none can leave between the layers of Glm5NextModel" in why and "indexed_attention" in why
    assert "no row says which views" in support.methods["visionzip"]
    assert support.methods["evs"] is None
    text = message_of(vtok.UnsupportedModelError, vtok.plan, model, "random", keep=KEEP, prompt={"images": 1, "text_tokens": 8})
    assert "Qwen3_5Model" in text and "not known" in text


@pytest.mark.parametrize(("name", "layers"), [("gemma4", (1, 2, 4)), ("granite4_vision", (2, 3))])
def test_layers_between_which_tokens_may_leave(name, layers, monkeypatch):
    """Up to the first layer whose keys and values later layers read; from the last one in front of which features arrive."""
    config_of = generic_models.config_of

    def deeper(name):
        config = config_of(name)
        if name == "granite4_vision":
            config.spatial_target_layers = [0, 0, 1, 2]
        return config

    monkeypatch.setattr(generic_models, "config_of", deeper)
    model = build(name)
    values = inputs(model)
    for layer in layers:
        evidence = check_prompts(vtok.patch(model, "fastv", layer=layer, keep=KEEP), values, steps=3)
        vtok.unpatch(model)
        assert evidence.fault is None and max(evidence.differences.values()) <= 3e-5, (layer, evidence)
    refused, why = {"gemma4": (5, "up to layer 4"), "granite4_vision": (1, "from layer 2 on")}[name]
    assert why in message_of(vtok.UnsupportedModelError, vtok.patch, model, "fastv", layer=refused, keep=KEEP)


@pytest.mark.parametrize("name", each(HYBRIDS, ("qwen3_5", "lfm2_vl")))
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "todre"])
def test_recurrent_layers_behind_a_drop_are_a_fresh_run(name, method):
    """They read what is left of the sequence: so do later words, and neither padding nor what was dropped leaves a trace."""
    model = build(name)
    values = inputs(model)
    (vlm,) = find(model)
    (layer, *_) = vlm.info.judged_layers(0 if method == "pyramiddrop" else 1)
    extra = {
        "fastv": {"layer": layer, "keep": KEEP},
        "pyramiddrop": {"layers": [layer], "keep": [KEEP]},
        "sparsevlm": {"layers": [layer - 1], "keep": [0.3]},
        "todre": {"keep": 1.0, "probe": layer - 1, "tau": 1.0},
    }
    untouched = generate(model, values)
    vtok.patch(model, method, **extra[method])
    with torch.no_grad():
        found = model(**values, use_cache=False).logits[:, -1]
    last = pruner_of(find(model)[0]).last
    columns, into, length = last.stages[layer].column, last.stages[layer].into, values["input_ids"].shape[1]
    keep = torch.zeros(len(columns), length + 1, dtype=torch.bool)
    keep = keep.scatter(1, columns.where(columns >= 0, length), True)[:, :length]
    assert ((~keep) & last.real).any()
    text = torch.tensor([[5, 9, 7, 6, 8], [7, 6, 9, 5, 8]])
    said = {"prefix_allowed_tokens_fn": lambda b, ids: [int(text[b % 2, len(ids) - length])]}
    out = generate(model, values, **said)
    close(generate(model, values, use_cache=False, **said), out, 3)  # chunks and steps of the delta rule round differently
    vtok.unpatch(model)
    assert torch.equal(generate(model, values), untouched)

    close(found, by_hand_between(model, values, layer, keep, into))
    close(out[:, 0], found)
    assert (untouched[:, 0] - found).abs().max() > 1e-3
    for step in (1, 4):
        whole = torch.cat([keep, torch.ones(len(keep), step, dtype=torch.bool)], 1)
        close(out[:, step], by_hand_between(model, longer(values, text[:, :step]), layer, whole, into))


@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
def test_recurrent_layers_and_rows_of_several_samples(name):
    """What tells them apart in front of a drop, if anything does, does not behind it."""
    model = build(name)
    values = inputs(model)
    ids, pixels = values["input_ids"][1, values["attention_mask"][1] == 1], {}
    position = torch.arange(len(ids))[None]
    if name == "qwen3_5":
        grid, kinds = values["image_grid_thw"][-1:], (ids == model.config.image_token_id).int()[None]
        pixels = {"pixel_values": values["pixel_values"][-int(grid.prod()) :].repeat(2, 1), "image_grid_thw": grid.repeat(2, 1)}
        pixels["mm_token_type_ids"] = kinds.repeat(1, 2)
        time = model.model.get_rope_index(ids[None], image_grid_thw=grid, mm_token_type_ids=kinds)[0]
        position = torch.cat([position[None], time])
    else:
        names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
        pixels = {name: torch.cat([values[name][-1:]] * 2) for name in names}
    vtok.patch(model, "fastv", layer=2, keep=KEEP)
    packed = {"position_ids": torch.cat([position] * 2, -1), "use_cache": False, **pixels}
    text = message_of(vtok.UnsupportedModelError, model, torch.cat([ids] * 2)[None], **packed)
    assert "rows hold several samples" in text and "a row of its own" in text


def test_gates_for_training_need_masks_that_every_layer_reads():
    class Nothing:
        layers = (2,)

    text = message_of(vtok.UnsupportedModelError, softened(build("qwen3_5"), Nothing()).__enter__)
    assert "gates are added to attention masks" in text and "recurrent state" in text


def test_layers_without_attention_are_named():
    model = build("qwen3_5")
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "fastv", layer=3, keep=KEEP)
    assert "decoder layer 2 of Qwen3_5Model" in text and "in front of one of the layers 2" in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "fastv", layer=1, keep=KEEP)
    assert "counts tokens by its first layer of attention" in text and "from layer 2 on" in text


@pytest.mark.parametrize(
    ("kinds", "method", "why"),
    [
        ("CCCA", "fastv", "drop them before the LLM, as there is no later layer"),
        ("ACCC", "pyramiddrop", "a recurrent state or a convolution; use a method that acts before the LLM"),
    ],
)
def test_where_no_layer_can_be_named_instead_none_is(kinds, method, why, monkeypatch):
    config_of = generic_models.config_of

    def other(name):
        config = config_of(name)
        config.text_config.layer_types = [{"C": "conv", "A": "full_attention"}[kind] for kind in kinds]
        return config

    monkeypatch.setattr(generic_models, "config_of", other)
    assert message_of(vtok.UnsupportedModelError, vtok.patch, build("lfm2_vl"), method).endswith(why)


@pytest.mark.parametrize("name", each(HYBRIDS, ("lfm2_vl",)))
def test_dart_behind_recurrent_layers(name):
    """It compares hidden states behind the LLM's last norm, whatever that is called."""
    model = build(name)
    values, (vlm,) = inputs(model), find(model)
    layer = vlm.info.judged_layers()[0]
    vtok.patch(model, "dart", layer=layer, keep=KEEP, visual_pivots=1, text_pivots=1)
    with torch.no_grad():
        found = model(**values, use_cache=False).logits[:, -1]
    last = pruner_of(find(model)[0]).last
    columns, length = last.stages[layer].column, values["input_ids"].shape[1]
    keep = torch.zeros(len(columns), length + 1, dtype=torch.bool)
    keep = keep.scatter(1, columns.where(columns >= 0, length), True)[:, :length]
    assert ((~keep) & last.real).any()
    vtok.unpatch(model)
    close(found, by_hand_between(model, values, layer, keep))


def test_layers_that_are_known_from_other_models_may_drop():
    """Mistral 3 has no row; its LLM is LLaVA's."""
    model = build("mistral3")
    values = inputs(model)
    vtok.patch(model, "fastv", layer=2, keep=KEEP)
    with torch.no_grad():
        found = model(**values).logits[:, -1]
    close(generate(model, values)[:, 0], found)
    (row,) = vtok.info(model).prompts[0].rows
    assert row.place == "decoder layer 2" and (row.tokens_in, row.tokens_out) == ((8, 4), (4, 2))
    assert "what Mistral3Model costs is not known" in str(vtok.info(model))


def test_a_prompt_without_images_and_nothing_to_drop():
    model = build("qwen3_5")
    values, text = inputs(model), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad(), warnings.catch_warnings():
        expected = [generate(model, given) for given in (text, values)]
        vtok.patch(model, "random", keep=1.0)
        assert torch.equal(generate(model, values), expected[1])
        vtok.patch(model, "random", keep=KEEP)
        assert torch.equal(generate(model, text), expected[0])


WINDOWS = (
    "cohere2_vision",
    "cohere_compass",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "idefics2",
    "muse_glimmer",
    "unlimited_ocr",
)


@pytest.mark.parametrize("name", each(("aya_vision", "exaone4_5", *WINDOWS), ("aya_vision", "exaone4_5")))
def test_windows_look_back_over_columns_of_the_long_prompt(name, monkeypatch):
    config_of = generic_models.config_of

    def narrow(name):
        config = config_of(name)
        config.text_config.sliding_window = 6
        return config

    monkeypatch.setattr(generic_models, "config_of", narrow)
    model = build(name)
    values = inputs(model)
    alive = chosen(model, values, "random")[0] | (values["attention_mask"] == 0)
    whole = generate(model, values)
    with MaskedPrompt(model, dict.fromkeys(range(model.config.text_config.num_hidden_layers), alive)):
        expected = generate(model, values)
    assert (whole - expected).abs().max() > 0.1
    close(generate(vtok.patch(model, "random", keep=KEEP), values), expected)


@pytest.mark.parametrize("name", each(("aya_vision", "qwen3_5", "qwen3_vl_moe", "gemma3n", "hy_v4_vl"), ("qwen3_5",)))
def test_beams_and_hidden_states(name):
    model = build(name)
    values = inputs(model)
    length = values["input_ids"].shape[1]

    def beams(given):
        given = {key: copy.copy(value) for key, value in given.items()}
        return model.generate(**given, max_new_tokens=5, num_beams=3, do_sample=False)[:, given["input_ids"].shape[1] :]

    expected = beams(vtok.prune_inputs(model, values, "random", keep=KEEP))
    vtok.patch(model, "random", keep=KEEP)
    assert torch.equal(beams(values), expected)
    with torch.no_grad():
        hidden = model(**values, output_hidden_states=True, use_cache=False).hidden_states
        whole = vtok.unpatch(model)(**values, output_hidden_states=True, use_cache=False).hidden_states
    assert [x.shape for x in hidden] == [x.shape for x in whole] and length in hidden[0].shape


@pytest.mark.parametrize("name", ["mistral3", "glm4v"])
def test_packed_rows_see_only_themselves(name):
    """Two samples in one row, by positions that start over: each gives what it gives in a row of its own."""
    model = build(name)
    values = inputs(model)
    ids = values["input_ids"][1, values["attention_mask"][1] == 1]
    pixels, extra, kinds = values["pixel_values"][-1:], {"image_sizes": values.get("image_sizes", [])[-1:]}, None
    position = torch.arange(len(ids))[None]
    if name == "glm4v":
        grid, kinds = values["image_grid_thw"][-1:], (ids == model.config.image_token_id).int()[None]
        pixels, extra = values["pixel_values"][-int(grid.prod()) :], {"image_grid_thw": grid}
        time = model.model.get_rope_index(ids[None], image_grid_thw=grid, mm_token_type_ids=kinds)[0]
        position = torch.cat([torch.arange(len(ids))[None, None], time])
    others = pixels.flip(0) * 0.7 + 0.1
    vtok.patch(model, "random", keep=KEEP)

    def last(times, pixels, **more):
        given = {key: torch.cat([value] * times) for key, value in extra.items() if len(value)}
        given |= {} if kinds is None else {"mm_token_type_ids": torch.cat([kinds] * times, 1)}
        with torch.no_grad():
            return model(torch.cat([ids] * times)[None], pixel_values=pixels, use_cache=False, **given, **more).logits[0]

    found = last(2, torch.cat([pixels, others]), position_ids=torch.cat([position] * 2, -1))
    close(found[len(ids) - 1], last(1, pixels)[-1])
    close(found[-1], last(1, others)[-1])


def test_an_llm_that_is_not_called_is_noticed():
    model = build("mistral3")
    values = inputs(model)
    vtok.patch(model, "random", keep=KEEP)
    text = model.model.language_model
    hooks = [key for key, hook in text._forward_pre_hooks.items() if type(hook).__name__ == "BeforeText"]
    for key in hooks:
        del text._forward_pre_hooks[key]
    assert "nothing was shortened" in message_of(vtok.UnsupportedModelError, model, **values)
