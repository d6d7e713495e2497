"""The signatures of `vtok.patch`, `vtok.patched` and `vtok.plan`, one a method, so that editors complete names and knobs:
`python -m vtok.eval.signatures` writes `vtok/_signatures.pyi` anew, from the registry and the fields of the config classes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vtok
from vtok import api
from vtok.registry import METHODS
from vtok.writing import write

FILE = Path(vtok.__file__).with_name("_signatures.pyi")
_HEAD = '''"""Made by `python -m vtok.eval.signatures`; for editors and type checkers alone, nothing imports it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

from torch import nn

from vtok.reports.prompt import PromptPlan
from vtok.reports.results import PlanReport
from vtok.targets.resolve import Method, Size
'''
# function -> (whose keywords it takes, what it returns)
_FUNCTIONS: dict[Callable[..., Any], tuple[Callable[..., Any], str]] = {
    api.patch: (api.patch, "nn.Module"),
    api.patched: (api.patch, "AbstractContextManager[nn.Module]"),
    api.plan: (api.plan, "PlanReport | PromptPlan"),
}


def stub() -> str:
    """The file."""
    names = [name for name in METHODS if METHODS.get(name).__module__.startswith("vtok.")]  # not those of other packages
    listed = "".join(f'    "{name}",\n' for name in names)
    parts = [_HEAD, f"MethodName = Literal[\n{listed}]\n"]
    parts += [_overload(function, name) for function in _FUNCTIONS for name in [*names, None]]
    return "\n".join(parts)


def _overload(function: Callable[..., Any], method: str | None) -> str:
    """One signature; that of all other methods for `None`."""
    source, returned = _FUNCTIONS[function]
    keywords = {name: one for name, one in inspect.signature(source).parameters.items() if one.kind is one.KEYWORD_ONLY}
    name = "MethodName | Method" if method is None else f'Literal["{method}"]'
    usual = inspect.signature(source).parameters["method"].default
    default = f' = "{usual}"' if method in (usual, None) else ""
    lines = ["model: nn.Module", f"method: {name}{default}", "*"]
    lines += [f"{one}: {field.type} = {_shown(field)}" for one, field in _fields(method)]
    lines += [f"{one}: {about.annotation} = {about.default!r}" for one, about in keywords.items()]
    lines += ["**params: Any"] if method is None else []
    written = "".join(f"    {line},\n" for line in lines).replace("**params: Any,", "**params: Any")
    doc, end = inspect.getdoc(function) or "", "\n" if method is None else ""
    if method is not None:
        doc = f"`vtok.{function.__name__}` with {method}; its knobs: help(vtok.{METHODS.get(method).__name__})."
    body = "\n".join(f"    {line}".rstrip() for line in f'"""{doc}{end}"""'.splitlines())
    return f"@overload\ndef {function.__name__}(\n{written}) -> {returned}:\n{body}\n"


def _fields(method: str | None) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for field in () if method is None else dataclasses.fields(METHODS.get(method)):
        yield field.name, field


def _shown(field: dataclasses.Field[Any]) -> str:
    return "..." if field.default is dataclasses.MISSING else repr(field.default)


if __name__ == "__main__":
    write(FILE, stub())
