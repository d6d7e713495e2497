"""DART against its authors' program (see golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import FOLDER, assert_equal
from helpers_layers import info, layout

import vtok
from vtok.core.prompt import LayerAttention, Layout
from vtok.core.tokens import Place, Site
from vtok.methods.in_llm import dart

FILES = {"baseline2_dart": 10, "baseline2_dart_576": 1}
AT = Site(Place.DECODER_IN, 2)


def cases(name: str, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Any]]:
    """Case -> its arrays."""
    import numpy as np

    with np.load(FOLDER / f"{name}.npz") as arrays:
        numbers = {k: torch.from_numpy(arrays[k]) for k in arrays if arrays[k].dtype.kind in "fib"}
        words = {k: str(arrays[k]) for k in arrays if k.endswith("__rule")}
    found: dict[str, dict[str, Any]] = {}
    for key, value in {**numbers, **words}.items():
        case, _, field = key.partition("__")
        if isinstance(value, torch.Tensor):
            value = value.item() if value.ndim == 0 else value.to(dtype) if value.is_floating_point() else value
        found.setdefault(case, {})[field] = value
    return found


def config(g: dict[str, Any], **params: Any) -> vtok.DART:
    amount = {"keep": 1 - g["amount"]} if g["rule"].startswith("ratio") else {"keep_tokens": max(1, g["amount"])}
    return vtok.DART(visual_pivots=g["visual_pivots"], text_pivots=g["text_pivots"], **amount, **params)


def attention(g: dict[str, Any]) -> LayerAttention:
    """The keys; hidden states have been through the last norm already."""
    nothing = torch.zeros(0)
    return LayerAttention(1, 1.0, lambda rows: g["keys"], lambda rows: nothing, final_norm=lambda x: x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("file", FILES)
def test_what_stays(file: str, dtype: torch.dtype) -> None:
    found = cases(file, dtype)
    assert len(found) == FILES[file]
    for name, g in found.items():
        start, n, hidden = g["image_start"], g["image_length"], g["hidden"]
        if name == "k1":
            continue
        prompts = layout(hidden.shape[1], start, n, torch.ones(hidden.shape[:2], dtype=torch.bool))
        for params, key in (({"preset": "official"}, "kept"), ({"order": "set"}, "kept"), ({}, "kept_list_order")):
            method = config(g, **params)
            assert method.picks(n) == g["per_pivot"], name
            assert method.count(n) == g["kept"].shape[1], name
            reducer = method.build_vlm(info())
            keep = reducer.keep(hidden, prompts, attention(g), AT)
            assert reducer.layer_count(AT, n, n) == g["kept"].shape[1]
            for b in range(len(hidden)):
                kept = keep[b].nonzero()[:, 0]
                if g.get("ties"):  # exact copies on both sides of the cut: which of them is undefined
                    assert_equal(hidden[b, kept].sort(0).values, hidden[b, g[key][b]].sort(0).values)
                else:
                    assert_equal(kept, g[key][b])


@pytest.mark.parametrize("file", FILES)
def test_pivots_and_their_order(file: str) -> None:
    for g in cases(file).values():
        whole = layout(g["hidden"].shape[1], g["image_start"], g["image_length"])
        for b in range(len(g["hidden"])):
            place, real = dart.choose_pivots(dart.key_norms(g["keys"][b : b + 1]), whole.visual, whole.after_image, config(g))
            assert real.all()
            assert_equal(place.gather(1, dart.visiting_order(place, real))[0], g["pivot_order"][b])


def test_a_pivot_alone() -> None:
    """No picks at all: the pivot stays."""
    g = cases("baseline2_dart")["k1"]
    whole = layout(g["hidden"].shape[1], g["image_start"], g["image_length"])
    method = vtok.DART(keep=1e-6, visual_pivots=1, text_pivots=0)
    keep = dart.dart_select(g["hidden"], g["keys"], whole, method)
    assert_equal(keep[0].nonzero()[:, 0], g["kept"][0])
    assert method.count(20) == 1


def test_prompts_with_little_text_and_none_with_an_image() -> None:
    """The first visual pivot picks for missing text pivots; counts are as planned; a prompt without an image is left alone."""
    generator = torch.Generator().manual_seed(0)
    hidden, keys = torch.randn(3, 30, 8, generator=generator), torch.randn(3, 2, 30, 4, generator=generator)
    real = torch.ones(3, 30, dtype=torch.bool)
    column = torch.arange(30)
    visual = torch.stack([(column >= 4) & (column < 29), column >= 28, column < 0])
    method = vtok.DART(keep=0.5)
    keep = dart.dart_select(hidden, keys, Layout.whole(visual, real), method)
    assert keep.sum(1).tolist() == [method.count(25), method.count(2), 0] == [4 + 8, 2, 0]
    for b in range(3):
        alone = dart.dart_select(
            hidden[b : b + 1], keys[b : b + 1], dart.Layout.whole(visual[b : b + 1], real[b : b + 1]), method
        )
        assert_equal(alone[0], keep[b])


def test_counts() -> None:
    assert [vtok.DART(keep_tokens=m).count(576) for m in (192, 128, 64)] == [196, 132, 68]
    assert vtok.DART(keep_tokens=320).count(2880) == 324
    assert vtok.DART(keep_tokens=320).count(44) == 44
    assert vtok.DART().count(3) == 3
    assert vtok.DART(keep=1.0).build_vlm(info()).sites == ()
    assert vtok.DART(keep=1.0).count(16) == 16


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"visual_pivots": 0}, "visual_pivots must be a whole number >= 1, got 0"),
        ({"text_pivots": -1}, "text_pivots must be a whole number >= 0, got -1"),
        ({"order": "sorted"}, "unknown order 'sorted'; known: list, set"),
        ({"preset": "oficial"}, "unknown preset 'oficial'"),
        ({"preset": "official", "order": "list"}, "visits pivots in the order of a set"),
    ],
)
def test_values_that_make_no_sense(params: dict[str, Any], message: str) -> None:
    with pytest.raises(vtok.VtokError, match=message):
        vtok.DART(**params)
