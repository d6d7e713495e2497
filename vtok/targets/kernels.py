"""Which attention kernel every block really runs, seen by one forward pass under a dispatch mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operators by the name torch gives them; "math" is what remains when no fused kernel ran but a softmax over keys did.
KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash (cpu)",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "fused (device)",
    "_native_multi_head_attention": "native multi-head",
    "_transformer_encoder_layer_fwd": "native encoder layer",
}


class _Log(TorchDispatchMode):
    def __init__(self, count: int):
        super().__init__()
        self.block: int | None = None
        self.seen: list[list[str]] = [[] for _ in range(count)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.block is not None:
            if name in KERNELS:
                self.seen[self.block].append(KERNELS[name])
            elif name == "_softmax" and out.ndim == 4 and out.shape[-2] > 1:
                self.seen[self.block].append("math")
        return out


def attention_kernels(blocks: Sequence[nn.Module], forward: Callable[[], Any]) -> list[str]:
    """Runs `forward` once and names the attention kernel of each block.

    Args:
        blocks: modules to watch.
        forward: runs the model that holds them.

    Returns:
        One name a block; several joined by " + " where a block ran several (a method that builds an attention map shows as
        "... + math"); "-" where none ran.
    """
    log = _Log(len(blocks))

    def enters(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            log.block = i

        return hook

    def leaves(*_: Any) -> None:
        log.block = None

    handles = [block.register_forward_pre_hook(enters(i)) for i, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leaves) for block in blocks]
    try:
        with torch.no_grad(), log:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return [" + ".join(dict.fromkeys(seen)) or "-" for seen in log.seen]
