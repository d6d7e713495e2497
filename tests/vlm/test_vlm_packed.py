"""Rows that hold several samples, told apart by positions that start over: samples never see each other, shortened or not."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers_errors import message_of
from vlm_zoo import (
    TOLERANCE,
    AttendedReducer,
    Columns,
    MaskOracle,
    _ColumnsReducer,
    build,
    feature_keeps,
    inputs,
    text_model,
    visual,
)

import vtok
from vtok.config import MethodConfig
from vtok.methods.todre import config as todre

FAMILIES = ["LLaVA-1.5", "LLaVA, Mistral text, window 9", "LLaVA, Qwen2 text, window 9 first", "LLaVA-NeXT", "InternVL"]
ROTARY = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]


@dataclass(frozen=True)
class Places(MethodConfig):
    """Drops fixed visual tokens by their place in the row, at layers or before the LLM (layer 0)."""

    name: ClassVar[str] = "places"
    shares: tuple[tuple[int, int], ...] = ()

    def build_vlm(self, info):
        return _PlacesReducer(self.shares)


class _PlacesReducer(_ColumnsReducer):
    def keep(self, x, layout, attention, at):
        return layout.column % dict(self.shares)[at.index] == 0


@dataclass(frozen=True)
class Watched(MethodConfig):
    """Keeps the three visual tokens in front of a layer that the last token of a prompt attends to most in the layer before."""

    name: ClassVar[str] = "watched"
    layer: int = 3

    def build_vlm(self, info):
        return _WatchedReducer(self.layer, 3, 1)


class _WatchedReducer(AttendedReducer):
    def keep(self, x, layout, attention, at):
        last = layout.real.cumsum(1).argmax(1, keepdim=True)
        score = attention.probs(last).mean(1)[:, 0].masked_fill(~layout.visual, -1)
        return torch.zeros_like(layout.visual).scatter(1, score.topk(self.count).indices, True)


def alone(name):
    """Every prompt of the example by itself, unpadded."""
    values, model = inputs(name), build(name)
    mask, ids = values["attention_mask"].bool(), values["input_ids"]
    first = 2 if len(values["pixel_values"]) == 3 or "image_grid_thw" in values else 1
    samples = []
    for row, images in ((0, slice(0, first)), (1, slice(first, None))):
        one = {"input_ids": ids[row][mask[row]][None]}
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in values:
                one[key] = values[key][row][mask[row]][None]
        if "image_grid_thw" in values:
            one["image_grid_thw"] = values["image_grid_thw"][images]
            ends = values["image_grid_thw"].prod(1).cumsum(0).tolist()
            cut = ends[first - 1]
            one["pixel_values"] = values["pixel_values"][:cut] if row == 0 else values["pixel_values"][cut:]
            place = model.model.get_rope_index(
                one["input_ids"], image_grid_thw=one["image_grid_thw"], mm_token_type_ids=one["mm_token_type_ids"]
            )[0]
            one["position_ids"] = torch.cat([torch.arange(place.shape[-1])[None, None], place])
        else:
            one["pixel_values"] = values["pixel_values"][images]
            one["position_ids"] = torch.arange(one["input_ids"].shape[1])[None]
        if "image_sizes" in values:
            one["image_sizes"] = values["image_sizes"][images]
        samples.append(one)
    return samples


def pack(samples):
    """One row of all samples."""
    along = {"pixel_values": 0, "image_sizes": 0, "image_grid_thw": 0}
    return {key: torch.cat([sample[key] for sample in samples], along.get(key, -1)) for key in samples[0]}


def run(model, values, **kwargs):
    """Logits [1, L, V] of a pass as in training: no mask, no cache."""
    with torch.no_grad():
        return model(**copy.copy(values), use_cache=False, **kwargs).logits


def assert_close(found, expected):
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", [*FAMILIES, *ROTARY])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_equal_to_every_sample_alone(name, kernel):
    """Image tokens dropped before the LLM; every column of every sample, the dropped ones included."""
    samples = alone(name)
    model = vtok.patch(build(name, kernel), "uniform", keep=0.4)
    found = run(model, pack(samples)).split([s["input_ids"].shape[1] for s in samples], 1)
    for i, sample in enumerate(samples):
        assert_close(found[i], run(model, sample))
    other = copy.copy(samples)
    other[0] = {**samples[0], "pixel_values": samples[0]["pixel_values"] * 2}
    changed = run(model, pack(other))[:, -found[1].shape[1] :]
    assert torch.equal(changed, found[1]), "the second sample sees nothing of the first"


@pytest.mark.parametrize("name", [*FAMILIES, *ROTARY, "Gemma3", "Gemma3, window 9", "PaliGemma"])
def test_equal_to_the_masked_row(name):
    """Before the LLM and between its layers, under transformers' own mask of the packed row."""
    values, model = pack(alone(name)), build(name)
    shares = ((0, 2), (2, 3), (3, 2))
    seen, column, alive, keeps = visual(model, values["input_ids"]), torch.arange(values["input_ids"].shape[1]), None, {}
    alive = torch.ones_like(seen)
    for layer in range(4):
        for at, share in shares:
            alive = alive & (~seen | (column % share == 0)) if at == layer else alive
        keeps[layer] = alive
    with MaskOracle(model, keeps):
        expected = run(model, values)
    found = run(vtok.patch(model, Places(shares)), values)
    kept = keeps[3][0]
    assert not kept.all()
    assert_close(found[:, kept], expected[:, kept])


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen3-VL"])
def test_samples_that_begin_with_an_image(name):
    """Nothing of the sample in front is left on its columns, though none of its own stays in front of them."""
    first, second = alone(name)
    cut = int(visual(build(name), second["input_ids"])[0].int().argmax())
    second = {k: v[..., cut:] if k.endswith("_ids") else v for k, v in second.items()}
    second["position_ids"] = second["position_ids"] - second["position_ids"].amin(-1, keepdim=True)
    model = vtok.patch(build(name), Places(((0, 1000),)))
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    assert ids.shape[1] < 1000
    found = run(model, pack([first, second]))[:, first["input_ids"].shape[1] :]
    words = first["input_ids"]
    words = torch.where(visual(build(name), words) | (words > 110), words, 111 - words)
    assert not torch.equal(words, first["input_ids"])
    changed = run(model, pack([{**first, "input_ids": words}, second]))
    assert torch.equal(changed[:, first["input_ids"].shape[1] :], found)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL"])
def test_compact_positions_start_over(name):
    samples = alone(name)
    model = vtok.patch(build(name), "uniform", keep=0.4, positions="compact")
    found = run(model, pack(samples)).split([s["input_ids"].shape[1] for s in samples], 1)
    for i, sample in enumerate(samples):
        assert_close(found[i], run(model, sample))


def test_compact_positions_between_layers_want_a_row_a_sample():
    model = vtok.patch(build("LLaVA-1.5"), Columns(((2, 2),)), positions="compact")
    with pytest.raises(vtok.UnsupportedModelError, match="a row holds several samples; give every sample a row of its own"):
        run(model, pack(alone("LLaVA-1.5")))


def test_what_the_model_itself_does_not_take_for_packed():
    """With a cache, or positions in which Qwen2-VL looks for no borders, samples see each other, patched or not."""
    for name, options in (("LLaVA-1.5", {"use_cache": True}), ("Qwen2-VL", {"use_cache": False})):
        model, values = build(name), pack(alone(name))
        if name == "Qwen2-VL":
            values["position_ids"] = values["position_ids"][1:]
        alive = feature_keeps(model, values, 0.4)
        with torch.no_grad(), MaskOracle(model, dict.fromkeys(range(4), alive)):
            expected = model(**copy.copy(values), **options).logits
        with torch.no_grad():
            found = vtok.patch(model, "uniform", keep=0.4)(**copy.copy(values), **options).logits
        assert_close(found[:, alive[0]], expected[:, alive[0]])


def _varlen(module, q, k, v, mask, scaling=None, position_ids=None, **kwargs):
    """What flash attention makes of packed rows: lengths first, else restarts of the positions of a single row."""
    assert mask is None
    batch, _, n, _ = q.shape
    ends = kwargs.get("cu_seq_lens_q")
    if ends is None and batch == 1 and position_ids is not None:
        from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

        if _is_packed_sequence(position_ids, batch):
            ends = prepare_fa_kwargs_from_position_ids(position_ids)[0][0]
    ends = torch.tensor([0, batch * n]) if ends is None else ends
    assert ends[-1] == batch * n
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v))
    sample, order = torch.searchsorted(ends[1:], torch.arange(batch * n), right=True), torch.arange(batch * n)
    allowed = (sample == sample[:, None]) & (order <= order[:, None])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    return out[0].unflatten(1, (batch, n)).permute(1, 2, 0, 3), None


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL", "Qwen3-VL"])
def test_lengths_for_flash_attention(name, stated, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", _varlen)
    samples, method = alone(name), Places(((0, 2), (2, 3)))
    values = pack(samples)
    expected = run(vtok.patch(build(name), method), values)
    model = vtok.patch(build(name), method)
    text_model(model).config._attn_implementation_internal = "flash_attention_2"
    ends, lengths = torch.tensor([0, *[s["input_ids"].shape[1] for s in samples]]).cumsum(0).int(), {}
    if stated:
        longest = int(ends.diff().max())
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    assert_close(run(model, values, **lengths), expected)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL", "Gemma3"])
def test_methods_that_decide_for_each_prompt(name, flash, monkeypatch):
    """Every sample is a prompt to them: the threshold lies between what the two of them ask for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", _varlen)
    if flash and name == "Gemma3":
        pytest.skip("flash attention has no images that look ahead")
    samples, found = alone(name), []
    original = todre.layer_relevance
    monkeypatch.setattr(todre, "layer_relevance", lambda *args: found.append(original(*args)) or found[-1])
    model = build(name)
    for sample in samples:
        run(vtok.patch(model, "todre", keep=0.5, probe=1, tau=1.0), sample)
    shares = [float(max(forth, back)) for forth, back in found]
    tau = sum(shares) / 2
    vtok.patch(model, [vtok.ToDRE(keep=0.5, probe=1, tau=tau), Watched()])
    parts = [run(model, sample) for sample in samples]
    (second,) = vtok.info(model).prompts
    assert (second.rows[1].tokens_out == (0,)) == (shares[1] < tau)
    if flash:
        text_model(model).config._attn_implementation_internal = "flash_attention_2"
    together = run(model, pack(samples)).split([s["input_ids"].shape[1] for s in samples], 1)
    for i in range(2):
        assert_close(found[-1][i], torch.cat([found[0][i], found[1][i]]))
    for got, want in zip(together, parts):
        assert_close(got, want)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_models_that_hand_over_the_images_of_a_row_as_one(name):
    values = inputs(name)
    ids, mask = values["input_ids"], values["attention_mask"].bool()
    rows = [ids[row][mask[row]] for row in range(2)]
    values = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "pixel_values": values["pixel_values"].flatten(0, 1)[:3][None],
    }
    model = vtok.patch(build(name), "uniform", keep=0.4)
    assert "hands over the images of a whole row as one" in message_of(vtok.UnsupportedModelError, run, model, values)
    assert vtok.patch(model, Places(((2, 2),))) and run(model, values).isfinite().all()


def test_prompts_shortened_without_hooks():
    """Numbered anew, samples can still be told apart; with gaps between positions they could not."""
    samples = alone("LLaVA-1.5")
    model, values = build("LLaVA-1.5"), pack(samples)
    words = message_of(vtok.StateError, vtok.prune_inputs, model, values, "uniform", keep=0.4)
    assert "positions='compact'" in words
    short = vtok.prune_inputs(model, values, "uniform", keep=0.4, positions="compact")
    assert short.get("attention_mask") is None
    found = run(model, short)
    parts = [run(model, vtok.prune_inputs(model, s, "uniform", keep=0.4, positions="compact")) for s in samples]
    assert_close(found, torch.cat(parts, 1))


def test_the_check_would_notice():
    """Unpatched, samples of a packed row do not see each other, and without positions that start over they do."""
    samples = alone("LLaVA-1.5")
    model, values = build("LLaVA-1.5"), pack(samples)
    apart = run(model, values)
    assert_close(apart[:, -samples[1]["input_ids"].shape[1] :], run(model, samples[1]))
    together = run(model, {k: v for k, v in values.items() if k != "position_ids"})
    assert (together - apart).abs().max() > 1e-2
