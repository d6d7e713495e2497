"""Patching and unpatching vision-language models: bits, copies, files, what is left behind."""

import copy
import io

import pytest
import torch
from vlm_zoo import EXAMPLES, Attended, Columns, build, generate, inputs, text_model

import vtok


def _build(name):
    return build(name, EXAMPLES[name].kernels[-1])


def _registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return [dict(table._global_mapping) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]


def _hooks(model):
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), type(m))
        for name, m in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_bits(name):
    """keep=1.0 changes no bit, nor does a patch that has gone; nothing is registered, no config is touched."""
    model, values = _build(name), inputs(name)
    before = generate(model, values, steps=3)  # transformers hooks some towers itself then
    hooks, tables, config = _hooks(model), _registered(), model.config.to_dict()
    vtok.patch(model, "uniform", keep=1.0)
    assert torch.equal(generate(model, values, steps=3)[1], before[1])
    vtok.patch(model, [vtok.RandomDrop(keep=0.5), Attended(layer=3)])
    changed = generate(model, values, steps=3)
    assert not torch.equal(changed[1], before[1])
    assert _registered() == tables
    assert model.config.to_dict() == config
    assert _hooks(vtok.unpatch(model)) == hooks
    assert torch.equal(generate(model, values, steps=3)[1], before[1])
    assert not any("_vtok" in m.__dict__ for m in model.modules())


def test_a_stage_that_drops_nothing_changes_no_bit():
    model, values = _build("LLaVA-1.5"), inputs("LLaVA-1.5")
    before = generate(model, values)
    vtok.patch(model, Columns(((0, 1), (2, 1))))
    assert torch.equal(generate(model, values)[1], before[1])
    assert "kept all its visual tokens" in str(vtok.info(model))


def test_patched_goes_back_to_the_earlier_patch():
    model, values = vtok.patch(_build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    before = generate(model, values)
    with vtok.patched(model, "random", keep=0.3):
        assert vtok.info(model).prompts[0].configs == (vtok.RandomDrop(keep=0.3),)
        assert not torch.equal(generate(model, values)[1], before[1])
    assert torch.equal(generate(model, values)[1], before[1])
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 7


def test_copies_and_pickles():
    model, values = vtok.patch(_build("LLaVA-1.5"), [vtok.UniformGrid(keep=0.5), Attended()]), inputs("LLaVA-1.5")
    buffer = io.BytesIO()
    torch.save(model, buffer)  # not after a pass: transformers' own hooks cannot be pickled
    buffer.seek(0)
    before = generate(model, values)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(generate(other, values)[1], before[1])
        vtok.unpatch(other)
        assert torch.equal(generate(other, values)[1], generate(_build("LLaVA-1.5"), values)[1])
    assert torch.equal(generate(model, values)[1], before[1])


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_saved_configs(tmp_path, positions):
    model, values = _build("LLaVA-1.5"), inputs("LLaVA-1.5")
    vtok.patch(model, "uniform", keep=0.4, positions=positions)
    vtok.save_config(model, tmp_path)
    other = vtok.patch(_build("LLaVA-1.5"), tmp_path)
    assert torch.equal(generate(other, values)[1], generate(model, values)[1])
    assert vtok.info(other).prompts[0].positions == positions


def test_state_dicts_and_wrapped_models():
    """Weights stay as they are; a model inside a module of the user's is found."""
    model = _build("LLaVA-1.5")
    names = list(model.state_dict())
    holder = torch.nn.ModuleDict({"inner": model})
    vtok.patch(holder, "uniform", keep=0.5)
    assert list(model.state_dict()) == names
    assert vtok.info(holder).prompts[0].path == "inner.model"
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    generate(model, inputs("LLaVA-1.5"))
    assert vtok.info(holder).prompts[0].rows[0].tokens_out == (16, 8)
    assert type(vtok.unpatch(holder)["inner"]).__mro__[0].__module__.startswith("transformers.")


def test_a_failed_call_leaves_nothing_behind():
    model, values = vtok.patch(_build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    before = generate(model, values)
    with pytest.raises(ValueError, match="do not match"):
        model(**{**values, "pixel_values": values["pixel_values"][:1]})
    with pytest.raises(vtok.ConfigError, match=r"attention_mask must be .* got shape \[2, 3, 3\]"):
        model(**{**values, "attention_mask": torch.ones(2, 3, 3)})
    assert torch.equal(generate(model, values)[1], before[1])


def test_supports_and_info():
    support = vtok.supports(_build("Qwen3-VL"))
    assert support
    assert support.methods["uniform"] is None
    assert "runs the patches of all images as one sequence" in support.methods["fastervlm"]
    assert "Qwen3VLTextDecoderLayer x4" in str(support)
    model = _build("Qwen3-VL")
    assert "not patched" in str(vtok.info(model))
    vtok.patch(model, "uniform", keep=0.5)
    assert "no prompt with images yet" in str(vtok.info(model))
    assert vtok.info(model, probe=inputs("Qwen3-VL")).prompts[0].rows[0].tokens_in == (24, 8)


@pytest.mark.parametrize(("name", "method"), [("LLaVA-1.5", "random"), ("LLaVA-1.5", "tome"), ("InternVL", "pitome")])
def test_parts_of_a_patched_model_are_not_patched_by_themselves(name, method):
    model, values = build(name), inputs(name)
    with torch.no_grad():
        reference = model(**values).logits
        reduced = vtok.patch(model, method, **({"keep": 0.5} if method == "random" else {"r": 2}))(**values).logits
        for part in (model.model.vision_tower, model.model.language_model):
            for call in (lambda part: vtok.patch(part, "tome", r=2), vtok.unpatch):
                with pytest.raises(vtok.VtokError, match=r"part of a vision-language model|holds nothing"):
                    call(part)
        assert torch.equal(model(**values).logits, reduced)
        vtok.unpatch(model)
        assert torch.equal(model(**values).logits, reference)
        vtok.patch(model.model.vision_tower, "tome", r=1)  # of a model that is not patched it may be
        vtok.unpatch(model)


def test_a_pass_that_failed_is_not_told_of():
    model, values = vtok.patch(build("LLaVA-1.5"), "random", keep=0.5), inputs("LLaVA-1.5")
    with torch.no_grad():
        model(**values)
        assert vtok.info(model).prompts[0].rows

        def fail(module, args):
            raise ZeroDivisionError

        handle = text_model(model).layers[2].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**values)
        found = vtok.info(model).prompts[0]
        assert not found.rows and found.estimate is None
        assert "no prompt with images yet" in str(found)
        handle.remove()
        model(**values)
        assert vtok.info(model).prompts[0].rows
