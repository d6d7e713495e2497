"""Prompts of models whose packed towers are patched: generation, plans, files, training, and what is refused."""

import copy
import io

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import by_hand, close
from helpers_packed import GENERIC, PACKED, deep, encoded, images
from transformers.vision_utils import get_vision_window_index
from vlm_zoo import EXAMPLES, assert_same, build, generate, inputs, visual

import vtok
from vtok.eval.benchmarks.flops import count_prompt_macs
from vtok.patches.hf_packed.adapter import raster_places
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, START
from vtok.patches.hf_vlm.families import find
from vtok.targets.resolve import run_of
from vtok.testing import generic_models, generic_prompts, prompt_checks
from vtok.testing.tiny import alone

METHODS = {
    "tome": vtok.ToMe(r=3),
    "pitome": vtok.PiToMe(ratio=0.8),
    "random": vtok.RandomDrop(keep=0.6, layers=[0, 1]),
    "ats": vtok.ATS(num_tokens=6, layers=[0, 1], query="mean"),
    "zero_tprune": vtok.ZeroTPrune(layers=[0, 1], retain=0.7, r=1, cls_init="uniform"),
}
CHECKS = ("masking", "batch", "order", "counts", "unpatching")
WINDOWS = "Qwen2.5-VL"
QUICK = {(WINDOWS, method) for method in METHODS} | {(name, "tome") for name in PACKED}
PAIRS = [
    (name, method) if (name, method) in QUICK else pytest.param(name, method, marks=pytest.mark.slow)
    for name in PACKED
    for method in METHODS
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_prompts(name, method):
    """A padded batch with several images against the whole prompt under a mask; a batch is its rows; plans are right."""
    model = build(name)
    for check in CHECKS:
        getattr(prompt_checks, f"check_{check}")(model, EXAMPLES[name], METHODS[method])


@pytest.mark.parametrize("name", GENERIC)
def test_prompts_of_models_without_a_row(name):
    """The unpatched LLM fed with what is left: behind linear attention, and with features for deeper layers."""
    model = generic_models.build(name)
    values = generic_prompts.inputs(model)
    vtok.patch(model, "tome", r=1)
    (vlm,) = find(model)
    with torch.no_grad():
        found = hf.choose(vlm.module, hf.encode(vlm.module, values), None, vlm.family, values, True)
    keep = hf.kept_columns(values["input_ids"], vlm.tokens, found.rows) & (values["attention_mask"] == 1)
    (row,) = _rows(model, values)
    assert row.place == "vision tower" and row.tokens_in == (12, 8) and row.tokens_out == (8, 6)
    logits = generate(model, values, steps=2)[1][:, 0]
    vtok.unpatch(model)
    close(logits, by_hand(model, values, keep, found.outputs, False))


def _rows(model, values):
    with torch.no_grad():
        model(**values)
    return vtok.info(model).prompts[0].rows


@pytest.mark.parametrize("config", [vtok.ToMe(r=0), vtok.PiToMe(ratio=1.0), vtok.RandomDrop(keep=1.0, layers=[0])], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_nothing_to_reduce(name, config):
    model, values = build(name), inputs(name)
    before = generate(model, values, steps=2)[1]
    vtok.patch(model, config)
    assert vtok.info(model).patched
    assert torch.equal(generate(model, values, steps=2)[1], before)


def test_blocks_in_front_of_the_first_that_reduces_run_their_own_code():
    """A block that takes nothing away changes nothing but the order of sums."""
    model = deep("Qwen2.5-VL")
    pixels, grid = images(model, [[1, 8, 8], [1, 6, 10]])
    with torch.no_grad():
        plain = encoded(model, pixels, grid)[0]
        vtok.patch(model, vtok.ToMe(r=[0, 0, 0, 1]))
        found = encoded(model, pixels, grid)[0]
        states = run_of(model).current.states
        assert all(state.untouched for state in states[:4]) and not states[4].untouched
        for x, y in zip(found, plain):
            near = ((x - y).abs() <= 1e-5).all(1)
            assert near.sum() >= len(x) - 2, "all but the merged unit and what it was merged into"


def test_text_alone_is_as_it_was():
    model = build(WINDOWS)
    values = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
    }
    before = generate(model, values, steps=3)
    vtok.patch(model, "tome", r=2)
    assert torch.equal(generate(model, values, steps=3)[1], before[1])


@pytest.mark.parametrize("name", PACKED)
def test_with_methods_on_the_prompt_and_short_inputs(name):
    """What the tower left is chosen from, and folded; features of deeper layers follow."""
    values = inputs(name)
    for last in (vtok.UniformGrid(keep=0.5), vtok.Downsample(keep=0.5)):
        model = vtok.patch(build(name), [vtok.ToMe(r=2), last])
        found = generate(model, values)
        rows = vtok.info(model).prompts[0].rows
        assert [row.place for row in rows] == ["vision tower", "before the LLM"]
        assert all(a > b > c for a, b, c in zip(rows[0].tokens_in, rows[0].tokens_out, rows[1].tokens_out))
        short = vtok.prune_inputs(build(name), values, [vtok.ToMe(r=2), last])
        assert_same(generate(build(name), short), found)


def test_features_of_deeper_layers_are_folded_as_the_tokens_are():
    """Qwen3-VL: a mean of two visual tokens is also one of what is added to them inside the LLM."""
    model = deep("Qwen3-VL")
    values = inputs("Qwen3-VL")
    vtok.patch(model, vtok.ToMe(r=[1, 0, 0, 1]))
    (vlm,) = find(model)
    with torch.no_grad():
        outputs = hf.encode(vlm.module, values)
        reducer = vtok.Downsample(keep=0.5).build_vlm(vlm.info)
        found = hf.choose(vlm.module, outputs, reducer, vlm.family, values, True)
    changed = found.outputs["image"].deepstack_features
    for before, after in zip(outputs["image"].deepstack_features, changed, strict=True):
        left = ~hf.vlm_tower.holes(outputs["image"].pooler_output[0])
        x, kept = before[0][left], found.rows["image"].split([len(x) for x in before])[0]
        pooled = torch.nn.functional.adaptive_avg_pool1d(x.T[None], int(kept.sum()))[0].T
        assert (after[0][kept] - pooled).abs().max() <= 1e-5 * pooled.abs().max()


@pytest.mark.parametrize("name", PACKED)
def test_videos(name):
    """Every frame is reduced as if it came alone."""
    model = build(name)
    values = EXAMPLES[name].videos(model, torch.Generator().manual_seed(0))
    vtok.patch(model, "tome", r=1)
    (row,) = _rows(model, values)
    frames = int(values["video_grid_thw"][:, 0].sum())
    depth = len(model.model.visual.blocks)
    assert sum(row.tokens_in) - sum(row.tokens_out) == depth * frames
    each = [generate(model, one, steps=2)[1][0] for one in alone(model, values)]
    together = generate(model, values, steps=2)[1]
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(each, together))


@pytest.mark.parametrize("name", [WINDOWS, pytest.param("Qwen3-VL", marks=pytest.mark.slow)])
def test_life(name, tmp_path):
    """Bits after unpatching, copies, pickles, files, state_dicts."""
    model, values = build(name), inputs(name)
    plain, keys = generate(model, values, steps=2)[1], list(model.state_dict())
    vtok.patch(model, [vtok.PiToMe(ratio=0.8), vtok.UniformGrid(keep=0.7)])
    assert list(model.state_dict()) == keys
    before = generate(model, values, steps=2)[1]
    assert not torch.equal(before, plain)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    vtok.save_config(model, tmp_path)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), vtok.patch(build(name), tmp_path)):
        assert torch.equal(generate(other, values, steps=2)[1], before)
        assert torch.equal(generate(vtok.unpatch(other), values, steps=2)[1], plain)
        assert not any(key.startswith("_vtok") for m in other.modules() for key in m.__dict__)


def test_traces():
    model = deep(WINDOWS)
    pixels, grid = images(model, [[1, 8, 8], [1, 8, 8]])
    vtok.patch(model, "tome", r=2, trace=True)
    with torch.no_grad():
        encoded(model, pixels, grid)
    state = run_of(model).current.final
    assert state.index.shape == (2, 8) and state.group.shape == (2, 16)
    numbers = torch.arange(8.0).expand(2, 8)[..., None]
    assert torch.equal(vtok.unmerge(model, numbers)[..., 0].long(), state.group)


@pytest.mark.parametrize("method", ["tome", "random"])
@pytest.mark.parametrize("name", [WINDOWS, "Qwen3-VL"])
def test_training(name, method):
    """Gradients reach the tower through what is left; computed again for checkpoints they are the same."""
    values = inputs(name)
    labels = values["input_ids"].masked_fill(visual(build(name), values["input_ids"]) | (values["attention_mask"] == 0), -100)

    def gradients(checkpointed):
        model = build(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        vtok.patch(model, METHODS[method])
        loss = model(**values, labels=labels, use_cache=False).loss
        loss.backward()
        return [p.grad for p in model.model.visual.blocks.parameters()]

    plain, again = gradients(False), gradients(True)
    assert all(g is not None and g.isfinite().all() for g in plain)
    assert any(g.abs().max() > 0 for g in plain)
    assert all((a - b).abs().max() <= 1e-5 * max(float(a.abs().max()), 1e-3) for a, b in zip(plain, again))


@pytest.mark.parametrize("name", [WINDOWS, pytest.param("Qwen3-VL", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision(name, method):
    values = inputs(name)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    assert generate(vtok.patch(build(name).bfloat16(), METHODS[method]), half, steps=2)[1].isfinite().all()
    model = vtok.patch(build(name), METHODS[method])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, values, steps=2)[1].isfinite().all()


def _page(name, rows, columns):
    """(model, a prompt with one image of so many patches)."""
    model = deep(name)
    pixels, grid = images(model, [[1, rows, columns]])
    ids = torch.tensor([[5, 6, START, *[IMAGE] * (rows * columns // 4), END, 7, 8, 9]])
    kinds = (ids == IMAGE).int()
    return model, {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PACKED)
def test_costs_are_those_that_are_counted(name, method):
    """Of an image whose windows are whole; and plans say so before."""
    (model, values), config = _page(name, 16, 12), METHODS[method]
    prompt = {"text_tokens": 7, "input_size": (3, 64, 48)}
    plan = vtok.plan(model, config, prompt=prompt).estimate
    vtok.patch(model, config)
    counted = count_prompt_macs(model, values)
    (found,) = vtok.info(model).prompts
    assert found.estimate.base_macs == plan.base_macs
    assert found.estimate.macs == counted.model
    if plan.exact:
        assert found.estimate.reduction_macs == counted.reduction
        assert (found.estimate.macs, found.estimate.reduction_macs) == (plan.macs, plan.reduction_macs)
    else:
        assert found.estimate.macs <= plan.macs
        assert 0 <= found.estimate.reduction_macs - counted.reduction <= 1e-3 * counted.reduction, "as if there was padding"
    tower = vtok.info(model).towers[0]
    assert tower.blocks[0].tokens_in == 48 and tower.num_patches == 48
    assert tower.estimate.macs == found.estimate.vision.macs


@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_budgets_are_solved_for_the_stated_size(method):
    model, _ = _page(WINDOWS, 16, 12)
    chosen = []
    for size in ((3, 64, 48), (3, 160, 160)):
        prompt = {"text_tokens": 6, "input_size": size}
        vtok.patch(model, method, flops=0.8, prompt=prompt)
        (config,) = vtok.info(model).prompts[0].configs
        left = vtok.plan(model, config, prompt=prompt).estimate.fraction
        assert 0.75 <= left <= 0.81
        chosen.append(config)
    if method == "tome":
        assert chosen[0].r.values[0] < chosen[1].r.values[0], "a count of units, for images of that size"


def test_more_may_merge_than_an_image_of_the_usual_size_holds():
    model, values = _page(WINDOWS, 16, 12)
    vtok.patch(model, "tome", r=[10_000])
    (row,) = _rows(model, values)
    assert (row.tokens_in, row.tokens_out) == ((48,), (24,))


def test_what_is_refused():
    model, values = build("Qwen2-VL"), inputs("Qwen2-VL")
    vtok.patch(model, "tome", r=1)
    pixels, grid = values["pixel_values"], values["image_grid_thw"]
    borders = torch.tensor([0, 64, 96, 128], dtype=torch.int32)
    text = message_of(vtok.UnsupportedModelError, model.model.visual, pixels, grid, cu_seqlens=borders)
    assert "cu_seqlens of a caller say how images are cut" in text and "leave them out" in text
    text = message_of(vtok.UnsupportedModelError, model.model.visual, pixels, grid, output_attentions=True)
    assert "output_attentions=True has nothing to return" in text
    block = model.model.visual.blocks[0]
    text = message_of(vtok.StateError, block, torch.zeros(8, 32), borders[:2], (torch.zeros(8, 16), torch.zeros(8, 16)))
    assert "was called by itself" in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "ats", parity=True, query="mean")
    assert "attends patch by patch" in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "fastervlm")
    assert "runs the patches of all images as one sequence" in text


def test_models_that_do_more_with_the_tokens_of_such_a_tower():
    """HyperCLOVAX has Qwen2.5-VL's tower and a projector behind it, which would hide what is missing."""
    name = "hyperclovax_vision_v2"
    if name not in generic_models.listed():
        return
    text = message_of(vtok.UnsupportedModelError, vtok.patch, generic_models.build(name), "tome", r=1)
    assert "HyperCLOVAXVisionV2Model is not known to take its visual tokens as they leave it" in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, generic_models.build(name), "pixel_dedup")
    assert "HyperCLOVAXVisionV2Model is not known to take visual tokens as that tower yields them" in text


def test_supports():
    support = vtok.supports(deep("Qwen2-VL"))
    assert support.methods["tome"] is None and support.methods["pitome"] is None
    assert support.on_request["ats"] == {"query": "mean"}
    assert "tome: yes, in the vision tower: the prompt gets shorter too" in str(support)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (7, 9), (1, 6)])
def test_where_units_lie(grid):
    """In the order of windows, as transformers has it."""
    tower = deep(WINDOWS).model.visual
    sizes = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    order, _ = get_vision_window_index(sizes, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    (vlm,) = find(deep(WINDOWS))
    assert torch.equal(raster_places(vlm.tower, grid), order)
    assert torch.equal(raster_places(find(build("Qwen2-VL"))[0].tower, grid), torch.arange(grid[0] * grid[1]))
