"""Soft accuracy against the two programs that define it, exact match, agreement."""

import json
from pathlib import Path

import numpy as np
import pytest

import vtok
from vtok.eval.tasks.vqa import metrics
from vtok.eval.tasks.vqa.metrics import agreement, exact_match, majority, normalised, soft_accuracy

MODES = ("lmms", "official")  # the others: test_question_metrics.py
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vqa_soft_accuracy.json").read_text(encoding="utf-8"))


def test_golden_cases_tell_the_modes_apart():
    assert len(GOLDEN) == 240
    assert sum(case["lmms"] != case["official"] for case in GOLDEN) > 100
    assert {case[mode] for case in GOLDEN for mode in MODES} == {0.0, 0.3, 0.6, 0.9, 1.0}


@pytest.mark.parametrize("mode", MODES)
def test_soft_accuracy_is_that_of_the_programs(mode):
    for case in GOLDEN:
        assert soft_accuracy(case["prediction"], case["answers"], mode) == pytest.approx(case[mode], abs=1e-8), case


@pytest.mark.parametrize(
    ("prediction", "answers", "lmms", "official"),
    [
        # all ten answers equal: the official program does not touch them
        ("5.", ["5"] * 10, 1, 1),
        ("5", ["5."] * 10, 1, 0),
        ("it's", ["it's"] * 10, 1, 0),
        ("dog", ["the dog"] * 10, 1, 0),
        ("Yes", ["Yes"] * 10, 1, 0),
        ("no!", ["no"] * 10, 1, 0),
        ("{x}", ["x"] * 10, 1, 0),
        ("3:00", ["3:00"] * 10, 1, 0),
        # they differ: their punctuation goes, but their articles, capitals and numbers stay
        ("5", ["5."] * 9 + ["6"], 1, 1),
        ("it's", ["it's"] * 9 + ["its"], 1, 1),
        ("dog", ["the dog"] * 9 + ["cat"], 1, 0),
        ("two", ["two"] * 9 + ["3"], 1, 0),
        ("two", ["2"] * 9 + ["3"], 1, 1),
        # marks that only one of the lists has
        ("left-hand", ["left hand"] * 9 + ["no"], 1, 0),
        ("yes!", ["yes"] * 9 + ["no"], 1, 0),
        ("3 00", ["3:00"] * 9 + ["noon"], 0, 1),
        ("its", ["it's"] * 9 + ["no"], 0, 0),
        # periods: not before a digit, and 32 at most
        ("1.5", ["1.5"] * 10, 1, 1),
        ("x" + 32 * ".", ["x"] * 10, 1, 1),
        ("x" + 33 * ".", ["x"] * 10, 0, 0),
        # commas in numbers
        ("1,000", ["1000"] * 10, 1, 1),
        ("1,,000", ["1000"] * 10, 1, 0),
        # new lines in the answers
        ("yes ", ["yes\n"] * 9 + ["no"], 1, 0),
        # the mean over the ten subsets
        ("yes", ["yes"] + ["no"] * 9, 0.3, 0.3),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6, 0.6),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9, 0.9),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1, 1),
    ],
)
def test_where_the_programs_differ(prediction, answers, lmms, official):
    assert soft_accuracy(prediction, answers, "lmms") == pytest.approx(lmms)
    assert soft_accuracy(prediction, answers, "official") == pytest.approx(official)


def test_a_single_answer_counts_for_all():
    assert soft_accuracy("Blue", ["blue"]) == 1 and soft_accuracy("red", ["blue"]) == 0


def test_normalised_texts():
    assert normalised("An  apple,\tten Dogs.") == "apple 10 dogs"
    assert normalised("dont") == "don't" and normalised("theyre there") == "they're there"
    assert normalised("a red/white cat") == "red white cat"  # no space beside the mark: it becomes one
    assert normalised("a red / white cat") == "red white cat"
    assert len(metrics._MEANT) == 114 and all("'" in key + value for key, value in metrics._MEANT.items())


def test_numbers_are_not_learned_from_answers():
    before = dict(metrics._NUMBERS)
    soft_accuracy("eleven", ["eleven"] * 10)
    assert before == metrics._NUMBERS


def test_exact_match_majority_agreement():
    assert exact_match(" Blue ", "blue") and not exact_match("blue.", "blue") and not exact_match("", "blue")
    assert majority(["b", "a", "a", "b", "c"]) == "b"
    assert np.array_equal(agreement(["yes", "Red"], ["no", "red"]), [0.0, 1.0])


def test_an_unknown_mode_is_named():
    with pytest.raises(vtok.VtokError, match="unknown normalisation 'offical'; did you mean 'official'"):
        soft_accuracy("a", ["a"], "offical")
