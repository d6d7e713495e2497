"""What method configs accept, how they say no, and what they resolve to."""

import json
from typing import Any

import pytest
from helpers_golden import model_info

import vtok
from vtok.config import MethodConfig
from vtok.methods.pitome.presets import PRESETS
from vtok.registry import METHODS, encoder_methods

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tome", {"r": -1}, "r counts tokens to remove and cannot be negative, got -1"),
    ("tome", {"r": [3, -2]}, "r counts tokens to remove and cannot be negative"),
    ("tome", {"r": 2.5}, "r counts tokens and must be whole, got 2.5"),
    ("tome", {"r": True}, "r must be a number, a list with one number a block, or"),
    ("tome", {"r": "8"}, "r must be a number, a list with one number a block, or"),
    ("tome", {"r": (8, 0.5, 1)}, "r as a tuple is"),
    ("tome", {"r": {"r": 8, "slope": 1}}, "r as a mapping takes the keys r and inflect"),
    ("pitome", {"ratio": 0.9, "r": 8}, "give ratio or r, not both"),
    ("pitome", {"ratio": 0}, r"ratio is a fraction in \(0, 1\], got 0"),
    ("pitome", {"ratio": [0.9, 1.2]}, r"ratio is a fraction in \(0, 1\], got 1.2"),
    ("pitome", {"r": -3}, "r counts tokens to remove and cannot be negative, got -3"),
    ("pitome", {"ratio": float("nan")}, "ratio must hold numbers"),
    ("pitome", {"alpha": -1.0}, "alpha must be a number >= 0, got -1.0"),
    ("pitome", {"alpha": float("inf")}, "alpha must be a number >= 0, got inf"),
    ("pitome", {"preset": "official_albef"}, "unknown preset 'official_albef'; known: official_deit, official_mae, .*_llava"),
    ("pitome", {"preset": "official_mae", "margin": 0.5}, "preset 'official_mae' fixes the margins"),
    ("pitome", {"preset": "official_clip", "metric": "keys"}, "preset 'official_clip' fixes the metric; drop metric=keys"),
    ("pitome", {"metric": "queries"}, "metric must be one of keys, hidden, got 'queries'"),
    ("pitome", {"preset": "official_llava", "prop_attn": True}, "preset 'official_llava' ignores sizes, so prop_attn=True"),
    ("ats", {"num_tokens": 8, "keep": 0.5}, "give num_tokens or keep, not both"),
    ("ats", {"num_tokens": 0}, "num_tokens must be a whole number >= 1, got 0"),
    ("ats", {"num_tokens": 7.5}, "num_tokens must be a whole number >= 1, got 7.5"),
    ("ats", {"keep": 1.5}, r"keep is a fraction in \(0, 1\], got 1.5"),
    ("ats", {"parity": True, "keep": 0.5}, "parity=True samples as many points as there are patches"),
    ("ats", {"parity": True, "num_tokens": 9}, "parity=True samples as many points as there are patches"),
    ("ats", {"mode": "pad"}, "mode must be one of drop, mask, got 'pad'"),
    ("ats", {"score": "max"}, "score must be one of sum_attention, per_head, got 'max'"),
    ("ats", {"query": "dist"}, "query must be one of cls, mean, got 'dist'"),
    ("zero_tprune", {"layers": [1], "retain": 0}, r"retain is a fraction in \(0, 1\], got 0"),
    ("zero_tprune", {"r": -1}, "r takes whole numbers >= 0, got -1"),
    ("zero_tprune", {"r": [3, 2.5]}, "r takes whole numbers >= 0, got 2.5"),
    ("zero_tprune", {"iters": 1.5}, "iters takes whole numbers >= 0, got 1.5"),
    ("zero_tprune", {"tau": 0}, "tau must be a number > 0, got 0"),
    ("zero_tprune", {"cls_init": "boost"}, "cls_init must be one of sqrt, uniform, got 'boost'"),
    ("zero_tprune", {"partition": "half"}, "partition must be one of seq_u, seq_i, alternate, random, got 'half'"),
    ("zero_tprune", {"metric": "minkowski6"}, "metric must be one of cos, dot, .*, got 'minkowski6'"),
    ("zero_tprune", {"head_filter": (0.7, 0.01)}, r"head_filter is \(low, high\) or None"),
    ("zero_tprune", {"head_filter": [0.1, 0.2, 0.3]}, r"head_filter is \(low, high\) or None"),
    ("random", {"keep": 0.0}, r"keep is a fraction in \(0, 1\], got 0.0"),
    ("random", {"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ("uniform", {"keep": True}, r"keep is a fraction in \(0, 1\], got True"),
]
# 4 blocks, 16 patches, a class token unless the facts say otherwise.
UNFIT: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("tome", {"r": 9}, {}, "r=9 in block 0: Vit has 16 patches, of which one block can merge at most 8"),
    ("tome", {"r": [1, 9]}, {}, "r=9 in block 1"),
    ("tome", {"r": [1] * 5}, {}, "r lists 5 blocks, the model has 4"),
    ("pitome", {"r": 9}, {}, "r=9 in block 0: Vit has 16 patches, of which one block can merge at most 8"),
    ("pitome", {"ratio": [0.9] * 5}, {}, "ratio lists 5 blocks, the model has 4"),
    ("pitome", {"margin": [0.9] * 5}, {}, "margin lists 5 blocks, the model has 4"),
    ("ats", {"layers": [4]}, {}, "layers names block 4, the model has blocks 0 to 3"),
    ("ats", {}, {"has_cls": False}, 'ats reads the attention of a class token and Vit has none; pass query="mean"'),
    ("ats", {}, {"plain_softmax": False}, "ats needs attention probabilities"),
    ("zero_tprune", {"layers": [1, 2]}, {}, "layers is given without retain"),
    ("zero_tprune", {"layers": [1, 2], "retain": [0.9]}, {}, r"retain has 1 values for 2 layers \(1, 2\)"),
    ("zero_tprune", {"layers": [1, 2], "retain": 0.9, "iters": [1]}, {}, r"iters has 1 values for 2 layers \(1, 2\)"),
    ("zero_tprune", {"layers": [3, -1], "retain": 0.9}, {}, r"layers names a block twice: \(3, 3\)"),
    ("zero_tprune", {"layers": [-5], "retain": 0.9}, {}, "layers names block -5, the model has blocks 0 to 3"),
    ("zero_tprune", {"layers": [1], "retain": 0.9, "r": 9}, {}, "r=9 in block 1: .* S-stage can prune at most 8"),
    ("zero_tprune", {}, {"has_cls": False}, 'zero_tprune reads the attention of a class token .* pass cls_init="uniform"'),
    ("zero_tprune", {}, {"plain_softmax": False}, "zero_tprune needs attention probabilities"),
    ("random", {"layers": [0, 4]}, {}, "layers names block 4, the model has blocks 0 to 3"),
    ("uniform", {"layers": [-5]}, {}, "layers names block -5, the model has blocks 0 to 3"),
]
IDLE: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 0}),
    ("tome", {"r": [0, 0]}),
    ("tome", {"r": (0, -1)}),
    ("pitome", {"ratio": 1.0}),
    ("pitome", {"ratio": [1.0, 1]}),
    ("pitome", {"r": 0}),
    ("pitome", {"ratio": 1.0, "preset": "official_deit"}),
    ("pitome", {"ratio": 1.0, "preset": "official_llava"}),
    ("ats", {"keep": 1.0}),
    ("ats", {"layers": []}),
    ("random", {"keep": 1.0}),
    ("uniform", {"keep": 1}),
    ("zero_tprune", {"layers": [0, 2], "retain": 1.0, "r": 0}),
    ("zero_tprune", {"layers": [], "retain": 0.5}),
]
# Config, the blocks of 12 in which it acts.
WHERE: list[tuple[str, dict[str, Any], list[int]]] = [
    ("tome", {"r": [4, 0, 2]}, [0, 2]),
    ("tome", {"r": (8, -1)}, list(range(11))),
    ("pitome", {"ratio": [0.9, 1.0, 0.9]}, [0, 2]),
    ("pitome", {"r": [0, 5]}, [1]),
    ("pitome", {}, list(range(12))),
    ("pitome", {"metric": "hidden"}, list(range(12))),
    ("ats", {}, list(range(3, 12))),
    ("ats", {"layers": [-1, 4]}, [4, 11]),
    ("zero_tprune", {}, [0, 2, 5, 8, 10]),
    ("zero_tprune", {"layers": [-2, 3, 6], "retain": [0.5, 1.0, 0.7], "r": [0, 0, 4]}, [6, 10]),
    ("random", {"layers": [2, 2, -1]}, [2, 11]),
    ("uniform", {}, list(range(12))),
]


@pytest.mark.parametrize(("method", "params", "message"), REFUSED)
def test_values_that_make_no_sense_are_refused(method: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(vtok.ConfigError, match=message):
        METHODS.get(method)(**params)


@pytest.mark.parametrize(("method", "params", "facts", "message"), UNFIT)
def test_values_that_do_not_fit_the_model_are_refused(
    method: str, params: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    config = METHODS.get(method)(**params)
    with pytest.raises(vtok.UnsupportedModelError if facts else vtok.ConfigError, match=message):
        config.build(model_info(**facts))


@pytest.mark.parametrize(("method", "params"), IDLE)
def test_settings_that_change_nothing_have_no_sites(method: str, params: dict[str, Any]) -> None:
    assert METHODS.get(method)(**params).build(model_info()).sites == ()


@pytest.mark.parametrize(("method", "params", "blocks"), WHERE)
def test_where_methods_act(method: str, params: dict[str, Any], blocks: list[int]) -> None:
    reducer = METHODS.get(method)(**params).build(model_info(depth=12, num_patches=196, grid=(14, 14)))
    assert [site.index for site in reducer.sites] == blocks
    place = {"ats": "pre", "zero_tprune": "end"}.get(method, "mid")
    assert {site.place.value for site in reducer.sites} == {place}


def configs() -> list[MethodConfig]:
    extra = [METHODS.get(method)(**params) for method, params, _ in WHERE]
    extra += [vtok.PiToMe(preset=preset) for preset in PRESETS]
    return [METHODS.get(name)() for name in METHODS] + extra


@pytest.mark.parametrize("config", configs(), ids=repr)
def test_configs_survive_json(config: MethodConfig) -> None:
    plain = json.loads(json.dumps(config.to_dict()))
    assert METHODS.get(plain["method"]).from_dict(plain) == config
    assert hash(config) == hash(type(config).from_dict(plain))


def test_unknown_parameters_are_named() -> None:
    for name in METHODS:
        with pytest.raises(vtok.UnknownNameError, match=f"unknown parameter of {name} 'ratoi'"):
            METHODS.get(name).create(ratoi=0.9)


def test_default_schedules() -> None:
    facts = model_info(depth=12, num_patches=196, grid=(14, 14))
    pitome = vtok.PiToMe().build(facts)
    assert pitome.ratio == (0.925,) * 12
    assert pitome.margin == pytest.approx([0.9 * (1 - i / 12) for i in range(12)])
    assert pitome.prop_attn
    assert set(pitome.matching) == {"energy"}
    assert (pitome.hidden, pitome.use_size) == (False, True)
    assert set(vtok.ATS().build(facts).points) == {108}
    steps = vtok.ZeroTPrune().build(facts).steps
    assert [(s.block, s.retain, s.r, s.iters) for s in steps] == [
        (0, 1.0, 10, 30), (2, 0.9, 10, 30), (5, 0.8, 10, 5), (8, 0.7, 10, 5), (10, 1.0, 10, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("method", encoder_methods(budget=True))
def test_candidates_start_with_a_no_op_and_never_ease(method: str) -> None:
    """A FLOPs budget is found by bisection over this order."""
    facts = model_info(num_patches=64, grid=(8, 8))
    before = 1 + 64
    for number, config in enumerate(METHODS.get(method)().budget_candidates(facts)):
        reducer = config.build(facts)
        assert number > 0 or reducer.sites == ()
        n = 1 + 64
        for site in reducer.sites:
            n = reducer.count(site, n, 1)
        assert n <= before
        before = n
    assert before < 33
