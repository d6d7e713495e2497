"""A method may compare the tokens themselves: PiToMe's presets that do, in every kind of block."""

import helpers_pitome as slow
import pytest
import torch
from torch._subclasses import FakeTensorMode
from zoo import BACKENDS, EXAMPLES, FAMILIES, build, images

import vtok
from vtok.eval.benchmarks.flops import count_macs
from vtok.patches.attention import Tap

PRESETS = ("official_clip", "official_llava")  # between attention and MLP, weighted by size; after the MLP, plain means
# Every kind of block once, the plain ones of each backend under both.
BOTH = [
    name for name in FAMILIES if name in ("timm: ViT", "open_clip: ViT", "transformers: CLIP tower", "transformers: BLIP tower")
]
CASES = sorted({(name, PRESETS[i % 2]) for i, name in enumerate(FAMILIES)} | {(n, preset) for n in BOTH for preset in PRESETS})


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_hidden_states_are_compared_in_every_kind_of_block(name: str, preset: str) -> None:
    """Without a hook or a value read back, at the stated price, alone as in a batch; undone without a trace."""
    model, x = build(name, torch.float64), images(name, dtype=torch.float64)
    with torch.no_grad():
        reference = model(x)
        vtok.patch(model, "pitome", ratio=0.8, preset=preset, input_size=EXAMPLES[name].input_size)
        assert not any(isinstance(hook, Tap) for m in model.modules() for hook in m._forward_hooks.values())
        together = model(x)
        assert (together - torch.cat([model(one[None]) for one in x])).abs().max() <= 1e-10 * together.abs().max()
        plan = vtok.plan(model, "pitome", ratio=0.8, preset=preset, input_size=EXAMPLES[name].input_size)
        counted = count_macs(model, x)
        assert (counted.model, counted.reduction) == (plan.estimate.macs, plan.estimate.reduction_macs)
        assert not torch.equal(together, reference)
        with FakeTensorMode(allow_non_fake_inputs=True):  # any read of a value raises
            assert model(torch.empty(x.shape, dtype=x.dtype)).shape == reference.shape
        assert torch.equal(vtok.unpatch(model)(x), reference)


def test_blocks_that_cannot_be_split_merge_what_left_them() -> None:
    """Attention and MLP run side by side; the hidden states that merge are those behind both."""
    name = "timm: ViT parallel blocks"
    model, x = build(name, torch.float64), images(name, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        size = torch.ones(tokens.shape[:2], dtype=torch.float64)
        for i, block in enumerate(model.blocks):
            out = block(tokens)
            tokens, size = slow.merged(out, size, out, slow.step("official_clip", i, 4), 0.9)
        expected = model.forward_head(model.norm(tokens))
        found = vtok.patch(model, "pitome", ratio=0.9, preset="official_clip")(x)
    assert tokens.shape[1] < 50
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.skipif("open_clip" not in BACKENDS, reason="needs open_clip")
@pytest.mark.parametrize("preset", PRESETS)
def test_the_layout_of_the_blocks_makes_no_difference(preset: str) -> None:
    """Blocks that take [N, B, C] compare the tokens of one image, not the images of one token."""
    x = images("open_clip: ViT", dtype=torch.float64)
    first, second = (build(f"open_clip: {name}", torch.float64) for name in ("ViT", "ViT sequence first"))
    with torch.no_grad():
        second.load_state_dict(first.state_dict())
        outs = [vtok.patch(model, "pitome", ratio=0.8, preset=preset)(x) for model in (first, second)]
    assert (outs[0] - outs[1]).abs().max() <= 1e-10 * outs[0].abs().max()
