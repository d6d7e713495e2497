"""Methods on image features inside tiny vision-language models: against masking, image by image, against plans and budgets."""

import copy
import json
import random

import pytest
import torch
from helpers_features import Chosen, encoded, row_of
from helpers_todre import kernel_of
from vlm_zoo import EXAMPLES, Columns, MaskOracle, assert_same, build, column_keeps, generate, inputs

import vtok
from vtok.core.prompt import ImageFeatures, TowerBlock, TowerFacts, View, VLMInfo
from vtok.core.reduction import apply_plan
from vtok.core.search_space import draw
from vtok.core.tokens import AttentionView, TokenState
from vtok.eval.benchmarks.flops import count_prompt_macs
from vtok.patches.hf_vlm.families import find

METHODS = [
    vtok.VisionZip(keep=0.5),
    vtok.FasterVLM(keep=0.4),
    vtok.VisPruner(keep_tokens=3, important=0.4),
    vtok.PruMerge(keep=0.5, neighbours=5),
    vtok.HoloV(keep=0.5, runs=5),
    vtok.HiRED(keep=0.4),
    vtok.Downsample(keep=0.5),
]
VARIANTS = [
    vtok.VisionZip(dominant=2, contextual=1, preset="official"),
    vtok.PruMerge(plus=True),
    vtok.PruMerge(keep=0.25, preset="official"),
    vtok.HoloV(keep=0.4, variant="paper"),
    vtok.HoloV(keep=0.7, preset="official"),
    vtok.HiRED(keep_tokens=5, alpha=0.3, preset="official"),
    vtok.Downsample(keep_tokens=3, mode="bilinear", shape="square"),
]
TOWERS = [name for name in EXAMPLES if not name.startswith("Qwen")]
MAIN = ["LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3", "Gemma3", "PaliGemma"]
CROPPING = ["LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3"]


def _pairs(names, few, slow=()):
    """(model, config): methods on some models, variants of them on a few; the rest of the models, and of the pairs, if slow."""
    quick = [(name, config) for name in names for config in METHODS] + [(name, config) for name in few for config in VARIANTS]
    every = [(name, config) for name in [*names, *slow] for config in [*METHODS, *VARIANTS]]
    late = [pytest.param(*pair, marks=pytest.mark.slow, id=_pair_id(pair)) for pair in every if pair not in quick]
    return pytest.mark.parametrize(("name", "config"), [*(pytest.param(*pair, id=_pair_id(pair)) for pair in quick), *late])


def _pair_id(pair):
    return f"{pair[0]}-{_id(pair[1])}"


def _id(config):
    return f"{config.name}({', '.join(f'{k}={v}' for k, v in config.given().items())})"


@_pairs(MAIN, ["LLaVA-1.5"], [name for name in TOWERS if name not in MAIN])
def test_removing_is_masking(name, config):
    """generate() equals the whole prompt with the chosen features, under a mask; with beams; prune_inputs equals both."""
    values, kernel = inputs(name), kernel_of(name)
    reference = build(name, kernel)
    chosen = Chosen(reference, values, config)
    assert all(int(stays.sum()) > 0 for stays in chosen.stays) and not chosen.columns.all()
    with MaskOracle(reference, dict.fromkeys(range(4), chosen.columns)):
        expected = generate(reference, encoded(values, chosen))
    model = vtok.patch(build(name, kernel), config, positions="original")
    assert_same(generate(model, values), expected)
    assert_same(generate(model, values, use_cache=False), expected)
    (row,) = vtok.info(model).prompts[0].rows
    assert list(row.tokens_out) == [a - int(b) for a, b in zip(row.tokens_in, (~chosen.columns).sum(1))]
    vtok.unpatch(model)
    if "window" not in name:
        assert_same(generate(model, vtok.prune_inputs(model, values, config, positions="original")), expected)


@pytest.mark.parametrize("config", [*METHODS, *VARIANTS], ids=_id)
def test_beams(config):
    values, reference = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    chosen = Chosen(reference, values, config)

    def beams(model, given):
        given = {k: copy.copy(v) for k, v in given.items()}
        return model.generate(**given, max_new_tokens=4, num_beams=2, do_sample=False)

    with MaskOracle(reference, dict.fromkeys(range(4), chosen.columns)):
        expected = beams(reference, encoded(values, chosen))
    assert torch.equal(beams(vtok.patch(build("LLaVA-1.5"), config, positions="original"), values), expected)


@_pairs(["LLaVA-1.5", "LLaVA-NeXT", "Idefics3"], ["LLaVA-1.5", "LLaVA-NeXT"], ["InternVL"])
def test_a_batch_is_its_rows(name, config):
    values, model = inputs(name), build(name)
    together, images = Chosen(model, values, config), 0
    for b in range(2):
        alone = Chosen(model, row_of(name, values, b), config)
        for stays, features in zip(alone.stays, alone.features):
            assert stays.tolist() == together.stays[images].tolist()
            assert (features[stays] - together.features[images][stays]).abs().max() <= 1e-5
            images += 1
    assert images == len(together.stays)


@_pairs(["LLaVA-1.5", "InternVL"], ["LLaVA-1.5"], ["Gemma3", "PaliGemma"])
def test_plans_and_counters_agree(name, config):
    """Tokens, and multiply-accumulates of the choice itself."""
    model = build(name)
    values = {k: v[1:] if k != "pixel_values" else v[-1:] for k, v in inputs(name).items()}  # one image
    real = values["attention_mask"][0].bool()
    values = {k: v[:, real] if v.shape[-1] == len(real) and v.ndim == 2 else v for k, v in values.items()}
    text = int((values["input_ids"] < 118).sum())
    plan = vtok.plan(model, config, prompt={"text_tokens": text})
    vtok.patch(model, config)
    counted = count_prompt_macs(model, values)
    (found,) = vtok.info(model).prompts
    assert plan.estimate.exact == config.build_vlm(find(model)[0].info).exact
    assert plan.tokens[0] >= text + found.rows[0].tokens_out[0]
    assert found.estimate.macs == counted.model
    if plan.estimate.exact:
        assert found.estimate.reduction_macs == counted.reduction
        assert plan.tokens[0] == text + found.rows[0].tokens_out[0]
        assert plan.estimate.reduction_macs == counted.reduction


@pytest.mark.parametrize("config", [*METHODS, *VARIANTS], ids=_id)
def test_budgets_and_saved_configs(tmp_path, config):
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    for share in (0.9, 0.7):
        vtok.patch(model, type(config)(**_choices(config)), flops=share, prompt={"images": 1, "text_tokens": 8})
        found = vtok.info(model).prompts[0]
        left = vtok.plan(model, found.configs[0], prompt={"text_tokens": 8}).estimate.fraction
        assert left <= share + (0.05 if config.given().get("shape") != "square" else 0.1)  # of 4 x 4 it makes 3 x 3, no 15
    vtok.patch(model, config)
    vtok.save_config(model, tmp_path / "run.json")
    other = vtok.patch(build("LLaVA-1.5"), tmp_path / "run.json")
    assert vtok.info(other).prompts[0].configs == (config,)
    assert torch.equal(generate(other, values, steps=2)[1], generate(model, values, steps=2)[1])
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _choices(config):
    """Parameters besides those that a budget sets."""
    return {k: v for k, v in config.given().items() if k not in config.set_by_budget}


@_pairs(["LLaVA-1.5", "LLaVA-NeXT"], ["LLaVA-1.5"], ["LLaVA-OneVision", "InternVL", "Idefics3", "Gemma3", "PaliGemma"])
def test_keeping_everything_changes_no_bit(name, config):
    model, values = build(name, kernel_of(name)), inputs(name)
    before = generate(model, values, steps=2)[1]
    for changes in ({"keep": 1.0}, {"keep": None, "keep_tokens": 10_000}):
        whole = type(config)(**{**_choices(config), **changes})
        assert torch.equal(generate(vtok.patch(model, whole), values, steps=2)[1], before)
    vtok.patch(model, config)
    assert not torch.equal(generate(model, values, steps=2)[1], before)
    assert torch.equal(generate(vtok.unpatch(model), values, steps=2)[1], before)


@pytest.mark.parametrize("config", [*METHODS, *VARIANTS], ids=_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype, config):
    model, values = vtok.patch(build("LLaVA-1.5").to(dtype), config), inputs("LLaVA-1.5")
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    assert generate(model, half, steps=2)[1].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(vtok.patch(build("LLaVA-1.5"), config), values, steps=2)[1].isfinite().all()


@pytest.mark.parametrize("config", [*METHODS, *VARIANTS], ids=_id)
def test_the_connector_gets_gradients(config):
    """Tuning a connector behind the method: only what is kept, or merged into what is kept, reaches the loss."""
    model, values = vtok.patch(build("LLaVA-1.5").train(), config), inputs("LLaVA-1.5")
    model(**values, labels=values["input_ids"].masked_fill(values["input_ids"] > 110, -100)).loss.backward()
    grads = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)


@_pairs(CROPPING, ["LLaVA-NeXT", "LLaVA-OneVision"])
def test_pages_cut_into_crops(name, config):
    """Crops that lost rows as padding, or that shrank; prompts of several pages."""
    model = build(name)
    values = EXAMPLES[name].pages(model, torch.Generator().manual_seed(0))
    chosen = Chosen(model, values, config)
    assert all(int(stays.sum()) > 0 for stays in chosen.stays) and not chosen.columns.all()
    with MaskOracle(model, dict.fromkeys(range(4), chosen.columns)):
        expected = generate(model, encoded(values, chosen), steps=3)
    assert_same(generate(vtok.patch(build(name), config, positions="original"), values, steps=3), expected)


@pytest.mark.parametrize("config", METHODS, ids=_id)
def test_methods_before_and_inside_the_llm(config):
    """The oracle hides what either dropped."""
    name, values = "LLaVA-1.5", inputs("LLaVA-1.5")
    inside = Columns(((2, 2),))
    reference = build(name)
    chosen = Chosen(reference, values, config)
    layers = {i: chosen.columns & alive for i, alive in column_keeps(reference, values, inside.shares).items()}
    with MaskOracle(reference, layers):
        expected = generate(reference, encoded(values, chosen))
    model = vtok.patch(build(name), [config, inside])
    assert_same(generate(model, values), expected)
    assert len(vtok.info(model).prompts[0].rows) == 2
    with pytest.raises(vtok.ConfigError, match="two methods drop visual tokens at one place"):
        vtok.patch(build(name), [config, vtok.UniformGrid(keep=0.5)])


@pytest.mark.parametrize("config", VARIANTS, ids=_id)
def test_compact_positions(config):
    """Numbered anew: the prompt of a program that never knew of the other tokens."""
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    short = vtok.prune_inputs(model, values, config, positions="compact")
    mask = short["attention_mask"]
    expected = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    assert torch.equal(short["position_ids"].masked_fill(mask == 0, 0), expected)
    found = generate(vtok.patch(build("LLaVA-1.5"), config, positions="compact"), values)
    assert_same(found, generate(model, short))


@pytest.mark.parametrize("config", METHODS, ids=_id)
def test_what_a_search_varies(config):
    """Points are drawn, written into the config, and resolve; what was given is left alone."""
    info = find(build("LLaVA-1.5"))[0].info
    if config.name == "downsample":
        with pytest.raises(vtok.ConfigError, match="downsample has no schedule on vision-language models"):
            config.search_space(info)
        return
    space = type(config)().search_space(info)
    assert space and not set(space) & set(config.set_by_budget)
    for seed in range(5):
        drawn = draw(space, random.Random(seed))
        found = type(config)().candidates_at(info, drawn)[500]
        assert found.keep == 0.5
        found.build_vlm(info)
        assert not set(found.replace(keep=None).search_space(info)) - {k for k, v in drawn.items() if v == found.to_dict()[k]}


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("visionzip", {"dominant": 5}, "dominant and contextual are given together"),
        ("visionzip", {"keep": 0.5, "keep_tokens": 3}, "give keep or keep_tokens, not both"),
        ("visionzip", {"dominant": 5, "contextual": -1}, "contextual must be a whole number >= 0, got -1"),
        ("fastervlm", {"keep": 1.5}, r"keep is a fraction in \(0, 1\], got 1.5"),
        ("fastervlm", {"keep_tokens": 0}, "keep_tokens must be a whole number >= 1, got 0"),
        ("vispruner", {"important": 2}, r"important is a share of the tokens that stay, in \[0, 1\]; got 2"),
        ("prumerge", {"neighbours": 0}, "neighbours must be a whole number >= 1, got 0"),
        ("prumerge", {"iqr_factor": -1}, "iqr_factor is a number >= 0, got -1"),
        ("holov", {"runs": 0}, "runs must be a whole number >= 1, got 0"),
        ("holov", {"variant": "newest"}, "unknown variant 'newest'"),
        ("holov", {"variant": "paper", "preset": "official"}, "preset='official' is the program"),
        ("hired", {"alpha": 1.5}, r"alpha is a share of the budget in \[0, 1\], got 1.5"),
        ("downsample", {"mode": "sum"}, "unknown mode 'sum'"),
        ("fastvid", {"context": 1}, r"context lies in \[0, 1\), got 1"),
        ("vidcom2", {"preset": "ours"}, "unknown preset 'ours'"),
    ],
)
def test_values_that_make_no_sense(method, params, words):
    with pytest.raises(vtok.VtokError, match=words):
        vtok.METHODS.get(method)(**params)


@pytest.mark.parametrize("method", ["visionzip", "fastervlm", "vispruner", "prumerge", "holov", "hired"])
def test_towers_that_cannot_be_read(method):
    with pytest.raises(vtok.UnsupportedModelError, match=f"{method} looks at the attention of Qwen2VLModel's vision tower"):
        vtok.patch(build("Qwen2-VL"), method)
    layer = "late_layer" if method == "hired" else "layer"
    with pytest.raises(vtok.ConfigError, match=f"{layer}=7 names no block of the vision tower of LlavaModel, which has 2"):
        vtok.patch(build("LLaVA-1.5"), method, **{layer: 7})


def test_features_that_are_added_inside_the_llm_are_pooled_likewise():
    """Qwen3-VL adds features of two tower layers to the visual tokens between decoder layers."""
    from vtok.methods.baselines.downsample import pool_grid

    values, model = inputs("Qwen3-VL"), build("Qwen3-VL")
    chosen = Chosen(model, values, vtok.Downsample(keep=0.25))
    with torch.no_grad():
        whole = model.model.get_image_features(values["pixel_values"], values["image_grid_thw"], return_dict=True)
    changed = chosen.outputs["image"]
    for before, after in zip(
        (whole.pooler_output, *whole.deepstack_features), (changed.pooler_output, *changed.deepstack_features)
    ):
        for x, y, stays, grid in zip(before, after, chosen.stays, ((4, 4), (2, 4), (2, 4))):
            expected = pool_grid(x[None], grid, (grid[0] // 2, 2))[0]
            assert (y[stays] - expected).abs().max() <= 1e-6


STATIC = [config for config in [*METHODS, *VARIANTS] if config.name != "hired" and config != vtok.PruMerge(plus=True)]


@pytest.mark.parametrize("config", [*STATIC, vtok.HiRED(keep=0.4), vtok.EVS(keep=0.5), vtok.VidCom2(keep=0.5)], ids=_id)
def test_nothing_waits_for_the_host_where_counts_are_static(config):
    """On the meta device there are no values that could be read."""
    meta = {"device": "meta"}
    facts = TowerFacts(2, True, 1, 1, 32, 2, 16, 16)
    info = VLMInfo("Meta", 4, 64, 4, tower=facts, grid=(4, 4), videos=True)
    q = torch.empty(4, 2, 17, 16, **meta)
    view = AttentionView(q, q, q, q, 0.25, None)
    hidden = torch.empty(4, 17, 32, **meta)

    def block(views=range(4)):
        return TowerBlock(1, None, lambda: view, block, leaves=lambda: hidden)

    video = config.name in ("evs", "vidcom2")
    views = tuple(View(16 * i, 4, 4) for i in range(2 if video else 1))
    tokens = torch.empty(2 if video else 4, 16 * len(views), 64, **meta)
    linear = torch.nn.Linear(32, 64, **meta)
    images = ImageFeatures(tokens, views, "video" if video else "image", {0: block(), 1: block()}, 1, connector=linear)
    reducer = config.build_vlm(info)
    plan = reducer.features(images)
    assert plan.keep.device.type == "meta" and plan.valid is None
    assert plan.keep.shape[1] == reducer.feature_count(tokens.shape[1], views, images.modality)
    out, _ = apply_plan(tokens, TokenState(0, tokens.shape[1]), plan)
    assert out.shape == (*plan.keep.shape, 64)
