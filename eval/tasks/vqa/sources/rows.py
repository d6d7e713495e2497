"""The one form in which a task is given its questions: rows, from public files or from the `datasets` library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources import Sources
from vtok.eval.tasks.vqa.sources.pictures import Pictures
from vtok.eval.tasks.vqa.sources.reading import entries, load_json, load_lines, located, secret, text_of, texts_of


@dataclass(frozen=True)
class Row:
    """An entry of a public file, or a row of the `datasets` library. Values are checked when a question is made of them.

    Attributes:
        content: field -> value.
        place: where it stands, for messages.
        form: what is expected, for messages.
        number: its place among the others, or what the file knows it by.
        image: key of what is shown; `None` = nothing.
        split: part of the data.
        part: which of several files it comes from, "" = there is one.
        names: field -> what its source calls it.
        ocr: whether the prompt is to name OCR tokens.
    """

    content: Mapping[str, Any]
    place: str
    form: str
    number: Any = 0
    image: Any = None
    split: str = ""
    part: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    ocr: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, Mapping):
            raise ConfigError(f"{self.place} is {type(self.content).__name__} instead of an object {self.form}")

    def get(self, name: str) -> Any:
        """The value of a field, `None` if it is not there."""
        return self.content.get(self.names.get(name, name))

    def need(self, *names: str) -> list[Any]:
        """Values of fields that must all be there; `ConfigError` names those that are not."""
        missing = [repr(self.names.get(name, name)) for name in names if self.get(name) is None]
        if missing:
            raise ConfigError(f"{self.place} has no {', '.join(missing)}; expected {self.form}")
        return [self.get(name) for name in names]

    def text(self, name: str) -> str:
        return text_of(self.need(name)[0], repr(self.names.get(name, name)), self.place)

    def key(self, name: str) -> Any:
        """What a question or an image is known by: a text or a number, as it is."""
        self.text(name)
        return self.get(name)

    def texts(self, name: str) -> tuple[str, ...]:
        return texts_of(self.need(name)[0], repr(self.names.get(name, name)), self.place)

    def group(self, name: str) -> str:
        """What the question is counted under; "" where the field is not there."""
        return "" if self.get(name) is None else self.text(name)

    def answers(self) -> tuple[str, ...]:
        """Of people: a list that is not empty, but for a split whose answers are kept secret."""
        return () if secret(self.split) and not self.get("answers") else self.texts("answers")


Ask = Callable[[Row], "Question | Sequence[Question]"]


@dataclass(frozen=True)
class Rows:
    """What files or a data set hold: rows, each looked at once, and `pictures`, which `read` and `identify` their images.

    `path` is for messages; `name` is that of the data set where it is not the task's.
    """

    rows: Iterable[Row]
    path: Path
    pictures: Any
    split: str = ""
    name: str = ""

    def ask(self, name: str, question: Ask, prompt: str = "") -> VQAData:
        """The questions that the rows are, one or several each; `ConfigError` for none, and for a number that several have."""
        found: list[Question] = []
        for row in self.rows:
            made = question(row)
            found += [made] if isinstance(made, Question) else made
        for q in found:
            text_of(q.doc_id, "what a question is known by", str(self.path))
        repeated = [number for number, count in Counter(q.doc_id for q in found).items() if count > 1]
        if repeated:
            raise ConfigError(
                f"{self.path} asks question {repeated[0]} more than once; every question needs a number of its own"
            )
        if not found:
            raise ConfigError(f"{self.path} holds no questions")
        seen, probe = self.pictures, getattr(self.pictures, "probe", None)
        return VQAData(self.name or name, found, seen.read, prompt, split=self.split, identify=seen.identify, probe=probe)


@dataclass(frozen=True)
class Files:
    """The commonest public form: a JSON file with a list of questions, and a folder of images; call it to read them.

    Attributes:
        pattern: name of the file, may hold `*`; `{split}` stands for the split.
        form: of the file, for messages.
        split: that is asked where none is named.
        key: under which the list stands; `None` = the file is the list, or one of `kind`.
        kind: "list", "object" (number -> entry) or "lines" (an entry a line).
        number: field by which messages name an entry; "" = its place.
        image: field with the name of the image.
        ending: of the image's file, which its name lacks.
        names: see `Row`; these fields must be there.
        pictures: what finds the images.
    """

    pattern: str
    form: str
    split: str = ""
    key: str | None = None
    kind: str = "list"
    number: str = ""
    image: str = "image"
    ending: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    pictures: type[Pictures] = Pictures

    def __call__(self, sources: Sources) -> Rows:
        """The rows of a task's file; `ConfigError` where it is not there or not of the form."""
        split = (sources.split if "{split}" in self.pattern else "") or self.split
        path, pictures = located(sources, self.pattern.format(split=split)), self.pictures.of(sources)
        return Rows(self.rows(path, pictures, split), path, pictures, split)

    def rows(self, path: Path, pictures: Pictures, split: str = "", part: str = "") -> Iterator[Row]:
        """The rows of one file, about these pictures; split and part as in `Row`."""
        for number, place, entry in self.entries(path):
            row = Row(entry, place, self.form, number, None, split, part, self.names)
            row.need(self.image, *self.names)
            if self.number:
                row = replace(row, place=f"{path}: question {brief(row.key(self.number))}")
            yield replace(row, image=str(pictures.find(row.text(self.image) + self.ending, row.place)))

    def entries(self, path: Path) -> Iterator[tuple[Any, str, Any]]:
        """(number, place for messages, entry) of a file."""
        if self.kind == "lines":
            yield from ((i, place, entry) for i, (place, entry) in enumerate(load_lines(path, self.form)))
            return
        content = load_json(path, self.form)
        if self.kind == "list":
            listed = entries(content, self.key, path, self.form)
            yield from ((i, f"{path}: entry {i}", entry) for i, entry in enumerate(listed))
            return
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is not of the form {self.form}: it holds {type(content).__name__}")
        yield from ((number, f"{path}: question {brief(number)}", entry) for number, entry in content.items())
