"""Every plain ViT in timm's registry, built without memory, is covered or refused with a reason."""

import functools

import pytest
import timm
import torch
from timm.models import list_models

import vtok

MODULES = (
    "beit",
    "deit",
    "eva",
    "naflexvit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)
# Blocks whose attention vtok does not know, or whose attention and MLP cannot be told apart.
REFUSED_BLOCKS = {"RelPosBlock", "ResPostRelPosBlock", "ParallelThingsBlock", "DiffParallelScalingBlock"}
SAMPLE = (
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "beitv2_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_r26_s32_224",
    "naflexvit_base_patch16_siglip",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16",
)


@functools.cache
def plain_vits():
    return sorted(name for module in MODULES for name in list_models(module=module))


def _support(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    return vtok.supports(model)


def _check(name):
    """Whether `name` is covered; whatever is not must say why."""
    support = _support(name)
    if support:
        assert support.methods["random"] is None, (name, support.methods)
        return True
    assert "supported: " in support.reason or "known: " in support.reason, (name, support.reason)
    return False


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_registry(name):
    assert _check(name) == (not name.startswith(("vit_relpos", "samvit")))


@pytest.mark.slow
def test_the_whole_registry(capsys):
    covered = [name for name in plain_vits() if _check(name)]
    refused = sorted(set(plain_vits()) - set(covered))
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}: {len(covered)} of {len(plain_vits())} plain ViTs covered")
        print(f"refused: {', '.join(refused)}")
    assert len(covered) >= 0.92 * len(plain_vits())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_v2_b0", "hiera_tiny_224", "cait_xxs24_224", "resnet18"])
def test_other_architectures_are_refused_with_what_is_supported(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(vtok.UnsupportedModelError, match="VisionTransformer"):
        vtok.patch(model, "tome")
