"""What users write, checked by pydantic; what is wrong with it, said in one sentence: the key, what it must be, what was found.

A run file is a `FileModel`, options are dataclasses whose annotations `check_fields` holds them to. Values are taken as they
are: text is no number, true is not 1, and numbers are finite.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from vtok.errors import ConfigError, shown, unknown

MOST = 2**63 - 1  # of a whole number: torch takes no larger seed
Seed = Annotated[int, Field(ge=0, le=MOST, description="a whole number from 0 to 2^63 - 1")]
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(gt=0, le=1, description="a share of the model's FLOPs in (0, 1]")]
DType = Literal["float32", "bfloat16", "float16"]

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
_BOUNDS = {
    "greater_than": "above {gt:,}",
    "greater_than_equal": "at least {ge:,}",
    "less_than": "below {lt:,}",
    "less_than_equal": "at most {le:,}",
}
_Model = TypeVar("_Model", bound=BaseModel)


class Strict(BaseModel):
    """Values of exactly the annotated types, no other keys."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )


class FileModel(Strict):
    """A mapping of a file, where a key without a value (`key: null`) is one that is not there."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {key: value for key, value in content.items() if value is not None or key not in cls.model_fields}


def validated(kind: type[_Model], content: Any, where: str = "", prefix: str = "") -> _Model:
    """Values as a model has them; messages start with `where` they come from, keys with `prefix`, such as "published.". Raises
    `ConfigError`: a key that is unknown or missing, a value of another type or beyond its limits: the first that is."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(kind, error, prefix)}" if where else _sentence(kind, error, prefix)) from None


def check_fields(options: Any) -> None:
    """Raises `ConfigError` unless all fields of a dataclass hold what annotations say, limits in `Annotated` included."""
    kind = _model_of(options.__class__)
    validated(kind, {name: getattr(options, name) for name in kind.model_fields})


def check_choice(where: str, key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises `ConfigError` unless a value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(allowed)}, got {shown(value)}")


def members(hint: Any) -> list[Any]:
    """The types that an annotation allows, without `None` and what `Annotated` adds."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in members(part)]
    return [] if hint is type(None) else [hint]


@cache
def _model_of(kind: type) -> type[Strict]:
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {field.name: (hints[field.name], ...) for field in dataclasses.fields(kind)}
    return create_model(kind.__name__, __base__=Strict, **fields)


def _sentence(kind: type[BaseModel], error: ValidationError, prefix: str) -> str:
    """What is wrong first: a key that does not exist, else a value; of the forms that it may have the one it is closest to."""
    problems = [(_place(kind, _named(one)), one) for one in error.errors(include_url=False)]
    for (path, _, known), what in problems:
        if what["type"] in ("extra_forbidden", "invalid_key"):
            before = prefix + "".join(f"{part}." for part in path[:-1])
            name = path[-1] if isinstance(path[-1], str) else shown(path[-1])
            return str(unknown("key", before + name, [before + one for one in known]))
    top = problems[0][0][0][:1]
    same = [one for one in problems if one[0][0][:1] == top]
    (path, hint, _), what = max(same, key=lambda one: len(one[1]["loc"]))
    key, context, value = prefix + ".".join(map(str, path)), what.get("ctx", {}), shown(what["input"])
    if what["type"] == "missing" and _named(what) == what["loc"]:
        return f"{key} is missing"
    if what["type"] == "too_short":
        return f"{key} is an empty list; give one at least"
    if what["type"] in _BOUNDS and not _description(hint):
        bound = _BOUNDS[what["type"]].format(**context) if context.get("le") != MOST else "less than 2^63"
        return f"{key} must be {bound}, got {value}"
    if what["loc"][-1:] == ("[key]",):
        return f"the keys of {key} must be text, got {value}"
    return f"{key} must be {_words(hint, what['type'])}, got {value}".lstrip()


def _named(problem: Any) -> tuple[Any, ...]:
    """The place that a message names: of an entry that a list lacks the list, of a key that is no text the mapping."""
    loc = problem["loc"]
    if loc[-1:] == ("[key]",):
        return loc[:-2]
    return loc[:-1] if problem["type"] == "missing" and isinstance(loc[-1], int) else loc


def _place(hint: Any, loc: Sequence[Any]) -> tuple[list[Any], Any, Sequence[str]]:
    """(keys down to a value, its annotation, the keys that there are beside it).

    pydantic names the form of a union that it tried between two keys; that is no key of the user's.
    """
    path: list[Any] = []
    beside: Sequence[str] = ()
    parts = list(loc)
    while parts:
        forms = members(hint)
        if len(forms) > 1:
            parts.pop(0)
            if not parts:
                break
        part = parts.pop(0)
        path.append(part)
        hint, beside = Any, ()
        for form in forms:
            origin, inside = get_origin(form) or form, get_args(form)
            if isinstance(form, type) and issubclass(form, BaseModel):
                beside = list(form.model_fields)
                field = form.model_fields.get(part)
                hint = Any if field is None else Annotated[field.annotation, field]
            elif isinstance(part, int) and origin in (list, tuple) and inside:
                hint = inside[min(part, len(inside) - 1)] if inside[-1] is not Ellipsis else inside[0]
            elif isinstance(part, str) and len(inside) == 2 and origin not in (list, tuple):
                hint = inside[1]
    return path, hint, beside


def _words(hint: Any, problem: str) -> str:
    """What a value must be, from its annotation."""
    if problem == "finite_number" or _description(hint):
        return _description(hint) or "a finite number"
    forms = [_form(one) for one in members(hint)]
    return " or ".join(dict.fromkeys(forms)) or "null"


def _description(hint: Any) -> str | None:
    """What the `Field` of an annotation says of the values that it allows."""
    own = get_args(hint) if get_origin(hint) in (Annotated, Union, types.UnionType) else ()
    found = [one.description if isinstance(one, FieldInfo) else _description(one) for one in own]
    return next((one for one in found if one), None)


def _form(hint: Any) -> str:
    origin, inside = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin is tuple:
        count = "" if inside[-1] is Ellipsis else f" of {len(inside)}"
        return f"a list{count}, each {_words(inside[0], '')}"
    if isinstance(origin, type) and issubclass(origin, (Mapping, BaseModel)):
        return "a mapping"
    return _WORDS.get(origin, getattr(origin, "__name__", str(origin)))
