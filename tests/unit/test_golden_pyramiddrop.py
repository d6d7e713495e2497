"""PyramidDrop against its authors' program (see golden/README.md)."""

import pytest
import torch
from helpers_golden import assert_equal, load
from helpers_layers import info
from torch import Tensor

import vtok
from vtok.core.prompt import Layout
from vtok.core.tokens import Place, Site
from vtok.methods.todre.text_relevance import causal_attention


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0 .. L-1 on [B, H, L, D], in halves."""
    length, width = x.shape[-2:]
    angle = torch.arange(length, dtype=x.dtype)[:, None] / theta ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.cat([angle, angle], 1)
    return x * angle.cos() + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * angle.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_stays(dtype: torch.dtype) -> None:
    """One stage, two prompts of unequal length, padded on the right."""
    g = load("baseline_pyramiddrop", dtype)
    real, start, count = g["attention_mask"], g["image_start"][:, None], g["image_tokens"][:, None]
    column = torch.arange(real.shape[1])
    prompts = Layout.whole((column >= start) & (column < start + count), real)
    assert_equal(prompts.last, g["prompt_text_len"] + g["image_tokens"] - 1)
    q, k = (rotated(g[name], g["rope_theta"]) for name in ("q_no_rope", "k_no_rope"))
    attention = causal_attention(q, k, q.shape[-1] ** -0.5, real)
    reducer = vtok.PyramidDrop(keep=[g["ratio_next"], 0.25], layers=[8, 16]).build_vlm(info())
    keep = reducer.keep(g["features"], prompts, attention, reducer.sites[0])
    for b in range(2):
        kept = (keep[b] | ~prompts.visual[b]) & real[b]
        assert_equal(kept.nonzero()[:, 0], g["out_index"][b][g["out_attention_mask"][b]])
    assert keep.sum(1).tolist() == [reducer.layer_count(reducer.sites[0], 24, 24)] * 2


def test_stages() -> None:
    def where(depth: int, **params: object) -> list[int]:
        reducer = vtok.PyramidDrop(**params).build_vlm(info(depth=depth))
        assert all(reducer.probe(site) == site.index for site in reducer.sites)
        return [site.index for site in reducer.sites]

    assert [where(depth) for depth in (32, 40, 28, 4)] == [[8, 16, 24], [10, 20, 30], [7, 14, 21], [1, 2, 3]]
    assert where(32, keep=[1.0, 0.5], layers=[3, 9]) == [9]
    assert where(32, keep=[1, 1, 1]) == []
    with pytest.raises(vtok.ConfigError, match="3 stages need a deeper LLM than that of Golden, which has 3 layers"):
        where(3)


def test_shares_are_of_what_entered() -> None:
    """Rounded down from the number that entered the LLM, not from what arrives; tokens dropped before the LLM do not count."""
    reducer = vtok.PyramidDrop(keep=[0.5, 0.3]).build_vlm(info())
    first, second = reducer.sites
    assert [reducer.layer_count(site, n, 15) for site, n in ((first, 15), (second, 7))] == [7, 4]
    real = torch.ones(1, 30, dtype=torch.bool)
    visual = (torch.arange(30) >= 5) & (torch.arange(30) < 25)
    whole = Layout.whole(visual[None], real)
    q = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    attention = causal_attention(q, q, 1.0, real)
    fewer = whole._replace(entered=whole.before & (torch.arange(30) < 20))
    for prompts, n in ((whole, 20), (fewer, 15)):
        keep = reducer.keep(q, prompts, attention, Site(Place.DECODER_IN, second.index))
        assert int(keep.sum()) == reducer.layer_count(second, n, n) == int(0.3 * n)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"keep": 0.5}, "keep lists one share a stage"),
        ({"keep": [0.5, 0.6]}, "which cannot grow; got"),
        ({"keep": [0.5, 0]}, r"keep is a fraction in \(0, 1\], got 0"),
        ({"layers": [8, 16]}, "layers names 2 decoder layers for 3 shares"),
        ({"layers": [8, 8, 16]}, "layers lists decoder layers from 1 on in rising order"),
        ({"layers": [0, 8, 16]}, "layers lists decoder layers from 1 on in rising order"),
    ],
)
def test_values_that_make_no_sense(params: dict, message: str) -> None:
    with pytest.raises(vtok.ConfigError, match=message):
        vtok.PyramidDrop(**params)
