"""Pretended devices: tensors on them hold CPU tensors, and whatever mixes two of them raises, as on a machine with several.
Nothing needs a driver: it is a type of device that torch initialises nothing for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")


class There(Tensor):
    """A tensor on a pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"There({self.inner}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Devices():
            return func(*args, **(kwargs or {}))


class Devices(TorchDispatchMode):
    """Runs every operator where its tensors are."""

    def __enter__(self) -> Any:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) moves what it has made
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        found = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        devices = {t.device for t in found if t.ndim or isinstance(t, There)}
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if len(devices) > 1 and not moves:
            raise RuntimeError(f"{func} got tensors on {sorted(map(str, devices))}")
        device = next(iter(devices), torch.device("cpu")) if asked is None else torch.device(asked)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
        out = func(*args, **kwargs)
        if func._schema.is_mutable and len(func._schema.returns) == 1:  # in place
            return found[0]
        if device.type == "cpu":
            return out
        return tree_map(lambda t: There(t, device) if isinstance(t, Tensor) else t, out)


def put(module: nn.Module, device: torch.device) -> None:
    """Moves a module, with all that it holds."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, t in table.items():
                if t is not None:
                    moved = There(t.inner if isinstance(t, There) else t.detach(), device)
                    table[name] = nn.Parameter(moved, requires_grad=False) if table is part._parameters else moved
