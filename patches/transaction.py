"""Changes to the modules of a model that happen as a whole or not at all, whatever ends them: Ctrl-C, a signal, an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_TRIES = 100  # a user may press Ctrl-C again and again


class Snapshot:
    """Classes, attributes and hooks of all modules of a model at one moment."""

    def __init__(self, model: nn.Module):
        self.modules = [(m, type(m), dict(m.__dict__), [dict(m.__dict__[name]) for name in _HOOKS]) for m in model.modules()]

    def restore(self) -> None:
        """Makes the modules what they were. To be called again if it is interrupted."""
        for module, cls, attributes, hooks in self.modules:
            if type(module) is not cls:
                module.__class__ = cls
            now = module.__dict__
            for name in [name for name in now if name not in attributes]:
                now.pop(name, None)
            for name, value in attributes.items():
                if now.get(name) is not value or name not in now:
                    now[name] = value
            for name, were in zip(_HOOKS, hooks):
                if now[name] != were:
                    now[name].clear()
                    now[name].update(were)


def all_or_nothing(model: nn.Module, change: Callable[[], T]) -> T:
    """Runs `change`; if anything ends it early, the model is as it was before, and the exception goes on."""
    before = Snapshot(model)
    try:
        return change()
    except BaseException:
        to_the_end(before.restore)
        raise


def to_the_end(change: Callable[[], Any]) -> None:
    """Runs a change that may be run again until it gets through; an interrupt meanwhile is raised afterwards."""
    interrupt: BaseException | None = None
    for _ in range(_TRIES):
        try:
            change()
            break
        except Exception:
            raise
        except BaseException as error:  # KeyboardInterrupt, SystemExit
            interrupt = error
    if interrupt is not None:
        raise interrupt
