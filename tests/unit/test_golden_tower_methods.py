"""Methods that choose among the output of a vision tower, against arrays made by their authors' programs (golden/README.md)."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers_golden import FOLDER, assert_close, assert_equal, convert, load

from vtok.methods.baselines.downsample import pool_grid, smaller_grid
from vtok.methods.features.fastervlm import most_attended
from vtok.methods.features.hired import part_mask
from vtok.methods.features.holov import consecutive, program_weights, run_quotas, run_tokens, run_weights, windows
from vtok.methods.features.prumerge import adaptive_tokens, fixed_tokens, merge_neighbours, official_fixed_tokens
from vtok.methods.features.visionzip import contextual_tokens, zip_tokens
from vtok.methods.features.vispruner import prune_views
from vtok.ops.attention import cls_attention


def cases(name: str, dtype: torch.dtype = torch.float64) -> list[tuple[str, dict[str, Any]]]:
    """(case, its arrays) of a file with several cases."""
    found: dict[str, dict[str, Any]] = {}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for case in arrays["cases"].tolist():
            keys = [key for key in arrays if key.startswith(f"{case}__")]
            found[case] = {key.removeprefix(f"{case}__"): convert(arrays[key], dtype) for key in keys}
    assert found
    return list(found.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5)])
def test_visionzip(dtype: torch.dtype, tolerance: float) -> None:
    """The program computes in float32."""
    g = load("baseline_visionzip", dtype)
    attention = g["cls_attention"].sum(1)[:, 1:]
    hidden = g["hidden"]
    zipped = zip_tokens(attention, g["metric"][:, 1:], g["dominant"], g["contextual"])
    assert_equal(zipped.dominant + 1, g["dominant_index_with_cls"][:, 1:].sort(1).values)
    rows = (zipped.dominant + 1)[..., None].expand(-1, -1, hidden.shape[2])
    kept = [hidden[:, :1], hidden.gather(1, rows)]
    assert_close(torch.cat([*kept, contextual_tokens(hidden[:, 1:], zipped)], 1), g["out_tokens"], tolerance)
    assert contextual_tokens(hidden[:, 1:], zipped).dtype == dtype
    none = zip_tokens(attention, g["metric"][:, 1:], 5, 0)
    assert contextual_tokens(hidden[:, 1:], none).shape == (2, 0, 16) and none.free.shape == (2, 1)
    every = zip_tokens(attention, g["metric"][:, 1:], 60, 4)
    assert_equal(contextual_tokens(hidden[:, 1:], every), hidden[:, 1:].gather(1, every.rest[..., None].expand(-1, -1, 16)))


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
def test_fastervlm(dtype: torch.dtype) -> None:
    for _, g in cases("baseline2_fastervlm", dtype):
        assert_equal(most_attended(g["attention"].mean(1), int(g["k"])), g["kept"])


@DTYPES
@pytest.mark.parametrize("name", ["", "_576", "_extension"])
def test_vispruner(name: str, dtype: torch.dtype) -> None:
    """In the cases of the extension the program raises an error."""
    for case, g in cases(f"baseline2_vispruner{name}", dtype):
        found = prune_views(g["attention"].mean(1), g["features"], int(g["k"]), float(g["ratio"]))
        assert found.tolist() == g["kept"].tolist(), case


@DTYPES
@pytest.mark.parametrize("name", ["", "_plus_576", "_plus_fixed_576"])
def test_prumerge(name: str, dtype: torch.dtype) -> None:
    for case, g in cases(f"baseline2_prumerge{name}", dtype):
        attention = cls_attention(g["q"][:, 0, None], g["k"][:, None], 1, joint=True)
        assert_close(attention, g["cls_attention"], 1e-6)
        plus, width = bool(g["plus"]), g["index"].shape[1]
        if g["adaptive"]:
            ranked = adaptive_tokens(attention, plus=plus, joint=True)
            assert isinstance(ranked.stay, torch.Tensor) and set(ranked.stay.tolist()) == {width}
        else:
            ranked = official_fixed_tokens(attention, float(g["ratio"]), plus)
            assert ranked.stay == width
        assert ranked.order[:, :width].tolist() == g["index"].tolist(), case
        made = torch.cat(merge_neighbours(g["hidden"][:, 1:], g["k"][:, 1:], attention, ranked, width), 1)
        assert made.dtype == dtype
        assert_close(made, g["out_tokens"], 2e-6 * max(1.0, float(g["out_tokens"].abs().max())))


def test_prumerge_of_a_batch_is_that_of_its_images() -> None:
    """The program takes one share of outliers for both."""
    g = dict(cases("baseline2_prumerge"))["adaptive_batch2_joint_ratio"]
    attention = g["cls_attention"]
    alone = [adaptive_tokens(attention[b : b + 1]) for b in range(2)]
    together = adaptive_tokens(attention)
    assert_equal(together.order, torch.cat([one.order for one in alone]))
    assert_equal(together.stay, torch.cat([one.stay for one in alone]))  # type: ignore[arg-type]
    assert len(set(together.stay.tolist())) == 2  # type: ignore[union-attr]
    joint = adaptive_tokens(attention, joint=True)
    assert int(joint.stay[0]) == 11  # type: ignore[index]


def test_prumerge_plus_under_a_budget() -> None:
    """A quarter by attention, the others evenly spread; no token twice."""
    attention = dict(cases("baseline2_prumerge_plus_576"))["plus_576"]["cls_attention"]
    order, count = fixed_tokens(attention, 127, plus=True)
    assert count == 127 and sorted(order[0].tolist()) == list(range(576))
    assert order[0, :32].tolist() == attention[0].sort(descending=True, stable=True).indices[:32].tolist()
    gaps = order[0, 32:127].sort().values.diff()
    assert gaps.min() >= 5 and gaps.max() <= 12


@DTYPES
def test_downsampling(dtype: torch.dtype) -> None:
    kinds = set()
    for _, g in cases("baseline2_downsample", dtype):
        if g["kind"] not in ("avg", "max", "bilinear"):
            continue
        grid, out = ((int(a), int(b)) for a, b in (g["grid"], g["out"]))
        found = pool_grid(g["tokens"], grid, out, g["kind"])
        assert_close(
            found, g["pooled"].to(dtype), (1e-6 if dtype == torch.float64 else 3e-6) * max(1.0, float(g["pooled"].abs().max()))
        )
        kinds.add(g["kind"])
    assert kinds == {"avg", "max", "bilinear"}


def test_images_made_smaller() -> None:
    """What Pillow makes of them, and how many tokens Qwen-VL then makes; both as VTC-Bench does."""
    from PIL import Image

    from vtok.eval.common.pictures import shrink

    found = [g for _, g in cases("baseline2_downsample", torch.float32) if g["kind"] == "image" and g["filter"] == "bicubic"]
    assert len(found) == 2
    for g in found:
        picture = Image.fromarray(g["image"].numpy().astype("uint8"))
        factor = g["image"].shape[0] // int(g["out"][0])
        made = shrink(picture, factor)
        assert made.size == (int(g["out"][1]), int(g["out"][0]))
        assert (torch.tensor(list(made.tobytes())).view(g["resized"].shape) - g["resized"].long()).abs().max() <= 1
    resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    for _, g in cases("baseline2_downsample", torch.float32):
        if g["kind"] == "qwen":
            limits = {name: int(g[name]) for name in ("factor", "min_pixels", "max_pixels")}
            assert [list(resize(*size.tolist(), **limits)) for size in g["image_sizes"]] == g["resized_sizes"].tolist()
    smaller = [shrink(Image.new("RGB", (640, 480)), r).size for r in (2, 3, 4, 5, 10)]
    grids = [resize(high, wide, factor=28, min_pixels=3136, max_pixels=2408448) for wide, high in smaller]
    assert [high * wide // 28**2 for high, wide in grids] == [99, 48, 24, 15, 4]


def test_grids_of_a_budget() -> None:
    """Published counts of LLaVA-1.5; frames of LLaVA-OneVision; a grid that is one row."""
    square = (24, 24)
    assert [smaller_grid(square, k) for k in (192, 128, 64, 576, 1)] == [(12, 16), (8, 16), (8, 8), square, (1, 1)]
    assert [smaller_grid(square, k, "square") for k in (192, 128, 64)] == [(13, 13), (11, 11), (8, 8)]
    assert smaller_grid((1, 60), 7) == (1, 7) and smaller_grid((14, 14), 49) == (7, 7)
    for high in range(1, 9):
        for wide in range(1, 9):
            for count in range(1, high * wide + 1):
                for shape in ("rectangle", "square"):
                    rows, columns = smaller_grid((high, wide), count, shape)
                    assert 1 <= rows * columns <= count and rows <= high and columns <= wide, (high, wide, count, shape)


@DTYPES
@pytest.mark.parametrize("name", ["", "_576"])
def test_holov(name: str, dtype: torch.dtype) -> None:
    for case, g in cases(f"baseline2_holov{name}", dtype):
        features, attention, k = g["features"], g["attention"], int(g["k"])
        members, valid = consecutive(attention.shape[1], int(g["crops"]))
        sizes = valid.sum(-1)
        quota = run_quotas(program_weights(attention, features, members, valid), sizes, k, hand_on=False)
        assert quota.tolist() == g["quota"].tolist(), case
        found = run_tokens(attention, members, valid, quota, k)
        if "ties" in g:
            rows = [torch.cat([features, features[:, :1] * 0], 1)[0][i[0]].sort(0).values for i in (found, g["out_index"])]
            assert_equal(rows[0], rows[1])
        else:
            assert found.tolist() == g["out_index"].tolist(), case
        ours = run_quotas(run_weights(attention, members, valid), sizes, k)
        if (sizes > 1).all() and (g["out_index"] >= 0).all():  # else the program has scales of its own, or zero vectors
            assert_equal(ours, quota)
        assert (
            (ours.sum(1) == k).all() and (ours <= sizes).all() and (run_tokens(attention, members, valid, ours, k) >= 0).all()
        )


def test_the_variance_of_holovs_program_has_no_effect() -> None:
    (_, g), *_ = cases("baseline2_holov_576")
    members, valid = consecutive(576, 16)
    weights = [program_weights(g["attention"], g["features"], members, valid, alpha) for alpha in (0.0, 0.09, 1.0)]
    assert all(torch.allclose(weight, weights[0], rtol=1e-5) for weight in weights)


def test_windows_cover_grids() -> None:
    members, valid = windows(((5, 4), (2, 7)), 3)
    assert sorted(members[valid].tolist()) == list(range(34)) and len(members) == 9 + 6
    assert members[0][valid[0]].tolist() == [0, 1, 4, 5]


@DTYPES
def test_hired(dtype: torch.dtype) -> None:
    """Sums over heads; the whole view of every image first."""
    for case, g in cases("baseline2_hired", dtype):
        first, late, at = g["first_layer"].sum(1), g["late_layer"].sum(1), 0
        for parts in g["parts"].tolist():
            here = slice(at, at + parts)
            total = int(parts * first.shape[1] * float(g["rate"]))
            found = part_mask(first[at : at + 1], late[None, here], total, float(g["alpha"]))
            assert_equal(found[0], g["mask"][here].bool()), case
            at += parts
        assert at == len(late)
