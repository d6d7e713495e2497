"""Which letter an answer means, as lmms-eval reads it for several sets of questions with choices."""

from __future__ import annotations

from collections.abc import Sequence

from vtok.errors import ConfigError, shown
from vtok.eval.tasks.vqa.sources.rows import Row

BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
_STRIPPED = ",.!?;:'\""  # one after the other
# what may stand in front of the letter, in English, Korean, Chinese and Japanese
_LEADS = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
# how a letter is written, the surest first; alone at the beginning or at the end of the answer is surer than all of them
_ALONE_FIRST, _ALONE_LAST, _LED = 10, 9, 7
_WRITTEN = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))


def stripped(text: str, marks: str = _STRIPPED) -> str:
    """Without each of the marks, one after the other, at either end."""
    for mark in marks:
        text = text.strip(mark)
    return text


def letter_of(said: str, letters: Sequence[str] = "ABCD") -> str:
    """The letter (a capital) that an answer means: the last one of those written in the surest way; "" if there is none."""
    if not said.strip():
        return ""
    bare = stripped(said.strip())
    text, small = f" {bare} ", f" {bare} ".lower()
    bare = text.strip()
    found = [
        (sure, text.rfind(form.format(letter)), letter)
        for form, sure in _WRITTEN
        for letter in letters
        if form.format(letter) in text
    ]
    for lead in _LEADS:
        if lead in small:
            after = small.find(lead) + len(lead)
            found += [(_LED, place, letter) for letter in letters if (place := text.find(letter, after)) >= 0]
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_ALONE_FIRST, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_ALONE_LAST, len(text) - 1, letter))
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda one: one[:2])[2] if found else ""


def listed(options: Sequence[str], form: str = "{}. {}") -> str:
    """One choice a line with its letter, from A on."""
    return "\n".join(form.format(chr(ord("A") + i), option) for i, option in enumerate(options))


def one_of_four(row: Row) -> str:
    """The letter that a row says is right; `ConfigError` if it is none."""
    answer = row.get("answer")
    if answer not in ("A", "B", "C", "D"):
        raise ConfigError(f"{row.place}: 'answer' must be A, B, C or D, found {shown(answer)}")
    return answer
