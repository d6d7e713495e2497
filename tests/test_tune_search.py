"""Random search and successive halving over numbers: nothing here runs a model."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vtok
from tests.strategies import properties
from vtok.eval.tune.search import LEAST_SAMPLES, Rung, rungs, search, work

counts = st.integers(2, 200)


@given(counts, st.integers(1, 5000), st.integers(2, 5))
@properties
def test_halving_shows_more_samples_to_fewer_candidates(candidates, samples, eta):
    plan = rungs("halving", candidates, samples, eta)
    assert plan[0].candidates == candidates and plan[-1].samples == samples
    for before, after in itertools.pairwise(plan):
        assert before.samples < after.samples and before.candidates > after.candidates
        assert after.candidates == math.ceil(candidates / eta ** plan.index(after))
    assert len(plan) == 1 or plan[0].samples >= LEAST_SAMPLES
    assert plan[-1].candidates >= 1


@given(counts, st.integers(32, 5000), st.integers(2, 5), st.randoms(use_true_random=False))
@properties
def test_halving_keeps_the_best_and_the_default(candidates, samples, eta, rng):
    losses = [rng.random() for _ in range(candidates)]
    asked = []

    def evaluate(candidate, start, stop):
        asked.append((candidate, start, stop))
        return (losses[candidate],)

    plan = rungs("halving", candidates, samples, eta)
    rounds = search(plan, evaluate)
    best = min(range(candidates), key=losses.__getitem__)
    for rung, standing in zip(plan, rounds):
        numbers = [one.candidate for one in standing]
        assert standing[0].candidate == best and 0 in numbers
        expected = sorted(range(candidates), key=losses.__getitem__)[: rung.candidates]
        assert set(numbers) == {0, *expected}, "whoever is among the best goes on"
        assert [one.loss for one in standing] == sorted(one.loss for one in standing)
        assert {one.samples for one in standing} == {rung.samples}
    assert len(set(asked)) == len(asked), "no candidate sees a sample twice"
    assert sum(stop - start for _, start, stop in asked) <= work(plan)


@given(counts, st.integers(1, 500))
@properties
def test_random_search_shows_everything_to_everybody(candidates, samples):
    asked = []
    rounds = search(rungs("random", candidates, samples), lambda *what: asked.append(what) or (float(-what[0]),))
    assert asked == [(i, 0, samples) for i in range(candidates)]
    assert [one.candidate for one in rounds[-1]] == list(range(candidates))[::-1]
    assert work(rungs("random", candidates, samples)) == candidates * samples


def test_halving_is_cheaper_than_random_search():
    assert work(rungs("halving", 81, 1000)) < work(rungs("random", 81, 1000)) / 5


def test_ties_go_to_what_ranks_next_and_then_to_the_default():
    rounds = search([Rung(10, 3)], lambda i, *_: (0.5, {0: 0.2, 1: 0.1, 2: 0.3}[i]))
    assert [one.candidate for one in rounds[-1]] == [1, 0, 2]
    rounds = search([Rung(10, 3)], lambda *_: (0.5,))
    assert rounds[-1][0].candidate == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bayes", 4, 10), "unknown search 'bayes'"),
        (("random", 1, 10), "candidates must be at least 2, got 1"),
        (("random", 2, 0), "images must be at least 1, got 0"),
        (("halving", 4, 10, 1), "eta must be at least 2, got 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(vtok.VtokError, match=message):
        rungs(*arguments)
