"""Golden files as tensors, and the models that whole-model files were computed with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import recipe
import torch
from torch import Tensor, nn

from vtok.config import ModelInfo
from vtok.core.tokens import TokenState
from vtok.core.tracker import ForwardState
from vtok.targets.resolve import run_of

FOLDER = Path(__file__).parent / "golden"


def load(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arrays of a file: floats as `dtype`, indices as int64, bools as they are, 0-d arrays as Python values."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: convert(arrays[key], dtype) for key in arrays}


def convert(array: np.ndarray, dtype: torch.dtype) -> Any:
    if array.ndim == 0:
        return array.item()
    tensor = torch.from_numpy(array)
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool else tensor.long()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape and dtype, no entry further off than `tolerance`."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, check_device=False)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0, check_device=False)


def start(x: Tensor, num_prefix: int, size: Tensor | None = None, keep: Tensor | None = None) -> TokenState:
    """The state of tokens [B, N, C] that have just entered a model, with a token map."""
    group = torch.arange(x.shape[1]).expand(x.shape[:2])
    return TokenState(num_prefix, x.shape[1], size=size, keep=keep, group=group)


def model_info(**changes: Any) -> ModelInfo:
    """Facts of a small ViT."""
    facts: dict[str, Any] = {
        "name": "Vit", "depth": 4, "num_prefix": 1, "num_patches": 16, "grid": (4, 4), "has_cls": True,
        "width": 24, "head_dim": 8, "num_heads": 3, "num_kv_heads": 3,
    }  # fmt: skip
    return ModelInfo(**{**facts, **changes})


@functools.cache
def model(tag: str) -> nn.Module:
    """A float64 model with the recipe's weights; shared by tests, which patch it for the length of a `with` block."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if tag.startswith("deit_tiny"):
        made = timm.create_model(f"{tag}_patch16_224")
    elif tag.startswith("micro"):  # pooling over patches alone, then a norm, is what the MAE variant has
        pool: dict[str, Any] = {"global_pool": "avg", "fc_norm": True} if tag == "micro_mae" else {}
        made = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10, **pool)
    else:
        assert tag == "tiny"
        made = VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=4, mlp_ratio=2.0, num_classes=10)
    return recipe.fill(made.double(), None if tag == "tiny" else tag)


def images(g: dict[str, Any]) -> Tensor:
    """The input of a whole-model file."""
    return recipe.image(g.get("image_tag", g["tag"]), g["batch"], 224 if g["tag"].startswith("deit") else 64)


def run_model(patched: Any, x: Tensor) -> tuple[Tensor, list[Tensor], ForwardState]:
    """One pass: (logits, what left every block, what the pass recorded)."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in patched.blocks]
    try:
        with torch.no_grad():
            logits = patched(x)
    finally:
        for hook in hooks:
            hook.remove()
    run = run_of(patched)
    assert run is not None
    return logits, outputs, run.current


def token_counts(done: ForwardState) -> list[int]:
    """Rows that left every block."""
    return [done.tokens(i + 1) for i in range(len(done.states) - 1)]


def states(done: ForwardState, blocks: Sequence[int]) -> list[TokenState]:
    """The states that left some blocks."""
    found = [done.states[i + 1] for i in blocks]
    assert all(state is not None for state in found)
    return [state for state in found if state is not None]
