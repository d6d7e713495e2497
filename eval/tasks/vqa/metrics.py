"""Scores of answers to questions about images: exact match, VQAv2's soft accuracy as programs compute it, agreement.

They give a prediction, for every one of the ten people who answered, min(1, how many of the other nine agree / 3), and take
the mean. What they make of the texts first differs, see `assets/docs/evaluate.md`: "lmms" is lmms-eval 0.7, "official" VQA's
vqaEval.py, "vlmeval" VLMEvalKit, "textvqa" lmms-eval and M4C for TextVQA. All mean to keep the period of a decimal number, but
the pattern of the first two that should look behind it does not ("5." becomes "5", ".5" stays), and only the first 32 go in
any of them, as a flag stands where the count belongs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vtok.errors import unknown

MODES = ("lmms", "official", "textvqa", "vlmeval")
PEOPLE = 10  # who answered each question of VQAv2
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PUNCTUATION = {"lmms": _MARKS, "official": ";:/'[]\"()=+\\_><@`,?", "textvqa": _MARKS, "vlmeval": _MARKS}
_COMMAS, _COMMA = re.compile(r"(?<=\d),+(?=\d)"), re.compile(r"\d,\d")
_COMMA_IN_NUMBER = {"lmms": _COMMAS, "official": _COMMA, "textvqa": _COMMAS, "vlmeval": _COMMA}
_NO_DIGIT_AFTER, _NO_DIGIT_BESIDE = re.compile(r"\.(?!\d)"), re.compile(r"(?<!\d)\.(?!\d)")
_PERIOD = {"lmms": _NO_DIGIT_AFTER, "official": _NO_DIGIT_AFTER, "textvqa": _NO_DIGIT_AFTER, "vlmeval": _NO_DIGIT_BESIDE}
_PERIODS = 32
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})
# what is written -> what is meant; entries of the original table that can never match (capitals) or change nothing are left out
_CONTRACTIONS = """
aint ain't  arent aren't  cant can't  couldve could've  couldnt couldn't  couldn'tve couldn't've  couldnt've couldn't've
didnt didn't  doesnt doesn't  dont don't  hadnt hadn't  hadnt've hadn't've  hadn'tve hadn't've  hasnt hasn't  havent haven't
hed he'd  hed've he'd've  he'dve he'd've  hes he's  howd how'd  howll how'll  hows how's  isnt isn't  itd it'd  itd've it'd've
it'dve it'd've  itll it'll  maam ma'am  mightnt mightn't  mightnt've mightn't've  mightn'tve mightn't've  mightve might've
mustnt mustn't  mustve must've  neednt needn't  notve not've  oclock o'clock  oughtnt oughtn't  ow's'at 'ow's'at
'ows'at 'ow's'at  'ow'sat 'ow's'at  shant shan't  shed've she'd've  she'dve she'd've  shouldve should've  shouldnt shouldn't
shouldnt've shouldn't've  shouldn'tve shouldn't've  somebody'd somebodyd  somebodyd've somebody'd've
somebody'dve somebody'd've  somebodyll somebody'll  somebodys somebody's  someoned someone'd  someoned've someone'd've
someone'dve someone'd've  someonell someone'll  someones someone's  somethingd something'd  somethingd've something'd've
something'dve something'd've  somethingll something'll  thats that's  thered there'd  thered've there'd've
there'dve there'd've  therere there're  theres there's  theyd they'd  theyd've they'd've  they'dve they'd've  theyll they'll
theyre they're  theyve they've  twas 'twas  wasnt wasn't  wed've we'd've  we'dve we'd've  weve we've  werent weren't
whatll what'll  whatre what're  whats what's  whatve what've  whens when's  whered where'd  wheres where's  whereve where've
whod who'd  whod've who'd've  who'dve who'd've  wholl who'll  whos who's  whove who've  whyll why'll  whyre why're  whys why's
wont won't  wouldve would've  wouldnt wouldn't  wouldnt've wouldn't've  wouldn'tve wouldn't've  yall y'all  yall'll y'all'll
y'allll y'all'll  yall'd've y'all'd've  y'alld've y'all'd've  y'all'dve y'all'd've  youd you'd  youd've you'd've
you'dve you'd've  youll you'll  youre you're  youve you've
"""
_MEANT = dict(zip(_CONTRACTIONS.split()[::2], _CONTRACTIONS.split()[1::2]))


def exact_match(prediction: str, target: str) -> bool:
    """Whether two answers are the same text; case and white space do not count."""
    return prediction.lower().split() == target.lower().split()


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of several."""
    return Counter(answers).most_common(1)[0][0]


def without_punctuation(text: str, mode: str = "lmms") -> str:
    """Takes a mark out where a space stands beside any of its kind or a comma stands in a number, else puts a space there."""
    in_number = _COMMA_IN_NUMBER[mode].search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION[mode]:
        alone = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if alone or in_number else " ")
    return _PERIOD[mode].sub("", cleaned, count=_PERIODS)


def without_articles(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, contractions with their apostrophes, single spaces."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_MEANT.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=100_000)  # people give the same few answers again and again, and every setting is compared with them
def normalised(prediction: str, mode: str = "lmms") -> str:
    """What is compared of a prediction."""
    first = _FIRST.get(mode, str)(prediction)
    return without_articles(without_punctuation(first.replace("\n", " ").replace("\t", " ").strip(), mode))


def normalised_answers(answers: Sequence[str], mode: str = "lmms") -> list[str]:
    """What is compared of the answers that people gave to one question.

    `"official"` trusts that they are written as VQA's annotations are, with digits and without articles: "two" among them is
    never met by a prediction, which becomes "2". A single answer comes from elsewhere and is treated as the prediction is.
    """
    if mode != "official" or len(answers) == 1:
        return [normalised(answer, mode) for answer in answers]
    return [without_punctuation(answer, mode) for answer in answers] if len(set(answers)) > 1 else list(answers)


def soft_accuracy(prediction: str, answers: Sequence[str], mode: str = "lmms") -> float:
    """VQAv2's accuracy of one prediction in [0, 1], the mean over the leave-one-out subsets of the answers.

    Args:
        prediction: of the model.
        answers: of the people, ten in VQAv2; a single one counts as if all ten had given it.
        mode: one of `MODES`, see the module; `UnknownNameError` for others.
    """
    if mode not in MODES:
        raise unknown("normalisation", mode, MODES)
    given, said = normalised_answers(answers, mode), normalised(prediction, mode)
    given = given * PEOPLE if len(given) == 1 else given
    agree = sum(answer == said for answer in given)
    return sum(min(1.0, (agree - (answer == said)) / 3) for answer in given) / len(given)


def agreement(predictions: Sequence[str], unpatched: Sequence[str]) -> np.ndarray:
    """[n] float64: 1 where a patched model says what the unpatched one says, right or wrong."""
    return np.array([float(exact_match(said, before)) for said, before in zip(predictions, unpatched)])


def words_apart(text: str) -> str:
    """Lower case, without commas and question marks, a space before "'s"."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


_FIRST = {"textvqa": words_apart}  # mode -> what comes before everything else
