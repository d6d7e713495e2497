"""Methods on the frames of videos inside tiny vision-language models: against masking, video by video."""

import copy

import pytest
import torch
from helpers_features import Chosen, encoded
from helpers_todre import kernel_of
from vlm_zoo import EXAMPLES, MaskOracle, assert_same, build, generate, inputs

import vtok
from vtok.patches.hf_vlm.families import find

METHODS = [
    vtok.EVS(keep=0.5),
    vtok.VidCom2(keep=0.4),
    vtok.VidCom2(keep=0.6, preset="official"),
    vtok.FastVID(keep=0.5, segments=2, every=2),
    vtok.FastVID(keep=0.75, segments=1, salience="features"),
]
MODELS = [name for name in EXAMPLES if EXAMPLES[name].videos is not None]


def _id(config):
    return f"{config.name}({', '.join(f'{k}={v}' for k, v in config.given().items())})"


def _videos(name, seed=0):
    return EXAMPLES[name].videos(build(name), torch.Generator().manual_seed(seed))


def _row(values, b):
    """One prompt of a batch by itself, without padding."""
    real = values["attention_mask"][b].bool()
    one = {k: v[b : b + 1, real] for k, v in values.items() if v.shape == values["input_ids"].shape}
    if "video_grid_thw" in values:
        first = int(values["video_grid_thw"][:b].prod(1).sum())
        one["video_grid_thw"] = values["video_grid_thw"][b : b + 1]
        one["pixel_values_videos"] = values["pixel_values_videos"][first : first + int(one["video_grid_thw"].prod())]
    else:
        one["pixel_values_videos"] = values["pixel_values_videos"][b : b + 1]
    return one


@pytest.mark.parametrize("config", METHODS, ids=_id)
@pytest.mark.parametrize("name", MODELS)
def test_removing_is_masking(name, config):
    values, kernel = _videos(name), kernel_of(name)
    reference = build(name, kernel)
    chosen = Chosen(reference, values, config)
    assert all(0 < int(stays.sum()) < len(stays) for stays in chosen.stays)
    with MaskOracle(reference, dict.fromkeys(range(4), chosen.columns)):
        expected = generate(reference, encoded(values, chosen))
    model = vtok.patch(build(name, kernel), config, positions="original")
    assert_same(generate(model, values), expected)
    assert_same(generate(model, values, use_cache=False), expected)
    (row,) = vtok.info(model).prompts[0].rows
    assert list(row.tokens_out) == [a - int(b) for a, b in zip(row.tokens_in, (~chosen.columns).sum(1))]
    vtok.unpatch(model)
    assert_same(generate(model, vtok.prune_inputs(model, values, config, positions="original")), expected)


@pytest.mark.parametrize("config", METHODS, ids=_id)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_rows(name, config):
    values, model = _videos(name), build(name)
    together = Chosen(model, values, config)
    for b in range(2):
        alone = Chosen(model, _row(values, b), config)
        assert alone.stays[0].tolist() == together.stays[b].tolist()
        assert (alone.features[0] - together.features[b])[alone.stays[0]].abs().max() <= 1e-5


@pytest.mark.parametrize("config", METHODS, ids=_id)
def test_counts_images_and_saved_configs(tmp_path, config):
    """Images are left alone, bit for bit; the count is the one that was planned, or an upper bound."""
    name = "Qwen2.5-VL"
    (vlm,) = find(build(name))
    reducer, chosen = config.build_vlm(vlm.info), Chosen(build(name), _videos(name), config)
    for i, (stays, grid) in enumerate(zip(chosen.stays, ((4, 2, 4), (3, 2, 2)))):
        views = tuple(vtok.core.prompt.View(t * grid[1] * grid[2], *grid[1:]) for t in range(grid[0]))
        planned = reducer.feature_count(len(stays), views, "video")
        kept = int(stays.sum())
        exact = config.name != "fastvid" and getattr(config, "preset", None) is None
        assert kept == planned if exact else 0 < kept <= len(stays), i
        assert reducer.feature_count(16, views, "image") == 16
    before = generate(build(name), inputs(name), steps=2)[1]
    model = vtok.patch(build(name), config)
    assert torch.equal(generate(model, inputs(name), steps=2)[1], before)
    vtok.save_config(model, tmp_path / "run.json")
    other = vtok.patch(build(name), tmp_path / "run.json")
    assert vtok.info(other).prompts[0].configs == (config,)
    assert torch.equal(generate(other, _videos(name), steps=2)[1], generate(model, _videos(name), steps=2)[1])
    whole = type(config)(keep=1.0)
    unchanged = generate(build(name), _videos(name), steps=2)[1]
    assert torch.equal(generate(vtok.patch(model, whole), _videos(name), steps=2)[1], unchanged)


@pytest.mark.parametrize("method", ["evs", "vidcom2", "fastvid"])
def test_models_that_read_no_videos(method):
    with pytest.raises(vtok.UnsupportedModelError, match=f"{method} drops visual tokens of videos, and LlavaModel reads none"):
        vtok.patch(build("LLaVA-1.5"), method)


def test_frames_between_timestamps_are_told_apart():
    """generate() encodes videos ahead of the model, which then reads their grids from positions: text may stand in between."""
    for name in MODELS:
        values, model = _videos(name), build(name)
        direct = vtok.prune_inputs(model, values, vtok.EVS(keep=0.5))
        vtok.patch(model, vtok.EVS(keep=0.5))
        expected = generate(vtok.unpatch(build(name)), direct, steps=3)
        assert_same(generate(model, values, steps=3), expected)


def test_evs_by_hand():
    """The first frame, then what changed most."""
    name = "Qwen3-VL"
    chosen = Chosen(build(name), _videos(name), vtok.EVS(keep=0.5))
    for stays, x, size in zip(chosen.stays, chosen.whole, (8, 4)):
        change = 1 - torch.nn.functional.cosine_similarity(x[size:], x[:-size])
        count = max(size, len(x) // 2)
        expected = sorted([*range(size), *(size + int(i) for i in change.topk(count - size).indices)])
        assert stays.nonzero()[:, 0].tolist() == expected


def test_a_still_video_keeps_its_first_frames():
    x = torch.randn(1, 1, 6, 5, generator=torch.Generator().manual_seed(0)).expand(1, 4, 6, 5)
    from vtok.methods.video.evs import changed_tokens

    assert changed_tokens(x, 9).tolist() == [list(range(9))]


def test_beams_of_videos():
    values, config = _videos("Qwen2.5-VL"), vtok.FastVID(keep=0.5, segments=2)
    reference = build("Qwen2.5-VL")
    chosen = Chosen(reference, values, config)

    def beams(model, given):
        given = {k: copy.copy(v) for k, v in given.items()}
        return model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)

    with MaskOracle(reference, dict.fromkeys(range(4), chosen.columns)):
        expected = beams(reference, encoded(values, chosen))
    assert torch.equal(beams(vtok.patch(build("Qwen2.5-VL"), config, positions="original"), values), expected)


@pytest.mark.parametrize("method", ["evs", "vidcom2", "fastvid"])
def test_budgets_are_solved_on_videos(method):
    """A stated prompt holds an image, of which nothing would leave."""
    name = "LLaVA-OneVision"
    model, values = build(name), _videos(name)
    vtok.patch(model, method, flops=0.8, calibration=values)
    config = vtok.info(model).prompts[0].configs[0]
    assert 0 < config.keep < 1
    generate(model, values, steps=1)
    assert vtok.info(model).prompts[0].estimate.fraction <= 0.85
    with pytest.raises(vtok.BudgetError, match=f"{method} cannot bring LlavaOnevisionModel down to flops=0.8"):
        vtok.patch(build(name), method, flops=0.8)
