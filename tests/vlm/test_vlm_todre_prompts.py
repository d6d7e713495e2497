"""ToDRE on odd prompts and behind methods in the tower, what it refuses and what it costs (`helpers_todre`)."""

import pytest
import torch
from helpers_todre import KEEP, alive_of, kernel_of, row_of
from vlm_zoo import EXAMPLES, MaskOracle, assert_same, build, generate, inputs

import vtok
from vtok.eval.benchmarks.flops import count_prompt_macs
from vtok.methods.todre import config as todre
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.targets.resolve import run_of


# Odd prompts.
def test_a_prompt_without_an_image():
    model, plain = vtok.patch(build("LLaVA-1.5"), "todre", tau=1.0), build("LLaVA-1.5")
    text = {"input_ids": torch.tensor([[1, 6, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(generate(model, text)[1], generate(plain, text)[1])


def test_rows_with_and_without_images():
    """A row of text alone loses nothing in either stage."""
    values = inputs("LLaVA-1.5")
    ids = values["input_ids"].clone()
    ids[1] = torch.where(ids[1] == 119, 57, ids[1])
    values = {**values, "input_ids": ids, "pixel_values": values["pixel_values"][:2]}
    alive = alive_of("LLaVA-1.5", values)
    none = alive & (ids != 119)
    with MaskOracle(build("LLaVA-1.5"), {0: alive, 1: alive, 2: alive, 3: none}) as oracle:
        expected = generate(oracle.model, values)
    model = vtok.patch(build("LLaVA-1.5"), "todre", keep=KEEP, tau=1.0)
    assert_same(generate(model, values), expected)
    assert [row.tokens_out for row in vtok.info(model).prompts[0].rows] == [(10, 0), (0, 0)]


def _image_at(before, behind):
    ids = torch.tensor([[*range(5, 5 + before), *[119] * 16, *range(30, 30 + behind)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs("LLaVA-1.5")["pixel_values"][:1]}


@pytest.mark.parametrize("before", [0, 4])
def test_where_the_image_stands(before):
    values = _image_at(before, 5)
    alive = alive_of("LLaVA-1.5", values)
    none = alive & (values["input_ids"] != 119)
    with MaskOracle(build("LLaVA-1.5"), {0: alive, 1: alive, 2: alive, 3: none}) as oracle:
        expected = generate(oracle.model, values)
    assert_same(generate(vtok.patch(build("LLaVA-1.5"), "todre", keep=KEEP, tau=1.0), values), expected)


def test_an_image_at_the_end():
    """Behind all text there is nobody to ask, and nothing is dropped inside the LLM."""
    values, model = _image_at(9, 0), build("LLaVA-1.5")
    generate(vtok.patch(model, "todre", keep=KEEP, tau=1.0), values)
    assert [row.tokens_out for row in vtok.info(model).prompts[0].rows] == [(5,)]
    params = {"keep": KEEP, "probe": None, "positions": "compact"}
    short = vtok.prune_inputs(vtok.unpatch(model), values, "todre", **params)
    assert_same(generate(vtok.patch(model, "todre", **params), values), generate(build("LLaVA-1.5"), short))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_one_token_of_every_image_stays(name):
    model, values = vtok.patch(build(name, kernel_of(name)), "todre", keep=1e-6), inputs(name)
    with torch.no_grad():
        model(**values)
    (vlm,) = find(model)
    with torch.no_grad():
        images = sum(len(out.pooler_output) for out in hf.encode(vlm.module, values).values())
    assert sum(vtok.info(model).prompts[0].rows[0].tokens_out) == images


# Behind a method inside the tower.
@pytest.mark.parametrize("method", [vtok.ToMe(r=[5, 0]), vtok.PiToMe(ratio=[0.6, 1.0]), vtok.ATS(keep=0.6, layers=[0])])
@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "InternVL"])
def test_class_attention_of_a_tower_that_merges(name, method, monkeypatch):
    """The pivot is chosen among the tokens that are left, each at its patch, by the attention that their block computed."""
    if method.name == "ats" and name != "LLaVA-1.5":
        pytest.skip("methods that drop are refused where the connector needs the grid")
    model, scores, maps = build(name, "eager"), [], []
    original = todre.class_scores
    monkeypatch.setattr(todre, "class_scores", lambda *args: scores.append((args[0], original(*args))) or scores[-1][1])
    vtok.patch(model, [method, vtok.ToDRE(keep=KEEP, probe=None)])
    (vlm,) = find(model)
    block = vlm.tower.blocks[vlm.info.tower.feature_block]
    hook = block.attention.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    with torch.no_grad():
        model(**inputs(name))
    hook.remove()
    state = run_of(vlm.tower.module).current.states[vlm.info.tower.feature_block]
    mean = maps[0][:, :, 0].mean(1)
    whole = torch.zeros(len(mean), state.length)
    for view in range(len(mean)):
        for row in range(mean.shape[1]):
            if state.keep is None or state.keep[view, row]:
                whole[view, state.index[view, row]] = mean[view, row]
    whole = whole[:, 1:]
    assert (whole == 0).any(), "nothing was merged"
    if name == "InternVL":
        whole = whole.view(-1, 4, 2, 4, 2).sum((2, 4)).flatten(1)
    if name == "LLaVA-NeXT":
        whole = whole[::3]
    for images, (found, start) in scores:
        assert start == 0
        for b in range(len(found)):
            wanted = [x if images.patches is None else x[images.patches[b]] for x in whole]
            assert any(x.shape == found[b].shape and (x - found[b]).abs().max() <= 1e-6 for x in wanted)
    assert sum(len(found) for _, (found, _) in scores) == len(whole)


def test_merging_in_the_tower_then_both_stages():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    vtok.patch(model, [vtok.ToMe(r=[5, 0]), vtok.ToDRE(keep=0.5, tau=1.0)])
    together = generate(model, values)
    rows = vtok.info(model).prompts[0].rows
    assert [row.tokens_out for row in rows] == [
        (22, 11),
        (12, 6),
        (0, 0),
    ]  # 16 - 5 = 11 an image; half of them, rounded to even
    for b in range(2):
        alone = generate(model, row_of("LLaVA-1.5", values, b))
        assert (alone[1][0] - together[1][b]).abs().max() <= 1e-5 * max(1.0, float(together[1].abs().max()))


# What is refused.
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"keep": 0}, vtok.ConfigError, ["keep is a fraction in (0, 1], got 0"]),
        ({"keep": 1.5}, vtok.ConfigError, ["got 1.5"]),
        ({"keep": 0.5, "keep_tokens": 3}, vtok.ConfigError, ["give keep or keep_tokens, not both"]),
        ({"keep_tokens": 0}, vtok.ConfigError, ["whole number >= 1, got 0"]),
        ({"keep_tokens": 2.5}, vtok.ConfigError, ["whole number >= 1, got 2.5"]),
        ({"tau": 1.5}, vtok.ConfigError, ["tau is a share of attention in [0, 1], got 1.5"]),
        ({"tau": "low"}, vtok.ConfigError, ["tau is a share"]),
        ({"probe": 4}, vtok.ConfigError, ["probe=4 names no layer of a decoder of 4"]),
        ({"probe": -5}, vtok.ConfigError, ["probe=-5"]),
        ({"probe": 0.1}, vtok.ConfigError, ["probe=0.1 names no layer"]),
        ({"probe": "late"}, vtok.ConfigError, ["shares of the depth such as 0.875", "late"]),
        ({"selector": "max_som"}, vtok.UnknownNameError, ["did you mean 'max_sum'?"]),
        ({"criterion": "bot"}, vtok.UnknownNameError, ["did you mean 'both'?"]),
        ({"pivot": "centre"}, vtok.UnknownNameError, ["did you mean 'center'?"]),
        ({"pivot": -1}, vtok.ConfigError, ["or a token number; got -1"]),
        ({"pivot": 0.5}, vtok.ConfigError, ["or a token number; got 0.5"]),
        ({"seed": 1.5}, vtok.ConfigError, ["seed is a whole number, got 1.5"]),
        ({"cls_layer": 2}, vtok.ConfigError, ["cls_layer=2 names no block", "which has 2"]),
        ({"single_head": 1}, vtok.ConfigError, ["single_head is True or False"]),
        ({"keeps": 0.5}, vtok.UnknownNameError, ["did you mean 'keep'?"]),
    ],
)
def test_values_that_make_no_sense(params, error, words):
    with pytest.raises(error) as caught:
        vtok.patch(build("LLaVA-1.5"), "todre", **params)
    assert all(word in str(caught.value) for word in words), caught.value


def test_class_attention_where_there_is_none():
    for name, words in (("Qwen2.5-VL", "runs the patches of all images as one"), ("PaliGemma", "it has no class token")):
        with pytest.raises(vtok.UnsupportedModelError, match=rf'{words}.*pass pivot="center"'):
            vtok.patch(build(name), "todre", pivot="cls")
        assert vtok.supports(build(name)).methods["todre"] is None
    model = vtok.patch(build("LLaVA-1.5"), "todre", pivot=16)
    with pytest.raises(vtok.ConfigError, match="pivot=16 is no token of an image of 16"):
        model(**inputs("LLaVA-1.5"))


def test_patches_that_cannot_be_told_among_the_tokens(monkeypatch):
    """Explicit class attention says so; the default then starts from the center."""
    monkeypatch.setattr(todre, "class_scores", lambda *args: None)
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    with pytest.raises(vtok.StateError, match=r"LlavaModel's vision tower saw cannot be told among the 16 visual tokens"):
        vtok.patch(model, "todre", pivot="cls")(**values)
    found = generate(vtok.patch(model, "todre"), values)
    assert torch.equal(found[1], generate(vtok.patch(model, "todre", pivot="center"), values)[1])


def test_models_without_a_prompt():
    with pytest.raises(
        vtok.UnsupportedModelError, match="todre drops visual tokens from the prompts of vision-language models"
    ):
        vtok.patch(build("LLaVA-1.5").model.vision_tower, "todre")


# What it costs.
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_the_cost_of_choosing_among_features(name):
    """As counted, tower block, class token and selection included."""
    model, values = build(name, kernel_of(name)), inputs(name)
    vtok.patch(model, "todre", keep=KEEP, probe=None)
    counted = count_prompt_macs(model, values)
    estimate = vtok.info(model).prompts[0].estimate
    assert estimate.reduction_macs == counted.reduction > 0
    assert estimate.exact


def test_the_cost_of_both_stages_where_all_text_follows_one_image():
    model, values = build("LLaVA-1.5"), _image_at(0, 6)
    for tau in (0.1, 1.0):
        vtok.patch(model, "todre", keep=KEEP, tau=tau)
        counted = count_prompt_macs(model, values)
        assert vtok.info(model).prompts[0].estimate.reduction_macs == counted.reduction


def test_a_budget():
    model = build("LLaVA-1.5")
    for share in (0.8, 0.6):
        vtok.patch(model, "todre", flops=share, prompt={"images": 3, "text_tokens": 10})
        (found,) = vtok.info(model).prompts
        assert abs(found.budget.reached - share) <= 0.04
        assert found.configs[0].probe == 7 / 8
