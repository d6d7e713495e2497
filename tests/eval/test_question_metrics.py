"""Scores of the standard sets of questions on the answers where programs differ, and metrics of whole sets."""

import json
from pathlib import Path

import numpy as np
import pytest

import vtok
from vtok.eval.tasks import QUESTION_TASKS, TASKS
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.metrics import MODES, soft_accuracy
from vtok.eval.tasks.vqa.records import Scored
from vtok.eval.tasks.vqa_benchmarks.chartqa import relaxed
from vtok.eval.tasks.vqa_benchmarks.docvqa import anls, anls_definition, edit_distance
from vtok.eval.tasks.vqa_benchmarks.mme import CATEGORIES, parse_mme
from vtok.eval.tasks.vqa_benchmarks.pope import parse_llava as pope_llava
from vtok.eval.tasks.vqa_benchmarks.pope import parse_whole, parse_words
from vtok.eval.tasks.vqa_benchmarks.scienceqa import letter_match, prompt_text
from vtok.eval.tasks.vqa_benchmarks.scienceqa import parse_llava as science_llava
from vtok.eval.tasks.vqa_benchmarks.textvqa import prompt_text as textvqa_prompt

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "question_scores.json").read_text(encoding="utf-8"))


def ask(target, **groups):
    return Question(0, "q", (target,), 0, groups)


@pytest.mark.parametrize("task", ["chartqa", "docvqa", "gqa", "mme", "pope", "scienceqa", "textvqa", "vqav2"])
def test_scores_are_those_of_lmms_eval(task):
    """Answers and what lmms-eval 0.7.3 gives them."""
    rows = [row for row in GOLDEN if row["task"] == task]
    assert len(rows) >= 60 and len({row["score"] for row in rows}) > 1
    score = QUESTION_TASKS.get(task).scores[rows[0]["metric"]]
    for row in rows:
        assert score(row["said"], Question(0, "", tuple(row["answers"]), 0, row["groups"])) == pytest.approx(row["score"]), row


@pytest.mark.parametrize(
    ("said", "answers", "lmms", "official", "vlmeval"),
    [
        ("5.", ["5"] * 10, 1, 1, 0),  # the corrected pattern sees the digit before the period
        ("5.", ["5."] * 10, 1, 0, 1),
        ("no.", ["no"] * 10, 1, 1, 1),
        (".5", ["5"] * 10, 0, 0, 0),
        ("it's", ["it's"] * 10, 1, 0, 1),
        ("dog", ["the dog"] * 10, 1, 0, 1),
        ("x" + 32 * ".", ["x"] * 10, 1, 1, 1),
        ("x" + 33 * ".", ["x"] * 10, 0, 0, 0),  # a flag stands where the count belongs, in all of them
        ("1,,000", ["1000"] * 10, 1, 0, 0),
    ],
)
def test_three_normalisations_of_vqav2(said, answers, lmms, official, vlmeval):
    scores = QUESTION_TASKS.get("vqav2").score_all(said, Question(0, "", tuple(answers), 0, {}))
    assert scores == {"soft_accuracy": lmms, "soft_accuracy_official": official, "soft_accuracy_vlmeval": vlmeval}


@pytest.mark.parametrize("answer", ["two", "Two", "none", "the cat", "a t-shirt", "dont", "cat"])
def test_a_single_answer_in_plain_words_is_met_by_itself(answer):
    """vqaEval.py leaves answers of VQA as they are, since they hold digits and no articles: a single answer need not."""
    assert [soft_accuracy(answer, [answer], mode) for mode in MODES] == [1.0] * len(MODES)
    assert [soft_accuracy("dog", [answer], mode) for mode in MODES] == [0.0] * len(MODES)


def test_ten_equal_answers_stay_as_they_are_for_the_official_program():
    assert soft_accuracy("two", ["two"] * 10, "official") == 0 and soft_accuracy("two", ["2"] * 10, "official") == 1


def test_textvqa_sets_words_apart_first():
    assert soft_accuracy("mcdonald's", ["mcdonald 's"] * 10, "textvqa") == 1
    assert (
        soft_accuracy("mcdonald's", ["mcdonald 's"] * 10, "vlmeval") == soft_accuracy("mcdonald's", ["mcdonald 's"] * 10) == 0
    )
    assert soft_accuracy("1,0", ["10"] * 10, "textvqa") == 1 and soft_accuracy("a, b", ["ab"] * 10, "textvqa") == 0
    assert textvqa_prompt("What is the NAME?", None) == "What is the name?"
    assert textvqa_prompt("who?", ["A", "b"]) == "Who?\nReference OCR token: A, b"


@pytest.mark.parametrize(
    ("said", "target", "lmms", "vlmeval", "official"),
    [
        ("Yes", "yes", 1, 1, 1),
        ("yes.", "yes", 1, 0, 1),
        ("yes!", "yes", 1, 0, 0),
        ("t-shirt", "tshirt", 1, 0, 0),
        ("traffic light ", "traffic light", 0, 1, 0),
        ("traffic  light", "traffic light", 0, 0, 0),
    ],
)
def test_how_strictly_gqa_compares(said, target, lmms, vlmeval, official):
    found = QUESTION_TASKS.get("gqa").score_all(said, ask(target))
    assert found == {"exact_match": lmms, "exact_match_vlmeval": vlmeval, "exact_match_official": official}


@pytest.mark.parametrize(
    ("said", "whole", "llava", "words"),
    [
        ("Yes", "yes", "yes", "yes"),
        (" no\n", "no", "yes", "no"),  # LLaVA looks for whole words between spaces: "no\n" is none
        ("No, there is no dog in the image.", "", "no", "no"),
        ("No.", "", "no", "no"),
        ("NO", "no", "yes", "no"),
        ("There is not a dog", "", "no", ""),
        ("Yes, there is no doubt", "", "no", ""),
        ("I see a dog. No cat", "", "yes", "no"),
        ("maybe", "", "yes", ""),
        ("", "", "yes", ""),
        ("nope", "", "yes", ""),
    ],
)
def test_three_parsers_of_pope(said, whole, llava, words):
    assert (parse_whole(said), pope_llava(said), parse_words(said)) == (whole, llava, words)


def pope(answers, targets):
    questions = [Question(i, "q", (target,), i // 2, {"variant": "random"}) for i, target in enumerate(targets)]
    return Scored(VQAData("pope", questions, None), answers, QUESTION_TASKS.get("pope"))


def test_what_pope_makes_of_neither_yes_nor_no():
    found = pope(["yes", "maybe", "no", "yes", "well"], ["yes", "yes", "yes", "no", "no"]).metrics(None)
    assert found["accuracy"] == pytest.approx(1 / 5) and found["yes_ratio"] == pytest.approx(2 / 5)
    # lmms-eval does not miss what it cannot read: one of two; VLMEvalKit does: one of three; for LLaVA it is a yes
    assert found["recall"] == pytest.approx(1 / 2) and found["recall_vlmeval"] == pytest.approx(1 / 3)
    assert found["recall_llava"] == pytest.approx(2 / 3) and found["precision_llava"] == pytest.approx(2 / 4)
    assert found["precision"] == pytest.approx(1 / 2) and found["f1"] == pytest.approx(1 / 2)
    assert found["yes_ratio_llava"] == pytest.approx(4 / 5) and found["yes_ratio_labels"] == pytest.approx(3 / 5)
    nothing = pope(["no"] * 4, ["no", "no", "no", "no"]).metrics(None)
    assert (nothing["precision"], nothing["recall"], nothing["f1"], nothing["accuracy"]) == (0, 0, 0, 1)


def test_differences_of_f1_are_paired_by_image():
    targets = ["yes", "no"] * 40
    base = pope(targets, targets)
    same, worse = pope(targets, targets), pope(["yes" if i % 8 else "no" for i in range(80)], targets)
    assert same.metrics(base)["f1_difference"] == 0 and same.metrics(base)["f1_difference_ci"] is None
    found = worse.metrics(base)
    # 10 of 40 yes missed, all 40 no taken for yes
    precision, recall = 30 / 70, 30 / 40
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["f1_difference"] == pytest.approx(found["f1"] - 1)
    low, high = found["f1_difference_ci"]
    assert low < found["f1_difference"] < high < 0 and found["f1_difference_stderr"] == pytest.approx(found["f1_stderr"])
    assert found["f1_stderr"] == pytest.approx((high - low) / 3.92, rel=0.15)
    one = pope(["yes", "no"], ["yes", "no"]).metrics(None)
    assert one["f1"] == 1 and one["f1_stderr"] is None and one["f1_ci"] is None


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("Y", "yes"), ("n.", "no"), ("x", "other"), ("", "other"),
        ("No, it is not", "no"), ("nothing", "no"), ("Not yes", "no"), ("I no longer", "no"), ("It is no", "other"),
        ("ye.s", "yes"), ("Oh yes", "other"), (" yes", "yes"), ("a yes", "other"), ("1no", "no"),
    ],
)  # fmt: skip
def test_mme_reads_four_characters(said, label):
    assert parse_mme(said) == label


def mme(answers):
    """Two images of existence, one of OCR, two of code_reasoning: a yes and a no question each."""
    places = [("existence", 0), ("existence", 1), ("OCR", 0), ("code_reasoning", 0), ("code_reasoning", 1)]
    questions = [Question(f"{c}/{i}/{a}", "q", (a,), f"{c}/{i}", {"category": c}) for c, i in places for a in ("yes", "no")]
    return Scored(VQAData("mme", questions, None, whole=True), answers, QUESTION_TASKS.get("mme"))


def test_mme_adds_categories_up():
    scored = mme(["yes", "no", "yes", "yes", "no", "yes", "yes", "no", "Yes.", "N"])
    found = scored.metrics(None)
    # existence: 3 of 4 and 1 of 2 images; OCR: nothing; code_reasoning: everything
    assert found["perception"] == pytest.approx(75 + 50) and found["cognition"] == pytest.approx(200)
    assert found["total"] == pytest.approx(325) and found["accuracy"] == pytest.approx(70)
    assert found["accuracy_plus"] == pytest.approx(60)
    existence = np.array([True] * 4 + [False] * 6)
    part = scored.metrics(None, existence)
    assert part["total"] == part["perception"] == pytest.approx(125) and part["cognition"] is None
    assert part["cognition_stderr"] is None and part["total_stderr"] > 0
    better = mme(["yes", "no"] * 5)
    full = better.metrics(scored)
    assert (full["total"], full["perception"], full["cognition"]) == (600, 400, 200) and len(CATEGORIES) == 14
    assert full["total_difference"] == pytest.approx(275) and full["cognition_difference"] == 0
    # every category is in every resample: nothing varies where everything is right
    assert (full["total_stderr"], full["total_ci"]) == (0, None)
    assert full["total_difference_stderr"] == pytest.approx(found["total_stderr"]) and found["total_stderr"] > 0
    assert full["agreement"] == pytest.approx(50)  # percent, as everything here; "Yes." and "N" are other texts
    assert json.loads(json.dumps(full, allow_nan=False)) == full


@pytest.mark.parametrize(
    ("said", "lmms", "llava"),
    [
        ("B", 1, "B"), ("b", 1, ""), ("B.", 1, ""), ("B. a cat", 1, "B"), ("B.cat", 1, ""), ("b. a cat", 0, ""),
        ("The answer is B.", 0, "B"), ("The answer is B", 0, "B"), ("A", 0, "A"), ("A. B", 0, "A"), ("", 0, ""),
        ("B\nbecause", 0, "B"), (" B ", 1, "B"), ("Because", 0, ""), ("The answer is F.", 0, ""),
    ],
)  # fmt: skip
def test_letters_of_scienceqa(said, lmms, llava):
    assert letter_match(said, "B") == lmms and science_llava(said) == llava
    assert prompt_text("Q?", ["x", "y"], "") == "Q?\nA. x\nB. y"
    assert prompt_text("Q?", ["x"], "H") == "Context: H\nQ?\nA. x"


@pytest.mark.parametrize(
    ("said", "answers", "lmms", "definition"),
    [
        ("abcd", ["abcd"], 1, 1),
        ("ABCD", ["abcd"], 1, 1),
        ("ab", ["abcd"], 0.5, 0),  # exactly one half
        ("a", ["abcd"], 0, 0),
        ("abc", ["abcd"], 0.75, 0.75),
        ("abc", ["zzz", "abcd"], 0.75, 0.75),
        ("a  b", ["a b"], 1, 1),
        ("a   x", ["a y"], 0.8, 2 / 3),  # one change: of five characters as written, of three as compared
        ("", [""], 1, 1),
        ("", ["x"], 0, 0),
        ("5", ["$5"], 0.5, 0),
    ],
)
def test_anls(said, answers, lmms, definition):
    assert anls(said, answers) == pytest.approx(lmms) and anls_definition(said, answers) == pytest.approx(definition)


def test_edit_distance():
    assert [edit_distance(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("abc", ""), ("ab", "ba"))] == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("said", "target", "right"),
    [
        ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-100", "100", 0),
        ("5%", "0.05", 1), ("0.05", "5%", 1), ("5", "5%", 0), ("5%", "5", 0),
        ("0", "0", 1), ("0.0", "0", 0), ("0.001", "0", 0), ("0%", "0", 0),  # no 5 % of nothing: compared as texts
        ("Yes", "yes", 1), ("yes.", "yes", 0), ("ten", "10", 0), ("10", "ten", 0), ("%", "%", 1), ("nan", "5", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(said, target, right):
    assert relaxed(said, target) == right


def test_chartqa_tells_its_parts_apart():
    questions = [Question(i, "q", ("1",), i, {"part": "human" if i < 3 else "augmented"}) for i in range(4)]
    found = Scored(VQAData("chartqa", questions, None), ["1", "1", "2", "2"], QUESTION_TASKS.get("chartqa")).metrics(None)
    assert found["relaxed_overall"] == 0.5 and found["relaxed_human_split"] == pytest.approx(2 / 3)
    assert found["relaxed_augmented_split"] == 0 and found["relaxed_augmented_split_stderr"] is None


def test_every_question_task_is_a_task():
    for name in QUESTION_TASKS:
        task = QUESTION_TASKS.get(name)
        assert name in TASKS and task.name == name and task.correct in task.scores
        assert (
            task.primary in {**task.scores, **task.totals}
            and set(task.columns.values()) <= {**task.scores, **task.totals}.keys()
        )
    with pytest.raises(vtok.VtokError, match="unknown question task 'gqq'; did you mean 'gqa'"):
        QUESTION_TASKS.get("gqq")
