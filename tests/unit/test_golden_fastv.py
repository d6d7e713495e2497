"""FastV against its authors' program (see golden/README.md)."""

import pytest
import torch
from helpers_golden import assert_equal, load
from helpers_layers import given_probs, info, layout
from torch import Tensor

import vtok
from vtok.core.tokens import Place, Site
from vtok.methods.in_llm.fastv import attended

AT = Site(Place.DECODER_IN, 2)


def attention(rows: Tensor, at: list[int]) -> Tensor:
    """[B, H, L, L] with the given rows [B, H, L] at these places; whatever else is uniform."""
    probs = torch.full((*rows.shape, rows.shape[2]), 1 / rows.shape[2], dtype=rows.dtype)
    for b, place in enumerate(at):
        probs[b, :, place] = rows[b]
    return probs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("key", "drop"), [("r50", 0.5), ("r75", 0.75), ("r90", 0.9)])
def test_what_stays(key: str, drop: float, dtype: torch.dtype) -> None:
    g = load("baseline_fastv", dtype)
    length = g["attn_last_row"].shape[2]
    reducer = vtok.FastV(keep=1 - drop).build_vlm(info())
    assert [reducer.probe(site) for site in reducer.sites] == [1] == [g["K"] - 1]
    rows = g["attn_last_row"] / g["attn_last_row"].sum(-1, keepdim=True)
    both = layout(length, g["image_start"], g["image_length"], torch.ones(2, length, dtype=torch.bool))
    keep = reducer.keep(torch.zeros(2, length, 1), both, given_probs(attention(rows, [length - 1] * 2)), AT)
    kept = (keep | ~both.visual).nonzero()
    assert_equal(kept[kept[:, 0] == 0][:, 1], g[f"kept_positions_{key}"])  # the program lets the first prompt choose for all
    if key == "r50":
        chosen = keep[1].nonzero()[:, 0]
        own = g["batch_item_1_own_choice_r50"].sort().values
        assert_equal(chosen, own if int(own.max()) >= g["image_length"] else own + g["image_start"])
    assert keep.sum(1).tolist() == [reducer.layer_count(AT, g["image_length"], g["image_length"])] * 2


def test_the_last_query_is_the_last_token_that_is_no_padding() -> None:
    length = 12
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, 9:], real[1, :3] = False, False
    prompts = layout(length, 4, 4, real)
    assert prompts.last.tolist() == [8, 11]
    rows = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows / rows.sum(-1, keepdim=True)
    keep = (
        vtok.FastV(keep_tokens=2)
        .build_vlm(info())
        .keep(torch.zeros(2, length, 1), prompts, given_probs(attention(rows, [8, 11])), AT)
    )
    for b in range(2):
        assert keep[b].nonzero()[:, 0].tolist() == sorted((rows[b].mean(0)[4:8].topk(2).indices + 4).tolist())


def test_counts_and_ties() -> None:
    visual = torch.ones(3, 10, dtype=torch.bool)
    visual[1, 5:], visual[2] = False, False
    kept = attended(torch.ones(3, 10), visual, keep=0.5)
    assert kept.sum(1).tolist() == [5, 2, 0]  # halves to the even number; a prompt without an image
    assert kept[0, :5].all() and kept[1, :2].all()  # of equal scores the first
    assert [vtok.FastV(keep=share).count(576) for share in (0.5, 0.222)] == [288, 128]
    assert vtok.FastV(keep=1.0).build_vlm(info()).sites == ()
    with pytest.raises(vtok.ConfigError, match="layer must be a whole number >= 1, got 0"):
        vtok.FastV(layer=0)
