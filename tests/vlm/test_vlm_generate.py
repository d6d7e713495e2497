"""generate() on a shortened prompt equals the whole prompt under an explicit mask, for every family of models."""

import pytest
import torch
from vlm_zoo import (
    EXAMPLES,
    Attended,
    Columns,
    MaskOracle,
    Nearest,
    assert_same,
    build,
    column_keeps,
    feature_keeps,
    generate,
    inputs,
    text_model,
)

import vtok
from vtok.core.tokens import Site
from vtok.patches.decoder.text_models import TEXT_MODELS
from vtok.patches.hf_vlm.families import FAMILIES
from vtok.patches.hf_vlm.generic.refused import REFUSED
from vtok.patches.protocol import qualified_name

ALL = [(name, kernel) for name, example in EXAMPLES.items() for kernel in example.kernels]
FAST = [
    pytest.param(name, kernel, marks=() if (kernel == "sdpa" or len(EXAMPLES[name].kernels) == 1) else pytest.mark.slow)
    for name, kernel in ALL
]


def _columns(name, *shares):
    """Shares at layers, none of them where the family does not allow it."""
    first = EXAMPLES[name].first_layer
    return Columns(tuple((layer if layer == 0 else max(layer, first), share) for layer, share in shares))


def _oracle(name, kernel, shares, values):
    model = build(name, kernel)
    with MaskOracle(model, column_keeps(model, values, shares)):
        return generate(model, values)


@pytest.mark.parametrize(("name", "kernel"), FAST)
def test_before_the_llm_and_between_its_layers(name, kernel):
    """Three stages, the last of which drops all visual tokens; rows keep different numbers; positions stay."""
    model, values = build(name, kernel), inputs(name)
    method = _columns(name, (0, 2), (1, 3), (3, 0))
    expected = _oracle(name, kernel, method.shares, values)
    whole = generate(model, values, steps=1)
    found = generate(vtok.patch(model, method), values)
    assert_same(found, expected)
    assert (found[1][:, 0] - whole[1][:, 0]).abs().max() > 1e-2, "dropping changes nothing: the check would be empty"
    cache = found[2].past_key_values
    stored = [type(cache).get_seq_length(cache, i) for i in range(4)]
    assert stored == sorted(stored, reverse=True)
    assert stored[0] < values["input_ids"].shape[1]
    assert stored[3] < stored[0]
    assert cache.get_seq_length() == values["input_ids"].shape[1] + 7, "the cache counts as its caller does"


@pytest.mark.slow
@pytest.mark.parametrize("shares", [((0, 3),), ((1, 2),), ((2, 0),), ((0, 0),), ((1, 2), (2, 3), (3, 0))], ids=str)
@pytest.mark.parametrize(("name", "kernel"), ALL)
def test_every_single_place(name, kernel, shares):
    values, method = inputs(name), _columns(name, *shares)
    if len({layer for layer, _ in method.shares}) < len(method.shares):
        pytest.skip("two of the layers are one")
    assert_same(generate(vtok.patch(build(name, kernel), method), values), _oracle(name, kernel, method.shares, values))


@pytest.mark.parametrize("method", ["uniform", "random"])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_image_features(name, method):
    if method == "random" and name not in ("LLaVA-1.5", "Qwen2.5-VL"):
        pytest.skip("shares all its code with the other one")
    kernel = EXAMPLES[name].kernels[-1]
    values, model = inputs(name), build(name, kernel)
    alive = feature_keeps(model, values, 0.4, method)
    with MaskOracle(model, dict.fromkeys(range(4), alive)):
        expected = generate(model, values)
    assert_same(generate(vtok.patch(model, method, keep=0.4), values), expected)
    (found,) = vtok.info(model).prompts
    (row,) = found.rows
    dropped = (~alive).sum(1).tolist()
    assert [a - b for a, b in zip(row.tokens_in, row.tokens_out)] == dropped
    images = 2 * len(row.tokens_in)  # at most; each rounds by itself
    assert abs(sum(row.tokens_out) - 0.4 * sum(row.tokens_in)) <= images / 2 < 0.2 * sum(row.tokens_in)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen3-VL", "InternVL"])
def test_folding_features(name):
    """Merged features reach the LLM, also those of other tower layers: the same as replaced by hand, under a mask."""
    values, model = inputs(name), build(name)
    reference = build(name)
    from vtok.patches.hf_vlm import image_features as hf

    outputs = hf.encode(reference.model, values)
    images = list(outputs["image"].pooler_output)
    deep = [list(features) for features in getattr(outputs["image"], "deepstack_features", None) or ()]
    assert bool(deep) == (name == "Qwen3-VL")
    for features in (images, *deep):
        for i, x in enumerate(features):
            mean = torch.stack([x[j : j + 4].mean(0) if j + 4 <= len(x) else x[j:].mean(0) for j in range(0, len(x), 4)])
            features[i] = x.clone()
            features[i][::4] = mean
    stays = [torch.arange(len(x)) % 4 == 0 for x in images]
    if deep:
        outputs["image"].deepstack_features = deep
    outputs["image"].pooler_output = (
        images if isinstance(outputs["image"].pooler_output, (list, tuple)) else torch.stack(images)
    )
    alive = torch.ones_like(values["input_ids"], dtype=torch.bool)
    alive[values["input_ids"] == 119] = torch.cat(stays)
    with MaskOracle(reference, dict.fromkeys(range(4), alive)):
        encoded = {k: v for k, v in values.items() if k != "pixel_values"}
        expected = generate(reference, {**encoded, "mm_encoder_outputs": outputs})
    assert_same(generate(vtok.patch(model, Nearest()), values), expected)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_methods_together(name):
    """A choice among features and one by attention, in one model."""
    values, model = inputs(name), build(name)
    seen = []

    class Spy(type(Attended().build_vlm(None))):
        def keep(self, x, layout, attention, at):
            result = super().keep(x, layout, attention, at)
            seen.append((layout, result))
            return result

    class Spied(Attended):
        def build_vlm(self, info):
            return Spy(self.layer, self.count, self.back)

    found = generate(vtok.patch(model, [vtok.UniformGrid(keep=0.5), Spied(count=3)]), values)
    (layout, result) = seen[0]
    assert len(seen) == 1, "decoding decides nothing anew"
    before = feature_keeps(model, values, 0.5)
    after = before.clone()
    kept = result | ~layout.visual
    for b in range(2):
        after[b, layout.column[b][layout.real[b] & ~kept[b]]] = False
    assert (before.sum(1) > after.sum(1)).all()
    vtok.unpatch(model)
    with MaskOracle(model, {0: before, 1: before, 2: after, 3: after}):
        assert_same(found, generate(model, values))


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "Idefics3", "Gemma3"])
def test_one_row_without_padding(name):
    """No mask is needed then, and none may be: gaps between positions are no borders of packed sequences."""
    values = inputs(name)
    one = {"input_ids": values["input_ids"][:1], "attention_mask": values["attention_mask"][:1]}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in values:
            one[key] = values[key][:1]
    images = {"LLaVA-NeXT": 1, "Idefics3": 1}.get(name, 2)
    for key in ("pixel_values", "image_sizes", "image_grid_thw"):
        if key in values:
            one[key] = values[key][:images]
    if name == "Qwen2.5-VL":
        one["pixel_values"] = values["pixel_values"][: int(values["image_grid_thw"][:2].prod(1).sum())]
    if name == "LLaVA-NeXT":
        one["input_ids"], one["attention_mask"] = values["input_ids"][:1], values["attention_mask"][:1]
    method = Columns(((0, 2), (2, 3)))
    assert_same(generate(vtok.patch(build(name), method), one), _oracle(name, "sdpa", method.shares, one))
    method = Columns(((2, 0),))
    assert_same(generate(vtok.patch(build(name), method), one), _oracle(name, "sdpa", method.shares, one))


def test_every_row_of_the_tables_is_run():
    found = {qualified_name(type(m)) for name in EXAMPLES for m in build(name, EXAMPLES[name].kernels[0]).modules()}
    assert set(FAMILIES) <= found
    assert found >= TEXT_MODELS
    assert not set(FAMILIES) & set(REFUSED)
    assert str(Site(*next(iter(Columns(((2, 3),)).build_vlm(None).sites)))) == "in front of decoder layer 2"


def test_layers_are_the_ones_that_were_hooked():
    model = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in text_model(model).layers)
    assert not any(layer._forward_pre_hooks for layer in text_model(vtok.unpatch(model)).layers)
