"""Views, crops and feature rows of cropping models, against transformers' own functions."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, positive, seeds
from torch import Tensor

import vtok
from vtok.errors import ConfigError
from vtok.methods.correlation.merge import compress_features
from vtok.methods.correlation.scores import redundant_tokens, score_tokens, select_tokens
from vtok.methods.correlation.views import feature_metric, feature_scores, to_features
from vtok.ops.crops import GLOBAL_VIEW, Layout, global_views, group_map, packed_layout, plain_layout
from vtok.ops.matching import unit
from vtok.ops.packing import Packing, best_grid, pack, packing

SIDE, PATCH = 3, 10  # patches along a side of a view, pixels along a side of a patch
VIEW = SIDE * PATCH
PINPOINTS = [[VIEW, 2 * VIEW], [2 * VIEW, VIEW], [2 * VIEW, 2 * VIEW], [3 * VIEW, VIEW], [VIEW, 3 * VIEW]]
few = settings(max_examples=40, deadline=None, derandomize=True)
image_sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))


# Crops of LLaVA.
def upstream(x: Tensor, size: tuple[int, int], newline: Tensor, max_views: int | None) -> Tensor:
    """One image through transformers."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    vision = SimpleNamespace(image_size=VIEW, patch_size=PATCH)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS))
    if max_views is None:
        packed, _ = LlavaNextModel.pack_image_features(model, [x], [size], "default", newline)
    else:
        packed, _ = LlavaOnevisionModel.pack_image_features(model, [x], [size], newline, f"anyres_max_{max_views}")
    return packed[0]


@few
@given(image_sizes, st.sampled_from([None, 1, 2, 9]), seeds)
def test_packing_is_that_of_transformers(size: tuple[int, int], max_views: int | None, seed: int) -> None:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    grid = best_grid(size, PINPOINTS, VIEW)
    assert grid == get_anyres_image_grid_shape(size, PINPOINTS, VIEW)
    x, newline = normal(seed, 1 + grid[0] * grid[1], SIDE**2, 4), normal(seed + 1, 4)
    how = packing(grid, SIDE, size, max_views)
    expected = upstream(x, size, newline, max_views)
    assert_equal(pack(x, how, newline), expected)
    assert packed_layout(how).length == len(expected)
    lone = packing((0, 0), SIDE, size, max_views)
    assert_equal(pack(x[:1], lone, newline), upstream(x[:1], size, newline, max_views))
    assert packed_layout(lone).length == SIDE**2 + 1


def sources(how: Packing) -> Tensor:
    """[L, V n]: the share of every patch in every feature row."""
    views, n = 1 + how.grid[0] * how.grid[1], how.side**2
    return pack(torch.eye(views * n).view(views, n, -1), how, torch.zeros(views * n))


@few
@given(image_sizes, st.sampled_from([None, 1, 2]))
def test_rows_belong_to_the_view_that_they_come_from(size: tuple[int, int], max_views: int | None) -> None:
    how = packing(best_grid(size, PINPOINTS, VIEW), SIDE, size, max_views)
    layout, share = packed_layout(how), sources(how)
    assert layout.is_global.tolist() == [True] + [False] * (len(layout.is_global) - 1)
    of_view = share.view(len(share), len(layout.is_global), -1).sum(-1)  # [L, V]
    rows = layout.rows[layout.valid]
    assert sorted(rows.tolist()) == (share.sum(-1) > 0).nonzero()[:, 0].tolist()  # all but newlines, each once
    for view, (mine, valid) in enumerate(zip(layout.rows, layout.valid)):
        assert (of_view[mine[valid], view] >= of_view[mine[valid]].amax(-1) - 1e-6).all()
        assert mine[valid].tolist() == sorted(mine[valid].tolist())
    assert layout.patches is not None
    if not how.shrunk:
        assert_equal(layout.patches.flatten(), share.sum(0) > 0)
        ids = torch.arange(share.shape[1]).view(len(layout.is_global), -1)
        assert_equal(to_features(layout, ids)[layout.valid], share[rows].argmax(-1))
    else:
        assert layout.patches.flatten()[share.sum(0) > 0].all()


@few
@given(image_sizes, seeds)
def test_padding_of_llava_is_not_compared(size: tuple[int, int], seed: int) -> None:
    """Scores of an image's rows are those of the patches that show image, view by view."""
    layout = packed_layout(packing(best_grid(size, PINPOINTS, VIEW), SIDE, size))
    v = len(layout.is_global)
    keys, low, deep = normal(seed, v, 2, SIDE**2, 2), positive(seed, v, SIDE**2), positive(seed + 1, v, SIDE**2)
    scores = feature_scores(keys, low, deep, 0.2, layout)
    kept = select_tokens(scores, 0.5, "topk")
    assert layout.patches is not None
    for i, real in enumerate(layout.patches):
        assert real.sum() == layout.valid[i].sum()
        if not real.any():
            continue
        alone = score_tokens(keys[i : i + 1, :, real], low[i : i + 1, real], deep[i : i + 1, real], 0.2)
        assert_close(scores.critical[i, layout.valid[i]], alone.critical[0], 1e-12)
        assert_equal(kept[i, layout.valid[i]], select_tokens(alone, 0.5, "topk")[0])
    assert not kept[~layout.valid].any()
    metric = feature_metric(keys, layout)
    assert_close(metric[layout.valid], unit(keys.transpose(1, 2).flatten(2))[layout.patches], 1e-12)


def test_shrunken_features_are_chosen_by_shrunken_scores() -> None:
    size = (60, 50)
    how = packing(best_grid(size, PINPOINTS, VIEW), SIDE, size, 1)
    assert how.shrunk
    layout, n = packed_layout(how), SIDE**2
    keys, low = normal(0, 5, 2, n, 2), positive(0, 5, n)
    scores = feature_scores(keys, low, low, 0.2, layout)
    patch = score_tokens(keys, low, low, 0.2, layout.patches)
    rows = layout.rows[layout.valid]
    assert_close(scores.low[layout.valid], pack(low[..., None], how, torch.zeros(1).double())[rows, 0], 1e-12)
    assert_close(scores.critical[layout.valid], pack(patch.critical[..., None], how, torch.zeros(1).double())[rows, 0], 1e-12)
    x = pack(normal(1, 5, n, 4), how, torch.zeros(4).double())
    features, kept = compress_features(
        x, layout, select_tokens(scores, 0.5), feature_metric(keys, layout), scores.low, valid=scores.valid
    )
    assert len(features) == len(kept) < len(x)
    assert_equal(features[:n], x[:n])
    uniform = feature_scores(torch.ones_like(keys), torch.ones_like(low), torch.ones_like(low), 0.2, layout)
    assert select_tokens(uniform, 0.5).sum(-1).tolist() == [1] * 5  # a blank page


# Order of views.
def processed(name: str, size: tuple[int, int]) -> Tensor:
    """Views [V, 3, h, w] that a processor makes of an image that brightens from left to right."""
    import transformers

    options: dict[str, Any] = {
        "llava_next": {"size": {"shortest_edge": VIEW}, "crop_size": {"height": VIEW, "width": VIEW}},
        "llava_onevision": {"size": {"height": VIEW, "width": VIEW}},
        "internvl": {"size": {"height": VIEW, "width": VIEW}, "crop_to_patches": True, "max_patches": 4},
        "idefics3": {"size": {"longest_edge": 4 * VIEW}, "max_image_size": {"longest_edge": VIEW}},
        "smolvlm": {"size": {"longest_edge": 4 * VIEW}, "max_image_size": {"longest_edge": VIEW}},
    }[name]
    if name.startswith("llava"):
        options["image_grid_pinpoints"] = PINPOINTS
    kind = {
        "llava_next": "LlavaNextImageProcessor", "llava_onevision": "LlavaOnevisionImageProcessor",
        "internvl": "GotOcr2ImageProcessor", "idefics3": "Idefics3ImageProcessor", "smolvlm": "SmolVLMImageProcessor",
    }[name]  # fmt: skip
    image = np.broadcast_to(np.linspace(0, 255, size[1]).astype(np.uint8)[:, None], (*size, 3)).copy()
    pixels = getattr(transformers, kind)(**options)(image, return_tensors="pt")["pixel_values"]
    return pixels if pixels.ndim == 4 else pixels[0]


@pytest.mark.parametrize("family", sorted(set(GLOBAL_VIEW) - {"docowl"}))
def test_the_whole_page_is_where_transformers_puts_it(family: str) -> None:
    views = processed(family, (2 * VIEW, 2 * VIEW))
    assert len(views) > 4
    contrast = views.mean((1, 2))[:, -1] - views.mean((1, 2))[:, 0]  # crops show part of the ramp
    whole = global_views(family, [len(views)])
    assert whole.sum() == 1
    assert contrast[whole].item() > 1.5 * contrast[~whole].max().item()
    left_to_right = views.mean((1, 2, 3))[~whole]
    assert left_to_right[1] > left_to_right[0]  # crops follow row by row


def test_a_page_that_is_not_cropped_is_one_view() -> None:
    """InternVL adds no thumbnail then: its only tile is the page, and is left alone."""
    assert len(processed("internvl", (VIEW, VIEW))) == 1
    assert global_views("internvl", [1]).tolist() == [True]


def test_views_of_several_images() -> None:
    assert global_views("llava_next", [3, 1, 2]).tolist() == [True, False, False, True, True, False]
    assert global_views("internvl", [3, 1, 2]).tolist() == [False, False, True, True, False, True]
    assert global_views("docowl", []).tolist() == []


# Merged tokens.
@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds)
def test_group_map_is_a_convolution_of_that_stride(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    grid = rows * high, columns * wide
    x = normal(seed, grid[0] * grid[1])
    expected = torch.nn.functional.avg_pool2d(x.view(1, *grid), (high, wide)).flatten()
    assert_close(x[group_map(grid, (high, wide))].mean(-1), expected, 1e-12)


def test_merged_tokens_stay_or_go_as_a_whole() -> None:
    """An InternVL page: 2 tiles and a thumbnail of 4 x 4 patches, 2 x 2 merged."""
    layout, groups = plain_layout("internvl", 3, 4), group_map((4, 4), (2, 2))
    keys, low = normal(0, 3, 2, 16, 2), positive(0, 3, 16)
    deep = torch.ones(3, 16).index_fill(1, torch.tensor([7]), 9.0)
    scores = feature_scores(keys, low, deep, 3, layout, groups)
    kept = select_tokens(scores, 0.6, "topk")
    patches = ~redundant_tokens(keys, 0.6, 3)
    for view in range(3):
        informative = int(patches[view, groups].any(-1).sum())
        best = low[view, groups].sum(-1).topk(informative).indices.tolist()
        assert kept[view].nonzero()[:, 0].tolist() == sorted({*best, 1})  # patch 7 is in group 1
    x = normal(1, 12, 5)
    features, rows = compress_features(x, layout, kept, feature_metric(keys, layout, groups), scores.low, "none")
    assert_equal(features, x[rows])
    assert rows.tolist() == [*(kept[:2].flatten().nonzero()[:, 0]).tolist(), 8, 9, 10, 11]
    mean = unit(keys.transpose(1, 2).flatten(2))[:, groups].mean(2)
    found = feature_metric(keys, layout, groups)
    assert_close(torch.cosine_similarity(found, mean, dim=-1), torch.ones(3, 4).double(), 1e-12)


def test_padded_patches_of_idefics() -> None:
    """Tokens without a single real patch go; what padding holds changes nothing."""
    patches = torch.ones(2, 16, dtype=torch.bool)
    patches[0, [2, 3, 6, 7, 10]] = False  # the upper right token, and a quarter of the lower right one
    layout, groups = plain_layout("idefics3", 2, 4, patches), group_map((4, 4), (2, 2))
    keys, low = normal(0, 2, 2, 16, 2), positive(0, 2, 16)
    other = [torch.where(patches[:, None, :, None], keys, math.nan), torch.where(patches, low, math.nan)]
    results = []
    for k, a in ([keys, low], other):
        scores = feature_scores(k, a, a, 2, layout, groups)
        kept = select_tokens(scores, 1.0)
        assert kept[0].tolist() == [True, False, True, True]
        x = normal(1, 8, 5)
        few_kept = kept & torch.tensor([True, True, False, True])
        metric = feature_metric(k, layout, groups)
        results.append(compress_features(x, layout, few_kept, metric, scores.low, valid=scores.valid)[0])
    assert_equal(results[0], results[1])


# Errors.
def _refused(error: type[Exception], call: Any, *args: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args)
    return str(caught.value)


def test_errors() -> None:
    text = _refused(vtok.UnknownNameError, global_views, "llava", [2])
    assert "unknown family of cropping models 'llava'" in text and "did you mean 'llava_next'?" in text
    assert "every image has at least one view, got [2, 0]" in _refused(ConfigError, global_views, "docowl", [2, 0])
    wrong = _refused(ConfigError, group_map, (27, 27), (2, 2))
    assert "blocks of 2 x 2 patches do not divide a grid of 27 x 27" in wrong
    how = packing((2, 2), SIDE, (60, 60))
    wrong = _refused(ConfigError, pack, torch.ones(4, 9, 1), how, torch.ones(1))
    assert "make 5 views of 9 patches, got [4, 9]" in wrong


def test_a_layout_moves_to_a_device() -> None:
    for layout in (plain_layout("docowl", 2, 3, torch.ones(2, 3, dtype=torch.bool)), plain_layout("docowl", 2, 3)):
        moved = layout.to(torch.device("meta"))
        assert isinstance(moved, Layout)
        assert all(t.device.type == "meta" for t in moved if isinstance(t, Tensor))
        assert moved.length == 6 and (moved.patches is None) == (layout.patches is None)
