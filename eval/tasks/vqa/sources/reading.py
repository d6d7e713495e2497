"""Reading public files: every complaint names the file, the entry and the form that is expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import digest, find_files, find_pictures, leaves, open_picture, within
from vtok.eval.tasks.vqa.sources import Sources
from vtok.reading import exists, from_json, is_file, is_folder, regular

SHORT = "\nAnswer the question using a single word or phrase."  # what lmms-eval puts behind most questions


def located(sources: Sources, pattern: str) -> Path:
    """The file with the questions: the one that was named, the data itself, or the only one of that name in its folder.

    Args:
        sources: of the task.
        pattern: its name in the public distribution, e.g. "TextVQA_0.5.1_val.json"; may hold `*`.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if sources.questions or is_file(sources.data):
        path = Path(sources.questions or sources.data)
        if not exists(path):
            raise ConfigError(f"{brief(path)} does not exist; name the task's file with the questions ({pattern})")
        return regular(path)
    if not is_folder(sources.data):
        raise ConfigError(f"{brief(sources.data)} is neither a folder nor a file; name the folder that holds {pattern}")
    found = find_files(sources.folder, pattern)
    if len(found) != 1:
        others = "" if not found else ": " + ", ".join(str(path.relative_to(sources.folder)) for path in found[:4])
        raise ConfigError(f"{sources.folder} holds {len(found)} files {pattern}{others}; name the one to read with --questions")
    return found[0]


def load_json(path: Path, form: str) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        form: what is expected, for messages.

    Raises:
        ConfigError: the file is missing or no JSON.
    """
    return from_json(_content(path), f"{path} is no JSON file of the form {form}")


def load_lines(path: Path, form: str) -> Iterator[tuple[str, Any]]:
    """(place, content) of every line of a file of JSON lines.

    Raises:
        ConfigError: the file is missing, or a line is no JSON.
    """
    for number, line in enumerate(_content(path).splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", from_json(line, f"{path}:{number} is no JSON object of the form {form}")


def _content(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def entries(content: Any, key: str | None, path: Path, form: str) -> list[Any]:
    """A list that a file holds, under a key or itself.

    Raises:
        ConfigError: there is no such list.
    """
    found = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ConfigError(f"{path} is not of the form {form}: no list" + ("" if key is None else f" under {shown(key)}"))
    return found


def fields(entry: Any, names: Sequence[str], place: str, form: str) -> list[Any]:
    """Values of an object that must all be there.

    Args:
        entry: the object.
        names: of the values.
        place: where it stands, for messages: file and line, or file and number.
        form: what is expected.

    Raises:
        ConfigError: it is no object, or one is missing.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place} is {type(entry).__name__} instead of an object {form}")
    missing = [name for name in names if entry.get(name) is None]
    if missing:
        raise ConfigError(f"{place} has no {', '.join(repr(name) for name in missing)}; expected {form}")
    return [entry[name] for name in names]


def secret(split: str) -> bool:
    """Whether the answers of a split are known to the evaluation server alone."""
    return split.startswith("test")


def text_of(value: Any, what: str, place: str) -> str:
    """A text; numbers are written out.

    Args:
        value: as a file holds it.
        what: of what it is the value, for messages.
        place: where it stands, for messages.

    Raises:
        ConfigError: it is neither: nothing, a list, an object.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{place}: {what} must be a text, found {shown(value)}")


def number_of(value: Any, what: str, place: str) -> Any:
    """What a question or an image is known by: a number or a text, as it is.

    Raises:
        ConfigError: it is neither.
    """
    text_of(value, what, place)
    return value


def group_of(entry: Mapping[str, Any], name: str, place: str) -> str:
    """What an object says that its question is counted under; "" if it does not.

    Raises:
        ConfigError: it is no text.
    """
    value = entry.get(name)
    return "" if value is None else text_of(value, repr(name), place)


def texts_of(value: Any, what: str, place: str) -> tuple[str, ...]:
    """A list of at least one text; objects with "answer", as VQAv2 has them, stand for what they hold.

    Args:
        value: as a file holds it.
        what: of what it is the value, for messages.
        place: where it stands, for messages.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{place}: {what} must be a list of at least one text, found {shown(value)}")
    return tuple(
        text_of(one["answer"] if isinstance(one, Mapping) and "answer" in one else one, f"every one of {what}", place)
        for one in value
    )


def answer_list(entry: Any, place: str, form: str, split: str) -> tuple[str, ...]:
    """Answers of people: a list of texts that is not empty, but for a split whose answers are kept secret.

    Args:
        entry: with "answers".
        place: where it stands, for messages.
        form: what is expected.
        split: part of the data.

    Raises:
        ConfigError: it is something else.
    """
    if secret(split) and not entry.get("answers"):
        return ()
    (value,) = fields(entry, ("answers",), place, form)
    return texts_of(value, "'answers'", place)


def yes_no(value: Any, place: str) -> str:
    """ "yes" or "no", however it is written.

    Raises:
        ConfigError: it is something else.
    """
    found = str(value).strip().lower().rstrip(".")
    if found not in ("yes", "no"):
        raise ConfigError(f"{place}: the answer must be yes or no, found {shown(value)}")
    return found


class Pictures:
    """Images of a folder by name; reading one gives a PIL image.

    Args:
        folder: they lie in it at any depth.
        named: whether somebody named the folder as that of the images: links in it may then lead elsewhere, and of a name that
            leads out of it the file's own name counts.
    """

    kind = "image"  # what they are called in messages

    def __init__(self, folder: Path, named: bool = False):
        self.folder, self.named = folder, named
        self._index: dict[str, list[Path]] | None = None
        self._known: dict[str, Path] = {}

    @classmethod
    def of(cls, sources: Sources) -> Pictures:
        """The images of a task."""
        return cls(sources.image_folder, bool(sources.images))

    def find(self, name: str, place: str, deep: bool = True) -> Path:
        """The file of an image.

        Args:
            name: of the file, with folders or without, with its ending or without.
            place: what asks for it, for messages.
            deep: whether to look for it at any depth; otherwise it is where its name says.

        Raises:
            ConfigError: it is missing, several have that name, or it lies outside the folder.
        """
        if name not in self._known:
            found = self._find(name, place, deep)
            if not self.named and not within(self.folder, found):
                raise ConfigError(
                    f"{place}: the {self.kind} {brief(name)} is a link to {found.resolve()}, outside {self.folder}; if that is "
                    f"meant, pass the folder of the {self.kind}s (--images)"
                )
            self._known[name] = found
        return self._known[name]

    def _find(self, name: str, place: str, deep: bool) -> Path:
        out = leaves(name) and not _below(self.folder, name)
        if out and not self.named:
            raise ConfigError(
                f"{place}: the {self.kind} {brief(name)} lies outside {self.folder}; if that is meant, pass the folder of the "
                f"{self.kind}s (--images)"
            )
        direct = self.folder / name
        if not out and is_file(direct):
            return direct
        found = self._by_name(Path(name).name) if deep or out else []
        nearer = [path for path in found if path.with_suffix("").as_posix().endswith(Path(name).with_suffix("").as_posix())]
        found = nearer or found
        if not found:
            raise ConfigError(
                f"{place}: the {self.kind} {brief(name)} is missing from {self.folder}; pass the folder of the {self.kind}s "
                "(--images)"
            )
        if len(found) > 1:
            raise ConfigError(
                f"{place}: the {self.kind} {name} may be {found[0]} or {found[1]}; pass the folder of one (--images)"
            )
        return found[0]

    def _by_name(self, name: str) -> list[Path]:
        if self._index is None:
            self._index = {}
            for path in find_pictures(self.folder):
                for key in {path.name, path.stem}:
                    self._index.setdefault(key, []).append(path)
        return self._index.get(name, [])

    @property
    def read(self) -> Callable[[Any], Any]:
        """Path as text -> PIL image."""
        return open_picture

    @property
    def identify(self) -> Callable[[Any], str]:
        """Path as text -> hash of the file."""
        return digest


def _below(folder: Path, name: str) -> bool:
    """Whether an absolute name stands for a file in the folder."""
    return Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).is_relative_to(folder.absolute())
