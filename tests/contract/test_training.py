"""Gradients, gradient checkpointing, low precision."""

from collections import Counter

import pytest
import torch
from zoo import FAMILIES, attach, block_list, build, checkpointing, covering, images, pairs, run

import vtok
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of
from vtok.testing import encoder_checks


@pytest.mark.parametrize(("name", "method"), covering(pairs(), 2))
def test_every_parameter_that_upstream_reaches_gets_a_gradient(name, method):
    run(encoder_checks.check_gradients, name, method)


def _counted(blocks):
    """(number of a block, name of a linear layer in it) -> how often it has run since."""
    runs = Counter()
    for i, block in enumerate(blocks):
        for part, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_, key=(i, part): runs.update([key]))
    return runs


# Upstream cannot checkpoint these; a test of the backend watches whether that is still so.
NOT_CHECKPOINTED = ("open_clip: ViT custom blocks, all norms",)


@pytest.mark.parametrize(("name", "method"), covering([p for p in pairs(FAMILIES) if p[0] not in NOT_CHECKPOINTED], 0))
def test_checkpointing_gives_equal_gradients(name, method):
    model, x = build(name, torch.float64).train(), images(name, dtype=torch.float64)
    attach(name, model, method)
    reference = encoder_checks.gradients(model, x)
    checkpointing(model)
    runs = _counted(block_list(model))
    checkpointed = encoder_checks.gradients(model, x)
    for i in range(len(block_list(model))):  # all but its last step: nothing behind that needs it again
        assert max(count for (block, _), count in runs.items() if block == i) == 2, f"block {i} runs again for its gradients"
    for parameter, gradient in reference.items():
        assert gradient is None or torch.equal(gradient, checkpointed[parameter]), parameter


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segment", [1, 2, 4])
def test_checkpointed_segments_find_their_own_forward_pass(segment, reentrant):
    """Segments of several blocks, and two forward passes before one backward, as contrastive losses do."""
    from torch.utils.checkpoint import checkpoint_sequential

    name = "timm: ViT"
    model = attach(name, build(name, torch.float64).train(), "tome")
    one, two = images(name, dtype=torch.float64, seed=1), images(name, dtype=torch.float64, seed=2)

    def loss(run_blocks):
        total = 0
        for x in (one, two):
            tokens = model._pos_embed(model.patch_embed(x))
            total = total + model.forward_head(model.norm(run_blocks(tokens))).square().sum()
        model.zero_grad()
        total.backward()
        return [p.grad.clone() for p in model.parameters()]

    def by_segments(tokens):
        return checkpoint_sequential(model.blocks, 4 // segment, tokens, use_reentrant=reentrant)

    for plain, recomputed in zip(loss(model.blocks), loss(by_segments)):
        assert torch.equal(plain, recomputed)


def test_recomputing_a_forgotten_pass_is_refused():
    """In eval mode one pass is remembered: a newer one must not be mistaken for it."""
    name = "timm: ViT"
    model = attach(name, build(name), "tome")
    model.set_grad_checkpointing(True)
    first = model(images(name, seed=1)).sum()
    model(images(name, seed=2))
    with pytest.raises(vtok.StateError, match="gradient checkpointing"):
        first.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "method"), covering(pairs(FAMILIES), 1))
def test_low_precision_stays_finite_and_decides_in_fp32(name, method, dtype):
    model, x = build(name, dtype), images(name, dtype=dtype)
    seen = []
    attach(name, model, method)
    _spy_on_decisions(model, seen)
    with torch.no_grad():
        out = model(x)
    assert out.dtype == dtype
    assert torch.isfinite(out.float()).all()
    final = run_of(model).current.final
    assert final.index.shape[1] < run_of(model).current.length
    assert final.size is None or final.size.dtype == torch.float32
    assert seen, "the method never ran"


def _spy_on_decisions(model, seen):
    """Fails when a score, softmax or sort inside a decision runs below fp32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from vtok.patches.block import ReducingBlock

    class Precision(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in (
                "bmm",
                "mm",
                "_softmax",
                "sort",
                "mean",
                "linalg_vector_norm",
                "cumsum",
                "elu_",
            ):
                first = out[0] if isinstance(out, (tuple, list)) else out
                if first.is_floating_point():
                    seen.append(func.overloadpacket.__name__)
                    assert first.dtype in (torch.float32, torch.float64), (func, first.dtype)
            return out

    for block in model.modules():
        if isinstance(block, ReducingBlock) and block._vtok.reducer is not None:
            link = block._vtok

            def decide(*args, _original=link.decide):
                with Precision():
                    plan = _original(*args)
                seen.append("decision")
                return plan

            link.decide = decide


@pytest.mark.parametrize("method", encoder_methods())
def test_autocast_does_not_reach_the_decisions(method):
    name = "timm: ViT"
    model, x, seen = build(name), images(name), []
    attach(name, model, method)
    _spy_on_decisions(model, seen)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert torch.isfinite(out).all()
    assert seen


def test_ats_trains_end_to_end():
    """A few steps on ragged batches lower the loss."""
    name = "timm: ViT"
    torch.manual_seed(0)
    model = attach(name, build(name).train(), "ats")
    x, y = images(name, batch=8), torch.arange(8) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
