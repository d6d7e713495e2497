"""Search spaces of methods: points repeat by seed, every candidate is valid, budgets are met by the closed form."""

import itertools
import json
import random

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties, seeds

import vtok
from vtok.capabilities import HasSearchSpace, search_space
from vtok.core.search_space import Blocks, BudgetCandidates, Choice, Real, Weights, draw
from vtok.cost.budget import steps_of, within
from vtok.cost.encoder import estimate
from vtok.eval.common.settings import pass_cost
from vtok.registry import METHODS, encoder_methods
from vtok.targets.resolve import towers

MODEL = zoo.build("timm: ViT")
((ADAPTER, TOWER),) = towers(MODEL, None)
INFO, COST = TOWER.info, ADAPTER.cost(TOWER)
SEARCHED = [name for name in encoder_methods() if isinstance(METHODS.get(name)(), HasSearchSpace)]
EXACT = [name for name in SEARCHED if METHODS.get(name)(**zoo.SETTINGS[name]).build(INFO).exact]


def price(config):
    return estimate(COST, steps_of([config.build(INFO)]), INFO.num_prefix + INFO.num_patches, INFO.num_prefix)


def candidates(method, seed):
    config = METHODS.get(method)()
    return config.candidates_at(INFO, draw(config.search_space(INFO), random.Random(seed)))


def test_methods_for_encoders_have_a_space():
    assert {"ats", "pitome", "random", "tome", "uniform", "zero_tprune"} <= set(SEARCHED)
    assert all(search_space(METHODS.get(name)(), INFO) for name in SEARCHED)


@given(st.integers(1, 40), st.booleans(), seeds)
@properties
def test_weights_are_shares_of_the_work(size, rest, seed):
    weights = Weights(size, rest).draw(random.Random(seed))
    assert len(weights) == size
    assert sum(weights) / size == pytest.approx(1)
    resting = [weight == 0 for weight in weights]
    assert sum(resting) <= (max(1, size // 2) if rest and size > 1 else 0)
    assert resting == sorted(resting, reverse=True), "only the first blocks rest"


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), seeds)
@properties
def test_blocks_are_sorted_distinct_and_as_many_as_asked_for(count, least, most, seed):
    blocks = Blocks(tuple(range(count)), least, most).draw(random.Random(seed))
    assert blocks == sorted(set(blocks)) and set(blocks) <= set(range(count))
    assert min(least, most, count) <= len(blocks) <= min(most, count)


def test_half_of_the_draws_are_as_usual():
    drawn = [Blocks(tuple(range(12)), 2, 6, (0, 5)).draw(random.Random(seed)) for seed in range(200)]
    assert 70 < drawn.count([0, 5]) < 130
    usual = (1.0, 2.0, 3.0, 4.0)
    mean = [sum(column) / 400 for column in zip(*(Weights(4, False, usual).draw(random.Random(seed)) for seed in range(400)))]
    assert mean == sorted(mean) and mean[3] > 2 * mean[0]


@given(seeds)
@properties
def test_a_point_is_plain_and_repeats_by_seed(seed):
    space = {"b": Real(-1, 2), "a": Choice((None, 3)), "c": Weights(4), "d": Blocks((1, 4, 6))}
    point = draw(space, random.Random(seed))
    assert json.loads(json.dumps(point)) == point
    assert draw(dict(reversed(space.items())), random.Random(seed)) == point, "the order of dimensions does not matter"
    assert -1 <= point["b"] <= 2 and point["a"] in (None, 3)


def test_budget_candidates_are_a_sequence():
    found = BudgetCandidates(lambda strength: strength, 2.0, 4)
    assert list(found) == [0, 0.5, 1, 1.5, 2] and found[-1] == 2 and found[1:3] == [0.5, 1]
    with pytest.raises(IndexError):
        found[5]


@pytest.mark.parametrize("method", SEARCHED)
@given(seeds)
@properties
def test_budget_candidates_begin_with_nothing_and_get_cheaper(method, seed):
    steps = candidates(method, seed)
    rows = sorted({0, len(steps) - 1, *(i * len(steps) // 23 for i in range(23))})
    costs = [price(steps[row]) for row in rows]
    assert costs[0].macs == costs[0].base_macs and costs[0].reduction_macs == 0
    slack = 0.01 * costs[0].base_macs  # counts are rounded block by block
    assert all(later.macs <= earlier.macs + slack for earlier, later in itertools.pairwise(costs))
    assert costs[-1].fraction < 0.95
    for row in rows[:: len(rows) // 4]:
        config = steps[row].resolved(INFO)
        assert METHODS.get(method).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("method", EXACT)
def test_the_cost_that_was_solved_for_is_the_cost_that_runs(method):
    found = []
    for seed in range(8):
        try:
            found.append(within(candidates(method, seed), 0.8, price))
        except vtok.BudgetError:
            continue
    assert len(found) >= 3
    images = torch.randn(2, *TOWER.input_size, generator=torch.Generator().manual_seed(0))
    for config, cost in found:
        assert cost.fraction <= 0.8
        with vtok.patched(MODEL, config), torch.no_grad():
            MODEL(images)
            ran = pass_cost(MODEL)
        assert (ran.macs + ran.reduction_macs) / ran.base_macs == pytest.approx(cost.fraction)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_class_of_block_gets_valid_settings(name):
    ((adapter, tower),) = towers(zoo.build(name), None)
    info, cost, searched = tower.info, adapter.cost(tower), []
    for method in SEARCHED:
        for _, config in METHODS.get(method).variants(info):
            try:
                config.budget_candidates(info)[-1].build(info)
            except vtok.UnsupportedModelError:
                continue
            for seed in range(4):
                steps = config.candidates_at(info, draw(config.search_space(info), random.Random(seed)))
                chosen = steps[len(steps) // 2].resolved(info)
                found = estimate(cost, steps_of([chosen.build(info)]), info.num_prefix + info.num_patches, info.num_prefix)
                assert 0 < found.macs < 1.01 * found.base_macs  # a mean over tokens that differ in weight costs a trifle
            searched.append(method)
            break
    assert {"tome", "pitome", "random", "uniform"} <= set(searched)


@pytest.mark.parametrize(("method", "params"), [("ats", {"layers": [1, 2]}), ("random", {"layers": [1]})])
def test_what_is_given_is_not_searched(method, params):
    assert METHODS.get(method)(**params).search_space(INFO) == {}


def test_zero_tprune_keeps_the_layers_that_were_given():
    config = METHODS.get("zero_tprune")(layers=[1, -2], retain=0.9, r=0)
    space = config.search_space(INFO)
    assert "layers" not in space
    chosen, cost = within(config.candidates_at(INFO, draw(space, random.Random(0))), 0.85, price)
    assert chosen.layers == (1, -2) and cost.fraction <= 0.85


def test_methods_on_prompts_have_no_space_in_encoders():
    with pytest.raises(vtok.ConfigError, match="todre has no schedule inside vision encoders"):
        search_space(METHODS.get("todre")(), INFO)
