"""Patches come, go and come back: whatever happens in between, a model is in one state or the other, never in half of each."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from zoo import EXAMPLES, build, images

import vtok
from vtok.patches.module_swap import Mixin
from vtok.targets.resolve import run_of


def _outputs(model, x):
    with torch.no_grad():
        return model(x)


def test_a_failed_unpatch_changes_nothing():
    model, x = vtok.patch(build("timm: ViT"), "tome", r=2), images("timm: ViT")
    wrapped, own = model.blocks[2], type(model.blocks[2])
    wrapped.__class__ = type("Wrapped", (own,), {})
    with pytest.raises(vtok.StateError, match="wrapped by another tool"):
        vtok.unpatch(model)
    assert all(isinstance(block, Mixin) for block in model.blocks)
    wrapped.__class__ = own
    assert torch.equal(_outputs(vtok.unpatch(model), x), _outputs(build("timm: ViT"), x))


def test_patched_inside_a_patch_gives_the_outer_one_back():
    model, x = vtok.patch(build("timm: ViT"), "tome", flops=0.7, trace=True), images("timm: ViT")
    before, budget = _outputs(model, x), run_of(model).patch.budget
    with vtok.patched(model, "random", keep=0.5):
        assert run_of(model).patch.configs[0].name == "random"
        assert not torch.equal(_outputs(model, x), before)
    assert torch.equal(_outputs(model, x), before)
    assert run_of(model).patch.budget == budget
    assert vtok.unmerge(model, model.forward_features(x)).shape[1] == 65


def test_patched_survives_an_error_inside():
    model = build("timm: ViT")
    with pytest.raises(ZeroDivisionError), vtok.patched(model, "tome", r=2):
        _ = 1 / 0
    assert not vtok.info(model).patched


@pytest.mark.parametrize("call", [vtok.plan, vtok.patch])
def test_calibration_on_a_patched_model(call):
    x = images("timm: ViT", batch=4)
    model, fresh = vtok.patch(build("timm: ViT"), "tome", r=2), build("timm: ViT")
    model.blocks[1].eval()
    reduced, modes = _outputs(model, x), [m.training for m in model.modules()]
    found, expected = call(model, "ats", flops=0.7, calibration=x), call(fresh, "ats", flops=0.7, calibration=x)
    assert [m.training for m in model.modules()] == modes
    if call is vtok.plan:
        assert found.budget == expected.budget
        assert torch.equal(_outputs(model, x), reduced), "planning leaves the patch as it was"
    else:
        assert run_of(model).patch.configs == run_of(fresh).patch.configs


def test_a_plan_from_a_file(tmp_path):
    model = vtok.patch(build("timm: ViT"), "tome", r=3)
    vtok.save_config(model, tmp_path)
    assert vtok.plan(build("timm: ViT"), tmp_path).tokens == vtok.plan(model, "tome", r=3).tokens


class Pair(nn.Module):
    """Two towers of different depth."""

    def __init__(self):
        super().__init__()
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
        self.a, self.b = VisionTransformer(depth=2, **shape), VisionTransformer(depth=4, **shape)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)


def test_two_towers_are_saved_each_with_its_own_numbers(tmp_path):
    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(model)
    vtok.patch(model, "zero_tprune")
    vtok.save_config(model, tmp_path)
    vtok.patch(other, tmp_path)
    for tower in ("a", "b"):
        configs = [run_of(getattr(m, tower)).patch.configs for m in (model, other)]
        assert configs[0] == configs[1]
    assert torch.equal(_outputs(model, x), _outputs(other, x))


def test_blocks_cut_off_after_patching_still_pool_by_size():
    """What leaves the last block that is left decides how the head averages."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "depth": 3}
    model, x = VisionTransformer(class_token=False, global_pool="avg", **shape).eval(), torch.randn(2, 3, 32, 32)
    cut_first = copy.deepcopy(model)
    vtok.patch(model, "tome", r=4)
    model.blocks = model.blocks[:2]
    cut_first.blocks = cut_first.blocks[:2]
    vtok.patch(cut_first, "tome", r=4)
    assert torch.equal(_outputs(model, x), _outputs(cut_first, x))
    with torch.no_grad():
        plain = model.head(model.fc_norm(model.forward_features(x).mean(1)))
    assert F.mse_loss(plain, _outputs(model, x)) > 0
    assert len(vtok.info(model).towers[0].blocks) > 0


def _wrapped(module):
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    module.forward = forward


def _compiled(module):
    module.forward = torch.compile(module.forward, backend="eager")


def _prepared(module):
    accelerate = pytest.importorskip("accelerate")
    state = accelerate.state.AcceleratorState  # one a process: of whoever came before, and of whoever comes next
    state._reset_state()
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(module)
    state._reset_state()


WRAPPED = [
    ("timm: ViT", "", _prepared),
    ("timm: ViT", "", _wrapped),
    ("timm: ViT", "", _compiled),
    ("timm: ViT", "blocks.1", _wrapped),
    ("timm: ViT", "blocks.0", _compiled),
    ("timm: BEiT relative bias", "blocks.0", _wrapped),
    ("open_clip: ViT", "transformer.resblocks.2", _wrapped),
    ("transformers: ViT", "model.vit.layers.1", _wrapped),
    ("transformers: ViT", "model", _prepared),
]


@pytest.mark.parametrize(("name", "where", "wrap"), [case for case in WRAPPED if case[0] in EXAMPLES])
def test_a_forward_that_others_wrap_while_the_model_is_patched(name, where, wrap):
    """It runs before and after the patch has gone, as the model that it then is, and the patch can come back."""
    model, x = build(name), images(name)
    reference = _outputs(model, x)
    wrap(vtok.patch(model, "tome", r=4).get_submodule(where))
    exact = wrap is not _prepared
    reduced = _outputs(model, x)
    assert not torch.allclose(reduced, reference, atol=1e-3)
    out = _outputs(vtok.unpatch(model), x)
    assert torch.equal(out, reference) if exact else torch.allclose(out, reference, atol=0.1 * reference.abs().max())
    assert torch.equal(_outputs(vtok.patch(model, "tome", r=4), x), reduced)
    assert torch.equal(_outputs(vtok.unpatch(model), x), out)


@pytest.mark.parametrize("wrap", [_prepared, _wrapped])
def test_a_wrapped_trunk_is_patched_as_it_is(wrap):
    """Nothing of vtok's replaces the forward of a whole tower, so whoever wraps it bypasses nothing."""
    model, x = build("timm: ViT average pool"), images("timm: ViT average pool")
    expected = _outputs(vtok.patch(copy.deepcopy(model), "tome", r=4), x)
    wrap(model)
    found = _outputs(vtok.patch(model, "tome", r=4), x)
    assert torch.allclose(found, expected, atol=0.1 * expected.abs().max())
    assert run_of(model).current.tokens(4) == 64 - 16


def test_a_model_of_which_one_tower_is_patched_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(model)
    vtok.patch(model.b, "tome", r=2)
    vtok.save_config(model, tmp_path)
    vtok.patch(other, tmp_path)
    assert run_of(other.a) is None
    assert run_of(other.b).patch.configs == run_of(model.b).patch.configs
    assert torch.equal(_outputs(model, x), _outputs(other, x))
    vtok.patch(other.a, "random", keep=0.5)
    vtok.patch(other, tmp_path)
    assert run_of(other.a) is None, "an earlier patch is removed first"
