"""prune_inputs: the prompt itself gets shorter, and what follows needs no hooks."""

import copy
import warnings

import pytest
import torch
from vlm_zoo import EXAMPLES, Attended, Columns, MaskOracle, Nearest, assert_same, build, feature_keeps, generate, inputs

import vtok

MAIN = ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "Idefics3"]
# A window looks back over stored tokens; the hooks keep it to the columns of the long prompt, a short prompt cannot.
WHOLE = [name for name in EXAMPLES if "window" not in name]
EACH = [*MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE if name not in MAIN)]


def _oracle(name, values, keep, call):
    model = build(name)
    with MaskOracle(model, dict.fromkeys(range(4), feature_keeps(model, values, keep))):
        return call(model, values)


@pytest.mark.parametrize("name", WHOLE)
def test_equal_to_the_masked_prompt(name):
    values, model = inputs(name), build(name)
    short = vtok.prune_inputs(model, values, "uniform", keep=0.4)
    alive = feature_keeps(model, values, 0.4) & (values["attention_mask"] == 1)
    assert short["input_ids"].shape[1] == alive.sum(1).max()
    assert short["attention_mask"].sum(1).tolist() == alive.sum(1).tolist()
    for row in range(2):
        real = short["attention_mask"][row] == 1
        assert torch.equal(short["input_ids"][row][real], values["input_ids"][row][alive[row]])
    assert "pixel_values" not in short
    assert_same(generate(model, short), _oracle(name, values, 0.4, generate))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", EACH)
def test_static_cache_and_beams(name):
    values, model = inputs(name), build(name)
    short = vtok.prune_inputs(model, values, "uniform", keep=0.4)
    assert_same(generate(model, short, cache_implementation="static"), _oracle(name, values, 0.4, generate))

    def beams(model, given):
        given = {key: copy.copy(value) for key, value in given.items()}
        out = model.generate(**given, max_new_tokens=6, num_beams=3, do_sample=False)
        return out[:, given["input_ids"].shape[1] :]

    assert torch.equal(beams(model, short), _oracle(name, values, 0.4, beams))


def test_a_second_turn():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")

    def talk(model, given):
        out = generate(model, given, steps=4)[2]
        more = torch.tensor([[7, 8, 9], [10, 11, 12]])
        ids = torch.cat([out.sequences, more], 1)
        added = ids.shape[1] - given["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(given["attention_mask"], (0, added), value=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in given:  # gaps go on: positions of the long prompt
            tail = given["position_ids"][:, -1:] + 1 + torch.arange(added)
            turn["position_ids"] = torch.cat([given["position_ids"], tail], 1)
        return generate(model, turn, steps=4, past_key_values=out.past_key_values)

    short = vtok.prune_inputs(model, values, "uniform", keep=0.4)
    assert_same(talk(model, short), _oracle("LLaVA-1.5", values, 0.4, talk))


def test_folded_features():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    short = vtok.prune_inputs(model, values, Nearest())
    assert_same(generate(model, short), generate(vtok.patch(model, Nearest()), values))


def test_nothing_to_do():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    same = vtok.prune_inputs(model, values, "uniform", keep=1.0)
    assert same.keys() == values.keys()
    assert all(same[key] is values[key] for key in values)
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert vtok.prune_inputs(model, text, "uniform", keep=0.5).keys() == text.keys()


def test_methods_that_act_inside_the_llm_as_well():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    with pytest.warns(UserWarning, match="in front of decoder layer 2 as well needs hooks"):
        short = vtok.prune_inputs(model, values, [vtok.UniformGrid(keep=0.4), Attended()])
    assert torch.equal(short["input_ids"], vtok.prune_inputs(model, values, "uniform", keep=0.4)["input_ids"])
    with pytest.raises(vtok.UnsupportedModelError, match="inside the LLM, which needs hooks: use vtok"):
        vtok.prune_inputs(model, values, Columns(((2, 3),)))


def _first_row(values):
    """The first prompt alone, without padding."""
    one = {k: v[:1] for k, v in values.items() if "pixel" not in k}
    if "image_grid_thw" in values:
        one["image_grid_thw"] = values["image_grid_thw"][:2]
        return {**one, "pixel_values": values["pixel_values"][: int(one["image_grid_thw"].prod(1).sum())]}
    return {**one, "pixel_values": values["pixel_values"][:2]}


@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_without_a_cache(name):
    """generate() then drops a mask that hides nothing, and the model takes gaps between positions for borders of samples:
    Qwen-VL looks for them in numbers of their own, which have no gaps; elsewhere a warning says what to do."""
    values, model = _first_row(inputs(name)), build(name)
    assert values["attention_mask"].all()
    options = {"keep": 0.4} if name.startswith("Qwen") else {"keep": 0.4, "positions": "compact"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        short = [vtok.prune_inputs(model, values, "uniform", **options) for _ in range(2)]
        vtok.prune_inputs(model, inputs(name), "uniform", keep=0.4)  # padding keeps the mask
    assert_same(generate(model, short[0], use_cache=False), generate(model, short[1]))
    if not name.startswith("Qwen"):
        with pytest.warns(UserWarning, match=r"generate\(use_cache=False\) would take the gaps for borders"):
            gaps = [vtok.prune_inputs(model, values, "uniform", keep=0.4) for _ in range(2)]
        cached, not_cached = generate(model, gaps[0]), generate(model, gaps[1], use_cache=False)
        assert (cached[1] - not_cached[1]).abs().max() > 1e-3, "the warning can go"


def test_bad_input():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    with pytest.raises(vtok.ConfigError, match="must hold input_ids"):
        vtok.prune_inputs(model, {"pixel_values": values["pixel_values"]}, "uniform")
    with pytest.raises(vtok.StateError, match="48 image placeholders, 32 image features"):
        vtok.prune_inputs(model, {**values, "pixel_values": values["pixel_values"][:2]}, "uniform")
    with pytest.raises(vtok.UnsupportedModelError, match="takes one vision-language model"):
        vtok.prune_inputs(torch.nn.Linear(2, 2), values, "uniform")
    with pytest.raises(vtok.ConfigError, match=r"call vtok\.unpatch"):
        vtok.prune_inputs(vtok.patch(model, "uniform"), values, "uniform")
