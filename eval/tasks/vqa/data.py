"""Questions about images: the bundled ones, files in VQAv2's format, and lines of JSON."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from vtok.errors import brief
from vtok.eval.common.pictures import digest, shrink
from vtok.eval.common.records import key_of
from vtok.eval.common.videos import Clip
from vtok.eval.tasks.vqa.metrics import majority

EASY_VQA, PAGES, SCENES, PRINT = "easy-vqa", "easy-vqa-pages", "scenes", "print"
GOLDEN = 0.6180339887498949
KINDS = ("yes/no", "open")
_YES_NO = ("yes", "no")


class Question(NamedTuple):
    """One question about one image.

    Attributes:
        doc_id: number or name of the question.
        text: of the question, as it was asked.
        answers: of everybody who was asked, the most frequent one is the target; empty where the evaluation server alone knows
            them.
        image: key of the image, or of what else is shown: several images, frames of a video; `None` = a question without one.
        groups: what it is counted under besides, e.g. {"kind": "yes/no"}.
        facts: what else its score depends on, e.g. {"choices": 4}.
    """

    doc_id: Any
    text: str
    answers: tuple[str, ...]
    image: Any
    groups: Mapping[str, str]
    facts: Mapping[str, Any] = MappingProxyType({})

    @property
    def target(self) -> str:
        return majority(self.answers) if self.answers else ""


@dataclass(frozen=True)
class VQAData:
    """Questions and where their images come from.

    Attributes:
        name: of the data set.
        questions: in the order in which they are asked.
        read: key of an image -> PIL image, a list of them, or a `Clip`.
        prompt: what stands behind every question.
        blind: text of a question -> the best answer without the image, as far as it is known.
        split: part of the data set that it is.
        whole: whether scores need all questions about an image, so that a part of them is a part of the images.
        identify: key of an image -> hash of its content; `None` = of its pixels.
        probe: key of an image -> nothing; raises if it cannot be read. `None` = what `read` does.
    """

    name: str
    questions: Sequence[Question]
    read: Callable[[Any], Any]
    prompt: str = ""
    blind: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    whole: bool = False
    identify: Callable[[Any], str] | None = None
    probe: Callable[[Any], None] | None = None

    def take(self, count: int | None) -> VQAData:
        """One question of each of `count` equal stretches; `None` = all.

        Where in its stretch a question stands follows the golden ratio: files list the kinds of questions in turn, and every
        eighteenth one may always be of one kind. Of `whole` data it takes images in this way, as few as have `count` questions.
        """
        total = len(self.questions)
        if count is None or count >= total:
            return self
        if not self.whole:
            return replace(self, questions=[self.questions[row] for row in _stretches(total, count)])
        images = list(dict.fromkeys(q.image for q in self.questions))
        chosen = {images[row] for row in _stretches(len(images), math.ceil(count * len(images) / total))}
        return replace(self, questions=[q for q in self.questions if q.image in chosen])

    def identity(self) -> str:
        """Hash of all that is asked: questions, answers, and what the images show. Every image is read once."""
        images = {q.image: self._identify(q.image) for q in self.questions}
        asked = [
            [q.doc_id, q.text, q.answers, images[q.image], dict(q.groups), dict(q.facts), self.blind.get(q.text)]
            for q in self.questions
        ]
        return key_of({"questions": asked})

    def _identify(self, image: Any) -> str | None:
        if image is None:
            return None
        return digest(self.read(image)) if self.identify is None else self.identify(image)

    def readable(self) -> tuple[VQAData, list[tuple[str, str]]]:
        """(The questions whose picture can be read, (picture, why not) of the others). Every picture is read once."""
        skipped: dict[Any, str] = {}
        probe = self.read if self.probe is None else self.probe
        for image in dict.fromkeys(q.image for q in self.questions if q.image is not None):
            try:
                probe(image)
            except Exception as error:  # decoders raise whatever they like
                skipped[image] = brief(error)
        if not skipped:
            return self, []
        kept = [q for q in self.questions if q.image not in skipped]
        return replace(self, questions=kept), [(str(image), why) for image, why in skipped.items()]

    def shrunk(self, factor: int) -> VQAData:
        """The same questions about pictures, or frames, whose sides are divided by a factor; the name says so."""
        if factor == 1:
            return self
        identify = self.identify
        return replace(
            self,
            name=f"{self.name}, sides / {factor}",
            read=lambda image: _shrunk(self.read(image), factor),
            identify=None if identify is None else lambda image: key_of({"image": identify(image), "sides": factor}),
            probe=self.read if self.probe is None else self.probe,
        )

    def with_prompt(self, prompt: str) -> VQAData:
        return replace(self, prompt=prompt)


def _shrunk(seen: Any, factor: int) -> Any:
    if isinstance(seen, Clip):
        return seen._replace(frames=[shrink(frame, factor) for frame in seen.frames])
    return [shrink(one, factor) for one in seen] if isinstance(seen, list) else shrink(seen, factor)


def _stretches(total: int, count: int) -> list[int]:
    return [int((i + i * GOLDEN % 1) * total / count) for i in range(count)]


def blind_answers(questions: Iterable[str], answers: Iterable[str]) -> dict[str, str]:
    """Text of a question -> its most frequent answer (the first of several): what can be said without an image, at best."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in zip(questions, answers):
        said[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in said.items()}


def kind_of(*answers: str) -> str:
    """ "yes/no" or "open", by the target."""
    return KINDS[0] if majority(answers) in _YES_NO else KINDS[1]
