"""Vision-language models that no row describes: their prompts are shortened before the LLM, whatever its layers are."""

import copy
import warnings

import pytest
import torch
from helpers_errors import message_of
from test_vlm_attention import Watch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LISTED

import vtok
from vtok.patches.decoder.text_models import GENERIC_TEXT_MODELS
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.patches.protocol import qualified_name
from vtok.testing import generic_models
from vtok.testing.generic_models import CLASSES, build
from vtok.testing.generic_prompts import inputs
from vtok.testing.prompt_oracle import NOTHING, MaskedPrompt, check_prompts
from vtok.testing.trials import trial

FAST = ("aya_vision", "mistral3", "glm4v", "qwen3_5", "qwen3_vl_moe", "exaone4_5")  # sliding, plain, M-RoPE, hybrid, DeepStack
KEEP = 0.5
SLOW = pytest.mark.slow
# Columns hidden in every layer are not what columns are that never entered:
BY_HAND = {
    **dict.fromkeys(
        ("glm5_next", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        "a recurrent state reads all columns",
    ),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), "convolutions run over neighbouring columns"),
    **dict.fromkeys(("inkling2", "inkling2_loop"), "convolutions, and distances counted in stored tokens"),
    "llama4": "chunks of attention begin every so many stored tokens",
    **dict.fromkeys(("dots3_note", "minimax_m3_vl"), "sparse attention chooses among stored tokens"),
}
NUMBERED_ANEW = ("llama4", "minimax_m3_vl")  # attention within chunks, or to blocks that are found by positions
OWN_CACHE = ("dots3_note", "nemotron_h_omni")  # with a cache the unpatched models themselves say something else than without
CACHED_ALONE = ("ernie4_5_vl_moe",)  # generate(use_cache=False) of the unpatched model fails
OWN_NUMBERS = ("exaone4_5", "hyperclovax_vision_v2")  # generate() passes them no positions
NEEDS_MORE = ("dart",)  # visual tokens than these prompts have


def each(names, fast=()):
    """Parameters, all but the fast ones marked as slow; classes that this release lacks are left out."""
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in names if name in LISTED]


def _chosen(model, values, method):
    """([B, L] bool: what a method leaves, by asking it about the images that the unpatched model encodes; their features)."""
    (vlm,) = find(model)
    reducer = vtok.METHODS.get(method)(keep=KEEP).build_vlm(vlm.info)
    with torch.no_grad():
        chosen = hf.choose(vlm.module, hf.encode(vlm.module, values), reducer, vlm.family, values)
    keep = hf.kept_columns(values["input_ids"], vlm.tokens, chosen.rows)
    assert keep is not None and not keep.all()
    return keep & (values["attention_mask"] == 1), chosen.outputs


def _row(given, b, at, compact):
    """Keywords of an LLM for the columns `at` of one row of what it was given, without a cache."""
    x, mask, position = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
    call = {**given, "use_cache": False, "cache": None, "attention_mask": torch.ones(1, len(at), dtype=torch.long)}
    if isinstance(mask, dict):
        call["attention_mask"] = {kind: m if m is None else m[b : b + 1, :, at][..., at] for kind, m in mask.items()}
    elif mask is not None and mask.ndim == 4:
        call["attention_mask"] = mask[b : b + 1, :, at][..., at]
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and name != "attention_mask" and value.shape[:2] == x.shape[:2]:
            call[name] = value[b : b + 1, at]
    position = torch.arange(x.shape[1])[None] if position is None else position
    position = position.expand(*position.shape[:-2], len(x), -1)[..., b : b + 1, at]
    call["position_ids"] = torch.arange(len(at))[None] if compact else position
    for planes, places in (("deepstack_visual_embeds", "visual_pos_masks"), ("deepstack_features", "vision_mask")):
        deep = given.get(planes)
        if deep is not None:
            here = torch.zeros(x.shape[:2], dtype=torch.bool)
            here[b, at] = True
            left = here[given[places].reshape(here.shape)]
            call[planes] = {k: d[left] for k, d in deep.items()} if isinstance(deep, dict) else [d[left] for d in deep]
    return call


def _by_hand(model, values, keep, features, compact=False):
    """Logits [B, V] of the last column: the unpatched model, whose LLM is fed, row by row, with the columns that stay of what
    it would be given. Everything but the cache goes along, positions as they were, or counted anew."""
    (vlm,) = find(model)
    rest = {name: value for name, value in values.items() if not name.startswith("pixel_values")}
    rows = []
    for b, stays in enumerate(keep):
        at = stays.nonzero()[:, 0]
        handle = vlm.text.register_forward_pre_hook(
            lambda m, args, kwargs, b=b, at=at: (args, _row(kwargs, b, at, compact)), with_kwargs=True
        )
        with torch.no_grad():
            rows.append(model(**rest, mm_encoder_outputs=copy.copy(features), use_cache=False).logits[0, -1])
        handle.remove()
    return torch.stack(rows)


def _generate(model, values, **kwargs):
    values = {key: copy.copy(value) for key, value in values.items()}
    out = model.generate(
        **values, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return torch.stack(out.logits, 1)


def _close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", each(CLASSES, FAST))
def test_removing_columns_by_hand(name):
    """Forward passes, generate() with and without a cache, inputs shortened ahead; and the model is itself again afterwards."""
    model = build(name)
    values = inputs(model)
    keep, features = _chosen(model, values, "random")
    expected = _by_hand(model, values, keep, features, name in NUMBERED_ANEW)
    with torch.no_grad():
        whole = model(**values, use_cache=False).logits[:, -1]
    assert (whole - expected).abs().max() > 1e-2
    if name in OWN_NUMBERS:
        text = message_of(vtok.UnsupportedModelError, vtok.prune_inputs, model, values, "random", keep=KEEP)
        assert "numbers the tokens of its prompt itself" in text
    else:
        short = _generate(model, vtok.prune_inputs(model, values, "random", keep=KEEP))
        _close(short[:, 0], expected)
    untouched = _generate(model, values)

    vtok.patch(model, "random", keep=KEEP)
    with torch.no_grad():
        _close(model(**values, use_cache=False).logits[:, -1], expected)
    found = _generate(model, values)
    _close(found[:, 0], expected)
    assert name in OWN_NUMBERS or torch.equal(found.argmax(-1), short.argmax(-1))
    if name not in CACHED_ALONE:
        uncached = _generate(model, values, use_cache=False)
        _close(uncached[:, 0] if name in OWN_CACHE else uncached, found[:, 0] if name in OWN_CACHE else found)
    left = (keep & (values["input_ids"] == model.config.image_token_id)).sum(1)
    assert vtok.info(model).prompts[0].rows[0].tokens_out == tuple(left.tolist())
    assert torch.equal(_generate(vtok.unpatch(model), values), untouched)
    if name in CACHED_ALONE:
        with pytest.raises(IndexError):
            _generate(model, values, use_cache=False)
    if name in OWN_CACHE:
        assert (_generate(model, values, use_cache=False) - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("name", each([name for name in CLASSES if name not in BY_HAND], ("mistral3", "granite4_vision")))
def test_removing_equals_masking(name):
    """Whatever method is not refused: the unpatched model on the whole prompt, what was dropped hidden in every layer."""
    model = build(name)
    values, done = inputs(model), set()
    for method, why in vtok.supports(model).methods.items():
        if why is None:
            evidence = check_prompts(vtok.patch(model, method, **trial(method).prompt), values, steps=3)
            vtok.unpatch(model)
            if evidence.fault == NOTHING:
                assert method in NEEDS_MORE
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
    expected = _by_hand(model, values, *_chosen(model, values, method), name in NUMBERED_ANEW)
    vtok.patch(model, method, keep=KEEP)
    with torch.no_grad():
        _close(model(**values, use_cache=False).logits[:, -1], expected)


@pytest.mark.parametrize("name", ["glm4v", "qwen3_5"])
def test_a_batch_is_its_rows(name):
    model = build(name)
    values = inputs(model)
    vtok.patch(model, "divprune", keep=KEEP)
    both = _generate(model, values)
    grid, start = values["image_grid_thw"], [0, 2, 3]
    ends = [0, *grid.prod(1).cumsum(0).tolist()]
    for row in range(2):
        real = values["attention_mask"][row] == 1
        one = {
            key: values[key][row, real][None] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in values
        }
        images = slice(start[row], start[row + 1])
        one |= {"image_grid_thw": grid[images], "pixel_values": values["pixel_values"][ends[images.start] : ends[images.stop]]}
        _close(_generate(model, one)[0], both[row])


def test_both_questions_are_answered():
    """Whether its prompt may be shortened, and whether tokens may leave between its layers."""
    model = build("qwen3_5")
    support = vtok.supports(model)
    assert {"random", "uniform", "divprune", "downsample"} <= {name for name, why in support.methods.items() if why is None}
    assert "none can leave between the layers of Qwen3_5Model" in support.methods["fastv"]
    assert "linear_attention" in support.methods["fastv"]
    assert "no row says which views" in support.methods["visionzip"]
    assert "no row says which visual tokens of Qwen3_5Model are a frame" in support.methods["evs"]
    text = message_of(vtok.UnsupportedModelError, vtok.plan, model, "random", keep=KEEP, prompt={"images": 1, "text_tokens": 8})
    assert "Qwen3_5Model" in text and "not known" in text


def test_layers_that_are_known_from_other_models_may_drop():
    """Mistral 3 has no row; its LLM is LLaVA's."""
    model = build("mistral3")
    values = inputs(model)
    vtok.patch(model, "fastv", layer=2, keep=KEEP)
    with torch.no_grad():
        found = model(**values).logits[:, -1]
    _close(_generate(model, values)[:, 0], found)
    (row,) = vtok.info(model).prompts[0].rows
    assert row.place == "decoder layer 2" and (row.tokens_in, row.tokens_out) == ((8, 4), (4, 2))
    assert "what Mistral3Model costs is not known" in str(vtok.info(model))


def test_a_prompt_without_images_and_nothing_to_drop():
    model = build("qwen3_5")
    values, text = inputs(model), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad(), warnings.catch_warnings():
        expected = [_generate(model, given) for given in (text, values)]
        vtok.patch(model, "random", keep=1.0)
        assert torch.equal(_generate(model, values), expected[1])
        vtok.patch(model, "random", keep=KEEP)
        assert torch.equal(_generate(model, text), expected[0])


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
    alive = _chosen(model, values, "random")[0] | (values["attention_mask"] == 0)
    whole = _generate(model, values)
    with MaskedPrompt(model, dict.fromkeys(range(4), alive)):
        expected = _generate(model, values)
    assert (whole - expected).abs().max() > 0.1
    _close(_generate(vtok.patch(model, "random", keep=KEEP), values), expected)


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
    _close(found[len(ids) - 1], last(1, pixels)[-1])
    _close(found[-1], last(1, others)[-1])


@SLOW
@pytest.mark.parametrize("name", [name for name in CLASSES if name in LISTED and name not in BY_HAND])
def test_attention_of_layers_that_may_drop_is_read_right(name):
    """What methods between the layers choose by is what the layer computes itself."""
    model = build(name)
    (vlm,) = find(model)
    if vlm.info.no_layers is not None:
        assert qualified_name(type(vlm.text)) not in GENERIC_TEXT_MODELS
        return
    values = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**values, use_cache=False, output_attentions=True).attentions
    for layer in (1, 2, 3):
        seen = []
        vtok.patch(model, Watch(layer=layer, back=0, seen=seen))
        with torch.no_grad():
            model(**values, use_cache=False)
        vtok.unpatch(model)
        ((layout, probs, _),) = seen
        assert (probs - expected[layer])[layout.real[:, None, :, None].expand_as(probs)].abs().max() <= 5e-5


@SLOW
def test_every_llm_that_may_drop_is_among_these_models():
    found = {qualified_name(type(module)) for name in CLASSES if name in LISTED for module in _texts(name)}
    assert found >= GENERIC_TEXT_MODELS


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


def test_an_llm_that_is_not_called_is_noticed():
    model = build("mistral3")
    values = inputs(model)
    vtok.patch(model, "random", keep=KEEP)
    text = model.model.language_model
    hooks = [key for key, hook in text._forward_pre_hooks.items() if type(hook).__name__ == "BeforeText"]
    for key in hooks:
        del text._forward_pre_hooks[key]
    assert "nothing was shortened" in message_of(vtok.UnsupportedModelError, model, **values)


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
