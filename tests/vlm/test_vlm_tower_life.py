"""Methods inside the vision tower of a vision-language model: batches, bits, copies, files, training, and what is refused."""

import copy
import io
import warnings

import pytest
import torch
from helpers_errors import message_of
from helpers_towers import METHODS, TOKENWISE, deep, tower_of
from vlm_zoo import build, generate, inputs, visual

import vtok
from vtok.targets.resolve import run_of


@pytest.mark.parametrize("method", ["pitome", "ats"])
def test_a_batch_is_its_rows(method):
    values = inputs("LLaVA-1.5")
    model = vtok.patch(deep("LLaVA-1.5"), [METHODS[method], vtok.UniformGrid(keep=0.7)])
    both = generate(model, values)
    for row, images in enumerate((slice(0, 2), slice(2, 3))):
        real = values["attention_mask"][row] == 1
        one = {k: values[k][row, real][None] for k in ("input_ids", "attention_mask")}
        alone = generate(model, {**one, "pixel_values": values["pixel_values"][images]})
        assert torch.equal(alone[0][0], both[0][row])
        assert (alone[1][0] - both[1][row]).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [vtok.ToMe(r=0), vtok.PiToMe(ratio=1.0), vtok.ATS(keep=1.0)], ids=str)
def test_nothing_to_reduce(config):
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    before = generate(model, values)
    vtok.patch(model, config)
    assert vtok.info(model).patched
    if not isinstance(config, vtok.ATS):  # samples of a grid as fine as the tokens still leave duplicates out
        assert torch.equal(generate(model, values)[1], before[1])
    assert torch.equal(generate(vtok.unpatch(model), values)[1], before[1])


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "LLaVA-NeXT"])
def test_life(name, tmp_path):
    """Bits after unpatching, the patch before, copies, pickles, files, state_dicts."""
    warnings.filterwarnings("ignore", message=".*put back on the grid")
    model, values = build(name), inputs(name)
    plain, keys = generate(model, values), list(model.state_dict())
    model = build(name)
    methods = [vtok.PiToMe(ratio=0.8), vtok.UniformGrid(keep=0.7)]
    vtok.patch(model, methods)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    if name in TOKENWISE:  # transformers' own hooks on the other one cannot be pickled
        torch.save(model, buffer)
        buffer.seek(0)
    vtok.save_config(model, tmp_path)
    before = generate(model, values)
    assert not torch.equal(before[1], plain[1])
    copies = [copy.deepcopy(model), vtok.patch(build(name), tmp_path)]
    if name in TOKENWISE:
        copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert torch.equal(generate(other, values)[1], before[1])
        assert [c.name for c in vtok.info(other).prompts[0].configs] == ["pitome", "uniform"]
        assert torch.equal(generate(vtok.unpatch(other), values)[1], plain[1])
    with vtok.patched(model, "random", keep=0.3):
        assert run_of(model) is None
        assert not torch.equal(generate(model, values)[1], before[1])
    assert torch.equal(generate(model, values)[1], before[1])
    vtok.unpatch(model)
    assert torch.equal(generate(model, values)[1], plain[1])
    assert not any("_vtok" in m.__dict__ for m in model.modules())


def test_trace():
    """Which patches were merged, for pictures of it."""
    model, values = deep("LLaVA-1.5"), inputs("LLaVA-1.5")
    vtok.patch(model, "tome", r=3, trace=True)
    with torch.no_grad():
        model(**values)
        state = run_of(model).current.final
        numbers = torch.arange(5.0).expand(3, 5)[..., None]
        assert state.index.shape == (3, 5)
        assert torch.equal(vtok.unmerge(model, numbers)[..., 0].long(), state.group)
    assert "none of these methods acts: uniform" in message_of(vtok.ConfigError, vtok.patch, model, "uniform", trace=True)


def test_training():
    """Gradients reach the tower through what is left; logits and loss have the length of the prompt."""
    model, values = deep("LLaVA-1.5"), inputs("LLaVA-1.5")
    labels = values["input_ids"].masked_fill(visual(model, values["input_ids"]) | (values["attention_mask"] == 0), -100)
    vtok.patch(model.train(), METHODS["pitome"])
    loss = model(**values, labels=labels).loss
    loss.backward()
    grads = [p.grad for p in tower_of(model).encoder.layers[0].parameters()]
    assert loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


def test_values_that_make_no_sense():
    model = vtok.patch(deep("LLaVA-1.5", -2), "tome", r=2)
    for method, words in (
        ([vtok.ToMe(r=2), vtok.PiToMe(ratio=0.9)], "two methods reduce in block 0"),
        ([vtok.ToMe(r=2), vtok.ATS(layers=[3])], "patch it alone"),
        (vtok.ATS(layers=[3]), "from block 3 of the vision tower on, but LlavaModel takes what leaves block 2"),
        (vtok.ATS(layers=[9]), "layers names block 9"),
        (vtok.UniformGrid(layers=[9]), "layers names block 9"),
        ([vtok.ToMe(r=2), vtok.UniformGrid(layers=[1])], "two methods reduce in block 1"),
    ):
        assert words in message_of(vtok.VtokError, vtok.patch, model, method)
    assert vtok.info(model).towers[0].configs == (vtok.ToMe(r=2),), "the earlier patch is still there"
    assert "call vtok.unpatch" in message_of(vtok.ConfigError, vtok.prune_inputs, model, inputs("LLaVA-1.5"), "tome", r=1)


def test_features_that_cannot_lose_tokens():
    model = deep("LLaVA-1.5", [-2, -1])
    assert "from layers [-2, -1] of the vision tower side by side" in message_of(
        vtok.UnsupportedModelError, vtok.patch, model, "tome"
    )
    model = deep("LLaVA-1.5")
    model.model.vision_tower = build("PaliGemma").model.vision_tower
    assert "has no class token: once patches are merged" in message_of(vtok.UnsupportedModelError, vtok.patch, model, "tome")
    model, values = vtok.patch(deep("LLaVA-1.5"), "tome", r=2), inputs("LLaVA-1.5")
    assert "another vision_feature_layer" in message_of(vtok.StateError, generate, model, values, vision_feature_layer=-2)
    early = build("LLaVA-1.5").model.get_image_features(values["pixel_values"], return_dict=True)
    rest = {k: v for k, v in values.items() if k != "pixel_values"}
    text = message_of(vtok.StateError, generate, model, {**rest, "mm_encoder_outputs": {"image": early}})
    assert "was not encoded by the vision tower that vtok patched" in text


def test_supports():
    support = vtok.supports(build("LLaVA-1.5"))
    assert all(support.methods[name] is None for name in ("ats", "pitome", "tome", "zero_tprune"))
    assert "tome: yes, in the vision tower: the prompt gets shorter too" in str(support)
    assert "uniform: yes, on the prompt" in str(support)
    support = vtok.supports(build("PaliGemma"))
    assert support.on_request["ats"] == {"query": "mean"}
    support = vtok.supports(build("Gemma3"))
    assert "in the vision tower alone: merged tokens are put back on the grid" in str(support)
    assert "needs every patch" in support.methods["ats"]
    assert "one sequence" in vtok.supports(build("Qwen2-VL")).methods["fastervlm"]
