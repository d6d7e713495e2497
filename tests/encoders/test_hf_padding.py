"""Images that come padded to one length (SigLIP2, Idefics3): padding is never merged, kept or attended to."""

import pytest
import torch

pytest.importorskip("transformers")

from zoo import SETTINGS, WITHOUT_CLS, Nothing, build, checkpointing

import vtok
from vtok.core.tokens import Place
from vtok.patches.padding import by_rows, padding_of
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of

GRIDS = [(8, 8), (6, 8), (5, 7), (6, 8), (2, 4)]
PATCH = 8


def picture(seed, grid):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, grid[0] * PATCH, grid[1] * PATCH, generator=generator, dtype=torch.float64)


def packed(pictures, length=None):
    """Pictures as SigLIP2 takes them, padded to one length with numbers that must not matter."""
    grids = [(p.shape[1] // PATCH, p.shape[2] // PATCH) for p in pictures]
    length = length or max(h * w for h, w in grids)
    pixels = torch.full((len(pictures), length, 3 * PATCH * PATCH), 7.0, dtype=torch.float64)
    mask = torch.zeros(len(pictures), length, dtype=torch.int64)
    for i, (picture_, (h, w)) in enumerate(zip(pictures, grids)):
        patches = picture_.reshape(3, h, PATCH, w, PATCH).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        pixels[i, : h * w], mask[i, : h * w] = patches, 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def siglip2(name, pictures, model, length=None):
    model.inputs = lambda _: packed(pictures, length)
    return model(torch.zeros(1))


def idefics3(name, pictures, model, length=None):
    """Padded to the right and below: real patches are no stretch of the sequence."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    pixels = torch.full((len(pictures), 3, height, width), 7.0, dtype=torch.float64)
    mask = torch.zeros(len(pictures), height // PATCH, width // PATCH, dtype=torch.bool)
    for i, p in enumerate(pictures):
        pixels[i, :, : p.shape[1], : p.shape[2]] = p
        mask[i, : p.shape[1] // PATCH, : p.shape[2] // PATCH] = True
    model.inputs = lambda _: {"patch_attention_mask": mask}
    return model(pixels)


CASES = [
    ("transformers: SigLIP2, both towers", siglip2),
    ("transformers: SigLIP2 classifier, average pool", siglip2),
    ("transformers: Idefics3 tower", idefics3),
]
PICTURES = [picture(i, grid) for i, grid in enumerate(GRIDS)]


PRESETS = ("official_clip", "official_llava")  # PiToMe on hidden states, with sizes and without


def config(method, **extra):
    if method in PRESETS:
        return vtok.PiToMe(ratio=0.8, preset=method)
    knobs = {**SETTINGS[method], **WITHOUT_CLS.get(method, {})}
    if method == "zero_tprune":
        knobs["r"] = 3
    return vtok.METHODS.get(method)(**{**knobs, **extra})


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [*encoder_methods(), *PRESETS])
@pytest.mark.parametrize(("name", "call"), CASES)
def test_a_padded_batch_equals_its_images_alone(name, call, method, kernel):
    model = build(name, torch.float64)
    model.model.set_attn_implementation(kernel)
    vtok.patch(model, config(method))
    with torch.no_grad():
        alone = torch.cat([call(name, [p], model) for p in PICTURES])
        together = call(name, PICTURES, model)
        run = run_of(model)
        final, length = run.current.final, run.current.length
        assert length == 64
        assert final.index.shape[1] < length
        # eager attention takes its softmax in fp32
        assert (together - alone).abs().max() <= (1e-10 if kernel == "sdpa" else 1e-4) * alone.abs().max()
        again = call(name, PICTURES[::-1], model).flip(0)
        assert (again - together).abs().max() <= (1e-10 if kernel == "sdpa" else 1e-4) * alone.abs().max()


@pytest.mark.parametrize("method", [*encoder_methods(), *PRESETS])
@pytest.mark.parametrize(("name", "call"), CASES)
def test_no_patch_and_padding_ever_meet(name, call, method):
    model = vtok.patch(build(name, torch.float64), config(method), trace=True)
    with torch.no_grad():
        call(name, PICTURES, model)
    run = run_of(model)
    real = run.current.states[0].keep
    assert real.sum(1).tolist() == [h * w for h, w in GRIDS]
    final = run.current.final
    assert (real.gather(1, final.index) | ~final.keep).all(), "padding was kept as if it were real"
    if final.size is not None:
        assert (final.size * final.keep).sum(1).tolist() == [h * w for h, w in GRIDS]
    group = final.group
    assert (group[real] >= -1).all()
    owner = final.keep.gather(1, group.clamp_min(0)) & (group >= 0)
    assert not (owner & ~real).any(), "padding was folded into a patch"
    if final.size is not None:
        assert owner[real].all(), "a merged patch is somewhere"


@pytest.mark.parametrize(("name", "call"), CASES)
def test_idle_and_split_blocks_on_padded_input(name, call):
    model = build(name, torch.float64)
    with torch.no_grad():
        reference = call(name, PICTURES, model)
        vtok.patch(model, vtok.RandomDrop(keep=1.0))
        assert torch.equal(call(name, PICTURES, model), reference) or "Idefics3" in name  # its reader now knows the padding
        for place in Place:
            vtok.patch(model, Nothing(place=place, needs=frozenset("qk")))
            split = call(name, PICTURES, model)
            if "Idefics3" not in name:
                assert (split - reference).abs().max() <= 1e-11 * reference.abs().max()


@pytest.mark.parametrize(("name", "call"), CASES[:2])
def test_batches_without_padding_are_as_before(name, call):
    """A mask that hides nothing costs nothing: no state is seeded."""
    model = vtok.patch(build(name, torch.float64), "tome", r=6)
    whole = [PICTURES[0], picture(9, (8, 8))]
    with torch.no_grad():
        call(name, whole, model)
    run = run_of(model)
    assert run.current.states[0].trivial
    assert run.current.final.keep is None


def test_info_counts_real_tokens():
    name, call = CASES[0]
    model = vtok.patch(build(name, torch.float64), "tome", r=6)
    with torch.no_grad():
        call(name, PICTURES, model)
    tower = vtok.info(model).towers[0]
    assert tower.blocks[0].per_image == (58, 42, 29, 42, 4)
    assert tower.blocks[-1].per_image == (40, 24, 11, 24, 1)
    assert tower.mean_estimate.macs < tower.estimate.macs
    assert tower.mean_estimate.rows[0].tokens_in == sum(h * w for h, w in GRIDS) / len(GRIDS)


def test_gradients_flow_through_padded_batches():
    name, call = CASES[0]
    model = vtok.patch(build(name, torch.float64).train(), "tome", r=6)
    call(name, PICTURES, model).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in plain.values())
    model.zero_grad()
    checkpointing(model)
    call(name, PICTURES, model).square().sum().backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_which_masks_are_padding():
    keep = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    wide = keep[:, None, None].expand(2, 1, 4, 4)
    both, itself = wide & wide.mT, torch.eye(4, dtype=torch.bool)
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~wide, torch.finfo(torch.float32).min)
    assert by_rows(None, {"attention_mask": keep.long()}).shape == (2, 1, 1, 4)
    for mask in (keep[:, None, None], keep.long()[:, None, None], wide, both, both | itself, wide | itself, additive):
        for form in (mask, mask.expand(2, 3, *mask.shape[2:])):
            assert torch.equal(padding_of(form, 4).keep, keep)
            assert padding_of(form, 4).alone
    for mask in (additive.clamp_min(-3e38), additive.clamp_min(-1e9), torch.where(wide, 0.0, -1e4)):
        assert padding_of(mask, 4).alone
    for bias in (additive + 0.5, wide & torch.ones(4, 4, dtype=torch.bool).tril()):  # padding, and more
        found = padding_of(bias, 4)
        assert torch.equal(found.keep, keep)
        assert not found.alone
    lone = torch.tensor([True, False, False, False])  # nothing but the class token, and nothing but one patch
    for mask in (lone, lone & lone[:, None], lone & lone[:, None] | itself):
        assert torch.equal(padding_of(mask, 4, num_prefix=1).keep[0], lone)
    assert torch.equal(padding_of(lone & lone[:, None], 4).keep[0], lone)
    assert padding_of(itself, 4) is None  # every token for itself: which are padding cannot be told
    for nothing in (
        None,
        torch.ones(2, 1, 1, 4),
        torch.zeros(1, 3, 4, 4),
        torch.ones(4, 4, dtype=torch.bool).tril(),
        keep[0, :3],
    ):
        assert padding_of(nothing, 4) is None
