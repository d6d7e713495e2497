"""Reading public files: every complaint names the file, the entry and the form that is expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.common.pictures import find_files
from vtok.eval.tasks.vqa.sources import Sources
from vtok.reading import exists, from_json, is_folder, regular


def located(sources: Sources, pattern: str) -> Path:
    """The file with the questions: the one that was named, the data itself, or the only one of that name in its folder.

    Args:
        sources: of the task.
        pattern: its name in the public distribution, e.g. "TextVQA_0.5.1_val.json"; may hold `*`.
    """
    if sources.one_file:
        path = Path(sources.one_file)
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
    """What a JSON file of some form holds; `ConfigError` if it is missing or no JSON."""
    return from_json(_content(path), f"{path} is no JSON file of the form {form}")


def load_lines(path: Path, form: str) -> Iterator[tuple[str, Any]]:
    """(place, content) of every line of a file of JSON lines; `ConfigError` if it is missing or a line is no JSON."""
    for number, line in enumerate(_content(path).splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", from_json(line, f"{path}:{number} is no JSON object of the form {form}")


def _content(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def entries(content: Any, key: str | None, path: Path, form: str) -> list[Any]:
    """The list that a file holds, under a key or itself (`None`); `ConfigError` if there is none."""
    found = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ConfigError(f"{path} is not of the form {form}: no list" + ("" if key is None else f" under {shown(key)}"))
    return found


def secret(split: str) -> bool:
    """Whether the answers of a split are known to the evaluation server alone."""
    return split.startswith("test")


def text_of(value: Any, what: str, place: str) -> str:
    """A text, numbers written out; `ConfigError` for anything else, with what it is the value of and where it stands."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{place}: {what} must be a text, found {shown(value)}")


def texts_of(value: Any, what: str, place: str) -> tuple[str, ...]:
    """A list of at least one text, see `text_of`; objects with "answer", as VQAv2 has them, stand for what they hold."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{place}: {what} must be a list of at least one text, found {shown(value)}")
    return tuple(
        text_of(one["answer"] if isinstance(one, Mapping) and "answer" in one else one, f"every one of {what}", place)
        for one in value
    )


def yes_no(value: Any, place: str) -> str:
    """ "yes" or "no", however it is written; `ConfigError` for anything else."""
    found = str(value).strip().lower().rstrip(".")
    if found not in ("yes", "no"):
        raise ConfigError(f"{place}: the answer must be yes or no, found {shown(value)}")
    return found
