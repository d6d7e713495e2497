"""Zero-TPrune against its authors' earlier code and against slow loops written from the equations (see golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, load, model, run_model, start
from torch import Tensor

import vtok
from vtok.core.reduction import apply_plan
from vtok.methods.zero_tprune import Step, prune_plan
from vtok.methods.zero_tprune import config as zero_tprune
from vtok.methods.zero_tprune.duplicates import METRICS, most_similar, similarity, split_halves
from vtok.methods.zero_tprune.graph import head_root_mean_square, head_variance, importance, initial_signal, weighted_page_rank
from vtok.ops.rows import take_rows

BOUNDS = (0.01, 0.7)


# The authors' earlier code: no boost of the class token, no head filter, a temperature.
@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
def test_votes_of_the_earlier_code(tau: float) -> None:
    g = load("zero_tprune_predecessor_scores")
    attn = (g["logits"] / tau).softmax(-1)
    assert_close(importance(attn, 5, 1, boost_cls=False, head_filter=None)[:, 1:], g[f"em_tau{tau}"], 1e-12)
    assert_close(importance(attn, 1, 1, boost_cls=False, head_filter=None)[:, 1:], g[f"aveem_tau{tau}"], 1e-12)


@pytest.mark.parametrize(("key", "iters", "damping"), [("iters1", 1, 0.0), ("iters30", 30, 0.0), ("damp0.15", 5, 0.15)])
def test_number_of_votes_and_damping(key: str, iters: int, damping: float) -> None:
    g = load("zero_tprune_predecessor_scores")
    attn = g["logits"].softmax(-1)
    signal = weighted_page_rank(attn, initial_signal(attn, boost_cls=False), iters, damping=damping)
    assert_close(head_root_mean_square(signal)[:, 1:], g[f"em_tau1.0_{key}"], 1e-12)


def test_dead_tokens_receive_nothing() -> None:
    """There dead tokens go on voting; what `alive` does (they do not) is pinned by the layer file."""
    g = load("zero_tprune_predecessor_scores")
    assert not g["token_mask"].all()
    logits = (g["logits"] / 0.5).masked_fill(g["token_mask"][:, None, None] == 0, float("-inf"))
    for key, iters in (("em", 5), ("aveem", 1)):
        found = importance(logits.softmax(-1), iters, 1, boost_cls=False, head_filter=None)
        assert_close(found[:, 1:], g[f"{key}_tau0.5_masked"], 1e-12)


@pytest.mark.parametrize(
    ("tag", "tau", "layers", "retain"),
    [("nopr", 1.0, [], []), ("p135", 0.5, [1, 3, 4], [0.9, 0.8, 0.7]), ("all60", 1.0, [0, 1, 2, 3, 4, 5], 0.9)],
)
def test_whole_model_of_the_earlier_code(
    tag: str, tau: float, layers: list[int], retain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = load("zero_tprune_predecessor_model")
    ranked: list[Tensor] = []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        ranked.append(importance(*args, **kwargs))
        return ranked[-1]

    monkeypatch.setattr(zero_tprune, "importance", recorded)
    config = vtok.ZeroTPrune(layers=layers, retain=retain, r=0, iters=5, tau=tau, cls_init="uniform", head_filter=None)
    with vtok.patched(model("tiny"), config) as patched:
        logits, _, done = run_model(patched, g["x"])
    assert_close(logits, g[f"{tag}_logits"], 1e-9)
    assert len(ranked) == len(layers) == sum(key.startswith(tag) and key.endswith("kept") for key in g)
    for block, scores in zip(layers, ranked):
        state = done.states[block + 1]
        assert state is not None and state.index is not None
        assert_equal(state.index[:, 1:] - 1, g[f"{tag}_block{block}_kept"])
        assert_close(scores[:, 1:], g[f"{tag}_block{block}_importance"], 1e-9)


# The equations.
@pytest.mark.parametrize("iters", [1, 5, 30])
@pytest.mark.parametrize("init", ["uniform", "sqrtN"])
def test_page_rank_head_filter_and_aggregation(init: str, iters: int) -> None:
    g = load("zero_tprune_eq_wpr")
    attn, case, boost = g["attn"], f"{init}_it{iters}", init == "sqrtN"
    signal = weighted_page_rank(attn, initial_signal(attn, boost), iters)
    variance = head_variance(signal, 1)
    passed = (variance >= BOUNDS[0]) & (variance <= BOUNDS[1])
    assert_close(signal, g[f"s_{case}"], 1e-12)
    assert_close(signal.mean(1), g[f"mean_{case}"], 1e-12)
    assert_close(variance, g[f"var_{case}"], 1e-12)
    assert_equal(passed, g[f"headmask_{case}"])
    assert_close(head_root_mean_square(signal), g[f"eir_{case}"], 1e-12)
    assert_close(head_root_mean_square(signal, passed), g[f"eir_vhf_{case}"], 1e-12)
    assert_close(importance(attn, iters, 1, boost, None), g[f"eir_{case}"], 1e-12)
    assert_close(importance(attn, iters, 1, boost, BOUNDS), g[f"eir_vhf_{case}"], 1e-12)


@pytest.mark.parametrize("eps", [0.01, 0.0001, 1e-08])
def test_votes_until_the_signal_stands_still(eps: float) -> None:
    g = load("zero_tprune_eq_wpr")
    attn = g["attn"]
    n = attn.shape[-1]
    signal = initial_signal(attn, boost_cls=False).expand(attn.shape[:-1])
    needed = torch.zeros(attn.shape[:2], dtype=torch.int64)
    for i in range(1, 61):
        voted = weighted_page_rank(attn, signal, 1)
        still = n * (voted - signal).abs().amax(-1) <= eps
        needed = torch.where((needed == 0) & still, i, needed)
        signal = voted
    assert_equal(needed, g[f"iters_to_{eps}"])


PARTITIONS = {"sequ": "seq_u", "seqi": "seq_i", "alt": "alternate", "rand": None}


@pytest.mark.parametrize("mode", PARTITIONS)
def test_partitions_and_matches(mode: str) -> None:
    g = load("zero_tprune_eq_sstage")
    partition = PARTITIONS[mode]
    half = g["imp"].shape[1] // 2
    a, b = (g["perm"][:, :half], g["perm"][:, half:]) if partition is None else split_halves(g["imp"], partition)
    assert_equal(a, g[f"{mode}_A"])
    assert_equal(b, g[f"{mode}_B"])
    best, match = similarity(take_rows(g["feat"], a), take_rows(g["feat"], b), "cos").max(-1)
    assert_close(best, g[f"{mode}_best"], 1e-12)
    assert_equal(b.gather(1, match), g[f"{mode}_match"])
    for r in (3, 10):
        assert_equal(most_similar(g["feat"], a, b, r, "cos").sort(-1).values, g[f"{mode}_r{r}_pruned"])


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric: str) -> None:
    g = load("zero_tprune_eq_sstage")
    a, b = split_halves(g["imp"], "seq_u")
    pruned = most_similar(g["feat"], a, b, 4, metric).sort(-1).values
    assert_equal(pruned, g[f"sequ_r4_{'minkowskiinf' if metric == 'chebyshev' else metric}_pruned"])


LAYERS: dict[str, dict[str, Any]] = {
    "default": {"retain": 0.7, "r": 4, "iters": 5},
    "uniform": {"retain": 0.7, "r": 4, "iters": 5, "boost_cls": False},
    "nos": {"retain": 0.7, "r": 0, "iters": 30},
    "noi": {"retain": 1.0, "r": 6, "iters": 1},
    "novhf": {"retain": 0.5, "r": 10, "iters": 30, "head_filter": None},
    "seqi": {"retain": 0.8, "r": 5, "iters": 1, "partition": "seq_i"},
}


@pytest.mark.parametrize("case", LAYERS)
def test_pruning_layer(case: str) -> None:
    g = load("zero_tprune_eq_layer")
    options = dict(LAYERS[case])
    step = Step(0, options.pop("retain"), options.pop("r"), options.pop("iters"))
    plan = prune_plan(g["attn"], g["keys"], 1, step, **options)
    assert_equal(plan.keep[:, 1:] - 1, g[f"{case}_kept"])
    out, _ = apply_plan(g["x"], start(g["x"], 1), plan)
    assert_equal(out, g[f"{case}_xout"])


@pytest.mark.parametrize("case", LAYERS)
def test_stages_of_a_pruning_layer(case: str) -> None:
    g = load("zero_tprune_eq_layer")
    attn, pruned, options = g["attn"], g[f"{case}_pruned_s"], LAYERS[case]
    boost, bounds = options.get("boost_cls", True), options.get("head_filter", BOUNDS)
    first = importance(attn, 1, 1, boost, bounds)
    assert_close(first, g[f"{case}_imp_iprime"], 1e-12)
    a, b = split_halves(first[:, 1:], options.get("partition", "seq_u"))
    features = g["keys"].transpose(1, 2).flatten(2)[:, 1:]
    assert_equal(most_similar(features, a, b, options["r"], "cos").sort(-1).values, pruned)

    alive = torch.ones(attn.shape[0], attn.shape[-1], dtype=torch.bool).scatter(1, pruned + 1, False)
    second = importance(attn, options["iters"], 1, boost, bounds, alive)
    assert_close(second[alive].view(len(attn), -1), g[f"{case}_imp_i"], 1e-12)
    assert not second[~alive].any()
    signal = weighted_page_rank(attn, initial_signal(attn, boost, alive), options["iters"], alive)
    assert_close(head_variance(signal, 1, alive), g[f"{case}_var"], 1e-12)
