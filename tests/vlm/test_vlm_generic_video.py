"""Videos of models that no row describes: shortened before the LLM, methods on frames where frames can be told."""

import copy

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import (
    BY_HAND,
    CACHED_ALONE,
    KEEP,
    LISTED,
    NUMBERED_ANEW,
    ON_FRAMES,
    OWN_CACHE,
    OWN_NUMBERS,
    SLOW,
    by_hand,
    chosen,
    close,
    generate,
)

import vtok
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.generic import videos
from vtok.patches.hf_vlm.install import observed
from vtok.testing.generic_models import CLASSES, build, empty
from vtok.testing.generic_prompts import inputs
from vtok.testing.generic_videos import FRAMES, UNBROKEN, VIDEO_CLASSES, video_inputs
from vtok.testing.prompt_oracle import check_prompts

FEATURES = ("cdpruner", "divprune", "downsample", "random", "uniform")
# Own placeholders and times between frames; those of images; frames handed over one by one; pieces of unknown videos.
FAST = [("qwen3_5", "evs"), ("glm4v", "fastvid"), ("video_llava", "vidcom2"), ("kimi_k25", "divprune"), ("gemma4", "random")]
UNTOLD = ("kimi_k25", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl")
# Its gates make rounding larger: 2e-5 in float32, 4e-6 where all is float64 but what the model itself casts to float32.
ROUGH = {"muse_spark": 3}
THOSE = [name for name in VIDEO_CLASSES if name in LISTED]


def _cases(names, methods=(*ON_FRAMES, *FEATURES)):
    pairs = [(n, m) for n in names for m in methods if not (n in UNTOLD and m in ON_FRAMES)]
    return [pair if pair in FAST else pytest.param(*pair, marks=SLOW) for pair in pairs]


@SLOW
def test_which_models_read_videos():
    """The classes with a prompt to test are those that take pixels of videos, and vtok knows it of each."""
    read = {name for name in CLASSES if name in LISTED for vlm in find(empty(name)) if vlm.info.videos}
    assert read == set(THOSE)
    for name in THOSE:
        support = vtok.supports(empty(name)).methods
        for method in ON_FRAMES:
            assert (support[method] is None) == (name not in UNTOLD)


def test_why_frames_cannot_be_told():
    assert vtok.supports(empty("molmo2")).methods["evs"] is None
    text = vtok.supports(empty("kimi_k25")).methods["evs"]
    assert "cannot be told of Kimi_K25Model: a long video comes in chunks, which are handed over one by one" in text
    assert "reads none" in vtok.supports(empty("mistral3")).methods["evs"]


@pytest.mark.parametrize(("name", "method"), _cases(THOSE))
def test_removing_columns_by_hand(name, method):
    """Forward passes, generate() with and without a cache, inputs shortened ahead; and the model is itself again afterwards."""
    model, times = build(name), ROUGH.get(name, 1)
    values = video_inputs(model)
    keep, features = chosen(model, values, method)
    expected = by_hand(model, values, keep, features, name in NUMBERED_ANEW)
    with torch.no_grad():
        whole = model(**values, use_cache=False).logits[:, -1]
    assert (whole - expected).abs().max() > 1e-2
    untouched = generate(model, values)
    if name not in OWN_NUMBERS:
        close(generate(model, vtok.prune_inputs(model, values, method, keep=KEEP))[:, 0], expected, times)
    vtok.patch(model, method, keep=KEEP)
    with torch.no_grad():
        close(model(**values, use_cache=False).logits[:, -1], expected, times)
    found = generate(model, values)
    close(found[:, 0], expected, times)
    if name not in (*CACHED_ALONE, *OWN_CACHE):
        close(generate(model, values, use_cache=False)[:, 0], expected, times)
        generate(model, values)
    left = (keep & (values["input_ids"] == videos.placeholders_of(model.base_model)["video"])).sum(1)
    assert name in CACHED_ALONE or vtok.info(model).prompts[0].rows[0].tokens_out == tuple(left.tolist())
    assert torch.equal(generate(vtok.unpatch(model), values), untouched)


@pytest.mark.parametrize(("name", "method"), _cases([name for name in THOSE if name not in BY_HAND], ON_FRAMES))
def test_removing_equals_masking(name, method):
    model = build(name)
    evidence = check_prompts(vtok.patch(model, method, keep=KEEP), video_inputs(model), steps=3)
    assert max(evidence.differences.values()) <= 3e-5, evidence
    assert evidence.fault is None or "other words" not in evidence.fault


@pytest.mark.parametrize("name", [n if n in ("qwen3_5", "video_llava") else pytest.param(n, marks=SLOW) for n in THOSE])
def test_frames_are_those_of_the_prompt(name):
    """As many, of as many tokens, as there are runs of placeholders where times stand between frames."""
    model = build(name)
    values, (vlm,) = video_inputs(model), find(model)
    seen = [views for x in observed(vlm, values, ()) for views in [x.views] * len(x.tokens)]
    if name in UNTOLD:
        assert all(len(views) == 1 and views[0].rows == 1 for views in seen)
        return
    here, runs = values["input_ids"] == vlm.tokens["video"], []
    for row in here:
        edges = row.int().diff(prepend=torch.zeros(1), append=torch.zeros(1))
        runs += ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()
    frames = [view.stop - view.start for views in seen for view in views]
    assert sum(frames) == int(here.sum())
    if name in UNBROKEN:
        five = values["pixel_values_videos"].ndim == 5
        temporal = 2 if name == "ernie4_5_vl_moe" else 1
        assert sorted(len(views) for views in seen) == sorted([4, 4, 4] if five else [n // temporal for n in FRAMES])
    else:
        assert sorted(frames) == sorted(runs)


def test_frames_handed_over_one_by_one_are_one_video():
    """EVS by hand: the first frame of each video, then what changed most since the frame before."""
    model = build("video_llava")
    values, (vlm,) = video_inputs(model), find(model)
    with torch.no_grad():
        x = model.model.get_video_features(values["pixel_values_videos"], return_dict=True).pooler_output.unflatten(0, (3, 4))
    rows = hf.choose(
        vlm.module, hf.encode(vlm.module, values), vtok.EVS(keep=KEEP).build_vlm(vlm.info), vlm.family, values
    ).rows
    change = 1 - torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    for stays, differs in zip(rows["video"].view(3, 4, 17), change):
        expected = torch.zeros(3 * 17, dtype=torch.bool)
        expected[differs.flatten().topk(2 * 17 - 17).indices] = True
        assert stays[0].all() and torch.equal(stays[1:].flatten(), expected)


@pytest.mark.parametrize("name", ["video_llava", "qwen3_5"])
def test_a_batch_is_its_rows_and_beams(name):
    model = build(name)
    values = video_inputs(model)

    def beams(given):
        given = {key: copy.copy(value) for key, value in given.items()}
        return model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)[:, given["input_ids"].shape[1] :]

    expected = beams(vtok.prune_inputs(model, values, "evs", keep=KEEP))
    vtok.patch(model, "evs", keep=KEEP)
    assert torch.equal(beams(values), expected)
    both, real = generate(model, values), values["attention_mask"][1] == 1
    one = {key: x[1:, real] for key, x in values.items() if x.shape == values["input_ids"].shape}
    pixels = values["pixel_values_videos"]
    if name == "video_llava":
        one["pixel_values_videos"] = pixels[2:]
    else:
        one["video_grid_thw"] = values["video_grid_thw"][2:]
        one["pixel_values_videos"] = pixels[-int(one["video_grid_thw"].prod()) :]
    close(generate(model, one)[0], both[1])


@pytest.mark.parametrize("name", ["glm4v", pytest.param("glm5_next", marks=SLOW)])
def test_images_and_videos_with_one_placeholder_are_refused_together(name):
    model = build(name)
    both = {**inputs(model), **video_inputs(model)}
    vtok.patch(model, "random", keep=KEEP)
    assert "images and videos of this model have one placeholder (id 127)" in message_of(
        vtok.UnsupportedModelError, model, **both
    )


@SLOW
def test_images_and_videos_with_placeholders_of_their_own():
    """Both in one prompt; a method on frames leaves the images alone."""
    model = build("qwen3_vl_moe")
    first, second = inputs(model), video_inputs(model)
    values = {name: torch.cat([first[name], second[name]], 1) for name in first.keys() & second.keys()}
    position = values["attention_mask"].argsort(dim=1, stable=True)  # padding in front
    values = {name: x.gather(1, position) for name, x in values.items()} | {
        name: x for name, x in (first | second).items() if name not in values
    }
    for method in ("evs", "divprune"):
        keep, features = chosen(model, values, method)
        expected = by_hand(model, values, keep, features)
        assert method != "evs" or keep[values["input_ids"] == model.config.image_token_id].all()
        vtok.patch(model, method, keep=KEEP)
        close(generate(model, values)[:, 0], expected)
        vtok.unpatch(model)


def test_a_model_that_drops_tokens_of_videos_itself():
    model = build("nemotron_h_omni")
    model.base_model.video_pruning_rate = 0.5
    values = video_inputs(model)
    vtok.patch(model, "random", keep=KEEP)
    text = message_of(vtok.UnsupportedModelError, model, **values)
    assert "drops tokens of videos itself (video_pruning_rate=0.5)" in text and "set model.video_pruning_rate to 0" in text


def test_tokens_that_the_processor_left_out():
    """VideoLLaMA 3: the prompt has no placeholder for them; what is left is one row."""
    model = build("video_llama_3")
    values = video_inputs(model)
    ids, here = values["input_ids"], values["input_ids"] == model.config.video_token_id
    stays = torch.rand(int(here.sum()), generator=torch.Generator().manual_seed(1)) < 0.7
    shown = torch.ones_like(here)
    shown[here] = stays
    rows = [row[at & (row != 0)] for row, at in zip(ids, shown)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    values |= {"input_ids": ids, "attention_mask": (ids != 0).long(), "video_compression_mask": stays}
    keep, features = chosen(model, values, "divprune")
    given = {name: x for name, x in values.items() if name != "video_compression_mask"}  # the features are without them already
    expected = by_hand(model, given, keep, features)
    short = vtok.prune_inputs(model, values, "divprune", keep=KEEP)
    close(generate(model, short)[:, 0], expected)
    vtok.patch(model, "divprune", keep=KEEP)
    close(generate(model, values)[:, 0], expected)
    close(generate(model, values, use_cache=False)[:, 0], expected)
    vtok.patch(model, "evs", keep=KEEP)
    assert "left out already (video_compression_mask)" in message_of(vtok.StateError, model, **values)


def test_placeholders_that_are_others_than_the_models_are_noticed(monkeypatch):
    """A model that reads features at columns of which vtok does not know would be left as it is without a word."""
    model = build("glm4v")
    values = video_inputs(model)
    monkeypatch.setattr(videos, "AS_IMAGES", {})
    vtok.patch(model, "random", keep=KEEP)
    text = message_of(vtok.UnsupportedModelError, model, **values)
    assert "put its image features at other columns" in text and "nothing was shortened" in text
