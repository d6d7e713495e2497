"""ATP inside vision-language models: against an oracle that reads whole attention maps, in batches, copies and compositions."""

import copy
import io
import warnings

import pytest
import torch
from atp_vlm import GRID, decided, modules, prompts, saved
from helpers_errors import message_of
from vlm_zoo import MaskOracle, assert_same, build, generate, inputs, text_model

import vtok

NAMES = ["LLaVA-1.5", "LLaVA, Qwen3 text"]


def _counts(model):
    return [row.tokens_out for row in vtok.info(model).prompts[0].rows]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_against_whole_attention_maps(tmp_path, name, seed, kernel):
    values, made = prompts(3, seed), modules(seed)
    alive = decided(build(name, "eager"), values, made)
    plain, model = build(name, kernel), vtok.patch(build(name, kernel), "atp", weights=saved(tmp_path, seed))
    with MaskOracle(plain, alive):
        expected = generate(plain, values)
    assert_same(generate(model, values), expected)
    with torch.no_grad():
        model(**values)
    seen = values["input_ids"] == 119
    counts = [tuple((seen & alive[layer]).sum(1).tolist()) for layer in (1, 2, 3)]
    assert _counts(model) == [n for n, before in zip(counts, [(16,) * 3, *counts]) if n != before]
    assert any(len(set(count)) > 1 for count in counts), "prompts keep different numbers"


def test_a_batch_is_its_prompts(tmp_path):
    values, model = prompts(3, 5), vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path, 1))
    together = generate(model, values)
    for row in range(3):
        real = values["attention_mask"][row] == 1
        one = {"input_ids": values["input_ids"][row : row + 1, real], "pixel_values": values["pixel_values"][row : row + 1]}
        alone = generate(model, {**one, "attention_mask": torch.ones_like(one["input_ids"])})
        assert torch.equal(alone[0][0], together[0][row])
        assert (alone[1][0] - together[1][row]).abs().max() <= 1e-4


def test_prompts_without_an_image_pass(tmp_path):
    values = prompts(images=(1, 0), seed=2)
    model = vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path))
    mixed = generate(model, values)
    assert all(count[1] == 0 for count in _counts(model))
    text = {k: v[1:] for k, v in values.items() if k != "pixel_values"}
    real = text["attention_mask"][0] == 1
    plain = generate(build("LLaVA-1.5"), {k: v[:, real] for k, v in text.items()})
    assert torch.equal(mixed[0][1], plain[0][0])


@pytest.mark.parametrize("place", ["start", "end"])
def test_where_the_image_stands(tmp_path, place):
    """At the end no text asks: the cross score is 0 everywhere."""
    words = list(range(20, 29))
    ids = torch.tensor([[119] * 16 + words if place == "start" else words + [119] * 16])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompts(1)["pixel_values"]}
    alone = generate(vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path, 2)), values)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0)),
        "attention_mask": torch.nn.functional.pad(values["attention_mask"], (3, 0)),
    }
    again = generate(vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path, 2)), {**values, **padded})
    assert torch.equal(alone[0], again[0])


def test_after_other_pruning_tokens_keep_their_slots(tmp_path):
    """What was dropped before the LLM scores 0 in its own slot: the thresholds are those of the whole grid with holes."""
    values, made = prompts(2, 3), modules(1)
    model = vtok.patch(build("LLaVA-1.5"), [vtok.UniformGrid(keep=0.5), vtok.ATP(weights=saved(tmp_path, 1))])
    found = generate(model, values)
    assert _counts(model)[0] == (8, 8)
    seen, keeps = [], []

    class Watched(type(made)):
        def thresholds(self, layer, self_score, cross, slots):
            seen.append(slots.slot)
            return super().thresholds(layer, self_score, cross, slots)

    (hook,) = {h.pruner for m in model.modules() for h in m._forward_pre_hooks.values() if hasattr(h, "pruner")}
    for _, reducer in hook.layers.values():
        reducer.modules.__class__ = Watched
    with torch.no_grad():
        model(**values)
    order = torch.arange(16).view(4, 4)
    from vtok.methods.baselines.uniform_grid import dither_rank

    keeps = (dither_rank(order.flatten(), 4, 4).argsort()[:8]).sort().values
    assert seen[0][seen[0] >= 0].view(2, 8).tolist() == [keeps.tolist()] * 2
    assert all(set(s[0][s[0] >= 0].tolist()) <= set(keeps.tolist()) for s in seen)
    assert torch.isfinite(found[1]).all()


def test_modules_stay_outside_the_model(tmp_path):
    model, values = build("LLaVA-1.5"), prompts()
    names, path = list(model.state_dict()), saved(tmp_path)
    vtok.patch(model, "atp", weights=path)
    assert list(model.state_dict()) == names
    assert "atp(weights=" in str(vtok.info(model))
    before = generate(model, values)
    vtok.save_config(model, tmp_path)
    other = vtok.patch(build("LLaVA-1.5"), tmp_path)
    assert vtok.info(other).prompts[0].configs == (vtok.ATP(weights=path),)
    for again in (other, copy.deepcopy(model)):
        assert torch.equal(generate(again, values)[1], before[1])
    vtok.unpatch(model)
    assert torch.equal(generate(model, values)[1], generate(build("LLaVA-1.5"), values)[1])


def test_pickles(tmp_path):
    """Modules travel with a patched model; the file is no longer needed."""
    path, values = saved(tmp_path), prompts()
    model, buffer = vtok.patch(build("LLaVA-1.5"), "atp", weights=path), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    (tmp_path / "atp.safetensors").unlink()
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(generate(other, values)[1], generate(model, values)[1])


def test_low_precision_models(tmp_path):
    """Scores and thresholds are taken in fp32."""
    model, values = vtok.patch(build("LLaVA-1.5").bfloat16(), "atp", weights=saved(tmp_path)), prompts()
    with torch.no_grad():
        logits = model(**{**values, "pixel_values": values["pixel_values"].bfloat16()}).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path))(**values).logits.isfinite().all()


def test_fewer_layers(tmp_path):
    path, values = saved(tmp_path, 1), prompts()
    model = vtok.patch(build("LLaVA-1.5"), "atp", weights=path, layers=[2])
    with torch.no_grad():
        model(**values)
    assert [row.place for row in vtok.info(model).prompts[0].rows] == ["decoder layer 2"]


def test_at_least_one_token_stays(tmp_path):
    made = modules()
    with torch.no_grad():
        for head in made.heads.values():
            head.redundant.bias.fill_(50.0)
            head.spatial.bias.fill_(50.0)
    made.save(tmp_path / "strict.safetensors")
    path, values = str(tmp_path / "strict.safetensors"), prompts()
    for least in (1, 3, 0):
        model = vtok.patch(build("LLaVA-1.5"), "atp", weights=path, min_tokens=least)
        assert torch.isfinite(generate(model, values)[1]).all()
        assert _counts(model)[-1] == (least, least)


def test_a_model_in_training_mode(tmp_path):
    """Tokens leave all the same, the model gets the gradients of the short prompt, the modules get none."""
    values, path = prompts(2, 1), saved(tmp_path, 1)
    alive = decided(build("LLaVA-1.5", "eager"), values, modules(1))
    kept = alive[3] & (values["attention_mask"] == 1)
    gradients = []
    for patched in (False, True):
        model = build("LLaVA-1.5").train()
        if patched:
            vtok.patch(model, "atp", weights=path)
            model(**values).logits[kept].square().sum().backward()
        else:
            with MaskOracle(model, alive):
                model(**values).logits[kept].square().sum().backward()
        gradients.append(text_model(model).layers[0].self_attn.v_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())
    pruner = next(h.pruner for m in model.modules() for h in m._forward_pre_hooks.values() if hasattr(h, "pruner"))
    assert all(p.grad is None for _, reducer in pruner.layers.values() for p in reducer.modules.parameters())


# Refusals.


def test_without_modules():
    model = build("LLaVA-1.5")
    text = message_of(vtok.ConfigError, vtok.patch, model, "atp")
    assert "atp needs modules that were trained for this LlavaModel" in text
    assert "python -m vtok.eval.training.atp --model FOLDER" in text
    assert text == vtok.supports(model).methods["atp"]
    assert not vtok.info(model).patched


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"depth": 6}, "trained for a decoder of 6 decoder layers, this model has 4"),
        ({"width": 32}, "trained for a decoder of 32 hidden units, this model has 64"),
        ({"grid": (2, 8)}, "trained for 2 x 8 visual tokens, this model has 4 x 4"),
    ],
)
def test_modules_of_another_model(tmp_path, spec, words):
    text = message_of(vtok.ConfigError, vtok.patch, build("LLaVA-1.5"), "atp", weights=saved(tmp_path, **spec))
    assert words in text


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layers": [0, 1]}, "layers names decoder layer 0, but the modules in"),
        ({"layers": [1, 9]}, "were trained for the layers 1, 2, 3; choose among these"),
        ({"target_tokens": 9}, "were trained for 4; thresholds are learned"),
        ({"target_tokens": -1}, "target_tokens must be a number > 0, got -1"),
        ({"min_tokens": 1.5}, "min_tokens is a whole number >= 0, got 1.5"),
        ({"weights": 3}, "weights is the path of a safetensors file, got 3"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({"layers": 2}, "layers is a list of block numbers"),
    ],
)
def test_values_that_make_no_sense(tmp_path, params, words):
    path = saved(tmp_path, target_tokens=4)
    assert words in message_of(vtok.ConfigError, vtok.patch, build("LLaVA-1.5"), "atp", **{"weights": path, **params})
    assert vtok.patch(build("LLaVA-1.5"), vtok.ATP(weights=path, target_tokens=4)) is not None


@pytest.mark.parametrize("inputs_", ["grid", "means"])
def test_several_images_and_grids_that_depend_on_them(tmp_path, inputs_):
    path = saved(tmp_path, inputs=inputs_)
    model = vtok.patch(build("LLaVA-1.5"), "atp", weights=path)
    text = message_of(vtok.UnsupportedModelError, model, **inputs("LLaVA-1.5"))
    assert "atp needs one image of 16 visual tokens in a prompt, or none; found 32" in text
    for name in ("LLaVA-NeXT", "Qwen2.5-VL", "Idefics3"):
        text = message_of(vtok.UnsupportedModelError, vtok.patch, build(name), "atp", weights=path)
        assert "depend on the image (tiles or variable resolution)" in text


@pytest.mark.parametrize("name", ["InternVL", "Gemma3", "PaliGemma", "LLaVA, Mistral text, window 9"])
def test_other_families(tmp_path, name):
    """Each is used with modules of its own; here are their grids, and that they run."""
    from vtok.patches.hf_vlm.families import find

    model, values = build(name), inputs(name)
    assert find(model)[0].info.grid == GRID
    vtok.patch(model, "atp", weights=saved(tmp_path))
    one = {k: v[-1:] for k, v in values.items()}
    real = one["attention_mask"][0] == 1
    one = {k: v[:, real] if v.shape[:2] == one["attention_mask"].shape else v for k, v in one.items()}
    assert torch.isfinite(generate(model, one)[1]).all()
    assert vtok.info(model).prompts[0].rows[0].tokens_out[0] < 16


def test_means_serve_another_grid(tmp_path):
    path = saved(tmp_path, inputs="means", grid=(24, 24))
    model = vtok.patch(build("LLaVA-1.5"), "atp", weights=path)
    assert torch.isfinite(generate(model, prompts())[1]).all()
    assert vtok.info(model).prompts[0].rows


def test_no_encoder_method(tmp_path):
    tower = build("LLaVA-1.5").model.vision_tower
    text = message_of(vtok.UnsupportedModelError, vtok.patch, tower, "atp", weights=saved(tmp_path))
    assert "atp drops visual tokens from the prompts of vision-language models" in text
    with pytest.raises(vtok.UnsupportedModelError, match="inside the LLM, which needs hooks"), warnings.catch_warnings():
        vtok.prune_inputs(build("LLaVA-1.5"), prompts(), "atp", weights=saved(tmp_path))
