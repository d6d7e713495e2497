"""Old names of what configs define, which go on working for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vtok.core.prompt import VLMInfo

# New name -> (old name for vision encoders, old name for vision-language models).
_OLD = {
    "budget_candidates": ("ladder", "ladder_vlm"),
    "search_space": ("search_space", "search_space_vlm"),
    "candidates_at": ("ladder_at", "ladder_at_vlm"),
}
_NEW = {old: new for new, pair in _OLD.items() for old in pair if old != new}


class RenamedMethods:
    """Base of configs: a class that defines an old name gets the new one, and old names can be called; both with a warning."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for new, pair in _OLD.items():
            own = {old: vars(cls)[old] for old in pair if old in vars(cls)}
            for old in own.keys() & _NEW.keys():
                warnings.warn(f"{cls.__name__}.{old} is called {new} now", DeprecationWarning, stacklevel=2)
                delattr(cls, old)
            if own and own.keys() != {new}:
                setattr(cls, new, _by_kind(own.get(pair[0]), own.get(pair[1]), getattr(cls, new, None)))

    if not TYPE_CHECKING:  # a checker shall go on noticing names that do not exist

        def __getattr__(self, name):
            if name in _NEW:
                warnings.warn(f"{type(self).__name__}.{name} is called {_NEW[name]} now", DeprecationWarning, stacklevel=2)
                return getattr(self, _NEW[name])
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _by_kind(encoder: Callable | None, vlm: Callable | None, inherited: Callable | None) -> Callable:
    """One method out of two for the two kinds of models, or what the base class has."""

    def either(self: Any, info: Any, *rest: Any) -> Any:
        chosen = (vlm if isinstance(info, VLMInfo) else encoder) or inherited or encoder or vlm
        assert chosen is not None
        return chosen(self, info, *rest)

    return either
