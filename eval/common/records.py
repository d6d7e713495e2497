"""Results: one record a setting, as lines of JSON that are appended one finished setting at a time. The file is the truth;
tables, plots and pages derive from it (`vtok.eval.report`).

A record is a mapping of plain values. What every task writes: `key` (equal keys are the same configuration), `task`, `model`,
`backend`, `dataset`, `method`, `setting` (what was asked for), `params` (every number resolved), `n` samples; `metrics` by
name, each with `_stderr` and `_ci`, and against the unpatched model the paired `_difference` with both; `primary`, the headline
among them; `percent`, whether they are percent or shares; `correct`, one bit a sample (see `correctness`); `tokens`, `gmacs`,
`gflops`, `implied_speedup`, `samples_per_sec`, `speedup`, `achieved`, `kernel`, `dtype`, `device`, `threads`, `batch_size`,
`seed`, `versions` and `config`, the run file that measures it once more.

A record is written with one `write` and synchronised to disk under a file lock, so that a kill at any moment loses at most
the configuration in progress and two processes never mix lines. A damaged line is reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vtok.errors import ConfigError
from vtok.writing import reason

Record = dict[str, Any]
UNPATCHED = "unpatched"  # as `method` of a record
BASELINES = ("random", "uniform")  # methods that choose tokens blindly: what others are compared with
AT_RANDOM = ", tokens at random"  # ends the name of a method whose tokens were drawn (`vtok.eval.common.control`)


def bits(hits: Any) -> str:
    """[n] hits, 0 or 1, in whatever NumPy can read -> one bit each, packed, in hexadecimal: the field `correct`."""
    return np.packbits(np.asarray(hits).astype(bool)).tobytes().hex()


def correctness(record: Record) -> np.ndarray:
    """[n] bool: which samples a setting got right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(record["correct"]), np.uint8), count=record["n"]).astype(bool)


def difference(record: Mapping[str, Any]) -> tuple[float | None, float | None, list[float] | None]:
    """(paired difference of the headline metric to the unpatched model, its standard error, 95 % interval); `None`s without."""
    metrics, primary = record["metrics"], record["primary"]
    name = f"{primary}_difference" if f"{primary}_difference" in metrics else "difference"
    return metrics.get(name), metrics.get(f"{name}_stderr"), metrics.get(f"{name}_ci")


def finite(value: Any) -> Any:
    """The same with `None` for what is not a number: strict JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def key_of(identity: dict[str, Any]) -> str:
    """Short hash of everything that decides a result: equal identities are the same configuration."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stamp(path: str | os.PathLike, without: str | os.PathLike | None = None) -> str | None:
    """Hash of the names, sizes and times of a file, or of all files below a folder; `None` if there is nothing there.

    What is copied or written anew is something else, until its content is looked at. Hidden files do not count, nor does a
    folder below it, such as that of the results (`without`).
    """
    root = os.fspath(path)
    if os.path.isfile(root):
        return key_of({"file": _signs(root)})
    if not os.path.isdir(root):
        return None
    found, seen = [], set[str]() if without is None else {os.path.realpath(without)}
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:  # or a link that leads back
            below.clear()
            continue
        seen.add(real)
        shown = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        found += [[os.path.relpath(place, root), *_signs(place)] for place in shown]
    return key_of({"files": sorted(found)})


def _signs(path: str) -> list[int]:
    """Size and time; none of a link that leads nowhere."""
    try:
        about = os.stat(path)
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]


class Records:
    """An append-only file of JSON lines, whose folder is created.

    Raises:
        ConfigError: its folder cannot be made, or what stands under its name is no file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"results cannot be written to {self.path.parent}: {reason(error)}") from error
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"results cannot be kept in {self.path}: it is no file")
        self._lock = FileLock(f"{self.path}.lock")

    def load(self) -> list[dict[str, Any]]:
        """All readable records, oldest first; damaged lines raise a warning that names them. Raises `ConfigError`: the file
        cannot be read."""
        if not self.path.is_file():
            return []
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"results cannot be read from {self.path}: {reason(error)}") from error
        records = []
        for number, value in json_lines(data):
            if isinstance(value, Exception):
                warnings.warn(f"{self.path}:{number}: damaged line skipped ({_short(value)})", stacklevel=2)
            elif isinstance(value, dict) and isinstance(value.get("key"), str):
                records.append(value)
            else:
                warnings.warn(f"{self.path}:{number}: not a record, skipped", stacklevel=2)
        return records

    def by_key(self) -> dict[str, dict[str, Any]]:
        """The newest record of every configuration."""
        return {record["key"]: record for record in self.load()}

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record that has a `key`."""
        self.extend([record])

    def extend(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records that have a `key`, with one write: all of them or, where the disk is full, none. Raises `ConfigError`:
        they cannot be written; the file is as it was."""
        lines = b"".join(json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n" for record in records)
        try:
            with self._lock, open(self.path, "ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and not _ends_with_newline(file):
                    lines = b"\n" + lines  # a killed writer left half a line: keep it apart
                try:
                    if file.write(lines) != len(lines):
                        raise OSError("the disk is full")
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        file.truncate(end)
                    raise
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {reason(error)}; what it held is still there, and the next start goes on"
            ) from error


def json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number of a line, what it holds, or the error that it raises); empty lines are passed over."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=_no_number, parse_float=_finite)
            except (ValueError, RecursionError) as error:  # ValueError: no JSON, no text, or a number of too many digits
                yield number, error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond any number")
    return value


def _short(error: BaseException) -> str:
    """An error of a damaged line in a few words."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
