"""Finds results in files and folders. Damaged lines and files are told, not fatal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief
from vtok.eval.common.records import Record, json_lines
from vtok.eval.report.values import mapping
from vtok.reading import exists, regular

_BIGGEST = 1 << 30  # bytes of one file


@dataclass
class Results:
    """What was found."""

    records: list[Record] = field(default_factory=list)  # results of settings, each with the `path` of its file added
    samples: dict[str, list[Record]] = field(default_factory=dict)  # key of a record -> its answers to single questions
    problems: list[str] = field(default_factory=list)  # sentences on what could not be read
    files: list[Path] = field(default_factory=list)  # that held something


def read(paths: Sequence[str | Path]) -> Results:
    """Reads results.jsonl, samples.jsonl and JSON files of `vtok run`, `sweep`, `eval`, `bench` and `demo`.

    Args:
        paths: files, or folders that are searched at any depth.

    Raises:
        ConfigError: a path does not exist, or no result is in any of them.
    """
    found, by_key = Results(), dict[str, Record]()
    for path in map(Path, paths):
        if not exists(path):
            raise ConfigError(
                f"{brief(path)} does not exist; name files or folders with results of vtok run, sweep, eval, bench or demo"
            )
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.suffix in (".json", ".jsonl") and p.is_file()]
            files.sort(key=lambda p: (len(p.parts), p))  # what lies on top comes first
        else:
            files = [regular(path)]
        for file in files:
            _read(file, found, by_key, asked=not path.is_dir())
    found.records = _without_copies([*found.records, *by_key.values()])
    if not found.records:
        told = "; ".join(found.problems[:3])
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no results there; a result is a line of results.jsonl or the JSON of vtok run, "
            f"eval or bench{f' ({told})' if told else ''}"
        )
    return found


def _without_copies(records: list[Record]) -> list[Record]:
    """Runs keep the records of their tasks in folders of their own, under other keys: copies of what a run has itself."""
    homes: dict[str, set[Path]] = {}
    for record in records:
        if mapping(record.get("config")):
            homes.setdefault(_same(record), set()).add(Path(record["path"]).parent)

    def copied(record: Record) -> bool:
        return not homes.get(_same(record), set()).isdisjoint(Path(record["path"]).parent.parents)

    return [record for record in records if not copied(record)]


def _same(record: Record) -> str:
    """Equal for a record of a run and that of its task."""
    title = record.get("title") or record.get("setting")
    return json.dumps([record.get(name) for name in ("model", "dataset", "n", "correct")] + [title], default=str)


def _read(path: Path, found: Results, by_key: dict[str, Record], asked: bool) -> None:
    """Adds what one file holds."""
    held = False
    for where, value in _values(path, found.problems):
        if _is_sample(value):
            key, _, _ = str(value["key"]).partition("/")  # names of questions may hold more
            found.samples.setdefault(key, []).append({**value, "path": str(path)})
        elif _is_record(value):
            _add({**value, "path": str(path)}, found, by_key)
        else:
            if path.suffix == ".jsonl" or asked:
                found.problems.append(f"{where}: not a result, left out")
            continue
        held = True
    if held:
        found.files.append(path)


def _values(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line of a .jsonl file, of every element of a .json file."""
    try:
        if path.stat().st_size > _BIGGEST:
            problems.append(f"{path}: larger than {_BIGGEST >> 20} MiB, left out")
            return
        data = path.read_bytes()
        value = None if path.suffix == ".jsonl" else json.loads(data)
    except OSError as error:
        problems.append(f"{path} cannot be read: {error}")
        return
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: damaged file left out ({error})")
        return
    if path.suffix != ".jsonl":
        for number, one in enumerate(value if isinstance(value, list) else [value], 1):
            yield f"{path}, element {number}", one
        return
    for number, value in json_lines(data):
        if isinstance(value, Exception):
            problems.append(f"{path}:{number}: damaged line left out ({value})")
        else:
            yield f"{path}:{number}", value


def _is_sample(value: Any) -> bool:
    return isinstance(value, dict) and "prediction" in value and "doc_id" in value and "/" in str(value.get("key", ""))


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and "method" in value and ("metrics" in value or "speedup" in value)


def _add(record: Record, found: Results, by_key: dict[str, Record]) -> None:
    """Files written one after the other may hold the same record; the later one wins, and says so if it differs."""
    key = record.get("key")
    if not isinstance(key, str):
        found.records.append(record)
        return
    earlier = by_key.setdefault(key, record)
    if earlier["path"] == record["path"]:  # files only grow: the last line of a setting is its result
        by_key[key] = record
    elif any(earlier[name] != record[name] for name in earlier.keys() & record.keys() - {"path"}):
        found.problems.append(
            f"{earlier['path']} and {record['path']} hold different results of one setting ({record.get('method')}, key "
            f"{key}); the later one is shown"
        )
        by_key[key] = record
    else:
        by_key[key] = earlier | record
