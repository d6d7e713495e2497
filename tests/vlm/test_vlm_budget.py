"""FLOPs budgets and calibration on vision-language models: what is promised is what torch's counter finds."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers_errors import message_of
from vlm_zoo import Attended, Columns, build, inputs

import vtok
from vtok.cost.budget import TOLERANCE, solve_prompt
from vtok.eval.benchmarks.flops import count_prompt_macs
from vtok.targets.resolve import run_of
from vtok.testing import generic_models

PROMPT = {"images": 1, "text_tokens": 24}
IN_TOWER = {"tome": {}, "pitome": {}, "ats": {"query": "mean"}, "zero_tprune": {"cls_init": "uniform"}}
STEP = 0.03  # a token more or less in a tower of 16 patches and two blocks
ROTARY = 0.002  # products of rotary tables, which estimates leave out


def _prompt(name, images=1, text=24):
    """One prompt as stated."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[119] * 16 * images + torch.randint(3, 110, (text,), generator=generator).tolist()])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "PaliGemma":
        values["token_type_ids"] = torch.zeros_like(ids)
    return {**values, "pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}


def _share(name, model, values):
    """Patched MACs, deciding included, of the unpatched ones, as counted."""
    base, found = count_prompt_macs(build(name), values), count_prompt_macs(model, values)
    return (found.model + found.reduction) / base.model


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_a_budget_is_met_for_the_stated_prompt(method):
    model = build("LLaVA-1.5")
    prompt = {"images": 3, "text_tokens": 10}
    for share in (1.0, 0.8, 0.6):
        vtok.patch(model, method, flops=share, prompt=prompt)
        (found,) = vtok.info(model).prompts
        assert abs(found.budget.reached - share) <= 0.04
        plan = vtok.plan(model, found.configs[0], prompt=prompt)
        assert plan.estimate.fraction == found.budget.reached
        assert "for 3 images of 3 x 16 x 16" in str(found)
    assert vtok.plan(model, method, flops=1.0).configs[0].keep == 1.0


@pytest.mark.parametrize("method", IN_TOWER)
@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma"])
def test_methods_in_the_tower_meet_a_budget_of_tower_and_prefill(name, method):
    """The counter finds the promised share on a prompt of that shape, or less where counts depend on the image."""
    model, values = build(name), _prompt(name)
    for share in (1.0, 0.85, 0.75):
        vtok.patch(model, method, flops=share, prompt=PROMPT, **IN_TOWER[method])
        (found,) = vtok.info(model).prompts
        assert abs(found.budget.reached - share) <= STEP
        assert "for 1 image of 3 x 16 x 16 (16 visual tokens) and 24 other tokens" in str(found.budget)
        plan = vtok.plan(model, found.configs[0], prompt=PROMPT)
        assert plan.estimate.fraction == found.budget.reached
        assert found.budget.exact == (method != "ats" or share == 1.0)
        counted = _share(name, model, values)
        if found.budget.exact:
            assert abs(counted - found.budget.reached) <= ROTARY
        else:
            assert counted < found.budget.reached
    again = vtok.plan(build(name), method, flops=0.75, prompt=PROMPT, **IN_TOWER[method])
    assert again.configs == found.configs
    assert again.budget == found.budget


def test_where_the_tower_alone_gets_cheaper_a_budget_ends_early():
    model, prompt = build("Gemma3"), {"images": 4, "text_tokens": 5}
    with pytest.warns(UserWarning, match="the prompt keeps its length"):
        vtok.patch(model, "tome", flops=0.95, prompt=prompt)
    assert abs(vtok.info(model).prompts[0].budget.reached - 0.95) <= TOLERANCE
    text = message_of(vtok.BudgetError, vtok.patch, model, "tome", flops=0.6, prompt=prompt)
    assert "tome cannot bring Gemma3Model down to flops=0.6: its strongest setting still needs 0.8" in text
    assert "for 4 images of 3 x 32 x 32" in text


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma"])
@pytest.mark.parametrize(("method", "params"), [("ats", {"query": "mean"}), ("todre", {})])
def test_calibration_finds_what_images_and_text_leave(name, method, params):
    """The mean of the prompts is met, each counted by itself; a stated prompt has a bound alone."""
    listed = [_prompt(name, text=n) for n in (20, 28)]
    model = build(name).train()
    vtok.patch(model, method, flops=0.7, calibration=listed, **params)
    assert model.training and model.model.language_model.layers[1].training
    model.eval()
    (found,) = vtok.info(model).prompts
    assert found.budget.exact
    assert "for 2 calibration prompts on average" in str(found.budget)
    assert abs(found.budget.reached - 0.7) <= 2 * STEP
    base = [count_prompt_macs(build(name), values).model for values in listed]
    shares = [_share(name, model, values) for values in listed]
    counted = sum(share * macs for share, macs in zip(shares, base)) / sum(base)
    assert abs(counted - found.budget.reached) <= 2 * ROTARY
    bound = vtok.plan(build(name), found.configs[0], prompt={"images": 1, "text_tokens": 24})
    assert not bound.estimate.exact
    assert bound.estimate.fraction > found.budget.reached - 0.005


def test_a_method_with_known_counts_is_solved_for_the_stated_prompt():
    """Calibration inputs change nothing, as on vision encoders."""
    plain = vtok.plan(build("LLaVA-1.5"), "tome", flops=0.8)
    measured = vtok.plan(build("LLaVA-1.5"), "tome", flops=0.8, calibration=_prompt("LLaVA-1.5"))
    assert str(measured) == str(plain)


def test_plans_of_calibration_inputs():
    """Means over prompts, each without padding; a model that is patched stays so; a stated prompt goes first."""
    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    listed = [values, _prompt("LLaVA-1.5", images=2)]
    plan = vtok.plan(model, "ats", num_tokens=8, calibration=listed)
    assert plan.measured == 3
    assert plan.estimate.exact
    assert "LlavaModel, 3 calibration prompts on average: ats" in str(plan)
    assert "upper bounds" not in str(plan)
    assert [c.name for c in vtok.info(model).prompts[0].configs] == ["uniform"]
    vtok.patch(model, plan.configs[0])
    each = []
    with torch.no_grad():
        for one in listed:
            model(**one)
            (found,) = vtok.info(model).prompts
            each += [found.mean_estimate or found.estimate] * len(found.text)
    for what in ("macs", "base_macs", "reduction_macs", "kv_bytes", "decode_macs"):
        mean = sum(getattr(e, what) for e in each) / 3
        assert getattr(plan.estimate, what) == pytest.approx(mean, rel=1e-12)
    bound = vtok.plan(model, "ats", num_tokens=8, prompt=PROMPT)
    assert bound.measured == 0 and "upper bounds" in str(bound)


def test_plans_with_a_threshold_that_calibration_finds():
    from helpers_correlation import cropping, pages

    plan = vtok.plan(cropping("InternVL"), "correlation", calibration=pages("InternVL"), sampling="topk", beta=2)
    assert plan.configs[0].alpha is not None
    assert plan.measured == 2
    assert plan.estimate.macs < plan.estimate.base_macs
    bound = vtok.plan(
        cropping("InternVL"), "correlation", calibration=pages("InternVL"), sampling="topk", beta=2, prompt={"images": 3}
    )
    assert bound.configs == plan.configs
    assert bound.measured == 0


@pytest.mark.parametrize(
    ("shares", "target", "taken"), [((1.0, 0.14), 0.6, 0.14), ((1.0, 0.64, 0.5), 0.6, 0.64), ((0.61,), 0.6, 0.61)]
)
def test_few_budget_candidates(shares, target, taken):
    """The closest step is taken, but none that leaves most of what the budget wants saved."""
    candidates = [vtok.RandomDrop(keep=share) for share in shares]
    chosen, budget = solve_prompt(
        vtok.RandomDrop(), target, candidates, "a model", lambda c: SimpleNamespace(fraction=c.keep, exact=True), "a prompt"
    )
    assert (chosen.keep, budget.reached) == (taken, taken)


def test_budgets_that_make_no_sense():
    model = build("LLaVA-1.5")
    with pytest.raises(vtok.BudgetError, match=r"its strongest setting still needs 0\.\d+ for 1 image of 3 x 16 x 16"):
        vtok.patch(model, "random", flops=0.05)
    with pytest.raises(vtok.ConfigError, match="no single knob that a FLOPs budget"):
        vtok.patch(model, Columns(((0, 2),)), flops=0.5)
    with pytest.raises(vtok.ConfigError, match="sets the knob of one method"):
        vtok.patch(model, [vtok.RandomDrop(), Attended()], flops=0.5)
    with pytest.raises(vtok.ConfigError, match="sets the knob of one method"):
        vtok.patch(model, [vtok.ToMe(r=2), vtok.ToDRE()], flops=0.5)
    for method, params in (("random", {"keep": 0.5}), ("tome", {"r": 2})):
        with pytest.raises(vtok.ConfigError, match=f"flops sets {next(iter(params))} of {method}"):
            vtok.patch(model, method, flops=0.5, **params)
    with pytest.raises(vtok.ConfigError, match="in \\(0, 1\\]"):
        vtok.plan(model, "random", flops=2)
    assert not vtok.info(model).patched
    text = message_of(vtok.UnsupportedModelError, vtok.patch, generic_models.build("aya_vision"), "tome", flops=0.7)
    assert "tome reduces tokens inside the vision tower, and that of AyaVisionModel cannot be patched" in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("LLaVA-NeXT"), "ats", flops=0.7)
    assert "ats drops tokens inside the vision tower" in text


def test_calibration_inputs_that_make_no_sense():
    model, values = vtok.patch(build("LLaVA-1.5"), "random", keep=0.5), _prompt("LLaVA-1.5")
    for given, words in (
        ([], "the list is empty"),
        (values["pixel_values"], "got Tensor"),
        ({"input_ids": values["input_ids"]}, "got ['input_ids']"),
    ):
        for call in (vtok.patch, vtok.plan):
            assert words in message_of(vtok.ConfigError, call, model, "ats", flops=0.7, calibration=given)
    useless = {"calibration": values, "prompt": PROMPT}
    assert "has no number to find" in message_of(vtok.ConfigError, vtok.patch, model, "ats", flops=0.7, **useless)
    assert "has no number to find" in message_of(vtok.ConfigError, vtok.plan, model, "ats", num_tokens=8, **useless)
    assert "has no number to find" in message_of(vtok.ConfigError, vtok.patch, model, "ats", num_tokens=8, calibration=values)
    odd = {**values, "pixel_values": torch.randn(2, 3, 16, 16)}
    assert "cannot run the calibration inputs" in message_of(
        vtok.ConfigError, vtok.patch, model, "ats", flops=0.7, calibration=odd
    )
    assert [c.name for c in vtok.info(model).prompts[0].configs] == ["random"], "the earlier patch is still there"
    assert run_of(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a grid is spoken of when the model is patched, not at every step of the search
        vtok.plan(build("Gemma3"), "tome", flops=0.97, prompt={"images": 4, "text_tokens": 5})
