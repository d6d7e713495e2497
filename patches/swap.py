"""Changing the class of a live module and changing it back.

A patched module becomes an instance of a class made on the fly, `(mixin, original class)`, under the original's own names: code
that looks classes up by name (device maps, sharding policies, repr) goes on working. Everything is found again by type, so
that unpatching works on deep copies and on unpickled models, with no list of handles to lose.
"""

from __future__ import annotations

import functools
import reprlib
import types
from typing import TYPE_CHECKING, Any

from torch import nn

from vtok.errors import StateError, UnsupportedModelError

if TYPE_CHECKING:
    _Base = nn.Module  # a mixin is always in front of a module
else:
    _Base = object


class Mixin(_Base):
    """Base of the classes that are put in front of a module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class exists only here: rebuild it from its two parts
        mixin, base = parts(type(self))
        return _rebuild, (mixin, base), self.__dict__

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedModelError(
            f"torch.jit.script cannot compile {type(self).__name__} as vtok patched it; use torch.compile, torch.export or "
            "torch.jit.trace, or call vtok.unpatch(model) first"
        )


class Hook:
    """Base of the hooks that vtok registers."""


def mixed_class(mixin: type, base: type) -> type:
    """`(mixin, base)` under the name of `base`; the same class for the same two parts."""
    return _mixed_class(mixin, base)


@functools.cache
def _mixed_class(mixin: Any, base: Any) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def parts(cls: type) -> tuple[type, type]:
    """(mixin, original class) of a class made by `mixed_class`."""
    mixin, base = cls.__bases__
    return mixin, base


def _rebuild(mixin: type, base: type) -> Any:
    cls: Any = mixed_class(mixin, base)
    return cls.__new__(cls)


def put_on(module: nn.Module, mixin: type) -> None:
    """Gives the module the class `(mixin, its class)`."""
    check_forward(module)
    _set_class(module, mixed_class(mixin, type(module)))


def take_off(module: nn.Module) -> None:
    """Gives a module its original class back. `check_class` comes first."""
    _set_class(module, type(module).__bases__[1])


def check_class(module: nn.Module) -> None:
    """Raises if another tool has put a class of its own on top of ours since."""
    cls = type(module)
    if not (len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], Mixin)):
        raise StateError(
            f"{cls.__name__} was wrapped by another tool ({cls.__mro__[1].__name__}) after vtok patched it; undo that first"
        )


def check_forward(module: nn.Module) -> None:
    """Raises if somebody replaced `forward` on the instance: a class swap would silently do nothing.

    accelerate's hooks do that too, but keep the class's own forward under `_old_forward`, and leave it bound to the instance
    when they go: both are re-bound by `_set_class`.
    """
    if "forward" in module.__dict__ and not _is_own(module, "forward") and not _is_own(module, "_old_forward"):
        found = reprlib.repr(module.__dict__["forward"])  # cut short: a bound method prints its whole module
        raise StateError(
            f"forward of this {type(module).__name__} was replaced on the instance by {found}; "
            "vtok would be bypassed. Patch with vtok first, or remove that replacement"
        )


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether an instance attribute is nothing but the class's forward, bound to the instance."""
    bound = module.__dict__.get(name)
    return getattr(bound, "__self__", None) is module and getattr(bound, "__func__", None) is type(module).forward


def _set_class(module: nn.Module, cls: Any) -> None:
    bound = [name for name in ("_old_forward", "forward") if _is_own(module, name)]
    module.__class__ = cls
    for name in bound:
        module.__dict__[name] = types.MethodType(cls.forward, module)


def remove_hooks(module: nn.Module) -> None:
    """Removes every hook of ours, recognised by type."""
    forward = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks, extras in (
        (module._forward_hooks, forward),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)
