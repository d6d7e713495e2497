"""DocOwl-1.5's parts and the compressor between them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, properties, seeds
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.methods.correlation.docowl import (
    ANCHORS,
    HReducer,
    best_anchor,
    compress_docowl,
    crop_positions,
    crop_prompt,
    crop_views,
    encode_docowl,
    h_reducer,
    split_qkv,
)
from vtok.methods.correlation.scores import redundant_tokens, score_tokens, select_tokens
from vtok.ops.attention import cls_attention
from vtok.ops.crops import plain_layout
from vtok.ops.selection import upper_outliers

C, D, SIDE = 6, 5, 8


def state(seed: int = 0, width: int = C) -> dict[str, Tensor]:
    shapes = {
        "vit_eos": (1, 1, D), "ln_q.weight": (width,), "reducer_before.0.weight": (4 * width, width, 1, 4),
        "reducer_before.0.bias": (4 * width,), "reducer.weight": (width, width, 1, 4), "reducer.bias": (width,),
        "visual_fc.weight": (D, width), "visual_fc.bias": (D,),
    }  # fmt: skip
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def convolved(x: Tensor, weights: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """The H-Reducer on a grid, as its description says: [V, rows columns, C] -> [V, rows columns / 4, D]."""
    grid = x.transpose(1, 2).unflatten(2, (rows, columns))
    z = nn.functional.conv2d(grid, weights["reducer_before.0.weight"], weights["reducer_before.0.bias"], stride=(1, 4))
    z = (
        nn.functional.gelu(z).unflatten(1, (4, x.shape[2])).permute(0, 2, 3, 4, 1).flatten(3)
    )  # four tokens a cell, side by side
    z = nn.functional.conv2d(z, weights["reducer.weight"], weights["reducer.bias"], stride=(1, 4))
    return z.flatten(2).transpose(1, 2) @ weights["visual_fc.weight"].T + weights["visual_fc.bias"]


@properties
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds)
def test_h_reducer_is_two_convolutions(v: int, rows: int, columns: int, seed: int) -> None:
    x, weights = normal(seed, v, rows * 4 * columns, C), state(seed)
    assert_close(h_reducer(x, HReducer.of(weights)), convolved(x, weights, rows, 4 * columns), 1e-10)


def test_queries_and_keys_of_a_fused_projection() -> None:
    heads, width = 3, 2
    fused = torch.arange(heads * 3 * width).expand(1, 4, -1)
    q, k, v = split_qkv(fused, heads)
    assert q.shape == k.shape == v.shape == (1, heads, 4, width)
    assert [part[0, :, 0].tolist() for part in (q, k, v)] == [
        [[0, 1], [6, 7], [12, 13]],
        [[2, 3], [8, 9], [14, 15]],
        [[4, 5], [10, 11], [16, 17]],
    ]


# The compressor.
def page(v: int = 4, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Hidden states, and queries and keys of two blocks: view 1 is nearly blank, half of view 2 is, view 3 is dense."""
    n = SIDE**2
    keys = normal(seed, v, 2, 1 + n, 4)
    keys[1] = normal(seed + 1, 2, 1, 4) + 0.01 * keys[1]
    keys[2, :, 1 : 1 + n // 2] = keys[1, :, 1 : 1 + n // 2]
    deep = normal(seed + 2, v, 2, 1 + n, 4)
    queries = normal(seed + 3, v, 2, 1 + n, 4)
    return normal(seed + 4, v, 1 + n, C), (queries, keys), (queries, deep)


@pytest.mark.parametrize("design", ["group", "strip"])
@pytest.mark.parametrize("aggregation", ["nearest", "none"])
def test_with_nothing_redundant_it_is_the_h_reducer(design: str, aggregation: str) -> None:
    hidden, low, deep = page()
    weights = state()
    found = compress_docowl(hidden, low, deep, HReducer.of(weights), 1.0, design=design, aggregation=aggregation)
    full = convolved(hidden[:, 1:], weights, SIDE, SIDE)
    for view, expected in zip(found, full, strict=True):
        assert_close(view, torch.cat([expected, weights["vit_eos"][0]]), 1e-10)


@pytest.mark.parametrize("sampling", ["topk", "multinomial"])
@pytest.mark.parametrize("design", ["group", "strip"])
def test_blank_crops_shrink_and_the_page_does_not(design: str, sampling: str) -> None:
    hidden, low, deep = page()
    weights = HReducer.of(state())
    found = compress_docowl(hidden, low, deep, weights, 0.9, design=design, sampling=sampling)
    assert_equal(
        found[0][:-1], h_reducer(hidden[:, 1:], weights)[0] if design == "group" else h_reducer(hidden[0, 1:], weights)
    )
    lengths = [len(view) - 1 for view in found]
    assert lengths[0] == SIDE**2 // 4
    assert 1 <= lengths[1] < lengths[2] < lengths[3]
    for view in found:
        assert_equal(view[-1], weights.eos.view(-1))


def test_whole_groups_are_kept() -> None:
    hidden, low, deep = page()
    weights = HReducer.of(state())
    found = compress_docowl(hidden, low, deep, weights, 0.9, beta=3, aggregation="none", sampling="topk")
    full = h_reducer(hidden[:, 1:], weights)
    informative = (~redundant_tokens(low[1][:, :, 1:], 0.9, 3)).unflatten(-1, (-1, 4)).any(-1).sum(-1).tolist()
    assert informative[1:] == [0, 8, 16]
    for view in range(1, 4):
        rows = [int((full[view] == row).all(-1).nonzero()) for row in found[view][:-1]]
        assert rows == sorted(set(rows))
        outliers = upper_outliers(cls_attention(deep[0][view : view + 1, :, 0], deep[1][view : view + 1]))
        assert max(1, informative[view]) <= len(rows) <= max(1, informative[view] + int(outliers.sum()))


def test_strips_are_the_kept_patches_four_by_four() -> None:
    hidden, low, deep = page()
    weights = HReducer.of(state())
    found = compress_docowl(hidden, low, deep, weights, 0.6, 3, "strip", "none", seed=5)
    attention = [cls_attention(q[:, :, 0], k) for q, k in (low, deep)]
    kept = select_tokens(score_tokens(low[1][:, :, 1:], *attention, 3), 0.6, seed=5, multiple=4)
    for view in range(1, 4):
        assert kept[view].sum() % 4 == 0
        assert_close(found[view][:-1], h_reducer(hidden[view, 1:][kept[view]], weights), 1e-12)


def test_seeds() -> None:
    hidden, low, deep = page()
    weights = HReducer.of(state())
    run, again, other = (
        torch.cat(compress_docowl(hidden, low, deep, weights, 0.9, beta=3, aggregation="none", seed=seed)) for seed in (1, 1, 2)
    )
    assert_equal(run, again)
    assert run.shape != other.shape or not torch.equal(run, other)


# The vision model around it.
class Fused(nn.Module):
    """Attention whose queries, keys and values lie head by head in one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.query_key_value = heads, nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_qkv(self.query_key_value(x), self.num_heads)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = Fused(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(x)


class Vision(nn.Module):
    """The parts of DocOwl's vision model that matter here, at 8 x 8 patches of 2 x 2 pixels."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, C, 2, 2), nn.Parameter(torch.randn(1, 1, C))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Block(C) for _ in range(depth)])

    def forward(self, views: Tensor) -> Any:
        x = self.embed(views).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, C), x], 1)
        for block in self.encoder.layers:
            x = block(x)
        return SimpleNamespace(last_hidden_state=x)


def test_a_page_through_the_vision_model() -> None:
    """Cropped, encoded and compressed: the tokens of every view, as `plain_layout` says; a blank crop keeps fewest."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    image[:, :16, :16] = 250
    grid = ANCHORS[4][best_anchor((32, 32), ANCHORS[4], view=16)]
    views = crop_views(image, grid, view=16).double()
    model, weights = Vision().double(), HReducer.of(state())
    with torch.no_grad():
        x = model(views).last_hidden_state
        full = h_reducer(x[:, 1:], weights)
        whole = encode_docowl(model, views, weights, 1.0, low_layer=1)
        found = encode_docowl(model, views, weights, 0.999, low_layer=1, beta=8, sampling="topk", aggregation="none")
    layout = plain_layout("docowl", len(views), full.shape[1])
    assert layout.rows.shape == full.shape[:2]
    for features, expected in zip(whole, full, strict=True):
        assert_close(features[:-1], expected, 1e-12)
    assert_equal(found[0][:-1], full[0])
    lengths = [len(view) - 1 for view in found]
    assert grid == (2, 2) and layout.is_global.tolist() == [True] + 4 * [False]
    assert lengths[1] < min(lengths[2:]) and lengths[0] == full.shape[1]
    assert not any(module._forward_hooks for module in model.modules())


# Crops.
def test_a_grid_never_holds_more_crops_than_allowed() -> None:
    for most, grids in ANCHORS.items():
        assert len(set(grids)) == len(grids)
        assert max(rows * columns for rows, columns in grids) == most


@properties
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([4, 9, 20]))
def test_the_grid_has_nearly_the_shape_of_the_image(width: int, height: int, most: int) -> None:
    """Shape decides; size only where grids fit within a hundredth of each other, cut heights where images are tiny."""

    def fit(grid: tuple[int, int], w: int, h: int) -> float:
        ratio = grid[0] / grid[1] / (h / w)
        return min(ratio, 1 / ratio)

    grid = ANCHORS[most][best_anchor((width, height), ANCHORS[most])]
    best = max(fit(other, width, height) for other in ANCHORS[most])
    assert fit(grid, width, height) >= best - 0.02


@properties
@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_crops_tile_the_page(rows: int, columns: int, seed: int) -> None:
    """Of an image that needs no resizing the crops are cut out as they are."""
    view = 4
    image = (127.5 + 60 * normal(seed, 3, rows * view, columns * view)).clamp(0, 255).to(torch.uint8)
    found = crop_views(image, (rows, columns), view)
    assert found.shape == (1 + rows * columns, 3, view, view)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = (found * std[:, None, None] + mean[:, None, None]) * 255
    for r in range(rows):
        for c in range(columns):
            part = image[:, r * view : (r + 1) * view, c * view : (c + 1) * view]
            assert_close(levels[1 + r * columns + c], part.float(), 1e-3)
    assert crop_positions((rows, columns)).tolist() == [[9, 9], *([r, c] for r in range(rows) for c in range(columns))]


def test_prompts() -> None:
    assert crop_prompt("a<|image|>b", (1, 1)) == "a<global_img><|image|><crop_img_row0_col0><|image|>b"


# Errors.
def _refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_errors() -> None:
    hidden, low, deep = page()
    weights = HReducer.of(state())
    assert "design must be group or strip, got 'grid'" in _refused(
        compress_docowl, hidden, low, deep, weights, 0.5, design="grid"
    )
    assert "four by four, got 6" in _refused(h_reducer, torch.ones(1, 6, C).double(), weights)
    lost = {name: weight for name, weight in state().items() if name != "reducer.bias"}
    assert "reducer.bias is missing; pass vision2text.state_dict()" in _refused(HReducer.of, lost)
    assert "vit_eos is missing" in _refused(HReducer.of, {k: v for k, v in state().items() if k != "vit_eos"})
    square = {**state(), "reducer.weight": torch.ones(C, C, 2, 2)}
    assert "conv_shape 1x4 is supported, got kernels [24, 6, 1, 4] and [6, 6, 2, 2]" in _refused(HReducer.of, square)
    assert "must hold <|image|> once, found 2 times" in _refused(crop_prompt, "<|image|><|image|>", (1, 1))
    assert "[3, height, width] uint8, got [5, 5, 3] torch.uint8" in _refused(
        crop_views, torch.ones(5, 5, 3, dtype=torch.uint8), (1, 1)
    )
    assert "at least one pixel, got width 0 and height 5" in _refused(best_anchor, (0, 5))
