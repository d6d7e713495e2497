"""Command-line flags made from the fields of an options dataclass, so that names and defaults are stated once."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from vtok.errors import ConfigError, shown

METHOD_HELP = "name or name:key=value,...; repeatable"
SETTING_HELP = "name or name:key=value,...; several patched together joined by +; repeatable"
Images = Annotated[int, typer.Option(min=1, help="vision-language models: images in a prompt")]
TextTokens = Annotated[int, typer.Option(min=1, help="vision-language models: other tokens of a prompt")]
_SHORT = {"batch_size": "-b", "candidates": "-n", "workers": "-j"}


def value_of(options: type, name: str, value: Any) -> Any:
    """Numbers, lists and mappings that the command line gives as text.

    Args:
        options: the dataclass.
        name: of the field.
        value: as typer hands it over.

    Raises:
        ConfigError: the text cannot be read as what the field holds.
    """
    kind, inside = _kind(get_type_hints(options)[name])
    if not isinstance(value, str) or kind not in (tuple, Mapping):
        return value
    from vtok.eval.runs import yaml_text

    flag = f"--{name.replace('_', '-')}"
    if kind is tuple and inside is str:
        return tuple(part.strip() for part in value.split("|"))
    try:
        if kind is tuple:
            return tuple(inside(part) for part in value.replace(",", " ").split())
        parsed = yaml_text.parse("{" + value.replace("=", ": ") + "}", flag)
        if not isinstance(parsed, dict):
            raise ValueError("not key=value")
        return parsed
    except ValueError as error:
        raise ConfigError(f"{flag} cannot be read: {shown(value)} ({error})") from error


def options_from(options: type, flags: Mapping[str, Any]) -> Any:
    """An instance of the dataclass from what typer read."""
    return options(**{name: value_of(options, name, value) for name, value in flags.items() if value is not None})


def signature(options: type, leading: Mapping[str, tuple[Any, Any]]) -> inspect.Signature:
    """A typer command's signature: the `leading` parameters (name -> annotation, default), then one keyword a field."""
    parameters = {name: (annotation, default) for name, (annotation, default) in leading.items()}
    about, hints = _help(options), get_type_hints(options)
    for field in dataclasses.fields(options):
        (kind, _), default = _kind(hints[field.name]), field.default
        if kind in (tuple, Mapping):
            kind, default = str, " ".join(map(str, default)) if isinstance(default, tuple) and default else None
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        flag = "--" + field.name.replace("_", "-")
        names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *([_SHORT[field.name]] if field.name in _SHORT else [])]
        typed = kind | None if default is None else kind
        parameters[field.name] = (Annotated[typed, typer.Option(*names, help=about.get(field.name))], default)
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
    )


def _help(options: type) -> dict[str, str]:
    """What the docstrings of the dataclass and of its bases say about each field."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        listed = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+(?:,\s+\w+)*): (.+?)(?=\n    \w|\Z)", listed, re.MULTILINE | re.DOTALL)
        found |= {name: " ".join(text.split()) for names, text in entries for name in re.split(r",\s+", names)}
    return found


def _kind(hint: Any) -> tuple[Any, Any]:
    """(int, float, bool, str, tuple or Mapping; of a tuple what its entries are): the form in which a flag is written."""
    from vtok.eval.common.checked import members

    (form,) = members(hint)
    origin, inside = get_origin(form), get_args(form)
    if origin is tuple:
        return tuple, members(inside[0])[0]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Mapping, None
    return (form, None) if form in (int, float, bool) else (str, None)
