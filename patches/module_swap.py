"""Changing the class of a live module and changing it back.

A patched module becomes an instance of a class made on the fly, `(mixin, original class)`, under the original's own names: code
that looks classes up by name (device maps, sharding policies, repr) goes on working. Everything is found again by type, so
that unpatching works on deep copies and on unpickled models, with no list of handles to lose.
"""

from __future__ import annotations

import copy
import functools
import inspect
import reprlib
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtok.errors import StateError, UnsupportedModelError

if TYPE_CHECKING:
    _Base = nn.Module  # a mixin is always in front of a module
else:
    _Base = object


class Mixin(_Base):
    """Base of the classes that are put in front of a module's own class.

    Other tools keep bound methods of a module (a wrapped or compiled `forward`). Kept while the module was patched and called
    when it no longer is, a method of a mixin does what the module's own class does.
    """

    def __init_subclass__(cls, **kwargs: Any):
        for name, method in list(vars(cls).items()):
            if isinstance(method, types.FunctionType) and not name.startswith("__"):
                setattr(cls, name, _or_own(method))
        super().__init_subclass__(**kwargs)  # last: layers of transformers checkpoint in a `forward` that must be the outermost

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class exists only here: rebuild it from its two parts
        return rebuilt(self)

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedModelError(
            f"torch.jit.script cannot compile {type(self).__name__} as vtok patched it; use torch.compile, torch.export or "
            "torch.jit.trace, or call vtok.unpatch(model) first"
        )


def _or_own(method: Any) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Mixin):
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    return call


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


def rebuilt(thing: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` of an instance of a class made by `mixed_class` returns."""
    return _rebuild, parts(type(thing)), thing.__dict__


def own_class(module: nn.Module) -> type:
    """The class of a module before it was patched."""
    return type(module).__bases__[1] if isinstance(module, Mixin) else type(module)


def _rebuild(mixin: type, base: type) -> Any:
    cls: Any = mixed_class(mixin, base)
    return cls.__new__(cls)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Gives the module the class `(mixin, its class)`."""
    check_forward(module, mixin)
    _set_class(module, mixed_class(mixin, type(module)))


def restore_class(module: nn.Module) -> None:
    """Gives a module its original class back. `check_class` comes first."""
    _set_class(module, type(module).__bases__[1])


def check_class(module: nn.Module) -> None:
    """Raises if another tool has put a class of its own on top of ours since."""
    cls = type(module)
    if not (len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], Mixin)):
        raise StateError(
            f"{cls.__name__} was wrapped by another tool ({cls.__mro__[1].__name__}) after vtok patched it; undo that first"
        )


def check_forward(module: nn.Module, mixin: type) -> None:
    """Raises if somebody replaced `forward` on the instance, and the mixin has another: it would silently do nothing.

    accelerate's hooks do that too, but keep the class's own forward under `_old_forward`, and leave it bound to the instance
    when they go: both are re-bound by `_set_class`. What was wrapped around a mixin's forward leads to it again.
    """
    theirs = module.__dict__.get("forward")
    if theirs is None or getattr(mixin, "forward", nn.Module.forward) is nn.Module.forward:
        return
    inner: Any = inspect.unwrap(theirs, stop=lambda f: isinstance(f, types.MethodType))
    own = parts(type(module))[1] if isinstance(module, Mixin) else type(module)
    ours = mixed_class(mixin, own).forward  # type: ignore[attr-defined]
    leads = isinstance(inner, types.MethodType) and inner.__self__ is module and inner.__func__ is ours
    if not leads and not is_own(module, "forward") and not is_own(module, "_old_forward"):
        found = reprlib.repr(module.__dict__["forward"])  # cut short: a bound method prints its whole module
        raise StateError(
            f"forward of this {type(module).__name__} was replaced on the instance by {found}; "
            "vtok would be bypassed. Patch with vtok first, or remove that replacement"
        )


def is_own(module: nn.Module, name: str) -> bool:
    """Whether an instance attribute is nothing but the class's forward, bound to the instance."""
    bound = module.__dict__.get(name)
    return getattr(bound, "__self__", None) is module and getattr(bound, "__func__", None) is type(module).forward


def _set_class(module: nn.Module, cls: Any) -> None:
    bound = [name for name in ("_old_forward", "forward") if is_own(module, name)]
    module.__class__ = cls
    for name in bound:
        module.__dict__[name] = types.MethodType(cls.forward, module)


def shared_by(module: nn.Module) -> list[Any]:
    """What vtok left on a module: links of blocks and hooks."""
    link = module.__dict__.get("_vtok")
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [*([] if link is None else [link]), *(hook for hook in hooks if isinstance(hook, Hook))]


def remove_hooks(module: nn.Module, ours: Callable[[Any], bool] = lambda hook: isinstance(hook, Hook)) -> None:
    """Removes every hook of ours, recognised by type."""
    forward = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks, extras in (
        (module._forward_hooks, forward),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """A module's own parameters are there, as while its forward runs: accelerate's hooks may keep them elsewhere in between."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # by torch.compile, and by torch's wrapper for checkpoints


def bare(module: nn.Module) -> Any:
    """What a wrapper calls, or the module itself."""
    for name in _WRAPPED:
        if name in module._modules:
            return bare(module.get_submodule(name))
    return module


def twin(module: nn.Module) -> Any:
    """A copy that shares a module's weights, without the hooks on it and without accelerate's. A forward that somebody put onto
    the module is the copy's as well.

    Raises:
        UnsupportedModelError: that forward says nothing of the module that it belongs to.
    """
    made = copy.copy(module)
    made._forward_pre_hooks, made._forward_hooks = OrderedDict(), OrderedDict()
    forward = made.__dict__.pop("forward", None)
    forward = made.__dict__.pop("_old_forward", forward)
    if forward is None:
        return made
    if getattr(forward, "__self__", None) is not module:
        raise UnsupportedModelError(
            f"somebody replaced the forward of {type(module).__name__} by {type(forward).__name__}, which vtok cannot run on a "
            "copy of that layer to see what its attention is given; leave that out, or use a method that acts before the LLM"
        )
    made.forward = types.MethodType(forward.__func__, made)
    return made


def leaves(module: nn.Module) -> bool:
    """Whether a module has its weights only while its forward runs: under FSDP2, unless its parent gathers them as well."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def brought(module: nn.Module, x: Any) -> Any:
    """What enters a module, where its weights are: accelerate's hooks bring it there only when its forward runs."""
    hook = module.__dict__.get("_hf_hook")
    device = None if hook is None else next((p.device for p in module.parameters()), None)
    if device is None or device.type == "meta":
        return x
    if isinstance(x, tuple):
        return tuple(brought(module, part) for part in x)
    return x.to(device) if isinstance(x, torch.Tensor) else x
