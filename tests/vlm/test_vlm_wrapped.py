"""Models under other tools: hooks that rebuild outputs and move weights, sharded weights, continuous batching, pickles."""

import copy
import io
import logging

import pytest
import torch
from atp_vlm import modules, prompts
from helpers_towers import METHODS, TOKENWISE, deep
from vlm_zoo import Attended, Columns, assert_same, build, generate, inputs

import vtok
from vtok.methods.atp.reducer import SoftATP
from vtok.patches.decoder.soft_gates import softened
from vtok.patches.hf_vlm.encoded import note_of

READS = vtok.ToDRE(keep=0.4, pivot="cls", probe=None)
EACH = {
    "reads the tower": ("LLaVA-1.5", READS),
    "reads tiles of the tower": ("InternVL", READS),
    "merges in the tower": ("LLaVA-1.5", METHODS["tome"]),
    "drops in the tower": ("PaliGemma", METHODS["ats"]),
    "decides in the LLM": ("LLaVA-1.5", Attended()),
    "decides in an LLM with positions in space": ("Qwen2.5-VL", Attended()),
}


def _model(name):
    return deep(name) if name in TOKENWISE else build(name)


def _offloaded(model):
    """All weights are elsewhere, but for the time that a module's forward runs; whatever a model gets is rebuilt on the way."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(("name", "method"), EACH.values(), ids=list(EACH))
@pytest.mark.parametrize("cache", [True, False])
def test_hooks_of_accelerate(name, method, cache):
    """generate() encodes images ahead; the hooks rebuild what it passes on. The answer is the one without hooks."""
    values = inputs(name)
    expected = generate(vtok.patch(_model(name), method), values, steps=4)
    whole = generate(_model(name), values, steps=1)
    assert (whole[1][:, 0] - expected[1][:, 0]).abs().max() > 1e-3, "dropping changes nothing: the check would be empty"
    for first in (vtok.patch, lambda model, _: _offloaded(model)):
        model = _model(name)
        first(model, method)
        if first is vtok.patch:
            _offloaded(model)
        else:
            vtok.patch(model, method)
        assert_same(generate(model, values, steps=4, use_cache=cache), expected)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision", "InternVL"])
def test_weights_that_are_elsewhere(name):
    """A model's own parameters, such as the token at the ends of rows, are needed to encode images ahead of its forward."""
    values, method = inputs(name), [vtok.UniformGrid(keep=0.5), Columns(((2, 3),))]
    with torch.no_grad():
        expected = vtok.patch(build(name), method)(**values).logits
        model = vtok.patch(_offloaded(build(name)), method)
        assert torch.equal(model(**values).logits, expected)
        assert all(p.is_meta for p in model.parameters()), "they are elsewhere again"
    model = vtok.patch(_offloaded(build(name)), method)
    assert torch.equal(generate(model, values, 2)[1], generate(vtok.patch(build(name), method), values, 2)[1])


def _rebuilt(output):
    return type(output)(**output)


def _pickled(output):
    buffer = io.BytesIO()
    torch.save(output, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "rebuilt": _rebuilt,
    "rebuilt as accelerate does": lambda output: type(output)(dict(output)),
    "copied": copy.copy,
    "deep copied": copy.deepcopy,
    "pickled": _pickled,
    "moved": lambda output: torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, output),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize(("name", "method"), list(EACH.values())[:4], ids=list(EACH)[:4])
def test_encoded_images_that_others_take_apart(name, method, way):
    values, model = inputs(name), vtok.patch(_model(name), method)
    rest = {key: value for key, value in values.items() if key != "pixel_values"}
    with torch.no_grad():
        expected = model(**values).logits
        encoded = model.get_image_features(values["pixel_values"], return_dict=True)
        assert all(bool(x.isfinite().all()) for x in encoded.pooler_output)
        again = way(encoded)
        assert torch.equal(model(**rest, mm_encoder_outputs={"image": again}).logits, expected)
        assert "vtok" not in repr(again)


@pytest.mark.parametrize("way", list(WAYS.values())[:2], ids=list(WAYS)[:2])
def test_a_plan_lasts_where_there_is_no_cache(way):
    """A loop by hand that encodes once and reads again at every step: what was decided for the prompt holds for the answer."""
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Attended())
    expected = generate(model, values, steps=5)
    ids, mask, logits = values["input_ids"], values["attention_mask"], []
    with torch.no_grad():
        encoded = model.get_image_features(values["pixel_values"], return_dict=True)
        for _ in range(5):
            again = {"image": way(encoded)}
            out = model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=again, use_cache=False)
            logits.append(out.logits[:, -1])
            ids = torch.cat([ids, expected[0][:, len(logits) - 1 : len(logits)]], 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        other = {**values, "input_ids": values["input_ids"].roll(-1, 1)}
        mine = model(**{k: v for k, v in other.items() if k != "pixel_values"}, mm_encoder_outputs={"image": encoded})
        assert torch.equal(mine.logits, model(**other).logits), "another prompt with the same images decides for itself"
    assert (torch.stack(logits, 1) - expected[1]).abs().max() <= 1e-5


def test_a_plan_lasts_where_somebody_else_encoded_the_images():
    """Then it lies with the call of generate(), and ends with it."""
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    rest = {key: value for key, value in values.items() if key != "pixel_values"}
    with torch.no_grad():
        encoded = model.get_image_features(values["pixel_values"], return_dict=True)
    vtok.patch(model, Attended())
    expected = generate(model, values)
    hooked = vtok.patch(_offloaded(build("LLaVA-1.5")), Attended())
    for m in (model, hooked):
        assert_same(generate(m, {**rest, "mm_encoder_outputs": {"image": copy.copy(encoded)}}, use_cache=False), expected)
        pruner = next(hook.pruner for hook in m.model._forward_pre_hooks.values())
        assert not pruner.generates
    assert note_of(encoded) is None


@pytest.mark.parametrize(("name", "method"), EACH.values(), ids=list(EACH))
def test_outputs_go_through_pickle(name, method):
    """As large as an unpatched model's, of the model's own classes, with finite features."""

    def saved(model):
        with torch.no_grad():
            out = model(**inputs(name), use_cache=False)
        buffer = io.BytesIO()
        torch.save(out, buffer)
        images = getattr(out, "image_outputs", None)
        if images is not None:
            assert type(images).__module__.startswith("transformers.")
            assert all(bool(x.isfinite().all()) for x in images.pooler_output)
        assert torch.equal(copy.deepcopy(out).logits, out.logits)
        return buffer.getbuffer().nbytes

    assert saved(vtok.patch(build(name), method)) <= 1.1 * saved(build(name))


@pytest.fixture
def mesh():
    """A process group of one."""
    distributed = pytest.importorskip("torch.distributed")
    pytest.importorskip("torch.distributed.fsdp")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def _sharded(model, mesh):
    """Every block has its weights while its own forward runs, and not longer."""
    from torch.distributed.fsdp import fully_shard

    for block in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


SHARDED = [Attended(back=1), Attended(layer=3, back=2), Attended(back=0), READS, METHODS["tome"]]


@pytest.mark.parametrize("method", SHARDED, ids=str)
def test_weights_that_are_gathered_for_each_layer(method, mesh):
    values = inputs("LLaVA-1.5")
    with torch.no_grad():
        expected = vtok.patch(deep("LLaVA-1.5"), method)(**values, use_cache=False).logits
        for model in (
            _sharded(vtok.patch(deep("LLaVA-1.5"), method), mesh),
            vtok.patch(_sharded(deep("LLaVA-1.5"), mesh), method),
        ):
            assert (model(**values, use_cache=False).logits - expected).abs().max() <= 1e-6


def test_training_form_with_gathered_weights(mesh):
    """Each gate reads the attention of the layer in front of it."""
    values, made = prompts(2, 4), modules(4)
    expected, found = (_softened(model, values, made) for model in (build("LLaVA-1.5"), _sharded(build("LLaVA-1.5"), mesh)))
    assert (found - expected).abs().max() <= 1e-6


def _softened(model, values, made):
    with torch.no_grad(), softened(model, SoftATP(made, 10.0)):
        return model(**values, use_cache=False).logits


@pytest.mark.parametrize("method", [vtok.UniformGrid(keep=0.5), METHODS["tome"], Attended()], ids=str)
def test_continuous_batching(method):
    """It takes text alone: what an unpatched model answers."""
    from transformers import GenerationConfig

    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        pytest.skip("this release has no settings of continuous batching")

    def answers(model):
        settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
        prompts = [[1, 5, 6, 7], [1, 9]]
        found = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=small, warmup=False)
        return sorted((tuple(out.prompt_ids), tuple(out.generated_tokens), out.error) for out in found.values())

    logging.disable(logging.CRITICAL)
    try:
        expected = answers(build("LLaVA-1.5"))
        assert all(tokens and error is None for _, tokens, error in expected)
        assert answers(vtok.patch(build("LLaVA-1.5"), method)) == expected
    finally:
        logging.disable(logging.NOTSET)
