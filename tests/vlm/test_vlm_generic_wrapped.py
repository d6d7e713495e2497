"""Attention of layers that others changed: offloaded by accelerate, wrapped, or with a forward of somebody else's."""

import functools
import types

import pytest
import torch
from helpers_errors import message_of
from helpers_generic import KEEP

import vtok
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.testing.generic_models import build
from vtok.testing.generic_prompts import inputs


def _read(name):
    """(patched model, its LLM's layers, a function that reads the prompt: logits, and which columns stay)."""
    model = build(name)
    values, (vlm,) = inputs(model), find(model)
    vtok.patch(model, "fastv", layer=vlm.info.judged_layers()[0], keep=KEEP)

    def read():
        with torch.no_grad():
            logits = model(**values, use_cache=False).logits
        return logits, pruner_of(find(model)[0]).last.stages[vlm.info.judged_layers()[0]].column

    return model, vlm.text.layers, read


@pytest.mark.parametrize("part", ["layer", "self_attn"])
@pytest.mark.parametrize("name", ["mistral3", "aya_vision", "qwen3_5"])
def test_weights_that_are_there_only_while_a_forward_runs(name, part):
    """Their projections lie on the meta device in between, where a product with them is whatever the memory held."""
    hooks = pytest.importorskip("accelerate.hooks")
    _, layers, read = _read(name)
    expected, stays = read()
    for layer in layers:
        module = layer if part == "layer" else getattr(layer, part, None)
        if module is not None:
            weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
            cpu = torch.device("cpu")
            hook = hooks.AlignDevicesHook(execution_device=cpu, offload=True, weights_map=weights, place_submodules=True)
            hooks.add_hook_to_module(module, hook)
    assert all(p.is_meta for layer in layers if hasattr(layer, "self_attn") for p in layer.self_attn.parameters())
    found, chosen = read()
    assert torch.equal(chosen, stays) and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4"])
def test_layers_that_are_wrapped(name):
    """Also where a layer is given things without a name (Gemma 4), which the wrapper does not name."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, layers, read = _read(name)
    expected, stays = read()
    vtok.unpatch(model)
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    (vlm,) = find(model)
    vtok.patch(model, "fastv", layer=vlm.info.judged_layers()[0], keep=KEEP)
    found, chosen = read()
    assert torch.equal(chosen, stays) and torch.equal(found, expected)


def test_arguments_that_a_wrapper_does_not_name_are_refused():
    class Wrapper(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.inner, self.self_attn = layer, layer.self_attn

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, layers, read = _read("gemma4")
    vtok.unpatch(model)
    for i, layer in enumerate(layers):
        layers[i] = Wrapper(layer)
    vtok.patch(model, "fastv", layer=2, keep=KEEP)
    assert "decoder layer 0 is a Wrapper" in message_of(vtok.UnsupportedModelError, read)


def test_a_forward_that_somebody_put_onto_attention():
    """It is run on the copy as well; one that does not say whose it is, is refused."""
    _, layers, read = _read("qwen3_5")
    expected, stays = read()
    attention = layers[1].self_attn
    own, calls = type(attention).forward, []

    def forward(self, hidden_states, **kwargs):
        calls.append(self is attention)
        return own(self, hidden_states * 0.5, **kwargs)

    attention.forward = types.MethodType(forward, attention)
    found, chosen = read()
    assert sorted(calls) == [False, True]
    assert not torch.equal(found, expected) and chosen.shape == stays.shape
    attention.forward = functools.partial(own, attention)
    assert "somebody replaced the forward of Qwen3_5Attention by partial" in message_of(vtok.UnsupportedModelError, read)
    del attention.forward
    assert torch.equal(read()[0], expected)
