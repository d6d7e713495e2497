"""What a prompt costs, three times: closed form (`plan`, `info`), torch's counter, and what the KV cache really holds."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from vlm_zoo import EXAMPLES, Attended, Columns, build, generate, inputs, text_model

import vtok
from vtok.eval.benchmarks.flops import FEATURES, count_prompt_macs, formulas
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.macs import stated_image
from vtok.targets.vlm.estimate import planned
from vtok.targets.vlm.resolve import resolve

PAIRS = [(name, kernel) for name, example in EXAMPLES.items() for kernel in example.kernels]


def _counted(model, values):
    """Per row; what rotary tables cost is left out: transformers makes them by a product in some releases."""
    calls = []
    rotary = text_model(model).rotary_emb
    handle = rotary.register_forward_hook(lambda _, args, kwargs, __: calls.append((args, kwargs)), with_kwargs=True)
    counted = count_prompt_macs(model, values)
    handle.remove()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        for args, kwargs in calls:
            rotary(*args, **kwargs)
    return counted.model - counter.get_total_flops() / 2 / counted.images, counted.reduction


def _settings(name):
    layer = EXAMPLES[name].first_layer
    return [vtok.UniformGrid(keep=0.5), Columns(((0, 3),)), [vtok.RandomDrop(keep=0.6), Columns(((layer, 2),))]]


def _cache_bytes(cache):
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _one(name):
    """A single prompt with one image and no padding; (values, size of the image)."""
    values = inputs(name)
    row = 0 if name == "LLaVA-OneVision" else 1
    real = values["attention_mask"][row].bool()
    picked = {k: v[row : row + 1, real] for k, v in values.items() if v.shape == values["input_ids"].shape}
    pixels = values["pixel_values"]
    if "image_grid_thw" in values:
        grid = values["image_grid_thw"][-1:]
        return {**picked, "image_grid_thw": grid, "pixel_values": pixels[-int(grid.prod()) :]}, (3, 16, 32)
    if "image_sizes" in values:
        sizes = values["image_sizes"][row : row + 1]
        return {**picked, "image_sizes": sizes, "pixel_values": pixels[row : row + 1]}, (3, *sizes[0].tolist())
    last = pixels[-1:, :1] if pixels.ndim == 5 else pixels[-1:]
    return {**picked, "pixel_values": last}, None


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_info_and_counter_agree_exactly(name, kernel):
    model, values = build(name, kernel), inputs(name)
    base = _counted(model, values)
    for setting in _settings(name):
        vtok.patch(model, setting)
        counted, own = _counted(model, values)
        (found,) = vtok.info(model).prompts
        assert found.estimate.macs == counted
        assert found.estimate.base_macs == base[0]
        assert found.estimate.reduction_macs == own
        assert counted < base[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_plan_counter_and_info_agree_exactly_on_a_prompt_without_padding(name):
    model = build(name, EXAMPLES[name].kernels[-1])
    values, size = _one(name)
    (vlm,) = find(model)
    text = int((values["input_ids"] < 118).sum())
    prompt = {"images": 1, "text_tokens": text, "input_size": size}
    base = _counted(model, values)[0]
    for setting in _settings(name)[:1]:
        plan = vtok.plan(model, setting, prompt=prompt)
        assert plan.estimate.base_macs == base
        vtok.patch(model, setting)
        counted, own = _counted(model, values)
        (found,) = vtok.info(model).prompts
        assert (plan.estimate.macs, plan.estimate.reduction_macs) == (counted, own)
        assert plan.estimate.layers == found.estimate.layers
        assert plan.estimate.vision == found.estimate.vision
        assert plan.estimate.exact and found.mean_estimate is None
        visual = values["input_ids"].shape[1] - text
        assert stated_image(vlm, size).tokens == visual
        assert plan.tokens == (text + found.rows[0].tokens_out[0],) * vlm.info.depth


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "LLaVA-NeXT", "Gemma3"])
def test_methods_in_the_tower(name):
    """Tower and connector as reduced; where the prompt keeps its length, so do the layers."""
    model, values = build(name), inputs(name)
    base = _counted(model, values)
    inside = [vtok.ToMe(r=3), [vtok.PiToMe(ratio=0.8), vtok.UniformGrid(keep=0.5)]]
    if name == "LLaVA-1.5":
        inside.append(vtok.ATS(keep=0.5, layers=[0, 1]))
    for setting in inside:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vtok.patch(model, setting)
        counted, own = _counted(model, values)
        (found,) = vtok.info(model).prompts
        if isinstance(setting, vtok.ATS):  # layers that look at one token at a time are shown no padding
            assert counted < found.estimate.macs <= 1.01 * counted
        else:
            assert found.estimate.macs == pytest.approx(counted, rel=1e-12)
        assert found.estimate.base_macs == base[0]
        assert found.estimate.reduction_macs == pytest.approx(own, rel=1e-12)
        assert counted < base[0]
        assert found.estimate.vision.macs < found.estimate.base_vision.macs
        grid = name in ("LLaVA-NeXT", "Gemma3")
        assert (found.estimate.vision.connector_macs < found.estimate.base_vision.connector_macs) != grid
        if grid and not isinstance(setting, list):
            assert found.estimate.llm_macs == found.estimate.base_llm_macs
    values, size = _one(name)
    prompt = {"images": 1, "text_tokens": int((values["input_ids"] < 118).sum()), "input_size": size}
    for setting in inside[:2]:
        plan = vtok.plan(model, setting, prompt=prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vtok.patch(model, setting)
        counted, own = _counted(model, values)
        assert plan.estimate.macs == pytest.approx(counted, rel=1e-12)
        assert plan.estimate.reduction_macs == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_bytes_of_the_cache_and_cost_of_the_first_answer_token(name, kernel):
    model, values = build(name, kernel), inputs(name)
    rows, length = values["input_ids"].shape
    seen = []
    for setting in [None, *_settings(name)]:
        if setting is not None:
            vtok.patch(model, setting)
        with torch.no_grad():
            cache = model(**values, use_cache=True).past_key_values
        later = {
            "input_ids": torch.full((rows, 1), 7),
            "attention_mask": torch.cat([values["attention_mask"], torch.ones(rows, 1, dtype=torch.long)], 1),
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in values or "image_grid_thw" in values:
            later["position_ids"] = torch.full((3, rows, 1), length)
        held = _cache_bytes(cache)
        seen.append((held / rows, _counted(model, later)[0]))
        if setting is not None:
            estimate = vtok.info(model).prompts[0].estimate
            assert estimate.kv_bytes == seen[-1][0]
            assert estimate.base_kv_bytes == seen[0][0]
            assert estimate.decode_macs == seen[-1][1]
            assert estimate.base_decode_macs == seen[0][1]
            assert estimate.dtype == "float32"
    assert seen[1][0] < seen[0][0] or "window" in name


def test_rows_that_are_padded_cost_more_than_alone():
    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    generate(model, values, steps=2)  # generate() encodes the images ahead of the model
    (found,) = vtok.info(model).prompts
    e, mean = found.estimate, found.mean_estimate
    assert e.vision.views == 1.5 and mean.vision == e.vision
    alone = []
    for row in range(2):
        real = values["attention_mask"][row].bool()
        images = values["pixel_values"][:2] if row == 0 else values["pixel_values"][2:]
        vtok.patch(model, "uniform", keep=0.5)
        with torch.no_grad():
            model(input_ids=values["input_ids"][row : row + 1, real], pixel_values=images)
        alone.append(vtok.info(model).prompts[0].estimate)
    assert mean.llm_macs == sum(a.llm_macs for a in alone) / 2 < e.llm_macs
    assert mean.base_llm_macs == sum(a.base_llm_macs for a in alone) / 2 < e.base_llm_macs
    assert mean.kv_bytes == sum(a.kv_bytes for a in alone) / 2 < e.kv_bytes
    text = str(found)
    assert "tower, 1.5 views" in text and "decoder layers 0 to 3, each" in text
    assert "by each prompt's own tokens" in text and "KV cache of the prompt, float32: MB" in text


def test_layers_are_listed_with_their_own_tokens():
    model = vtok.patch(build("LLaVA-1.5"), [vtok.UniformGrid(keep=0.5), Columns(((3, 0),))])
    values, _ = _one("LLaVA-1.5")
    text = values["input_ids"].shape[1] - 16
    with torch.no_grad():
        model(**values)
    (found,) = vtok.info(model).prompts
    assert [row.visual for row in found.estimate.layers] == [8, 8, 8, 0]
    assert [row.tokens for row in found.estimate.layers] == [text + 8] * 3 + [text]
    assert "decoder layers 0 to 2, each" in str(found) and "decoder layer 3 " in str(found)


def test_what_depends_on_the_prompt_is_called_an_upper_bound():
    model = build("LLaVA-1.5")
    plan = vtok.plan(model, Attended(layer=2, count=5), prompt={"images": 2, "text_tokens": 9})
    assert not plan.estimate.exact
    assert plan.tokens == (41, 41, 41, 41)
    assert "upper bounds" in str(plan)
    assert "upper bounds" not in str(vtok.plan(model, "random", keep=0.5))


def test_a_plan_states_the_prompt_it_is_for():
    model = build("LLaVA-NeXT")
    plan = vtok.plan(model, "uniform", keep=0.5)
    assert (plan.prompt.images, plan.prompt.text_tokens, plan.image.size) == (1, 64, (3, 32, 32))
    assert "1 image of 3 x 32 x 32" in str(plan) and "vtok's default" in str(plan)
    own = vtok.plan(model, "uniform", keep=0.5, prompt=vtok.Prompt(images=2, text_tokens=5), input_size=(3, 16, 32))
    assert "2 images of 3 x 16 x 32" in str(own) and "vtok's default" not in str(own)
    assert own.tokens[0] == 2 * 26 + 5


def test_prompts_that_make_no_sense():
    model = build("LLaVA-1.5")
    with pytest.raises(vtok.ConfigError, match="images of a prompt is a whole number"):
        vtok.plan(model, "random", prompt={"images": 0})
    with pytest.raises(vtok.ConfigError, match="text_tokens of a prompt"):
        vtok.plan(model, "random", prompt={"text_tokens": 1.5})
    with pytest.raises(vtok.UnknownNameError, match="field of a prompt"):
        vtok.plan(model, "random", prompt={"pictures": 1})
    with pytest.raises(vtok.ConfigError, match="prompt is"):
        vtok.plan(model, "random", prompt=3)
    with pytest.raises(vtok.ConfigError, match="input_size is \\(channels, height, width\\)"):
        vtok.plan(model, "random", input_size=(3, 16))
    with pytest.raises(vtok.ConfigError, match="reads images of 16 x 16 pixels"):
        vtok.plan(model, "random", input_size=(3, 32, 32))
    with pytest.raises(vtok.ConfigError, match="prompt is for vision-language models"):
        vtok.plan(model.model.vision_tower, "tome", prompt={})
    with pytest.raises(vtok.ConfigError, match="calibration takes inputs as the processor returns them"):
        vtok.plan(model, "random", calibration=torch.zeros(1, 3, 16, 16))


def test_images_encoded_earlier_are_said_to_be_missing_from_the_costs():
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    with torch.no_grad():
        outputs = {"image": model.get_image_features(values["pixel_values"], return_dict=True)}
        vtok.patch(model, "uniform", keep=0.5)
        model(input_ids=values["input_ids"], attention_mask=values["attention_mask"], mm_encoder_outputs=outputs)
    (found,) = vtok.info(model).prompts
    assert found.estimate.vision is None
    assert "tower and connector are not in these costs" in str(found) and "prefill alone" in str(found)


def test_a_tower_without_closed_form_is_refused_by_plan_and_noted_by_info():
    model = build("LLaVA-1.5")

    (vlm,) = find(model)
    pruner = resolve(vlm, (vtok.UniformGrid(keep=0.5),), "original")
    model.model.vision_tower = torch.nn.Identity()
    with pytest.raises(vtok.UnsupportedModelError, match=r"Identity.*is not known in closed form"):
        planned(model, vlm, pruner, vtok.Prompt())


def test_counting_leaves_nothing_behind():
    model, values = vtok.patch(build("LLaVA-1.5"), [vtok.UniformGrid(keep=0.5), Attended()]), inputs("LLaVA-1.5")
    from vtok.patches.hf_vlm.install import pruner_of

    (vlm,) = find(model)
    before = (pruner_of(vlm).features, dict(pruner_of(vlm).layers))
    counted = count_prompt_macs(model, values)
    assert (pruner_of(vlm).features, pruner_of(vlm).layers) == before
    assert set(counted.by_block) == {2} and counted.by_block[2] == counted.reduction > 0
    assert FEATURES not in counted.by_block


@pytest.mark.filterwarnings("ignore:.*put back on the")
@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "Gemma3", "LLaVA-NeXT"])
def test_what_the_tower_merges_is_accounted_for_apart(name):
    model = build(name)
    values, size = _one(name)
    text = int((values["input_ids"] < 118).sum())
    base = _counted(model, values)[0]
    methods = [vtok.ToMe(r=2), vtok.UniformGrid(keep=0.5)]
    plan = vtok.plan(model, methods, prompt={"text_tokens": text, "input_size": size}).estimate
    vtok.patch(model, methods)
    counted = count_prompt_macs(model, values)
    seen = vtok.info(model).prompts[0].estimate
    assert plan == seen
    assert (seen.base_macs, seen.macs, seen.reduction_macs) == (base, counted.model, counted.reduction)
    assert seen.vision.macs < seen.base_vision.macs and seen.vision.reduction_macs == counted.reduction > 0
    shorter = name in ("LLaVA-1.5", "PaliGemma")  # elsewhere merged tokens are put back on the grid
    assert (seen.vision.connector_macs < seen.base_vision.connector_macs) == shorter
    assert "tower block 0 mid" in str(vtok.info(model).prompts[0])


DECIDING = [
    ("LLaVA-NeXT", vtok.METHODS.get("correlation")(alpha=0.3)),
    ("LLaVA-NeXT", vtok.METHODS.get("correlation")(alpha=0.3, aggregation="none", overview=True)),
    ("LLaVA-OneVision", vtok.METHODS.get("correlation")(alpha=0.3)),
    ("LLaVA-1.5", vtok.METHODS.get("todre")(keep=0.3, probe=None)),
    ("LLaVA-NeXT", vtok.METHODS.get("todre")(keep=0.3, probe=None)),
    ("Qwen2.5-VL", vtok.METHODS.get("todre")(keep=0.3, probe=None)),
]


@pytest.mark.parametrize(("name", "config"), DECIDING)
def test_what_deciding_costs_agrees_exactly_with_the_counter(name, config):
    model, values = vtok.patch(build(name), config), inputs(name)
    counted = count_prompt_macs(model, values)
    (found,) = vtok.info(model).prompts
    assert (found.estimate.macs, found.estimate.reduction_macs) == (counted.model, counted.reduction)
    assert counted.reduction > 0
    assert vtok.plan(model, config).estimate.exact == (found.configs[-1].name == "todre")


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_what_late_decisions_cost_for_prompts_without_padding(tau):
    model = build("LLaVA-1.5")
    values, _ = _one("LLaVA-1.5")
    config = vtok.METHODS.get("todre")(keep=0.5, tau=tau)
    text = int((values["input_ids"] < 118).sum())
    plan = vtok.plan(model, config, prompt={"text_tokens": text})
    vtok.patch(model, config)
    counted = count_prompt_macs(model, values)
    estimate = vtok.info(model).prompts[0].estimate
    assert estimate.macs == counted.model
    assert counted.reduction <= estimate.reduction_macs <= 1.2 * counted.reduction  # text in front of the image asks nothing
    assert plan.estimate.reduction_macs == estimate.reduction_macs
    assert estimate.macs <= plan.estimate.macs and "upper bounds" in str(plan)
    assert (estimate.layers[-1].visual == 0) == (tau == 1)


@pytest.mark.parametrize(("kept", "llm"), [(192, 2.54), (128, 3.39), (64, 5.10)])
def test_llava_7b_before_anything_runs(kept, llm):
    """Implied speed-ups of the LLM at the usual settings, 576 visual and 64 other tokens; CLIP-L/336 has 191 GMACs."""
    import transformers

    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    with torch.device("meta"):
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
        model = transformers.LlavaForConditionalGeneration(config).to(torch.float16)
    config = vtok.METHODS.get("todre")(keep_tokens=kept, probe=None)
    e = vtok.plan(model, config, prompt={"images": 1, "text_tokens": 64}).estimate
    assert round(e.base_llm_macs / e.llm_macs, 2) == llm
    assert round(e.base_vision.macs / 1e9) == 191
    assert e.kv_bytes == (kept + 64) * 32 * 2 * 4096 * 2 and e.dtype == "float16"
