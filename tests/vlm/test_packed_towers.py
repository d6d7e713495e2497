"""Methods inside vision towers that run all images as one sequence (the Qwen-VL family), in units of their merger: against
the same by hand, masked, and one by one."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers_packed import GENERIC, PACKED, SIZES, Encoder, by_hand, deep, encoded, images, unit_probs

import vtok
from vtok.config import MethodConfig
from vtok.core.tokens import Place
from vtok.methods.baselines.random_drop import RandomReducer
from vtok.patches.block import ReducingBlock
from vtok.patches.hf_packed.attention import PackedAttention
from vtok.patches.hf_vlm.tower.bridge import DROPPED, holes
from vtok.testing.encoder_oracle import differences

METHODS = {
    "tome": vtok.ToMe(r=2),
    "pitome": vtok.PiToMe(ratio=0.8),
    "official_llava": vtok.PiToMe(preset="official_llava", ratio=0.8),
    "random": vtok.RandomDrop(keep=0.7, layers=[0, 1, 2]),
    "uniform": vtok.UniformGrid(keep=0.7, layers=[0, 1]),
    "ats": vtok.ATS(num_tokens=6, layers=[0, 1, 2], query="mean"),
    "zero_tprune": vtok.ZeroTPrune(layers=[0, 1, 2], retain=0.8, r=1, cls_init="uniform"),
}
COPIES = ("tome", "pitome")  # whose sizes attention sees
QUICK = {(PACKED[1], method) for method in METHODS} | {(name, method) for name in PACKED for method in COPIES}


def each_pair(quick=QUICK):
    """(tower, method): all with windows, and what merges on all rows of the table; the rest is slow."""
    every = [(name, method) for name in [*PACKED, *GENERIC] for method in METHODS]
    marked = [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in every]
    return pytest.mark.parametrize(("name", "method"), marked)


@pytest.mark.parametrize("name", [*PACKED, *GENERIC])
def test_by_hand(name):
    """Images of several sizes in one pass are each what ToMe makes of them by hand: windows, rotary positions, sizes, taps."""
    model, r = deep(name), [2, 1, 3, 0]
    pixels, grid = images(model, SIZES)
    vtok.patch(model, vtok.ToMe(r=r))
    with torch.no_grad():
        found = encoded(model, pixels, grid)
        vtok.unpatch(model)
        for i, (size, patches) in enumerate(zip(SIZES, pixels.split(grid.prod(1).tolist()))):
            tokens, taps = by_hand(model.model.visual, patches, size, r)
            assert len(tokens) == {8: 3, 15: 9, 16: 10}[size[1] * size[2] // 4], "a block merges at most half"
            for plane, wanted in zip([p[i] for p in found], [tokens, *taps], strict=True):
                expected = torch.full_like(plane, DROPPED)
                for place, token in wanted.items():
                    expected[place] = token
                assert (plane - expected).abs().max() <= 2e-5 * expected.abs().max()


@each_pair()
def test_removing_is_masking(name, method, monkeypatch):
    """In float64, within each image of several sizes; merged units count as so many copies of themselves."""
    monkeypatch.setattr(PackedAttention, "window", lambda self, attn: 64)  # slots for copies of what came from elsewhere
    model = deep(name).double()
    given = images(model, SIZES)
    for taps in (True, False):
        vtok.patch(model, METHODS[method], trace=True)
        found = differences(Encoder(model, taps), given)
        vtok.unpatch(model)
        if taps:  # copies of what was merged later differ where they are tapped
            found.pop("copies", None)
        else:
            assert ("copies" in found) == (method in COPIES)
        assert all(value <= 1e-10 for value in found.values()), found


@each_pair()
def test_together_is_one_by_one(name, method):
    model = deep(name)
    pixels, grid = images(model, [*SIZES, [3, 4, 8]])
    vtok.patch(model, METHODS[method])
    with torch.no_grad():
        found = encoded(model, pixels, grid)
        for i, patches in enumerate(pixels.split(grid.prod(1).tolist())):
            for plane, alone in zip(found, encoded(model, patches, grid[i : i + 1]), strict=True):
                assert torch.equal(holes(plane[i]), holes(alone[0]))
                assert (plane[i] - alone[0]).abs().max() <= 2e-5 * alone[0].abs().max()
    left = [int((~holes(x)).sum()) / len(x) for x in found[0]]
    assert max(left) < 1


@pytest.mark.parametrize("name", PACKED)
def test_what_methods_see_of_units(name):
    """Keys side by side, and of attention the mean over the patches that ask, summed over those that are seen."""
    model, seen = deep(name), []

    class Looks(RandomReducer):
        needs = frozenset("qkv")

        def plan(self, x, state, view, at):
            seen.append((x, state, view))
            return super().plan(x, state, view, at)

    @dataclass(frozen=True)
    class Look(MethodConfig):
        name: ClassVar[str] = "look"

        def build(self, info):
            return Looks(0.7, (0, 1, 2), 0)

    pixels, grid = images(model, SIZES[:1])
    vtok.patch(model, Look())
    with torch.no_grad():
        encoded(model, pixels, grid)
    blocks = [m for m in model.modules() if isinstance(m, ReducingBlock)]
    for number, (x, state, view) in enumerate(seen):
        assert view.parts == 4 and view.k.shape == (1, 2, x.shape[1], 64)
        assert blocks[number]._vtok.site.place is Place.BLOCK_MID
        probs = view.probs()
        assert (probs.sum(-1) - 1).abs().max() <= 1e-5
        assert (probs - unit_probs(model.model.visual, number, state, view, SIZES[0])).abs().max() <= 1e-5
