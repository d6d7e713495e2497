"""What every method for vision encoders must pass on every tiny model, as functions that raise AssertionError.

Models come unpatched and in eval mode, `x` is what they take; in float64 where outputs are compared to a tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vtok
from vtok.capabilities import HasBudget
from vtok.config import MethodConfig
from vtok.patches.module_swap import Hook, Mixin
from vtok.targets.resolve import Size, towers
from vtok.testing.encoder_oracle import TOLERANCE, check_reduction


@contextmanager
def _patched(model: nn.Module, config: MethodConfig, size: Size | None, trace: bool = False) -> Iterator[nn.Module]:
    vtok.patch(model, config, input_size=size, trace=trace)
    try:
        yield model
    finally:
        vtok.unpatch(model)


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    far = float((found - expected).abs().max() / expected.abs().max())
    assert far <= TOLERANCE, f"{what} differs by {far:.1e} of the largest output"


def check_masking(model: nn.Module, x: Any, config: MethodConfig, size: Size | None = None) -> None:
    """Tokens go down, and removing them equals masking them; where sizes count, merged tokens equal so many copies."""
    with _patched(model, config, size, trace=True):
        fault = check_reduction(model, x).fault
    assert fault is None, fault


def check_no_op(model: nn.Module, x: Any, config: MethodConfig, size: Size | None = None) -> None:
    """The mildest of a method's budget candidates changes nothing, bit for bit, with gradients and without."""
    assert isinstance(config, HasBudget), f"{config.name} has no budget candidates"
    mildest = config.budget_candidates(towers(model, size)[0][1].info)[0]
    with torch.no_grad():
        reference = model(x)
    graded = model(x).detach()
    with _patched(model, mildest, size):
        with torch.no_grad():
            assert torch.equal(model(x), reference), f"{mildest} is the mildest candidate, and changes the output"
        assert torch.equal(model(x).detach(), graded), f"{mildest} changes the output where gradients are recorded"


def check_batch(model: nn.Module, x: Tensor, config: MethodConfig, size: Size | None = None) -> None:
    """Every image of a batch gets what it gets alone, and the same again."""
    with _patched(model, config, size), torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
        again = model(x)
    assert torch.equal(together, again), "the same batch gives something else the second time"
    _close(alone, together, "an image alone")


def gradients(model: nn.Module, x: Any) -> dict[str, Tensor | None]:
    """Of the sum of squared outputs, by the names of the parameters."""
    model.zero_grad()
    torch.manual_seed(0)  # stochastic depth and jittered positions draw the same numbers every time
    model(x).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def check_gradients(model: nn.Module, x: Any, config: MethodConfig, size: Size | None = None) -> None:
    """Every parameter that has a gradient in the unpatched model has a finite one, and no other has any."""
    upstream = {name for name, gradient in gradients(model, x).items() if gradient is not None}
    with _patched(model, config, size):
        patched = {name: gradient for name, gradient in gradients(model, x).items() if gradient is not None}
    odd = sorted(upstream ^ set(patched))
    assert not odd, f"gradients are missing or new: {', '.join(odd)}"
    wild = sorted(name for name, gradient in patched.items() if not torch.isfinite(gradient).all())
    assert not wild, f"gradients are not finite: {', '.join(wild)}"


def check_counts(model: nn.Module, x: Any, config: MethodConfig, size: Size | None = None) -> None:
    """`vtok.plan` predicts the tokens of every block; where counts depend on the image, it bounds them."""
    plan = vtok.plan(model, config, input_size=size)
    with _patched(model, config, size):
        with torch.no_grad():
            model(x)
        blocks = vtok.info(model).towers[0].blocks
    found, planned = [block.mean_tokens for block in blocks], list(plan.tokens)
    if plan.estimate.exact:
        assert found == planned, f"blocks leave {found} tokens, plan says {planned}"
    else:
        assert all(n <= most for n, most in zip(found, planned)), f"blocks leave {found} tokens, at most {planned} by plan"


def check_unpatching(model: nn.Module, x: Any, config: MethodConfig, size: Size | None = None) -> None:
    """A patch changes the output, no key of the `state_dict`, and leaves no trace."""
    with torch.no_grad():
        reference = model(x)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attributes = [set(m.__dict__) for m in model.modules()]
    vtok.patch(model, config, input_size=size)
    try:
        assert list(model.state_dict()) == keys, "the patch changed the state_dict"
        with torch.no_grad():
            assert not torch.equal(model(x), reference), "the patch did nothing"
    finally:
        vtok.unpatch(model)
    check_traces(model, classes, attributes)
    with torch.no_grad():
        assert torch.equal(model(x), reference), "the unpatched model gives something else than before"


def check_traces(model: nn.Module, classes: list[type], attributes: list[set[str]]) -> None:
    """Classes, attributes and hooks of all modules are those of before."""
    assert [type(m) for m in model.modules()] == classes, "a module has another class than before"
    assert [set(m.__dict__) for m in model.modules()] == attributes, "a module has other attributes than before"
    assert not any(isinstance(m, Mixin) for m in model.modules())
    for m in model.modules():
        hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        assert not any(isinstance(hook, Hook) for hook in hooks), f"a hook is left on {type(m).__name__}"
        assert not m._forward_hooks_with_kwargs, f"a hook is left on {type(m).__name__}"
        assert not m._forward_pre_hooks_with_kwargs, f"a hook is left on {type(m).__name__}"


def check_json(config: MethodConfig) -> None:
    """A config survives being written down."""
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config, f"{config} comes back from JSON as {again}"
