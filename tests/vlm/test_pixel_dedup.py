"""pixel_dedup: units of patches that show the same leave in front of the towers of the Qwen-VL family."""

import copy
import itertools
import sys

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import by_hand, close
from test_vlm_turns import columns, converse, masked, same, three
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import vision_utils
from vlm_zoo import EXAMPLES, build, generate, inputs

import vtok
from vtok.eval.benchmarks.flops import formulas
from vtok.methods.pixel_dedup import codes_of, equal_to_neighbours, like_neighbours, seen_before
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.pixels import units
from vtok.patches.hf_vlm.tower.bridge import holes
from vtok.testing import generic_models
from vtok.testing.generic_videos import video_inputs
from vtok.testing.prompt_oracle import check_prompts

QWEN = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
GENERIC = ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow), pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)]
CONFIGS = [vtok.PixelDedup(), vtok.PixelDedup(compare="image"), vtok.PixelDedup(threshold=0.1)]


def _made(name):
    return build(name) if name in EXAMPLES else generic_models.build(name)


def page(values, model, seed=0):
    """The same inputs with images of few kinds of units, in blobs: half of the neighbours are alike, a few nearly."""
    generator, m = torch.Generator().manual_seed(seed), units.unit_of(units.tower_of(find(model)[0].module))
    values = dict(values)
    for pixels in ("pixel_values", "pixel_values_videos"):
        if pixels in values:
            x = values[pixels]
            kinds = torch.randn(2, m * x.shape[1], generator=generator)
            number = torch.randint(2, (len(x) // m,), generator=generator)
            noise = (
                0.05 * torch.rand(len(x) // m, 1, generator=generator) * (torch.rand(len(x) // m, 1, generator=generator) < 0.2)
            )
            values[pixels] = (kinds[number] + noise).view(x.shape)
    return values


class MaskedTower:
    """The unpatched tower on all patches, which attend, in every block and by an explicit mask, to those that stay.

    Args:
        tower: not patched.
        keep: [U] bool, in the order of the sequence.
    """

    def __init__(self, tower, keep, monkeypatch):
        self.tower, self.patches, m = tower, keep, units.unit_of(tower)
        index = torch.arange(len(keep))
        self.grid = None

        def enter(module, args, kwargs):
            order = index
            if hasattr(tower, "window_size"):
                grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
                order = vision_utils.get_vision_window_index(
                    grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
                )[0]
            self.patches = keep[order].repeat_interleave(m)

        self.handle = tower.register_forward_pre_hook(enter, with_kwargs=True)
        for block in tower.blocks:
            monkeypatch.setattr(block.attn, "forward", self._attention(block.attn))

    def _attention(self, attn):
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision

        def forward(hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
            n = len(hidden_states)
            q, k, v = attn.qkv(hidden_states).reshape(n, 3, attn.num_heads, -1).unbind(1)
            q, k = rotate(q, k, *position_embeddings)
            segment = torch.bucketize(torch.arange(n), cu_seqlens.long(), right=True)
            seen = (segment[:, None] == segment) & (self.patches | torch.eye(n, dtype=torch.bool))
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attn.scaling)
            return attn.proj(out[0].transpose(0, 1).reshape(n, -1))

        return forward


def _encoded(model, values):
    """({modality: features and deep features of all units}, {modality: [U] bool, True = there is one})."""
    outputs = hf.encode(find(model)[0].module, values)
    found, there = {}, {}
    for modality, output in outputs.items():
        deep = [torch.cat(list(x)) for x in getattr(output, "deepstack_features", None) or ()]
        found[modality] = [torch.cat(list(output.pooler_output)), *deep]
        there[modality] = ~holes(found[modality][0])
    return found, there


@pytest.mark.parametrize("name", [*QWEN, *GENERIC])
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_the_tower_sees_what_masking_would_show_it(name, kind, monkeypatch):
    """Several images of different size, or videos; features of the last and of deeper layers."""
    model = _made(name)
    if name in EXAMPLES:
        values = inputs(name) if kind == "images" else EXAMPLES[name].videos(model, torch.Generator().manual_seed(0))
    else:
        values = generic_models_inputs(model) if kind == "images" else video_inputs(model)
    values = page(values, model)
    with torch.no_grad():
        whole, _ = _encoded(model, values)
        vtok.patch(model, "pixel_dedup", threshold=0.1)
        found, there = _encoded(model, values)
        vtok.unpatch(model)
        ((modality, keep),) = there.items()
        assert 0.2 < keep.float().mean() < 0.9
        tower = units.tower_of(find(model)[0].module)
        masked = MaskedTower(tower, keep, monkeypatch)
        expected, _ = _encoded(model, values)
        masked.handle.remove()
    assert len(found[modality]) == len(expected[modality]) == 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
    for x, y, full in zip(found[modality], expected[modality], whole[modality]):
        assert (x - y)[keep].abs().max() <= 1e-5 * y.abs().max()
        assert (full - y)[keep].abs().max() > 1e-3 * y.abs().max()


def generic_models_inputs(model):
    from vtok.testing.generic_prompts import inputs as made

    return made(model)


FAST = [("Qwen2.5-VL", CONFIGS[0]), ("Qwen3-VL", CONFIGS[2])]


@pytest.mark.parametrize(
    ("name", "config"),
    [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(QWEN, CONFIGS)],
    ids=str,
)
def test_the_llm_sees_what_masking_would_show_it(name, config):
    """generate() with a cache, left padding, positions of the whole prompt; a batch is what its prompts are alone."""
    model = build(name)
    values = page(inputs(name), model)
    untouched = generate(model, values)[1]
    vtok.patch(model, config)
    together = generate(model, values)[1]
    (row,) = vtok.info(model).prompts[0].rows
    assert row.place == "in front of the vision tower" and all(b < a for a, b in zip(row.tokens_in, row.tokens_out))
    assert (generate(model, values, use_cache=False)[1] - together).abs().max() <= 1e-4
    for b, (first, count) in enumerate(((0, 2), (2, 1))):
        real, patches = values["attention_mask"][b].bool(), [0, *values["image_grid_thw"].prod(1).cumsum(0).tolist()]
        one = {key: x[b : b + 1, real] for key, x in values.items() if x.shape == values["input_ids"].shape}
        one["image_grid_thw"] = values["image_grid_thw"][first : first + count]
        one["pixel_values"] = values["pixel_values"][patches[first] : patches[first + count]]
        assert (generate(model, one)[1][0] - together[b]).abs().max() <= 1e-4
    assert "in front of the vision tower" in str(vtok.info(model))
    evidence = check_prompts(model, values, steps=3)  # unpatches it
    assert evidence.fault is None, evidence
    assert torch.equal(generate(model, values)[1], untouched)
    short = vtok.prune_inputs(model, values, config)
    assert short["input_ids"].shape[1] < values["input_ids"].shape[1]
    assert (generate(model, short)[1] - together).abs().max() <= 1e-4


def test_other_methods_choose_among_what_is_left():
    model = build("Qwen2.5-VL")
    values = page(inputs("Qwen2.5-VL"), model)
    vtok.patch(model, ["pixel_dedup", vtok.DivPrune(keep=0.5)])
    with torch.no_grad():
        model(**values)
    first, second = vtok.info(model).prompts[0].rows
    assert (first.place, second.place) == ("in front of the vision tower", "before the LLM")
    assert second.tokens_in == first.tokens_out and all(b < a for a, b in zip(second.tokens_in, second.tokens_out))
    assert check_prompts(model, values, steps=2).fault is None
    text = message_of(vtok.ConfigError, vtok.patch, model, ["pixel_dedup", vtok.PixelDedup(threshold=1)])
    assert "two methods drop visual tokens at one place (in front of the vision tower)" in text


def test_beams_and_a_later_turn():
    """A second turn with images, behind a cache that holds a shortened one: what left is hidden in every layer of the unpatched
    model, which is given the features of what stays."""
    model, (first, second) = build("Qwen2.5-VL"), (inputs("Qwen2.5-VL", seed) for seed in (0, 1))
    first, second = page(first, model), page(second, model, 1)

    def beams(given):
        given = {key: copy.copy(x) for key, x in given.items()}
        return model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)[:, given["input_ids"].shape[1] :]

    expected = beams(vtok.prune_inputs(model, first, "pixel_dedup"))
    vtok.patch(model, "pixel_dedup")
    assert torch.equal(beams(first), expected)

    turns, alive, shown = [first, turn_of_text(), second], [], []
    for turn in turns:
        stays, shows = torch.ones_like(turn["input_ids"], dtype=torch.bool), turn
        if "pixel_values" in turn:
            with torch.no_grad():
                output = hf.encode(model.model, turn)["image"]
            there = ~holes(torch.cat(list(output.pooler_output)))
            stays[turn["input_ids"] == model.config.image_token_id] = there
            output.pooler_output = [x.masked_fill(holes(x)[:, None], 0) for x in output.pooler_output]
            shows = {key: x for key, x in turn.items() if key != "pixel_values"} | {"mm_encoder_outputs": {"image": output}}
        alive.append(stays)
        shown.append(shows)
    positions = three(model, 2, columns(turns))
    found, _ = converse(model, turns, positions)
    vtok.unpatch(model)
    wanted, _ = masked(model, shown, torch.cat(alive, 1), positions)
    assert not torch.cat(alive, 1).all()
    same(found, wanted, torch.cat(alive, 1), turns)


def turn_of_text():
    return {"input_ids": torch.tensor([[7, 8, 9], [10, 11, 12]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_nothing_is_touched_where_nothing_is_the_same(name):
    model, values = build(name), inputs(name)
    with torch.no_grad():
        expected = model(**values).logits
        for compare in ("neighbours", "image"):
            vtok.patch(model, "pixel_dedup", compare=compare)
            assert torch.equal(model(**values).logits, expected)
            assert vtok.info(model).prompts[0].estimate.fraction == 1
            vtok.unpatch(model)


def test_qwen35_by_hand():
    """Recurrent layers: columns that never entered are not columns that are hidden."""
    model = generic_models.build("qwen3_5")
    values = page(generic_models_inputs(model), model)
    vtok.patch(model, "pixel_dedup", threshold=0.1)
    (vlm,) = find(model)
    with torch.no_grad():
        found = model(**values, use_cache=False).logits[:, -1]
        outputs = hf.encode(vlm.module, values)
    keep = torch.ones_like(values["input_ids"], dtype=torch.bool)
    keep[values["input_ids"] == model.config.image_token_id] = ~holes(torch.cat(list(outputs["image"].pooler_output)))
    assert not keep.all()
    vtok.unpatch(model)
    close(found, by_hand(model, values, keep & (values["attention_mask"] == 1), outputs))


# The maths.
def _alike(x, threshold):
    """By definition, one unit after the other."""
    batch, rows, columns, _ = x.shape
    gone = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for b in range(batch):
        stands = {}
        for r in range(rows):
            for c in range(columns):
                stands[r, c] = (r, c)
                for near in ((r, c - 1), (r - 1, c)):
                    if near in stands and (x[b, r, c] - x[b][stands[near]]).abs().max() <= threshold:
                        stands[r, c], gone[b, r, c] = stands[near], True
                        break
    return gone


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 6), (3, 4, 1), (1, 1, 1)], ids=str)
def test_neighbours_by_definition(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (*shape, 3), generator=generator).float() + 0.02 * torch.rand(*shape, 3, generator=generator)
    for threshold in (0.005, 0.01, 0.02, 1.5):
        assert torch.equal(like_neighbours(x, threshold), _alike(x, threshold))
    assert torch.equal(equal_to_neighbours(x.round()), _alike(x.round(), 0))
    assert torch.equal(like_neighbours(x.round(), 0.0), equal_to_neighbours(x.round()))


def test_differences_do_not_add_up_along_a_gradient():
    x = torch.linspace(0, 1, 101)[None, None, :, None].expand(1, 1, 101, 4)
    kept = (~like_neighbours(x, 0.1)).flatten().nonzero()[:, 0]
    assert kept.tolist() == list(range(0, 101, 11)) or (kept.diff() >= 10).all()
    assert all((x[0, 0, i, 0] - x[0, 0, kept[kept <= i][-1], 0]) <= 0.1 + 1e-6 for i in range(101))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_of_equal_units_of_an_image_stays(dtype):
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(4, 5, generator=generator).to(dtype)
    kinds[0, 0] = 0.0
    number = torch.randint(4, (3, 20), generator=generator)
    x = kinds[number]
    x[1, 3:] = torch.where(x[1, 3:] == 0, -0.0, x[1, 3:])  # the same number
    gone = seen_before(codes_of(x, 0.0))
    assert gone.tolist() == [[n in row[:i] for i, n in enumerate(row)] for row in number.tolist()]


def test_units_of_one_hash_that_differ_all_stay(monkeypatch):
    monkeypatch.setattr("vtok.methods.pixel_dedup.splitmix", lambda position, seed: torch.zeros_like(position))  # sums alone
    codes = torch.tensor([[[1, 2], [2, 1], [1, 2], [0, 3], [2, 1]]])
    assert seen_before(codes).tolist() == [[False, False, True, False, False]]


def test_near_duplicates_of_an_image_are_within_a_threshold():
    x = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(3))
    gone = seen_before(codes_of(x, 0.1))[0]
    assert 20 < gone.sum() < 180
    kept = x[0, ~gone]
    assert ((x[0, gone][:, None] - kept).abs().amax(-1).amin(1) <= 0.1).all()


# What is said.
def test_refusals():
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("LLaVA-1.5"), "pixel_dedup")
    assert "pixel_dedup drops patches in front of the vision tower" in text
    assert "the one of LlavaModel cannot do without: it is none of the Qwen-VL family" in text
    assert vtok.supports(build("Qwen3-VL")).methods["pixel_dedup"] is None
    model = build("Qwen2-VL")
    text = message_of(vtok.ConfigError, vtok.patch, model, "pixel_dedup", flops=0.5)
    assert "takes as many tokens from an image as that has duplicates, which no FLOPs budget can set" in text
    for wrong in (-1, float("nan"), "0", True):
        assert "threshold is a difference of pixel values" in message_of(vtok.ConfigError, vtok.PixelDedup, threshold=wrong)
    assert "neighbours" in message_of(vtok.UnknownNameError, vtok.PixelDedup, compare="neighbour")
    vtok.patch(model, "pixel_dedup")
    tower, values = units.tower_of(model.model), inputs("Qwen2-VL")
    text = message_of(
        vtok.UnsupportedModelError,
        tower,
        values["pixel_values"],
        grid_thw=values["image_grid_thw"],
        position_ids=torch.zeros(128, 2),
    )
    assert "position_ids of a caller" in text and find(model)[0].module._forward_pre_hooks


def test_plans_are_upper_bounds_and_runs_say_what_it_was():
    model = build("Qwen2.5-VL")
    values = page(inputs("Qwen2.5-VL"), model)
    plan = vtok.plan(model, "pixel_dedup", prompt={"images": 1, "text_tokens": 8})
    assert not plan.estimate.exact and plan.estimate.macs == plan.estimate.base_macs
    assert "upper bounds: what stays depends on the images" in str(plan)
    mean = vtok.plan(model, "pixel_dedup", calibration=values)
    vtok.patch(model, "pixel_dedup")
    with torch.no_grad():
        model(**values)
    cost = vtok.info(model).prompts[0].estimate
    assert 0 < cost.vision.macs < cost.base_vision.macs and cost.fraction < 1
    assert mean.measured == 2 and mean.estimate.vision.macs == pytest.approx(cost.vision.macs)


@pytest.mark.parametrize("name", QWEN)
def test_costs_are_those_that_run(name):
    """Multiply-accumulates of tower and merger, counted while they run."""
    model = build(name)
    values, (vlm,) = page(inputs(name), model), find(model)
    vtok.patch(model, "pixel_dedup")
    with torch.no_grad():
        model(**values)
        cost = vtok.info(model).prompts[0].estimate.vision
        with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
            vlm.module.get_image_features(values["pixel_values"], values["image_grid_thw"])
    assert counter.get_total_flops() / 2 == pytest.approx(2 * (cost.macs + cost.connector_macs), rel=1e-3)
