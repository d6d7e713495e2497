"""Methods on the frames of videos, against arrays made by their programs (golden/README.md)."""

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from test_golden_tower_methods import cases

from vtok.methods.video.evs import changed_tokens
from vtok.methods.video.fastvid import Budget, compress, segment_lengths
from vtok.methods.video.vidcom2 import exact_tokens, frame_tokens, rank_frames

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
@pytest.mark.parametrize("name", ["", "_16x64"])
def test_evs(name: str, dtype: torch.dtype) -> None:
    for case, g in cases(f"baseline2_evs{name}", dtype):
        frames, count = int(g["thw"][0]), int(g["mask"].sum())
        x = g["features"].view(1, frames, -1, g["features"].shape[1])
        assert count == max(x.shape[2], int(x.shape[1] * x.shape[2] * (1 - float(g["q"]))))
        found = torch.zeros(len(g["mask"]), dtype=torch.bool)
        found[changed_tokens(x, count)[0]] = True
        if "ties" in g:  # a still video: in the program rounding decides
            assert found[: x.shape[2]].all() and g["mask"][: x.shape[2]].all()
        else:
            assert_equal(found, g["mask"].bool()), case
            official = torch.zeros_like(found)
            official[changed_tokens(x, count, float("-inf"))[0]] = True
            assert_equal(official, g["mask"].bool()), case


@DTYPES
@pytest.mark.parametrize("name", ["", "_196"])
def test_vidcom2(name: str, dtype: torch.dtype) -> None:
    variants = set()
    for case, g in cases(f"baseline2_vidcom2{name}", dtype):
        tokens, variant = int(g["tokens_per_frame"]), g["variant"]
        x = g["features"].view(1, -1, tokens, g["features"].shape[1])
        variants.add(variant)
        if variant == "vllm":
            keep, count = 1.0 - float(g["q"]), int(g["mask"].sum())
            found = torch.zeros_like(g["mask"], dtype=torch.bool)
            found[exact_tokens(rank_frames(x, keep), count)[0]] = True
            assert_equal(found, g["mask"].bool()), case
            continue
        ranked = rank_frames(x, float(g["keep"]))
        assert_equal(ranked.quota[0], g["quota"]), case
        assert_close(ranked.alike[0], g["similarity"], 1e-5 * max(1.0, float(g["similarity"].abs().max())))
        kept = frame_tokens(ranked)[0].flatten().nonzero()[:, 0]
        if variant == "llava_vid":  # 13 rows of 13 tokens and a newline; all newlines stay, behind the tokens of their frame
            t, i = kept // tokens, kept % tokens
            place = t * 13 * 14 + i // 13 * 14 + i % 13
            expected = g["kept"][g["kept"] % 14 != 13]
            assert_equal(place, expected)
        elif "ties" in g:
            assert_equal(g["features"][kept].sort(0).values, g["features"][g["kept"]].sort(0).values)
        else:
            assert kept.tolist() == g["kept"].tolist(), case
    assert variants == ({"linear", "llava_vid", "vllm"} if not name else {"linear"})


@DTYPES
@pytest.mark.parametrize("name", ["", "_defaults"])
def test_fastvid(name: str, dtype: torch.dtype) -> None:
    for case, g in cases(f"baseline2_fastvid{name}", dtype):
        x, budget = g["features"], Budget.of(int(g["features"].shape[1] * float(g["keep"])), float(g["d"]))
        segments = segment_lengths(g["frame_features"], int(g["c"]), float(g["tau"]))
        assert segments == g["segments"].tolist(), case
        found = compress(x, g["attention"], segments, budget, int(g["p"]), float(g["beta"]), g["noise"])
        assert (found.rows + int(g["start"])).tolist() == g["kept"].tolist(), case
        made = found.remake(x)
        assert made.dtype == dtype
        assert_close(made, g["out_tokens"], 5e-6 * max(1.0, float(g["out_tokens"].abs().max())))
