"""Methods that spread what they keep over the image use the grid of the call, not the one that the model was built for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import BACKENDS, build

import vtok
from vtok.methods.baselines.uniform_grid import dither_rank
from vtok.targets.resolve import run_of

KEEP = 0.25
SIZES = ((64, 64), (64, 128), (128, 64), (48, 80))


def timm_model(name: str) -> nn.Module:
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 3}
    if name == "padded":
        return VisionTransformer(**size, dynamic_img_size=True, dynamic_img_pad=True)
    if name == "eva":
        return Eva(**size, dynamic_img_size=True, use_rot_pos_emb=True)
    if name == "built wide":
        return Beit(**{**size, "img_size": (48, 80)}, use_abs_pos_emb=False)
    if name == "naflex":
        return NaFlexVit(NaFlexVitCfg(patch_size=8, embed_dim=48, depth=2, num_heads=4), num_classes=3, img_size=64)
    return VisionTransformer(**size, dynamic_img_size=True, reg_tokens=2)


def check(model: nn.Module, grid: tuple[int, int]) -> None:
    """What the first block kept is a quarter of every quarter of the grid, and what the last one kept is spread alike."""
    run = run_of(model)
    rows, columns = grid
    for left in (run.current.states[1], run.current.final):
        places = left.index[:, run.num_prefix :] - run.num_prefix
        rank = dither_rank(torch.arange(rows * columns), columns, rows)
        expected = rank.argsort(stable=True)[: places.shape[1]].sort().values
        assert torch.equal(places, expected.expand(len(places), -1))
    places = run.current.states[1].index[0, run.num_prefix :] - run.num_prefix
    assert len(places) == rows * columns // 4
    assert ((places // columns % 2 == 0).all() and (places % columns % 2 == 0).all()) or rows % 2 or columns % 2


@pytest.mark.skipif("timm" not in BACKENDS, reason="needs timm")
@pytest.mark.parametrize("name", ["vit", "padded", "eva", "naflex", "built wide"])
def test_timm_at_other_sizes(name):
    model = vtok.patch(timm_model(name).eval(), "uniform", keep=KEEP, layers=[0])
    with torch.no_grad():
        for height, width in ((48, 80),) if name == "built wide" else SIZES:
            model(torch.rand(2, 3, height, width))
            check(model, (height // 8, width // 8))
        if name == "padded":
            model(torch.rand(2, 3, 60, 100))
            check(model, (8, 13))
        model(torch.rand(2, 3, 48, 80))
        assert vtok.info(model).towers[0].blocks[-1].tokens_out == run_of(model).num_prefix + 15


HF = {
    "transformers: ViT": True,
    "transformers: CLIP tower": True,
    "transformers: SigLIP tower, attention pool": True,
    "transformers: SigLIP2, both towers": False,
    "transformers: DINOv2": False,
    "transformers: DINOv3 rotary, registers": False,
    "transformers: BEiT average pool": True,
    "transformers: InternVL tower": False,
    "transformers: Idefics3 tower": False,
    "transformers: BLIP tower": True,
}


@pytest.mark.skipif("transformers" not in BACKENDS, reason="needs transformers")
@pytest.mark.parametrize("name", HF)
def test_transformers_at_other_sizes(name):
    model = build(name)
    inputs = model.inputs
    if HF[name]:
        model.inputs = lambda images: {**(inputs(images) if inputs else {}), "interpolate_pos_encoding": True}
    vtok.patch(model, "uniform", keep=KEEP, layers=[0])
    with torch.no_grad():
        for height, width in SIZES:
            if name == "transformers: Idefics3 tower" and (height, width) != (64, 64) and height * width > 64 * 64:
                continue  # its position embeddings know fractions of the built grid only
            model(torch.rand(2, 3, height, width))
            check(model, (height // 8, width // 8))


@pytest.mark.skipif("open_clip" not in BACKENDS, reason="needs open_clip")
def test_open_clip_built_for_another_shape():
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(image_size=(48, 80), patch_size=8, width=48, layers=2, heads=4, mlp_ratio=2.0, output_dim=10)
    vtok.patch(model.eval(), "uniform", keep=KEEP, layers=[0])
    with torch.no_grad():
        model(torch.rand(2, 3, 48, 80))
    check(model, (6, 10))


@pytest.mark.skipif("transformers" not in BACKENDS, reason="needs transformers")
@pytest.mark.parametrize("name", [n for n in HF if "SigLIP2" in n or "Idefics3" in n])
def test_images_of_different_shapes_in_one_batch(name):
    """Each keeps what it would keep alone."""
    from test_hf_padding import CASES, picture

    call = next(c for n, c in CASES if n == name)
    pictures = [picture(i, grid) for i, grid in enumerate([(4, 8), (8, 4), (6, 6), (2, 8)])]
    model = vtok.patch(build(name, torch.float64), "uniform", keep=KEEP, layers=[0])
    with torch.no_grad():
        call(name, pictures, model)
        state = run_of(model).current.final
        real = run_of(model).current.states[0].keep
        for i, p in enumerate(pictures):
            rows, columns = p.shape[1] // 8, p.shape[2] // 8
            rank = dither_rank(torch.arange(rows * columns), columns, rows)
            count = int(state.keep[i].sum())
            places = real[i].cumsum(0)[state.index[i, :count]] - 1  # among the patches of the image itself
            assert torch.equal(places, rank.argsort(stable=True)[:count].sort().values)
            assert count == rows * columns // 4


@pytest.mark.skipif("timm" not in BACKENDS, reason="needs timm")
def test_where_no_grid_is_known():
    """Patches that dropout leaves out, and blocks that are called without their stem."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=4, patch_drop_rate=0.5)
    vtok.patch(model, "uniform", keep=0.5, layers=[0])
    model.train()(torch.rand(2, 3, 64, 64))
    assert run_of(model).current.states[0].grid == (1, 32)
    model.eval()(torch.rand(2, 3, 64, 64))
    assert run_of(model).current.states[0].grid == (8, 8)
    model.blocks(torch.rand(2, 65, 48))
    assert run_of(model).current.states[0].grid is None


@pytest.mark.skipif("timm" not in BACKENDS, reason="needs timm")
def test_compiled_models_know_the_grid():
    model, x = vtok.patch(timm_model("vit").eval(), "uniform", keep=KEEP, layers=[0]), torch.rand(2, 3, 48, 80)
    with torch.no_grad():
        eager = model(x)
        torch._dynamo.reset()
        assert (torch.compile(model, fullgraph=True, backend="eager")(x) - eager).abs().max() < 1e-5
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="eager")
        assert (model(x) - eager).abs().max() < 1e-5
        check(model, (6, 10))


@pytest.mark.skipif("timm" not in BACKENDS, reason="needs timm")
def test_packed_input_is_refused_by_every_door():
    model = vtok.patch(timm_model("naflex").eval(), "tome", r=4)
    packed = {
        "patches": torch.rand(2, 20, 192),
        "patch_coord": torch.zeros(2, 20, 2, dtype=torch.int64),
        "patch_valid": torch.ones(2, 20, dtype=torch.bool),
    }
    for call in (lambda: model(packed), lambda: model(*packed.values()), lambda: model.forward_features(*packed.values())):
        with pytest.raises(vtok.UnsupportedModelError, match="packed NaFlex"):
            call()
