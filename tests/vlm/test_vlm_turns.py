"""Images in a later turn, behind a cache that holds text and images already."""

import copy

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import BY_HAND, LISTED, OWN_CACHE, SLOW, chosen
from test_vlm_caches import _name
from transformers import DynamicCache
from vlm_zoo import EXAMPLES, TOLERANCE, Columns, MaskOracle, build, column_keeps, feature_keeps, generate, inputs, text_model

import vtok
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.testing import generic_models, generic_prompts

MORE = torch.tensor([[7, 8, 9], [10, 11, 12]])
FAST = ("LLaVA-1.5", "LLaVA, Mistral text, window 9", "Qwen2.5-VL", "Qwen3-VL", "Gemma3, window 9")
NAMES = [name if name in FAST else pytest.param(name, marks=SLOW) for name in EXAMPLES if not name.startswith("PaliGemma")]
GENERIC = [
    name if name in ("mistral3", "glm4v") else pytest.param(name, marks=SLOW)
    for name in generic_models.CLASSES
    if name in LISTED
]
CHANNELS = {"hunyuan_vl": 4}  # of positions
# Rows that differ in length behind a cache: their layers are not plain attention.
ALONE = ("hy_v4_vl", "mistral_large4", "unlimited_ocr")
GIVEN = ("granite4_vision",)  # forward does not return the cache that it made
OWN_PIXELS = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")  # images of one prompt stand side by side, not one after the other


def text(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MORE_TEXT = text(MORE)


def columns(turns):
    return sum(turn["input_ids"].shape[1] for turn in turns)


def three(model, rows, length, channels=3):
    """Positions in time, height and width for models that number images by them: any will do; else `None`."""
    if not hasattr(model.base_model, "get_rope_index") and not hasattr(model.base_model, "compute_3d_position_ids"):
        return None
    counted = torch.arange(length).expand(rows, -1)
    return torch.stack([2 * counted, counted // 3, counted, counted][:channels])


def converse(model, turns, positions=None, between=(), **kwargs):
    """Logits of all turns, read one after the other into one cache; `between` is done to model and cache behind the first."""
    cache, outs, first = kwargs.pop("cache", None), [], 0
    mask = torch.zeros(len(turns[0]["input_ids"]), 0, dtype=torch.long)
    with torch.no_grad():
        for number, turn in enumerate(turns):
            for change in between if number == 1 else ():
                mask = change(model, cache, mask)
            mask = torch.cat([mask, turn["attention_mask"]], 1)
            call = {key: copy.copy(value) for key, value in turn.items()} | {"attention_mask": mask, "use_cache": True}
            if positions is not None:
                call["position_ids"] = positions[..., first : (first := first + turn["input_ids"].shape[1])]
            outs.append(model(**call, **({} if cache is None else {_name(model): cache}), **kwargs))
            cache = cache if cache is not None else outs[-1][_name(model)]
    return torch.cat([out.logits for out in outs], 1), outs


def masked(model, turns, alive, positions=None, between=(), **kwargs):
    """The same of the unpatched model, from which columns [B, L] that are not alive are hidden in every layer."""
    with MaskOracle(model, dict.fromkeys(range(len(text_model(model).layers)), alive)):
        return converse(model, turns, positions, between, **kwargs)


def _read(model, values, **kwargs):
    with torch.no_grad():
        return model(**values, use_cache=True, **kwargs)[_name(model)]


def stays(turn, keep=None):
    """[B, L] bool of a turn: all columns, if nothing else is said."""
    return torch.ones_like(turn["input_ids"], dtype=torch.bool) if keep is None else keep


def same(found, expected, alive, turns, tolerance=TOLERANCE):
    """Where columns are neither dropped nor padding."""
    where = alive & torch.cat([turn["attention_mask"] for turn in turns], 1).bool()
    assert (found - expected)[where].abs().max() <= tolerance * max(1.0, expected.abs().max())


CHOICES = (
    (vtok.UniformGrid(keep=0.4), lambda model, turn: feature_keeps(model, turn, 0.4)),
    (Columns(((0, 2),)), lambda model, turn: column_keeps(model, turn, ((0, 2),))[0]),
)


@pytest.mark.parametrize("name", NAMES)
def test_dropping_equals_hiding(name):
    """Images in the first, third and last turn; rows keep different numbers and are padded in the midst of the conversation."""
    model, a, b, c = build(name), inputs(name), inputs(name, 1), inputs(name, 2)
    for turns in ([a, MORE_TEXT, b, text(MORE + 3), c], [MORE_TEXT, b, text(MORE[:, :1])]):
        positions = three(model, 2, columns(turns))
        for method, asked in CHOICES:
            alive = torch.cat([stays(t, asked(model, t) if "pixel_values" in t else None) for t in turns], 1)
            expected, _ = masked(model, turns, alive, positions)
            vtok.patch(model, method)
            found, outs = converse(model, turns, positions)
            vtok.unpatch(model)
            same(found, expected, alive, turns)
            cache = outs[-1][_name(model)]
            full = next((layer for layer, short in zip(cache.layers, cache.is_sliding) if not short), None)
            assert full is None or full.keys.shape[2] < columns(turns)


def test_a_first_turn_that_lost_nothing():
    """It was read with keep=1.0, or by the model before it was patched."""
    model, a, b = build("LLaVA-1.5"), inputs("LLaVA-1.5"), inputs("LLaVA-1.5", 1)
    turns = [a, MORE_TEXT, b, MORE_TEXT]
    alive = torch.cat([stays(a), stays(MORE_TEXT), feature_keeps(model, b, 0.4), stays(MORE_TEXT)], 1)
    expected, _ = masked(model, turns, alive)

    def repatched(model, cache, mask):
        vtok.unpatch(model)
        vtok.patch(model, "uniform", keep=0.4)
        return mask

    for first in (1.0, None):
        if first is not None:
            vtok.patch(model, "uniform", keep=first)
        same(converse(model, turns, between=[repatched])[0], expected, alive, turns)
        vtok.unpatch(model)


@pytest.mark.parametrize("order", [[1, 0], [1, 1]], ids=str)
def test_rows_that_moved(order):
    model, a, b = build("LLaVA-1.5"), inputs("LLaVA-1.5"), inputs("LLaVA-1.5", 1)
    turns = [a, b, MORE_TEXT]

    def moved(model, cache, mask):
        cache.reorder_cache(torch.tensor(order))
        if isinstance(oracle, MaskOracle):
            oracle.alive = dict.fromkeys(oracle.alive, after)
        return mask[order]

    keeps = [feature_keeps(model, t, 0.4) for t in (a, b)]
    before = torch.cat([*keeps, stays(MORE_TEXT)], 1)
    after = torch.cat([keeps[0][order], keeps[1], stays(MORE_TEXT)], 1)
    with MaskOracle(model, dict.fromkeys(range(len(text_model(model).layers)), before)) as oracle:
        expected, _ = converse(model, turns, between=[moved])
    oracle = None
    vtok.patch(model, "uniform", keep=0.4)
    same(converse(model, turns, between=[moved])[0], expected, before & after, turns)


def test_what_is_returned_has_the_length_of_the_turn():
    model, turns = build("LLaVA-1.5", "eager"), [inputs("LLaVA-1.5"), inputs("LLaVA-1.5", 1)]
    keeps = [feature_keeps(model, turn, 0.4) for turn in turns]
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = masked(model, turns, torch.cat(keeps, 1), **asked)[1][-1]
    vtok.patch(model, "uniform", keep=0.4)
    found = converse(model, turns, **asked)[1][-1]
    where = keeps[1] & turns[1]["attention_mask"].bool()
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert a.shape == b.shape
        assert (a - b)[where].abs().max() <= 1e-4
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert a.shape == b.shape
        assert (a - b).transpose(1, 2)[where].abs().max() <= 1e-5


def test_masks_of_the_caller():
    """[B, 1, L, P + L], of whole conversations: they say the same as those of two dimensions."""
    model, turns = build("LLaVA-1.5"), [MORE_TEXT, inputs("LLaVA-1.5", 1)]
    real = torch.cat([turn["attention_mask"] for turn in turns], 1).bool()
    past = turns[0]["input_ids"].shape[1]
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()[past:]
    vtok.patch(model, "uniform", keep=0.4)
    cache = _read(model, turns[0])
    with torch.no_grad():
        given = {**turns[1], "attention_mask": causal & real[:, None, None], _name(model): cache}
        found = model(**given).logits
        more = torch.nn.functional.pad(real, (0, 3), value=True).long()
        found = [found, model(input_ids=MORE, attention_mask=more, **{_name(model): cache}).logits]
    expected = converse(model, [*turns, MORE_TEXT])[0][:, past:]
    where = torch.cat([real[:, past:], torch.ones(2, 3, dtype=torch.bool)], 1)
    assert (torch.cat(found, 1) - expected)[where].abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Gemma3, window 9"])
def test_generate(name):
    """Both turns by generate(), from its own cache: the masks of Gemma 3 let the columns of new images see each other."""
    model, a, b = build(name), inputs(name), inputs(name, 1)

    def answers(oracle=None):
        first = generate(model, a, steps=3)[2]
        later = {**b, "input_ids": torch.cat([first.sequences, MORE, b["input_ids"]], 1)}
        later["attention_mask"] = torch.cat([a["attention_mask"], torch.ones(2, 6, dtype=torch.long), b["attention_mask"]], 1)
        for kind in (key for key in b if "type_ids" in key):
            later[kind] = torch.cat([a[kind], torch.zeros(2, 6, dtype=a[kind].dtype), b[kind]], 1)
        return generate(model, later, steps=4, **{_name(model): first[_name(model)]})

    alive = torch.cat([feature_keeps(model, a, 0.4), torch.ones(2, 6, dtype=torch.bool), feature_keeps(model, b, 0.4)], 1)
    with MaskOracle(model, dict.fromkeys(range(len(text_model(model).layers)), alive)):
        expected = answers()
    plain = answers()
    vtok.patch(model, "uniform", keep=0.4)
    found = answers()
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() <= TOLERANCE * expected[1].abs().max()
    assert (plain[1] - expected[1]).abs().max() > 1e-2


def _row(values, row, images):
    return {key: value[images] if key == "pixel_values" else value[row : row + 1] for key, value in values.items()}


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_rows_one_by_one_and_read_at_once(positions):
    model, a, b = build("LLaVA-1.5"), inputs("LLaVA-1.5"), inputs("LLaVA-1.5", 1)
    turns = [a, MORE_TEXT, b, MORE_TEXT]
    vtok.patch(model, "random", keep=0.5, positions=positions)
    at = torch.cat([turn["attention_mask"] for turn in turns], 1)
    counted = (at.cumsum(1) - 1).clamp_min(0)  # as generate() has it
    together, _ = converse(model, turns, counted)
    for row, images in ((0, slice(0, 2)), (1, slice(2, None))):
        real = at[row].bool()
        short = [_row(turn, row, images) for turn in turns]
        short = [{k: v if k == "pixel_values" else v[:, t["attention_mask"][0].bool()] for k, v in t.items()} for t in short]
        alone, outs = converse(model, short)
        assert (together[row, real][-3:] - alone[0, -3:]).abs().max() <= 1e-4
        whole = text(torch.cat([turn["input_ids"] for turn in short], 1))
        whole["pixel_values"] = torch.cat([turn["pixel_values"] for turn in short if "pixel_values" in turn])
        with torch.no_grad():
            anew = model(**whole, use_cache=False).logits
        assert (anew[0] - alone[0]).abs().max() <= 1e-4
        assert outs[-1][_name(model)].layers[0].keys.shape[2] < whole["input_ids"].shape[1]


def test_compact_positions_are_those_of_a_short_conversation():
    """The unpatched model reads the same turns without the placeholders and features that leave."""
    model = build("LLaVA-1.5")
    turns = [_row(inputs("LLaVA-1.5", seed), 0, slice(0, 2)) for seed in (0, 1)] + [text(MORE[:1])]
    (vlm,), short, kept = find(model), [], []
    for turn in turns[:2]:
        keep = feature_keeps(model, turn, 0.4)[0]
        features = hf.encode(vlm.module, turn)["image"]
        left = keep[(turn["input_ids"] == vlm.tokens["image"])[0]]
        counts = left.unflatten(0, (2, -1)).sum(1).tolist()
        features.pooler_output = list(torch.cat(list(features.pooler_output))[left].split(counts))
        short.append({**text(turn["input_ids"][:, keep]), "mm_encoder_outputs": {"image": features}})
        kept.append(keep)
    expected, _ = converse(model, [*short, turns[2]])
    vtok.patch(model, "uniform", keep=0.4, positions="compact")
    found, _ = converse(model, turns)
    assert (found[:, torch.cat([*kept, torch.ones(3, dtype=torch.bool)])] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", GENERIC)
def test_models_without_a_row(name):
    if name in BY_HAND or name in ALONE:
        return _alone(name)
    model = generic_models.build(name)
    turn = generic_prompts.inputs(model)
    more = text(MORE[: len(turn["input_ids"])])
    turns = [turn, more, turn, more]
    positions = three(model, len(MORE), columns(turns), CHANNELS.get(name, 3))
    keep = chosen(model, turn, "uniform")[0] | (turn["attention_mask"] == 0)
    alive = torch.cat([stays(t, keep if t is turn else None) for t in turns], 1)
    empty = [DynamicCache(config=model.config.get_text_config()) if name in GIVEN else None for _ in range(2)]
    expected, _ = masked(model, turns, alive, positions, cache=empty[0])
    vtok.patch(model, "uniform", keep=0.5)
    same(converse(model, turns, positions, cache=empty[1])[0], expected, alive, turns, 5e-5)


def _alone(name):
    """One row: read from its cache, read anew as a whole. Rows that differ in length are refused."""
    model = vtok.patch(generic_models.build(name), "uniform", keep=0.5)
    two = generic_prompts.inputs(model)
    if len(two["input_ids"]) > 1:
        turns = [two, two]
        refusal = message_of(vtok.UnsupportedModelError, converse, model, turns, three(model, 2, columns(turns)))
        assert "pass one prompt at a time" in refusal
    if name in OWN_CACHE or name in OWN_PIXELS:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generic_prompts, "ALONE", (model.config.model_type,))
        turn = generic_prompts.inputs(model)
    turns = [turn, text(MORE[:1]), turn, text(MORE[1:])]
    positions = three(model, 1, columns(turns), CHANNELS.get(name, 3))
    whole = {"input_ids": torch.cat([t["input_ids"] for t in turns], 1)}
    whole |= {"attention_mask": torch.ones_like(whole["input_ids"])}
    whole |= {} if positions is None else {"position_ids": positions}
    for key, value in turn.items():
        if "type_ids" in key:
            whole[key] = torch.cat([t.get(key, torch.zeros_like(t["input_ids"]).int()) for t in turns], 1)
        elif key not in whole:
            whole[key] = torch.cat([value, value])
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits
    found, _ = converse(model, turns, positions)
    assert (found - expected)[:, -3:].abs().max() <= 5e-5 * max(1.0, expected.abs().max())


def test_what_is_refused():
    values = inputs("LLaVA-1.5")
    says = "images were passed with a cache that holds text already"

    def refused(model, turn, cache, **kwargs):
        return message_of(vtok.UnsupportedModelError, _read, model, turn, **{_name(model): cache}, **kwargs)

    model = vtok.patch(build("LLaVA-1.5"), Columns(((2, 2),)))
    found = refused(model, values, _read(model, values))
    assert says in found
    assert "decide once, for a prompt that is read from an empty cache" in found
    cache = _read(model, values)
    vtok.unpatch(model)
    vtok.patch(model, "uniform", keep=0.5)
    assert "decide once" in refused(model, values, cache), "of the turn before"
    cache = _read(model, values)
    vtok.unpatch(model)
    vtok.patch(model, "uniform", keep=0.5, positions="compact")
    assert "another value of positions" in refused(model, values, cache)
    vtok.unpatch(model)
    vtok.patch(model, "uniform", keep=0.5)
    static = generate(model, values, steps=2, cache_implementation="static", disable_compile=True)[2][_name(model)]
    assert "static cache" in refused(model, values, static)
    pali = vtok.patch(build("PaliGemma"), "uniform", keep=0.5)
    assert "columns of a prompt see each other" in refused(pali, inputs("PaliGemma"), _read(pali, inputs("PaliGemma")))
    qwen, turn = vtok.patch(build("Qwen2.5-VL"), "uniform", keep=0.5), inputs("Qwen2.5-VL")
    mask = turn.pop("attention_mask")
    cache = _read(qwen, turn, attention_mask=mask)
    assert "pass position_ids of the new columns" in refused(qwen, turn, cache, attention_mask=torch.cat([mask, mask], 1))
    turns = [inputs("Qwen2.5-VL"), inputs("Qwen2.5-VL", 1)]
    assert converse(qwen, turns, three(qwen, 2, columns(turns)))[0].isfinite().all()
