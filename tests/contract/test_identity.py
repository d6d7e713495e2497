"""A patch that reduces nothing changes nothing; unpatching leaves no trace."""

import copy
import io

import pytest
import torch
from zoo import EXAMPLES, Nothing, attach, build, images, pairs

import vtok
from vtok.core.tokens import Place
from vtok.patches.module_swap import Hook, Mixin
from vtok.registry import encoder_methods

NO_OPS = {
    "ats": {"keep": 1.0},
    "pitome": {"ratio": 1.0},
    "random": {"keep": 1.0},
    "tome": {"r": 0},
    "uniform": {"keep": 1.0},
    "zero_tprune": {"layers": [1], "retain": 1.0, "r": 0, "cls_init": "uniform"},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_ops_are_bit_identical(name):
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model(x)
    graded = model(x).detach()
    for method, knobs in NO_OPS.items():
        if not _accepts(name, model, method, knobs):
            continue
        vtok.patch(model, method, input_size=EXAMPLES[name].input_size, **knobs)
        with torch.no_grad():
            assert torch.equal(model(x), reference), method
        assert torch.equal(model(x).detach(), graded), method
        vtok.unpatch(model)


def test_every_method_has_a_no_op():
    assert set(NO_OPS) == set(encoder_methods())
    # ATS refuses models without a class token; its no-op is checked wherever it runs.
    assert _accepts("timm: ViT", build("timm: ViT"), "ats", {"keep": 1.0})


def _accepts(name, model, method, knobs):
    try:
        vtok.plan(model, method, input_size=EXAMPLES[name].input_size, **knobs)
    except vtok.UnsupportedModelError:
        return False
    return True


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_split_path_equals_upstream(name, place):
    """Attention and MLP computed apart (step by step for BLOCK_PRE) give what the block's own forward gives."""
    model, x = build(name, torch.float64), images(name, dtype=torch.float64)
    with torch.no_grad():
        reference = model(x)
        needs = frozenset("k") if place is not Place.BLOCK_PRE or "differential" in name else frozenset("qk")
        try:
            vtok.patch(model, Nothing(place=place, needs=needs), input_size=EXAMPLES[name].input_size)
        except vtok.UnsupportedModelError:
            assert "differential" in name
            assert place is Place.BLOCK_PRE
            return
        split = model(x)
    assert (split - reference).abs().max() <= 1e-11 * reference.abs().max()


@pytest.mark.parametrize(("name", "method"), pairs())
def test_unpatching_restores_everything(name, method):
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model(x)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attributes = [set(m.__dict__) for m in model.modules()]
    attach(name, model, method)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert not torch.equal(model(x), reference), "the patch did nothing"
    vtok.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(isinstance(m, Mixin) for m in model.modules())
    for m in model.modules():
        assert not any(isinstance(h, Hook) for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        assert not m._forward_hooks_with_kwargs
        assert not m._forward_pre_hooks_with_kwargs
    with torch.no_grad():
        assert torch.equal(model(x), reference)


@pytest.mark.parametrize("name", EXAMPLES)
def test_copies_and_files(name):
    """A deep copy and an unpickled model are patched, independent, and can be unpatched."""
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model(x)
        attach(name, model, "tome")
        patched = model(x)
        twin = copy.deepcopy(model)
        blob = io.BytesIO()
        torch.save(model, blob)
        blob.seek(0)
        loaded = torch.load(blob, weights_only=False)
        for other in (twin, loaded):
            assert torch.equal(other(x), patched)
            assert str(vtok.info(other)) == str(vtok.info(model))
        vtok.unpatch(model)
        assert torch.equal(model(x), reference)
        assert torch.equal(twin(x), patched), "unpatching the original reached its copy"
        for other in (twin, loaded):
            assert torch.equal(vtok.unpatch(other)(x), reference)


def test_patching_again_replaces_the_patch():
    name = "timm: ViT"
    model, x = build(name), images(name)
    vtok.patch(model, "tome", r=6)
    vtok.patch(model, "pitome", ratio=0.8)
    vtok.patch(model, "tome", r=4)
    with torch.no_grad():
        once = vtok.patch(build(name), "tome", r=4)(x)
        assert torch.equal(model(x), once)
    assert sum(isinstance(h, Hook) for m in model.modules() for h in m._forward_hooks.values()) == 4


def test_a_refused_patch_leaves_the_old_one():
    model = vtok.patch(build("timm: ViT"), "tome", r=4)
    before = str(vtok.info(model))
    with pytest.raises(vtok.ConfigError):
        vtok.patch(model, "tome", r=500)
    assert str(vtok.info(model)) == before


def test_the_context_manager_unpatches_after_an_error():
    model = build("timm: ViT")
    tokens = model._pos_embed(model.patch_embed(images("timm: ViT")))
    with pytest.raises(vtok.UnsupportedModelError, match="is_causal"), vtok.patched(model, "tome", r=4):
        model.blocks[0](tokens, is_causal=True)  # older timm models do not hand it on
    assert not vtok.info(model).patched
