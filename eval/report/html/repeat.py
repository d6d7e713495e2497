"""What a section was measured with, and the command that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from vtok.errors import VtokError
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.values import at, mapping, number, text
from vtok.eval.runs.again import DTYPES, methods_of, of_record
from vtok.eval.runs.loader import checked
from vtok.eval.tasks import RECORDED, TASKS
from vtok.registry import METHODS

_FACTS = {
    "model": "model",
    "weights": "weights",
    "pretrained": "pretrained tag",
    "backend": "backend",
    "dataset": "data",
    "split": "split",
    "n": "samples",
    "num_skipped": "files skipped",
    "prompt": "text behind every question",
    "dtype": "number type",
    "device": "device",
    "device_name": "processor",
    "threads": "threads",
    "num_processes": "processes",
    "batch_size": "batch size",
    "img_size": "image size, pixels",
    "crop_pct": "crop",
    "interpolation": "interpolation",
    "param_count": "parameters, millions",
    "max_new_tokens": "tokens of an answer at most",
    "pairs": "timed pairs",
    "kernel": "attention kernel",
    "attention": "attention of the LLM",
    "seed": "seed",
}
ALL_TOKENS = {"name": "uniform", "keep": 1.0}


class Repeat(NamedTuple):
    """How to measure a section again."""

    commands: list[str]
    files: list[tuple[str, str]]  # (name, content) of configurations that the commands name
    notes: list[str]  # what the records do not say


def environment(section: Section) -> list[tuple[str, str]]:
    """(name, value) of everything that a number may depend on; values that differ between settings are listed."""
    found = []
    for name, label in _FACTS.items():
        values = dict.fromkeys(v for row in section.rows if (v := _words(row.record.get(name))))
        if values:
            found.append((label, " | ".join(list(values)[:4]) + (" …" if len(values) > 4 else "")))
    software = dict.fromkeys(_versions(row.record.get("versions")) for row in section.rows)
    found += [("versions", words) for words in software if words]
    found.append(("read from", ", ".join(dict.fromkeys(text(row.record.get("path")) for row in section.rows))))
    return found


def repeat(section: Section, number_: int) -> Repeat:
    """Commands for a section: the run files and commands that its records hold, else what their fields say; `number_` is in
    the names of files."""
    if section.bench:
        return _bench(section)
    held, commands, notes = list[dict[str, Any]](), list[str](), list[str]()
    for row in section.rows:
        told = row.record.get("command")
        if isinstance(told, list) and told:
            commands.append(shlex.join(text(word) for word in told))
            continue
        config = mapping(row.record.get("config")) or _config(row, notes)
        if config:
            held.append(config)
    configs = _joined(held, notes)
    names = [f"run-{number_}.yaml" if len(configs) == 1 else f"run-{number_}-{i}.yaml" for i in range(1, len(configs) + 1)]
    random = ["--no-pretrained"] if any(row.record.get("pretrained") is False for row in section.rows) else []
    commands += [shlex.join(["vtok", "run", name, *random]) for name in names]
    notes = list(dict.fromkeys(notes))
    if not commands:
        notes.append("the records do not say how they were made")
    return Repeat(list(dict.fromkeys(commands)), list(zip(names, configs)), notes)


def _config(row: Row, notes: list[str]) -> dict[str, Any]:
    """A run file from the fields of a record that holds none; empty if they do not make one, with a note."""
    r = row.record
    task = RECORDED.get(text(r.get("task")), text(r.get("task")))
    if task not in TASKS.names():
        return {}
    try:
        found = of_record(r, task, [] if row.unpatched else methods_of(r))
        checked("record", "record", found if found["method"] is not None else found | {"method": dict(ALL_TOKENS)})
    except (VtokError, TypeError, ValueError, KeyError, AttributeError) as error:
        notes.append(f"{row.label}: no run file can be made of what its record says ({text(error)})")
        return {}
    notes.append(
        "an earlier release wrote these records: the data stand in the run file as they are named there, put their path"
    )
    return found


def _bench(section: Section) -> Repeat:
    """The benchmark once more."""
    r, methods, notes = section.first, list[str](), list[str]()
    for row in section.patched:
        try:
            methods.append(method_text(row.record))
        except (VtokError, TypeError, ValueError, KeyError, AttributeError) as error:
            notes.append(f"{row.label}: its parameters cannot be written as a command ({text(error)})")
    batch = ["-b", text(r.get("batch_size"))] if number(r.get("batch_size")) else []
    threads = ["--threads", text(r.get("threads"))] if number(r.get("threads")) else []
    dtype = DTYPES.get(text(r.get("dtype")), "fp32")
    words = ["vtok", "bench", text(r.get("model")), *dict.fromkeys(methods), *batch, *threads, "--dtype", dtype]
    return Repeat([shlex.join([*words, "--json", "bench.json"])], [], notes)


def _joined(configs: Sequence[dict[str, Any]], notes: list[str]) -> list[str]:
    """YAML of runs: those that differ in the method alone become one with a list of `methods`."""
    grouped: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for config in configs:
        rest = {name: value for name, value in config.items() if name != "method"}
        _, methods = grouped.setdefault(yaml.safe_dump(rest), (rest, []))
        own = config.get("method")
        if own is not None and own not in methods:
            methods.append(own)
    written = []
    for rest, methods in grouped.values():
        if not methods:
            notes.append("a run compares a method with the unpatched model: the one named here keeps all tokens")
        methods = methods or [dict(ALL_TOKENS)]
        named = {"methods": methods} if len(methods) > 1 else {"method": methods[0]}
        written.append(yaml.safe_dump({**rest, **named}, sort_keys=False, allow_unicode=True))
    return written


def method_text(record: dict[str, Any]) -> str:
    """A record's method as the command line writes it: `tome:r=13`, several joined by "+"; defaults are left out. Raises
    `UnknownNameError`: the method or a parameter of it is not known here."""
    return "+".join(_one(name, params) for name, params in methods_of(record))


def _one(name: str, params: dict[str, Any]) -> str:
    cls = METHODS.get(name)
    config = cls.create(**params)
    usual, given = cls().to_dict(), config.to_dict()
    words = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]}"
        for key, value in given.items()
        if key != "method" and value != usual.get(key)
    ]
    return name + (":" + ",".join(words) if words else "")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        if set(value) == {"base", "patched"} and len(set(map(str, value.values()))) == 1:
            return text(value["base"])
        return ", ".join(f"{text(name, 40)} {text(one, 80)}" for name, one in value.items())
    return text(value, 120) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _versions(value: Any) -> str:
    return ", ".join(f"{text(name, 40)} {text(one, 40)}" for name, one in mapping(value).items())


def model_name(record: dict[str, Any]) -> str:
    """Name of the model: of the configuration, if the record holds one."""
    return text(at(record, "config", "model", "name")) or text(record.get("model"))
