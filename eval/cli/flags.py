"""Command-line flags made from the fields of an options dataclass, so that names and defaults are stated once."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from vtok.errors import ConfigError, shown
from vtok.eval.runs import yaml_text

METHOD_HELP = "name or name:key=value,...; repeatable"
SETTING_HELP = "name or name:key=value,...; several patched together joined by +; repeatable"
_SHORT = {"batch_size": "-b", "workers": "-j"}


def value_of(options: type, name: str, value: Any) -> Any:
    """Numbers, lists and mappings that the command line gives as text.

    Args:
        options: the dataclass.
        name: of the field.
        value: as typer hands it over.

    Raises:
        ConfigError: the text cannot be read as what the field holds.
    """
    kind = _kinds(options)[name]
    if value is None or not isinstance(value, str):
        return value
    try:
        if "tuple" in kind and "str" in kind:
            return tuple(part.strip() for part in value.split("|"))
        if "tuple" in kind:
            number = float if "float" in kind else int
            return tuple(number(part) for part in value.replace(",", " ").split())
        if "Mapping" in kind:
            parsed = yaml_text.parse("{" + value.replace("=", ": ") + "}", f"--{name.replace('_', '-')}")
            if not isinstance(parsed, dict):
                raise ValueError("not key=value")
            return parsed
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')} cannot be read: {shown(value)} ({error})") from error
    return value


def options_from(options: type, flags: Mapping[str, Any]) -> Any:
    """An instance of the dataclass from what typer read."""
    return options(**{name: value_of(options, name, value) for name, value in flags.items() if value is not None})


def signature(options: type, leading: Mapping[str, tuple[Any, Any]]) -> inspect.Signature:
    """A typer command's signature: the `leading` parameters (name -> annotation, default), then one keyword a field."""
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in leading.items()
    ]
    about = _help(options)
    for name, kind in _kinds(options).items():
        default = next(field.default for field in dataclasses.fields(options) if field.name == name)
        if "tuple" in kind:
            default = " ".join(str(part) for part in default) if isinstance(default, tuple) and default else None
        text = "tuple" in kind or "Mapping" in kind
        base = str if text else {"str": str, "bool": bool, "int": int, "float": float}[kind.split(" |")[0]]
        optional = text or "None" in kind
        flag = "--" + name.replace("_", "-")
        names = [flag, *([_SHORT[name]] if name in _SHORT else [])] if base is not bool else [f"{flag}/--no-{flag[2:]}"]
        annotation: Any = Annotated[base | None if optional else base, typer.Option(*names, help=about.get(name))]
        made.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=annotation,
                default=None if default is dataclasses.MISSING else default,
            )
        )
    return inspect.Signature(made)


def _help(options: type) -> dict[str, str]:
    """What the docstrings of the dataclass and of its bases say about each field."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        listed = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+(?:,\s+\w+)*): (.+?)(?=\n    \w|\Z)", listed, re.MULTILINE | re.DOTALL)
        found |= {name: " ".join(text.split()) for names, text in entries for name in re.split(r",\s+", names)}
    return found


def _kinds(options: type) -> dict[str, str]:
    return {field.name: str(field.type) for field in dataclasses.fields(options)}
