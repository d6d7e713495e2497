"""Methods inside vision towers that run all images as one sequence (the Qwen-VL family), in units of their merger."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers_packed import PACKED, SIZES, Encoder, by_hand, deep, encoded, images

import vtok
from vtok.config import MethodConfig
from vtok.methods.baselines.random_drop import RandomDrop
from vtok.patches.hf_packed.attention import PackedAttention
from vtok.patches.hf_vlm.tower_bridge import DROPPED, holes
from vtok.testing.encoder_oracle import differences

METHODS = {
    "tome": vtok.ToMe(r=2),
    "pitome": vtok.PiToMe(ratio=0.8),
    "official_llava": vtok.PiToMe(preset="official_llava", ratio=0.8),
}


@dataclass(frozen=True)
class Lose(MethodConfig):
    """Drops units at random inside the tower, in the middle of blocks."""

    name: ClassVar[str] = "lose"

    keep: float = 0.7
    layers: tuple[int, ...] = (0, 1, 2)

    def build(self, info):
        return RandomDrop(keep=self.keep, layers=self.layers).build(info)


ALL = {**METHODS, "lose": Lose()}


@pytest.mark.parametrize("name", PACKED)
def test_by_hand(name):
    """Images of several sizes in one pass are each what ToMe makes of them by hand: windows, rotary positions, sizes, taps."""
    model, (pixels, grid) = deep(name), images(SIZES)
    r = [2, 1, 3, 0]
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


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", PACKED)
def test_removing_is_masking(name, method, monkeypatch):
    """In float64, within each image of several sizes; merged units count as so many copies of themselves."""
    monkeypatch.setattr(PackedAttention, "window", lambda self, attn: 64)  # slots for copies of what came from elsewhere
    model, (pixels, grid) = deep(name).double(), images(SIZES)
    for taps in (True, False):
        encoder = Encoder(model, taps)
        vtok.patch(model, ALL[method], trace=True)
        found = differences(encoder, (pixels.double(), grid))
        vtok.unpatch(model)
        if taps:  # copies of what was merged later differ where they are tapped
            found.pop("copies", None)
        else:
            assert ("copies" in found) == (method in ("tome", "pitome"))
        assert all(value <= 1e-10 for value in found.values()), found


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", PACKED)
def test_together_is_one_by_one(name, method):
    model, (pixels, grid) = deep(name), images([*SIZES, [3, 4, 8]])
    vtok.patch(model, ALL[method])
    with torch.no_grad():
        found = encoded(model, pixels, grid)
        for i, patches in enumerate(pixels.split(grid.prod(1).tolist())):
            for plane, alone in zip(found, encoded(model, patches, grid[i : i + 1]), strict=True):
                assert torch.equal(holes(plane[i]), holes(alone[0]))
                assert (plane[i] - alone[0]).abs().max() <= 1e-5 * alone[0].abs().max()
        assert len({int((~holes(x)).sum()) for x in found[0]}) > 1
