"""Taking patches off again, and putting them on for a while: as a whole or not at all, whatever interrupts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from vtok.errors import StateError
from vtok.patches.module_swap import Mixin, check_class, remove_hooks, restore_class, shared_by
from vtok.patches.transaction import all_or_nothing, to_the_end

_STATE = ("_vtok", "_vtok_run", "_vtok_taps")  # what patches keep on modules


def check_whole(model: nn.Module) -> None:
    """Raises if a module is part of a vision-language model that is patched."""
    hooks = [hook for module in model.modules() for hook in shared_by(module) if hasattr(hook, "pruner")]
    owned = {id(hook.pruner) for hook in hooks if hook.leads}
    if any(id(hook.pruner) not in owned for hook in hooks):
        raise StateError(
            f"this {type(model).__name__} is part of a vision-language model that vtok patched; patch and unpatch that model: "
            "what was patched into its parts belongs together"
        )


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a model bit for bit; see `vtok.unpatch`."""
    for module in model.modules():
        if isinstance(module, Mixin):
            check_class(module)

    def bare() -> nn.Module:
        for module in model.modules():
            if isinstance(module, Mixin):
                restore_class(module)
            for name in _STATE:
                module.__dict__.pop(name, None)
            remove_hooks(module)
        return model

    return all_or_nothing(model, bare)


@contextmanager
def temporarily(model: nn.Module, change: Callable[[], Any], restore: Callable[[], Any]) -> Iterator[None]:
    """The model is patched for a while; afterwards, whatever happens inside, it is as it was before.

    Args:
        model: the model.
        change: unpatches and patches it, or leaves it as it was where it fails.
        restore: patches it as it was before; called when it is unpatched.
    """
    marks, done = _marks(model), False

    def restored() -> None:
        if _marks(model) != marks:  # else nothing has been patched
            unpatch(model)
            restore()

    def back() -> None:
        nonlocal done
        if not done:
            all_or_nothing(model, restored)
            done = True

    try:
        try:
            change()
            yield
        finally:
            to_the_end(back)
    except BaseException:  # also an interrupt on the way into `finally`
        to_the_end(back)
        raise


def _marks(model: nn.Module) -> list[int]:
    """What is patched, as far as it can be told from what is patched anew."""
    return [id(shared) for module in model.modules() for shared in shared_by(module)]


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """The module is in eval mode for a while."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def weight_sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares parameters and buffers: it is patched on its own and takes no memory for weights."""
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def call(module: nn.Module, inputs: Any) -> Any:
    """Runs a model on one tensor, or on a mapping: by name."""
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
