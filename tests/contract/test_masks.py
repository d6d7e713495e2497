"""Masks that a caller hands to a tower: patches that they hide are never merged into others, kept, or looked at by a method."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import EXAMPLES, MERGING, SETTINGS, attach, build, config_for, images

import vtok
from vtok.patches.block import ReducingBlock
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of, towers
from vtok.testing.encoder_oracle import differences

NAMES = [
    name
    for name in (
        "timm: ViT",
        "timm: ViT qk-norm, LayerScale, 4 registers",
        "timm: ViT map pool (SigLIP)",
        "timm: ViT average and maximum pool",
        "timm: ViT differential attention",
        "timm: ViT res-post-norm",
        "timm: ViT parallel blocks",
        "timm: EVA-02 rotary, SwiGLU",
        "timm: EVA grouped queries",
        "timm: DINOv3 rotary, 4 registers",
        "timm: NaFlexViT",
        "timm: NaFlexViT average pool, registers",
        "open_clip: ViT",
        "open_clip: ViT custom blocks, all norms",
    )
    if name in EXAMPLES
]
MORE = {"ats": {"query": "mean"}}
PAIRS = [(name, method) for name in NAMES for method in encoder_methods() if config_for(name, method, build(name))]


def tower(model):
    return towers(model)[0][1]


def masked(model: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a model says of images under a mask, broadcast to [B, H, N, N], True = attend, or added."""
    if hasattr(model, "transformer"):  # open_clip writes it otherwise, and hands none on
        custom = type(tower(model).blocks[0].module).__name__ == "CustomResidualAttentionBlock"
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask if custom else torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        if mask is not None:
            mask = mask.expand(len(x), 4, mask.shape[-1], mask.shape[-1]).flatten(0, 1)
        handle = model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
        )
        try:
            return model(x)
        finally:
            handle.remove()
    return model.forward_head(model.forward_features(x, attn_mask=mask))


def keeps(model, batch=2):
    """[B, N] bool: some columns of patches are hidden, in each image others."""
    p = tower(model).num_prefix
    keep = torch.ones(batch, p + 64, dtype=torch.bool)
    for i in range(batch):
        keep[i, p:].view(8, 8)[:, 5 + i :] = False
    return keep


def forms(keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks that all say the same."""
    wide = keep[:, None, None]
    pairs = wide & keep[:, None, :, None]
    found = {"keys": wide, "pairs": wide.expand(*pairs.shape), "heads": wide.expand(-1, 4, *pairs.shape[2:])}
    found |= {"symmetric": pairs | torch.eye(keep.shape[1], dtype=torch.bool)}
    found |= {f"{k}, added": torch.zeros(m.shape, dtype=torch.float64).masked_fill(~m, float("-inf")) for k, m in found.items()}
    return found


def hidden_changed(model, x, keep):
    """The same images with other content where `keep` is False."""
    p = tower(model).num_prefix
    gone = (~keep[:, p:]).view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.where(gone, 3 * images(next(iter(EXAMPLES)), len(x), torch.float64, seed=9), x)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_what_is_hidden_does_not_matter(name, method):
    """Whatever hidden patches show, and however the mask is written; alone as in a batch."""
    model, x = attach(name, build(name, torch.float64), method, trace=True), images(name, dtype=torch.float64)
    keep = keeps(model)
    masks = forms(keep)
    with torch.no_grad():
        out = masked(model, x, masks["keys"])
        limit = 1e-10 * out.abs().max()
        final = run_of(model).current.final
        assert keep.gather(1, final.index)[final.keep].all(), "a hidden patch was kept"
        if final.size is not None:
            assert torch.equal((final.size * final.keep).sum(1), keep.sum(1).to(final.size)), "one was merged into another"
        assert (masked(model, hidden_changed(model, x, keep), masks["keys"]) - out).abs().max() <= limit
        alone = torch.cat([masked(model, x[i : i + 1], masks["keys"][i : i + 1]) for i in range(2)])
        assert (alone - out).abs().max() <= limit
        for form, mask in masks.items():
            assert (masked(model, x, mask) - out).abs().max() <= limit, form


FORMS = (lambda k: k[None], lambda k: k[None].expand(len(k), -1), lambda k: k[None, None], lambda k: k[None, None, None])


@pytest.mark.parametrize("method", encoder_methods())
def test_masks_of_every_number_of_axes(method):
    name = "timm: ViT"
    model, x = attach(name, build(name, torch.float64), method), images(name, dtype=torch.float64)
    keep = keeps(model)[0]
    with torch.no_grad():
        outs = [masked(model, x, form(keep)) for form in FORMS]
    assert all((out - outs[-1]).abs().max() <= 1e-10 * outs[-1].abs().max() for out in outs)


@pytest.mark.parametrize("method", encoder_methods())
def test_hiding_patches_is_taking_them_out(method):
    """The tokens that are left, and the logits, are those of a sequence that never held what the mask hides."""
    name = "timm: ViT"
    config = config_for(name, method, build(name))
    configs = [config, config.replace(**MORE[method])] if method in MORE else [config]
    for chosen in configs:
        model = vtok.patch(build(name, torch.float64), chosen)
        x, keep = images(name, dtype=torch.float64)[:1], keeps(model)[:1]
        with torch.no_grad():
            whole = model._pos_embed(model.patch_embed(x))
            short = whole[keep][None]
            run_of(model)._forget()  # the stem has told the grid of the whole image
            for block in model.blocks:
                whole = block(whole, attn_mask=keep[:, None, None])
            state = run_of(model).current.final
            short = model.blocks(short)
        n = short.shape[1]
        assert n < keep.sum()
        assert state.keep[:, :n].all() and not state.keep[:, n:].any()
        assert (whole[:, :n] - short).abs().max() <= 1e-10 * short.abs().max()


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if pair[0] in NAMES[:8]])
def test_masks_between_patches(name, method):
    """A mask that hides patches from some tokens: dropping under it is exact; merging would carry across, and is refused."""
    model, x = attach(name, build(name, torch.float64), method, trace=True), images(name, dtype=torch.float64)
    n = tower(model).num_prefix + 64
    band = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 40
    band[: n - 64] = band[:, : n - 64] = True
    with torch.no_grad():
        if method in MERGING:
            with pytest.raises(vtok.UnsupportedModelError, match="hides some tokens from others"):
                masked(model, x, band)
            return

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return masked(self.model, x, band)

        assert differences(Masked(), x)["masked"] <= 1e-10
        added = torch.zeros(n, n, dtype=torch.float64).masked_fill(~band, float("-inf"))
        out = masked(model, x, band)
        assert (masked(model, x, added) - out).abs().max() <= 1e-10 * out.abs().max()


@pytest.mark.parametrize("method", encoder_methods())
def test_biases_with_hidden_patches(method):
    """A bias that is added to logits goes on to be added where it also hides patches."""
    name = "timm: ViT"
    model, x = attach(name, build(name, torch.float64), method), images(name, dtype=torch.float64)
    keep = keeps(model)
    bias = torch.randn(1, 4, 65, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = bias.masked_fill(~keep[:, None, None], float("-inf"))
    with torch.no_grad():
        out = masked(model, x, both)
        assert (masked(model, hidden_changed(model, x, keep), both) - out).abs().max() <= 1e-10 * out.abs().max()
        plain = masked(model, x, keep[:, None, None])
    assert (out - plain).abs().max() > 1e-3 * out.abs().max(), "the bias was lost"


@pytest.mark.parametrize("name", ["timm: ViT", "timm: ViT average and maximum pool", "timm: ViT map pool (SigLIP)"])
@pytest.mark.parametrize("method", encoder_methods())
def test_an_image_whose_patches_are_all_hidden(name, method):
    model, x = attach(name, build(name, torch.float64), method), images(name, dtype=torch.float64)
    p = tower(model).num_prefix
    keep = torch.ones(2, p + 64, dtype=torch.bool)
    keep[1, p:] = False
    with torch.no_grad():
        out = masked(model, x, keep[:, None, None])
        alone = masked(model, x[:1], None)
    assert (out[:1] - alone).abs().max() <= 1e-10 * alone.abs().max()
    assert p == 0 or torch.isfinite(out).all() or "pool" in name


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_patch_that_does_nothing_changes_nothing_under_a_mask(name):
    model, x = build(name), images(name)
    mask = keeps(model)[:, None, None]
    with torch.no_grad():
        reference = masked(model, x, mask)
        vtok.patch(model, "random", keep=1.0)
        assert torch.equal(masked(model, x, mask), reference)
        vtok.patch(model, vtok.RandomDrop(keep=0.5, layers=[3]))
        link = next(m for m in model.modules() if isinstance(m, ReducingBlock))._vtok
        assert link.seeds
        masked(model, x, mask.new_ones(mask.shape))  # hides nothing
        assert run_of(model).current.states[0].keep is None
        assert torch.equal(masked(vtok.unpatch(model), x, mask), reference)


def test_settings_cover_every_method():
    assert set(SETTINGS) == set(encoder_methods())
