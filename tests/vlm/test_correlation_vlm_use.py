"""Correlation-guided compression in use: beams, shortened inputs, calibration, files, what it refuses and what it costs."""

import copy

import pytest
import torch
from helpers_correlation import (
    ALPHA,
    BETA,
    chosen,
    columns,
    cropping,
    expected,
    pages,
    setting_of,
    whole_pages,
)
from helpers_errors import message_of
from vlm_zoo import MaskOracle, build, generate, inputs

import vtok
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.install import observed


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_beams(name):
    values = pages(name)
    stays, _ = expected(name, values, ALPHA[name], BETA, "none")

    def beams(model):
        given = {key: copy.copy(value) for key, value in values.items()}
        return model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)

    model = vtok.patch(cropping(name), "correlation", aggregation="none", **setting_of(name))
    found = beams(model)
    vtok.unpatch(model)
    with MaskOracle(model, dict.fromkeys(range(4), columns(values, stays))):
        assert torch.equal(found, beams(model))


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_prune_inputs_keeps_the_structure(name):
    """Text and markers stay in their order, every page keeps its tokens, positions are those of the long prompt."""
    values, model = pages(name), cropping(name)
    short = vtok.prune_inputs(model, values, "correlation", **setting_of(name))
    stays = columns(values, chosen(name, values)[0])
    for row in range(2):
        alive = stays[row] & (values["attention_mask"][row] == 1)
        left = short["attention_mask"][row] == 1
        assert torch.equal(short["input_ids"][row, left], values["input_ids"][row, alive])
        text = values["input_ids"][row] != 119
        assert short["input_ids"][row, left].ne(119).sum() == (text & (values["attention_mask"][row] == 1)).sum()


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL"])
def test_calibration_and_files(name, tmp_path):
    """The alpha found at patch time is a number of the config, hits its target on those pages and survives a file."""
    values = pages(name)
    setting = {"beta": 2, "sampling": "topk", "iqr_factor": 1e6}
    found = {**setting, "target_keep": 0.5, "calibration": [values, pages(name, 1)]}
    model = vtok.patch(cropping(name), "correlation", **found)
    (config,) = vtok.info(model).prompts[0].configs
    assert config.alpha is not None and config.target_keep is None
    counts = [0, 0]
    for seed in (0, 1):
        tower, stays = pages(name, seed), chosen(name, pages(name, seed), **{**setting, "alpha": config.alpha})[0]
        assert tower.keys() == values.keys()
        newline = getattr(cropping(name).model, "image_newline", None)
        features = chosen(name, pages(name, seed), **{**setting, "alpha": 1.0})[2]
        for mask, x, cut in zip(stays, features, whole_pages(name)):
            token = torch.ones_like(mask) if newline is None else ~(x == newline).all(-1)
            token[: 16 if name == "LLaVA-NeXT" else len(mask) * cut[0][1]] = False  # the whole page
            counts[0] += int((mask & token).sum())
            counts[1] += int(token.sum())
    assert abs(counts[0] / counts[1] - 0.5) <= 0.05
    before = generate(model, values, steps=2)
    vtok.save_config(model, tmp_path)
    other = vtok.patch(cropping(name), tmp_path)
    assert vtok.info(other).prompts[0].configs == (config,)
    assert torch.equal(generate(other, values, steps=2)[1], before[1])
    short = vtok.prune_inputs(vtok.unpatch(model), values, "correlation", **found)
    again = vtok.prune_inputs(model, values, config)
    assert torch.equal(short["input_ids"], again["input_ids"])


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Idefics3"])
def test_unpatching_leaves_nothing(name):
    model, values = cropping(name), pages(name)
    before = generate(model, values, steps=2)
    classes = [type(m) for m in model.modules()]
    changed = generate(vtok.patch(model, "correlation", **setting_of(name)), values, steps=2)
    assert not torch.equal(changed[1], before[1])
    vtok.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any(key.startswith("_vtok") for m in model.modules() for key in m.__dict__)
    assert torch.equal(generate(model, values, steps=2)[1], before[1])


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "Gemma3"])
def test_the_only_view_is_left_alone_unless_asked_for(name):
    model, values = build(name), inputs(name)
    with pytest.raises(vtok.UnsupportedModelError, match=r"never crops, so nothing would change\. overview=True compresses"):
        vtok.patch(model, "correlation", alpha=0.5)
    stays, _, whole = chosen(name, values, build(name), overview=True, alpha=0.3)
    assert all(0 < int(mask.sum()) < len(x) for mask, x in zip(stays, whole))
    vtok.patch(model, "correlation", **{**setting_of(name), "overview": True, "alpha": 0.3})
    generate(model, values, steps=1)
    assert vtok.supports(build(name)).on_request["correlation"] == {"alpha": 0.5, "overview": True}


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_overviews_on_request(name):
    stays = chosen(name, pages(name), overview=True, alpha=0.3)[0]
    less = chosen(name, pages(name), alpha=0.3)[0]
    assert sum(int(a.sum()) for a in stays) < sum(int(b.sum()) for b in less)


def test_a_prompt_without_images_in_the_batch():
    """Idefics returns the features of a prompt as one; those of a prompt without images are none."""
    values = pages("Idefics3")
    values["pixel_values"][0], values["pixel_attention_mask"][0] = 0, 0
    values["input_ids"][0] = values["input_ids"][0].masked_fill(values["input_ids"][0] == 119, 60)
    model = vtok.patch(cropping("Idefics3"), "correlation", **setting_of("Idefics3"))
    generate(model, values, steps=1)
    (row,) = vtok.info(model).prompts[0].rows
    assert row.tokens_in[0] == row.tokens_out[0] == 0
    assert 0 < row.tokens_out[1] < row.tokens_in[1]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({}, "pass alpha=..., or calibration=[inputs, ...]"),
        ({"target_keep": 0.5}, "target_keep=0.5 of the tokens are to stay"),
        ({"alpha": 0.5, "target_keep": 0.5}, "alpha=0.5 and target_keep=0.5 contradict each other"),
        ({"alpha": 1.5}, "alpha is a cosine in [-1, 1], got 1.5"),
        ({"target_keep": 0}, "target_keep is a share of tokens in (0, 1], got 0"),
        ({"alpha": 0.5, "beta": -1}, "beta is a number of tokens >= 0"),
        ({"alpha": 0.5, "low_layer": 2}, "low_layer=2 is no block of the vision tower, which has blocks 0 to 1"),
        ({"alpha": 0.5, "deep_layer": -3}, "deep_layer=-3 is no block of the vision tower"),
        ({"alpha": 0.5, "k": 0}, "k is a whole number >= 1, got 0"),
        ({"alpha": 0.5, "min_tokens": 0}, "min_tokens is a whole number >= 1, got 0"),
        ({"alpha": 0.5, "iqr_factor": -1}, "iqr_factor is a number >= 0, got -1"),
        ({"alpha": 0.5, "joint": 1}, "joint is True or False, got 1"),
        ({"alpha": 0.5, "sampling": "top"}, "did you mean 'topk'?"),
        ({"alpha": 0.5, "aggregation": "near"}, "aggregation"),
    ],
)
def test_values_that_make_no_sense(setting, words):
    assert words in message_of(vtok.VtokError, vtok.patch, build("LLaVA-NeXT"), "correlation", **setting)


def test_other_refusals():
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("Qwen2.5-VL"), "correlation", alpha=0.5)
    assert "correlation looks at the attention of Qwen2_5_VLModel's vision tower, which cannot be read: " in text
    model = build("InternVL")
    text = message_of(vtok.ConfigError, vtok.patch, model, "correlation", calibration=inputs("InternVL"))
    assert "none of the inputs was: pass larger images, or alpha" in text
    text = message_of(vtok.ConfigError, vtok.patch, model, "correlation", calibration=torch.zeros(1))
    assert "calibration takes inputs as the processor returns them" in text
    text = message_of(vtok.ConfigError, vtok.patch, model, "correlation", alpha=0.5, calibration=inputs("InternVL"))
    assert "calibration cannot be used on a vision-language model with correlation, which has no number to find" in text
    values = pages("InternVL")
    values["input_ids"][1, 40], values["input_ids"][1, -1] = 60, 119  # pieces that are no whole tiles
    text = message_of(vtok.StateError, chosen, "InternVL", values)
    assert "must know how an image of 16 visual tokens was cut into 1 views, and the inputs do not say" in text


def test_towers_that_lose_tokens():
    """Patches that were merged can no longer be compared, even where they are put back on the grid."""
    methods = [vtok.ToMe(r=2), vtok.Correlation(alpha=0.5)]
    text = message_of(vtok.ConfigError, vtok.patch, build("LLaVA-NeXT"), methods)
    assert "compares all patches that block 1 of the vision tower of LlavaNextModel sees, but tome reduces them" in text


@pytest.mark.parametrize("aggregation", ["nearest", "none"])
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision"])
def test_what_deciding_costs(name, aggregation):
    """Stated products are those that torch counts, here where crops carry no padding."""
    from torch.utils.flop_counter import FlopCounterMode

    values, model = pages(name), cropping(name)
    values["image_sizes"] = torch.tensor([[16, 32], [32, 32]])
    (vlm,) = find(model)
    reducer = vtok.Correlation(**setting_of(name), aggregation=aggregation).build_vlm(vlm.info)
    stated, counted = 0, 0
    for images in observed(vlm, values, reducer.tower_blocks):
        batch, n, _ = images.tokens.shape
        stated += batch * reducer.feature_macs(n, images.views)
        with FlopCounterMode(display=False) as counter:
            reducer.features(images)
        counted += counter.get_total_flops() // 2
    assert stated == counted > 0
