"""Errors that users meet. Each message says what was wrong, what was found and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class VtokError(Exception):
    """Base of every error that vtok raises on purpose."""


class UnknownNameError(VtokError, ValueError):
    """A method, parameter, task or run that does not exist."""


class ConfigError(VtokError, ValueError):
    """A parameter or a config file whose value makes no sense."""


class BudgetError(ConfigError):
    """A FLOPs budget that the method cannot meet on this model."""


class UnsupportedModelError(VtokError, TypeError):
    """A model, block, head or input that vtok cannot patch, or a method that needs what the model lacks."""


class StateError(VtokError, RuntimeError):
    """A patched model used in a way that would mix up or lose its token state."""


class MissingExtraError(VtokError, ImportError):
    """An optional dependency that the called part of vtok needs."""

    def __init__(self, package: str, extra: str):
        super().__init__(f'{package} is not installed; run: pip install "vtok[{extra}]"')


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
_SHORT.maxlevel = 3
_LISTED = 50  # known names in a message


def shown(value: object) -> str:
    """A value for a message: as Python writes it, cut where it is long."""
    return _SHORT.repr(value)


def brief(words: object, longest: int = 300) -> str:
    """An error of another library, or a name, for a message: on one line, cut where it is long."""
    text = " ".join(str(words).split()) or type(words).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """`unknown method 'pitom'; did you mean 'pitome'? known: ats, pitome, ...`

    Args:
        kind: what should have been named.
        name: what was.
        known: all names that there are.
        where: they can be looked up, said in place of the names: for thousands.
    """
    known = sorted(known)
    name = name if len(name) <= _SHORT.maxstring else f"{name[: _SHORT.maxstring]}..."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    if where:
        return UnknownNameError(f"unknown {kind} {name!r};{hint} {where}")
    rest = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return UnknownNameError(f"unknown {kind} {name!r};{hint} known: {', '.join(known[:_LISTED])}{rest}")
