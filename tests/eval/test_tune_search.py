"""Searches over numbers: nothing here runs a model."""

import itertools
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties

import vtok
from vtok.core.search_space import Blocks, Choice, Real, Weights
from vtok.eval.tune.search import LEAST_SAMPLES, SEARCHES, Search, TrialRandom, stages

SPACE = {
    "blocks": Blocks(tuple(range(8)), 2),
    "kind": Choice(("a", "b", "c")),
    "tau": Real(2, 5),
    "weights": Weights(8),
}


def asked(search):
    trial = search.ask()
    return trial, {name: one.draw(TrialRandom(trial, name)) for name, one in SPACE.items()}


def found(path, search="random", count=20, seed=0, kill=None, eta=3):
    """(points, losses) of a search for weights that rise and a small tau; every trial has two stages."""
    made, points, losses = Search(path, {"of": "test"}, search, eta, seed), [], []
    while len(made.trials()) < count:
        trial, point = asked(made)
        points.append(point)
        slope = point["weights"][-1] - point["weights"][0]
        for stage, noise in enumerate((0.1, 0.0)):
            loss = abs(slope - 2) + point["tau"] + noise
            if kill == (len(made.trials()), stage):
                return points, losses
            goes_on = made.report(trial, stage, loss)
            if stage == 1:
                made.finish(trial, loss)
            elif not goes_on:
                made.finish(trial)
                break
        losses.append(loss)
    return points, losses


@given(st.integers(1, 5000), st.integers(2, 5))
@properties
def test_halving_shows_eta_times_as_many_samples_at_every_stage(samples, eta):
    plan = stages("halving", samples, eta)
    assert plan[-1] == samples and plan == stages("tpe", samples, eta)
    assert all(before == after // eta for before, after in itertools.pairwise(plan))
    assert len(plan) == 1 or plan[0] >= LEAST_SAMPLES
    assert plan[0] // eta < LEAST_SAMPLES, "one stage more would still do"
    assert stages("random", samples, eta) == [samples]


def test_points_are_drawn_as_a_random_generator_draws_them(tmp_path):
    search, theirs = Search(tmp_path / "j", 1, "random", 3, 0), random.Random(0)
    ours = []
    for _ in range(120):
        trial, point = asked(search)
        search.finish(trial)
        ours.append(point)
    them = [{name: one.draw(theirs) for name, one in SPACE.items()} for _ in range(120)]
    for about in (
        lambda p: p["tau"],
        lambda p: p["weights"][0] == 0,
        lambda p: p["weights"][-1],
        lambda p: p["kind"] == "b",
        lambda p: len(p["blocks"]) / 8,
        lambda p: 3 in p["blocks"],
        lambda p: p["blocks"] == list(range(8 - len(p["blocks"]), 8)),
    ):
        a, b = ([float(about(point)) for point in points] for points in (ours, them))
        spread = fmean((x - fmean(b)) ** 2 for x in b) ** 0.5
        assert abs(fmean(a) - fmean(b)) < 4 * spread * (2 / 120) ** 0.5
    assert all(p["blocks"] == sorted(set(p["blocks"])) and len(p["blocks"]) >= 2 for p in ours)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kill", [(0, 0), (3, 1), (13, 0)])
def test_a_stopped_search_ends_as_if_it_had_not_been(tmp_path, search, kill):
    whole = found(tmp_path / "whole", search, 18)
    found(tmp_path / "part", search, 18, kill=kill)
    with open(tmp_path / "part", "ab") as file:
        file.write(b'{"torn')
    done = len(Search(tmp_path / "part", {"of": "test"}, search, 3, 0).trials())
    rest = found(tmp_path / "part", search, 18)
    assert rest == (whole[0][done:], whole[1][done:])


def test_seeds_and_identities_are_searches_of_their_own(tmp_path):
    assert found(tmp_path / "a", seed=1, count=3) != found(tmp_path / "b", seed=2, count=3)
    search = Search(tmp_path / "a", {"of": "another"}, "random", 3, 1)
    assert not search.trials() and len(Search(tmp_path / "a", {"of": "test"}, "random", 3, 1).trials()) == 3


def test_halving_drops_most_and_never_the_best(tmp_path):
    search, best, went_on = Search(tmp_path / "j", 1, "halving", 3, 0), float("inf"), 0
    for loss in random.Random(1).sample(range(60), 60):
        trial = search.ask()
        goes_on = search.report(trial, 0, float(loss))
        assert goes_on or loss > best, "what is best so far goes on"
        best, went_on = min(best, loss), went_on + goes_on
        search.finish(trial, float(loss) if goes_on else None)
    assert 60 / 3 - 8 < went_on < 60 / 3 + 8


def test_random_search_drops_nothing(tmp_path):
    search = Search(tmp_path / "j", 1, "random", 3, 0)
    for loss in range(9):
        trial = search.ask()
        assert search.report(trial, 0, float(loss))
        search.finish(trial, float(loss))


def test_what_was_found_guides_what_is_drawn(tmp_path):
    """The later half of a guided search is better than blind draws."""
    guided, blind = (
        fmean(fmean(found(tmp_path / f"{name}{seed}", name, 40, seed)[1][20:]) for seed in range(2))
        for name in ("tpe", "halving")
    )
    assert guided < blind - 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bayes", 10), "unknown search 'bayes'"),
        (("random", 0), "images must be at least 1, got 0"),
        (("halving", 10, 1), "eta must be at least 2, got 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(vtok.VtokError, match=message):
        stages(*arguments)
