"""The tests that a release of transformers brings with its source distribution, and runs of them in a process of their own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

ROOT = Path(__file__).parents[1]
RUNNER = Path(__file__).parent / "upstream" / "run.py"
COMMON = "test_modeling_common.py"


def release_tests(cache: Path) -> Path:
    """A folder with transformers' common tests as the package `tests`, of the release that is installed.

    Wheels leave the tests out; the source distribution holds those that all models share. It is fetched once, by pip, from
    whatever index pip is set up for. Mixins that the common tests import from files that are left out there too (generation,
    export) are made, empty.

    Args:
        cache: where the folder is kept from run to run.

    Raises:
        RuntimeError: pip cannot get it, or it holds no such tests.
    """
    name = f"transformers-{version('transformers')}"
    with FileLock(cache / f"{name}.lock"):
        folder = cache / name
        if not (folder / "tests" / COMMON).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache) as new:
                archive = _download(name.replace("-", "==", 1), Path(new))
                _fill_in(_unpack(archive, Path(new) / "tests"))
                folder.mkdir()
                (Path(new) / "tests").rename(folder / "tests")
    return folder


def _download(what: str, folder: Path) -> Path:
    """The archive. Its metadata is built by the setuptools that is here: nothing else has to be fetched."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    done = subprocess.run([*command, "--dest", str(folder), what], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip cannot get the source distribution of {what}: {done.stderr.strip()[-1000:]}")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _unpack(archive: Path, folder: Path) -> Path:
    """The files tests/*.py of a source distribution."""
    folder.mkdir()
    with tarfile.open(archive) as files:
        for member in files:
            parts = Path(member.name).parts
            content = files.extractfile(member) if parts[1:2] == ("tests",) and len(parts) == 3 else None
            if content is not None:
                (folder / parts[2]).write_bytes(content.read())
    if not (folder / COMMON).is_file():
        raise RuntimeError(f"{archive.name} holds no tests/{COMMON}")
    return folder


def _fill_in(tests: Path) -> None:
    """Makes the modules of `tests` that the common ones import and the source distribution lacks, with empty classes."""
    wanted: dict[Path, set[str]] = {}
    for node in ast.walk(ast.parse((tests / COMMON).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            module = tests.joinpath(*node.module.split(".")).with_suffix(".py")
            if not module.exists():
                wanted.setdefault(module, set()).update(name.name for name in node.names)
    for module, names in wanted.items():
        module.parent.mkdir(exist_ok=True, parents=True)
        module.write_text("".join(f"class {name}:\n    pass\n\n\n" for name in sorted(names)))
        (module.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()


class Failure(NamedTuple):
    """A test, or a part of it, that failed.

    Attributes:
        test: its name.
        part: of the test; "" = all of it.
        errors: names of the exception's classes, its causes' included.
        message: of the exception.
        statement: of the test that was running.
        trace: the frames around.
    """

    test: str
    part: str
    errors: tuple[str, ...]
    message: str
    statement: str
    trace: str

    def __str__(self) -> str:
        return f"{self.test} {self.part}: {self.errors[0]}: {self.message}\n{self.statement}\n{self.trace}"

    @property
    def kind(self) -> str:
        """What a failure is where tokens are dropped.

        A "refusal"; another "shape" of attentions, caches or what the vision tower told; a "recompilation"; no "gradient" of
        hidden states, those returned being copies at the prompt's length; else a "fault".
        """
        if "vtok.errors.VtokError" in self.errors:
            return "refusal"
        if any(name.startswith("torch._dynamo.exc.") for name in self.errors):
            return "recompilation"
        said = f"{self.statement} {self.message.splitlines()[-1:]}"
        if self.errors[0] != "builtins.AssertionError":
            return "fault"
        if "shape" in said and any(name in said for name in ("attentions", "cache", "image_outputs")):
            return "shape"
        return "gradient" if "assertIsNotNone(hidden_states.grad)" in said else "fault"


class Outcome(NamedTuple):
    """A suite under one patch.

    Attributes:
        ran: tests that were run, those that were skipped left out.
        skipped: tests that were skipped.
        failed: what failed.
        tokens: in front of each place where a model drops or merges some, and behind it.
        asked: how often a method was asked what to keep.
    """

    ran: frozenset[str]
    skipped: frozenset[str]
    failed: tuple[Failure, ...]
    tokens: tuple[tuple[int, int], ...]
    asked: int

    def beyond(self, other: Outcome) -> Iterator[Failure]:
        """What failed here, but not there."""
        known = {(failure.test, failure.part) for failure in other.failed}
        return (failure for failure in self.failed if (failure.test, failure.part) not in known)


def outcomes(tests: Path, name: str, ways: tuple[str, ...], folder: Path) -> dict[str, Outcome]:
    """Runs a family's suite once for each way to patch its models.

    Args:
        tests: as `release_tests` returns it.
        name: of the family.
        ways: keys of `PATCHES` in upstream/run.py.
        folder: for temporary files.

    Raises:
        RuntimeError: the process ended early.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    path = os.pathsep.join([str(tests), str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder),
    }
    report = folder / "report.json"
    done = subprocess.run([sys.executable, str(RUNNER), str(report), name, *ways], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the suite of {name} ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(report.read_text())
    return {way: _outcome(one) for way, one in found.items()}


def _outcome(one: dict[str, Any]) -> Outcome:
    failed = tuple(Failure(**{**failure, "errors": tuple(failure["errors"])}) for failure in one["failed"])
    skipped = frozenset(one["skipped"])
    return Outcome(frozenset(one["ran"]) - skipped, skipped, failed, tuple(map(tuple, one["tokens"])), one["asked"])
