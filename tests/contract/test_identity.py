"""A patch that reduces nothing changes nothing; unpatching leaves no trace."""

import copy
import io

import pytest
import torch
from zoo import EXAMPLES, Nothing, attach, build, config_for, covering, images, pairs, run

import vtok
from vtok.capabilities import HasBudget
from vtok.core.tokens import Place
from vtok.patches.module_swap import Hook
from vtok.registry import encoder_methods
from vtok.testing import encoder_checks


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_mildest_settings_are_bit_identical(name):
    model, x = build(name), images(name)
    for method in encoder_methods():
        config = config_for(name, method, model)
        if isinstance(config, HasBudget):  # else it is refused on this model, or has no setting that does nothing
            encoder_checks.check_no_op(model, x, config, EXAMPLES[name].input_size)


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


@pytest.mark.parametrize(("name", "method"), covering(pairs(), 0))
def test_unpatching_restores_everything(name, method):
    run(encoder_checks.check_unpatching, name, method)


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
