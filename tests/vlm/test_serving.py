"""The choice that serving engines ask for: counts before images, the same rows as methods choose elsewhere, true refusals."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vtok
from vtok.ops.packing import best_grid, pack, packing
from vtok.patches.hf_vlm import layout as hf_views
from vtok.patches.hf_vlm.families import examples, find
from vtok.serving import (
    TokenChoice,
    TowerFacts,
    VLMInfo,
    block_of,
    choose_tokens,
    frames_layout,
    grid_layout,
    packed_crops_layout,
    tiles_layout,
)
from vtok.serving.layouts import square_layout
from vtok.serving.vllm_plugin.families import MODELS, choice_of
from vtok.serving.vllm_plugin.plugin import check_model, check_release
from vtok.serving.vllm_plugin.positions import Grid, placed, prompt_positions, with_columns, without_columns
from vtok.serving.vllm_plugin.prompts import between, joined, shortened, woven

SIDE, WIDTH = 6, 16
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 72]]  # views of 24 pixels, patches of 4
FEATURES = [
    {"method": "uniform", "keep": 0.3},
    {"method": "random", "keep": 0.25},
    {"method": "downsample", "keep": 0.25},
    {"method": "todre", "keep": 0.2, "probe": None},
    {"method": "divprune", "keep_tokens": 7},
    {"method": "cdpruner", "keep": 0.2, "relevance": "none"},
]
TOWER = [
    {"method": "fastervlm", "keep_tokens": 7},
    {"method": "vispruner", "keep": 0.25},
    {"method": "visionzip", "keep": 0.25},
    {"method": "holov", "keep_tokens": 20, "runs": 4},
    {"method": "prumerge", "keep": 0.25},
]
SIZES = [(24, 24), (24, 60), (100, 37), (37, 100), (300, 200), (50, 160), (72, 24), (7, 90)]


def info(crops=False, prefix=1, **more):
    tower = TowerFacts(3, prefix > 0, prefix, 2, 8, 2, 4, SIDE**2)
    return VLMInfo("a model", 4, WIDTH, 2, tower=tower, grid=None if crops else (SIDE, SIDE), crops=crops, **more)


def seen(views, prefix=1, seed=0):
    """A tower of three blocks that saw so many views."""
    generator = torch.Generator().manual_seed(seed)
    n = SIDE**2 + prefix
    qkv, out = torch.randn(views, n, 24, generator=generator), torch.randn(views, n, 8, generator=generator)
    return {block: block_of(qkv * (block + 1), 2, 0.5, prefix, out) for block in range(3)}


def connector():
    torch.manual_seed(0)
    return torch.nn.Linear(8, WIDTH).requires_grad_(False)


@pytest.mark.parametrize("settings", FEATURES + TOWER, ids=lambda one: one["method"])
def test_as_many_tokens_stay_as_were_announced(settings):
    choice = TokenChoice(settings, info())
    layout = grid_layout(SIDE, SIDE)
    x = torch.randn(3, SIDE**2, WIDTH)
    kept = choice.choose(x, layout, seen(3), connector())
    assert kept.rows.shape == (3, choice.count(layout)) == kept.tokens.shape[:2]
    assert choice.count(layout) < SIDE**2 and (kept.rows.diff() > 0).all()
    alone = [choose_tokens(x[i : i + 1], layout, settings, info(), _only(seen(3), i), connector()) for i in range(3)]
    assert torch.equal(torch.cat([one.rows for one in alone]), kept.rows)
    torch.testing.assert_close(torch.cat([one.tokens for one in alone]), kept.tokens)


def _only(tower, i):
    return {name: block.only([i]) for name, block in tower.items()}


@pytest.mark.parametrize("settings", FEATURES + TOWER, ids=lambda one: one["method"])
@pytest.mark.parametrize("most", [None, 2])
def test_counts_of_joined_crops(settings, most):
    """Padding that is cut off crops, and crops that are shrunk, change how many tokens stay; nothing need be encoded for it."""
    choice = TokenChoice(settings, info(crops=True))
    layouts = {packed_crops_layout(size, PINPOINTS, 24, 4, most) for size in SIZES}
    assert len(layouts) > 4
    for layout in layouts:
        x = torch.randn(1, layout.length, WIDTH)
        kept = choice.choose(x, layout, seen(layout.tower_views), connector())
        assert kept.rows.shape[1] == choice.count(layout) < layout.length


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", [None, 2])
def test_crops_are_laid_out_as_in_transformers(size, most):
    how = packing(best_grid(size, PINPOINTS, 24), SIDE, size, most)
    newline = torch.randn(WIDTH)
    x = pack(torch.randn(1 + how.grid[0] * how.grid[1], SIDE**2, WIDTH), how, newline)
    vision = SimpleNamespace(image_size=24, patch_size=4)
    model = SimpleNamespace(image_newline=newline, config=SimpleNamespace(vision_config=vision))
    layout = packed_crops_layout(size, PINPOINTS, 24, 4, most)
    assert layout.views == hf_views.any_resolution(model, "image", 0, 0, x, {}) and layout.length == len(x)


def test_frames_and_squares_are_laid_out_as_in_transformers():
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    given = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
    assert frames_layout(3, 4, 6, "video").views == hf_views.frames(model, "video", 0, 0, torch.zeros(72, 4), given)
    for n in (36, 37):
        assert square_layout(n).views == hf_views.square(model, "image", 0, 0, torch.zeros(n, 4), {})


@pytest.mark.parametrize("settings", [*FEATURES, {"method": "uniform", "keep": 1.0}], ids=lambda one: one["method"])
def test_rows_that_need_no_image(settings):
    choice, layout = TokenChoice(settings, info()), frames_layout(1, 5, 7)
    if not choice.fixed_rows:
        with pytest.raises(vtok.StateError, match="depends on the image: call choose"):
            choice.rows(layout)
        return
    kept = choice.choose(torch.randn(2, 35, WIDTH), layout)
    assert torch.equal(choice.rows(layout).expand(2, -1), kept.rows)


def test_the_other_features_of_a_token_go_with_it():
    choice, layout = TokenChoice({"method": "downsample", "keep": 0.25}, info()), grid_layout(SIDE, SIDE)
    x = torch.randn(2, SIDE**2, WIDTH)
    kept = choice.choose(x, layout)
    torch.testing.assert_close(kept.apply(torch.cat([x, 2 * x], 2)), torch.cat([kept.tokens, 2 * kept.tokens], 2))


@pytest.mark.parametrize("name", ["evs", "vidcom2"])
def test_videos(name):
    choice = TokenChoice({"method": name, "keep": 0.3}, VLMInfo("a model", 4, WIDTH, 2, videos=True))
    layout = frames_layout(4, 3, 5, "video", newline=True)
    kept = choice.choose(torch.randn(2, 61, WIDTH), layout)
    assert kept.rows.shape[1] == choice.count(layout) < 61 and (kept.rows[:, -1] == 60).all()
    assert choice.count(frames_layout(1, 3, 5)) == 15  # images stay whole


REFUSED = [
    ({"method": "fastv"}, TypeError, "in front of decoder layer 2, but the KV cache .* holds the same tokens in all layers"),
    ({"method": "todre", "probe": 0.5}, TypeError, 'pass "probe": null'),
    ({"method": "cdpruner"}, TypeError, 'reads the question, .* pass "relevance": "none"'),
    ({"method": "prumerge"}, TypeError, "how many tokens prumerge keeps .* depends on the image.* pass keep or keep_tokens"),
    ({"method": "correlation", "alpha": 0.2, "overview": True}, TypeError, "choose another method, such as divprune"),
    ({"method": "tome"}, TypeError, "inside vision encoders"),
    ({"method": "evs"}, TypeError, "reads none"),
    ({"method": "divprun"}, ValueError, "did you mean 'divprune'"),
    ({"method": "divprune", "keep": 2.0}, ValueError, r"keep is a fraction in \(0, 1\]"),
    ({"keep": 0.5}, ValueError, '"method": name'),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED, ids=lambda one: str(one)[:30])
def test_what_cannot_be_served_is_refused_in_a_sentence(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        TokenChoice(settings, info())
    assert isinstance(caught.value, vtok.VtokError)


def test_counts_that_depend_on_crops_are_refused_for_hired():
    with pytest.raises(vtok.UnsupportedModelError, match="how many tokens hired keeps"):
        TokenChoice({"method": "hired"}, info(crops=True))


def test_a_stage_inside_the_llm_is_left_out_if_nothing_was_said_of_it():
    choice = TokenChoice({"method": "todre", "keep": 0.2}, info())
    assert choice.config.probe is None and '"probe": null' in choice.left_out
    assert choice.digest == TokenChoice({"method": "todre", "keep": 0.2, "probe": None}, info()).digest
    assert choice.digest != TokenChoice({"method": "todre", "keep": 0.3}, info()).digest


def test_what_does_not_belong_together_is_said():
    choice, layout = TokenChoice({"method": "fastervlm", "keep": 0.5}, info()), grid_layout(SIDE, SIDE)
    with pytest.raises(vtok.StateError, match="has 35 visual tokens, but its layout says 36"):
        choice.choose(torch.randn(1, 35, WIDTH), layout, seen(1))
    with pytest.raises(vtok.StateError, match="looks at block 2 of the vision tower, which was not passed"):
        choice.choose(torch.randn(1, 36, WIDTH), layout)


ARCHITECTURES = {
    "LLaVA-1.5": "LlavaForConditionalGeneration",
    "LLaVA-NeXT": "LlavaNextForConditionalGeneration",
    "LLaVA-OneVision": "LlavaOnevisionForConditionalGeneration",
    "Qwen2-VL": "Qwen2VLForConditionalGeneration",
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "InternVL": "InternVLForConditionalGeneration",
    "Gemma3": "Gemma3ForConditionalGeneration",
    "Idefics3": "Idefics3ForConditionalGeneration",
    "SmolVLM": "SmolVLMForConditionalGeneration",
}


@pytest.mark.parametrize("example", ARCHITECTURES)
def test_a_config_says_what_the_model_itself_would(example):
    model = examples()[example].build()
    known, told = find(model)[0].info, MODELS[ARCHITECTURES[example]].info(model.config)
    for name in ("depth", "width", "num_heads", "num_kv_heads", "head_dim", "tower", "grid", "crops"):
        assert getattr(told, name) == getattr(known, name), name
    assert {*ARCHITECTURES.values(), "Qwen3_5ForConditionalGeneration"} == set(MODELS)


def test_models_releases_and_settings_are_checked_before_anything_is_loaded():
    config = examples()["LLaVA-1.5"].build().config
    assert choice_of(config, "LlavaForConditionalGeneration") is None
    config.vtok = {"method": "prumerge", "keep": 0.5, "layer": -1}
    check_model("LlavaForConditionalGeneration", config)
    config.vision_feature_layer = -2
    with pytest.raises(vtok.UnsupportedModelError, match=r'builds blocks 0 to 0, .* as by "layer": 0'):
        check_model("LlavaForConditionalGeneration", config)
    with pytest.raises(
        vtok.UnsupportedModelError, match="does not prune visual tokens of PaliGemmaForConditionalGeneration in vLLM"
    ):
        check_model("PaliGemmaForConditionalGeneration", config)
    config.vtok = "divprune"
    with pytest.raises(vtok.ConfigError, match="got 'divprune'"):
        check_model("LlavaForConditionalGeneration", config)
    check_release("0.31.0")
    check_release("0.32.1+cpu")
    with pytest.raises(vtok.UnsupportedModelError, match=r"found 0\.30\.0: install such a release, or serve"):
        check_release("0.30.0")


def test_what_stands_for_an_image_gets_shorter():
    full, visual = [7, 5, 5, 5, 5, 8, 5, 5, 9], [False, True, True, True, True, False, True, True, False]
    assert shortened(full, visual, 2, 1) == [7, 5, 5, 8, 5, 9]  # three pieces, each by itself
    with pytest.raises(vtok.StateError, match="4 placeholders of an image stand together, which are no pieces of 3"):
        shortened(full, visual, 3, 1)
    assert between(full, visual) == [5, 5, 5, 5, 8, 5, 5]
    assert joined(full, visual, 2) == [7, 5, 5, 5, 9]  # two that stay, and the word between


@pytest.mark.parametrize("rows", [[0, 5], [1, 2], [4, 5], [0, 1, 2, 3, 4, 5], [3]])
def test_words_between_visual_tokens_keep_their_place(rows):
    visual = torch.tensor([True, True, False, True, True, False, False, True, True])
    words, tokens = torch.randn(9, 4), torch.randn(len(rows), 4)
    out = woven(words, visual, torch.tensor(rows), tokens)
    expected, number, places = [], 0, dict(zip(rows, tokens))
    for i, here in enumerate(visual.tolist()):
        if not here:
            expected.append(words[i])
        elif number in places:
            expected.append(places[number])
        number += here
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("tiles", [1, 5])
def test_tiles_are_laid_out_as_in_transformers(tiles):
    vision = SimpleNamespace(image_size=24, patch_size=4)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, scale_factor=2))
    x = torch.randn(9 * tiles, WIDTH)
    layout = tiles_layout(tiles, 3, 3)
    assert layout.views == hf_views.tiles(model, "image", 0, 0, x, {}) and layout.tower_views == tiles


def test_coordinates_survive_bf16():
    at = torch.stack([torch.arange(0, 12000, 7), torch.arange(0, 12000, 7).flip(0), torch.arange(0, 12000, 7) // 3], 1)
    x = torch.randn(len(at), 8, dtype=torch.bfloat16)
    features, back = without_columns(with_columns(x, at))
    assert torch.equal(back, at) and torch.equal(features, x)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 40])
def test_positions_do_not_depend_on_how_a_prompt_is_cut(chunk):
    """Two images, one wide and one tall, some of whose tokens stay: as if the whole prompt had been numbered at once."""
    wide, tall = torch.tensor([0, 3, 4, 9]), torch.tensor([1, 5, 7])
    grids = [Grid(2, 4, 1, 2, 5), Grid(9, 3, 1, 6, 2)]
    length = 14
    positions, delta = prompt_positions(length, grids)
    whole, same = prompt_positions(length, [grid._replace(kept=rows) for grid, rows in zip(grids, (wide, tall))])
    assert delta == same
    text = torch.tensor([i not in (2, 3, 4, 5, 9, 10, 11) for i in range(length)])
    assert torch.equal(positions[:, text], whole[:, text])
    assert whole[0, 6] == 2 + 5 and whole[0, 12] == 7 + 3 + 6  # an image takes as many positions as its longer side has
    assert whole[:, 10].tolist() == [10, 10 + 2, 10 + 1]  # token 5 of the tall one: row 2, column 1
    encoded = [grid.coordinates(rows) for grid, rows in zip(grids, (wide, tall))]
    for first in range(0, length, chunk):
        stop, parts = min(first + chunk, length), []
        for grid, at in zip(grids, encoded):
            parts.append(at[max(first - grid.offset, 0) : max(stop - grid.offset, 0)])
        if any(len(part) for part in parts):
            positions = placed(positions, ~text, parts, first)
        assert torch.equal(positions[:, :stop], whole[:, :stop])


def test_videos_take_time():
    grid = Grid(0, 4, 3, 2, 2, pace=2.5)
    assert grid.span == 6
    assert grid.coordinates(torch.tensor([0, 5, 10, 11])).tolist() == [[0, 0, 0], [2, 0, 1], [5, 1, 0], [5, 1, 1]]


def test_importing_it_needs_torch_alone():
    code = (
        "import sys, vtok.serving, vtok.serving.vllm_plugin; "
        "print(sorted({'vllm', 'transformers', 'timm', 'open_clip'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
