"""Matrices of tokens by tokens: built block by block where there are many, refused where they cannot fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtok
from vtok.core import tokens
from vtok.core.tokens import AttentionView
from vtok.methods.pitome import energy_score
from vtok.ops import room
from vtok.ops.matching import bipartite_soft_matching


@given(st.integers(2, 70), st.integers(1, 200), st.integers(0, 2**31))
def test_blocks_change_nothing(n, largest, seed):
    """In fp64, where products of other shapes round alike to far below what orders tokens."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    whole = bipartite_soft_matching(metric, n // 3, 1), energy_score(metric, 0.3, 0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "LARGEST", largest)
        parts = bipartite_soft_matching(metric, n // 3, 1), energy_score(metric, 0.3, 0.7)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [None, (2, 1, 1, 50), (1, 3, 50, 50)])
@pytest.mark.parametrize("padded", [False, True])
def test_received_attention(bias, padded, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 3, 50, 8, generator=generator).unbind()
    view = AttentionView(q, None, k, None, 0.3, None if bias is None else torch.randn(bias, generator=generator))
    keep = torch.rand(2, 50, generator=generator) > 0.2 if padded else None
    whole = view.received(keep)
    monkeypatch.setattr(tokens, "LARGEST", 400)
    torch.testing.assert_close(view.received(keep), whole)


def test_energies_are_those_of_the_elu():
    metric = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    expected = torch.nn.functional.elu(unit @ unit.transpose(-1, -2) - 0.4, 0.6).mean(-1)
    found = energy_score(metric, 0.4, 0.6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(value.square().sum(), metric, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_what_does_not_fit_is_refused(monkeypatch):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit").eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    vtok.patch(model, "zero_tprune")
    monkeypatch.setattr(room, "_SMALL", 1000)
    with torch.no_grad():
        model(images)
        monkeypatch.setattr(room, "free_bytes", lambda device: 2000)
        with pytest.raises(vtok.UnsupportedModelError, match=r"attention of every token.*GiB are free"):
            model(images)


def test_what_is_free_is_known_or_not_asked(monkeypatch):
    free = room.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert room.free_bytes(torch.device("meta")) is None
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    room.check_room(2**60, torch.device("cpu"), "")
