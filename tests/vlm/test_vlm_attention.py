"""What a method reads of a decoder layer's attention is what that layer computes, whatever kernel runs."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vlm_zoo import EXAMPLES, Attended, AttendedReducer, Columns, build, generate, inputs, text_model

import vtok
from vtok.patches.decoder.attention_probe import why_not

ALL = [(name, kernel) for name, example in EXAMPLES.items() for kernel in example.kernels]


@dataclass(frozen=True)
class Watch(Attended):
    """Drops nothing; hands what it saw to a list."""

    seen: Any = None

    def build_vlm(self, info):
        return _Watcher(self.layer, self.count, self.back, self.seen)


@dataclass(frozen=True)
class _Watcher(AttendedReducer):
    seen: Any = None

    def keep(self, x, layout, attention, at):
        rows = torch.arange(x.shape[1]).expand(len(x), -1)
        probs = attention.probs(rows)
        self.seen.append((layout, probs, attention.mean_probs(layout.after_image)))


def _watch(name, kernel, layer, back, method=()):
    seen = []
    model = vtok.patch(build(name, kernel), [*method, Watch(layer=layer, back=back, seen=seen)])
    with torch.no_grad():
        model(**inputs(name))
    return seen[0]


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize(("name", "kernel"), ALL)
def test_probabilities_are_the_layers_own(name, kernel, back):
    layer = max(2, EXAMPLES[name].first_layer)
    layout, probs, mean = _watch(name, kernel, layer, back)
    model = build(name, "eager")
    with torch.no_grad():
        expected = model(**inputs(name), output_attentions=True).attentions[layer - back]
    real = layout.real[:, None, :, None].expand_as(probs)
    assert (probs - expected)[real].abs().max() <= 1e-5
    weight = layout.after_image.double()
    by_hand = (expected.mean(1).double() * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    assert (mean - by_hand).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA, Mistral text, window 9", "Qwen2.5-VL", "Gemma3, window 9"])
def test_after_earlier_reductions(name):
    """Columns that are gone get no attention: the rest is what masking them gives."""
    from vlm_zoo import MaskOracle, column_keeps

    method, values = Columns(((0, 2), (1, 3))), inputs(name)
    layout, probs, _ = _watch(name, "sdpa", 2, 0, [method])
    model = build(name, "eager")
    with MaskOracle(model, column_keeps(model, values, method.shares)), torch.no_grad():
        expected = model(**values, output_attentions=True).attentions[2]
    for b in range(2):
        real = layout.real[b]
        column = layout.column[b][real]
        assert (probs[b][:, real][:, :, real] - expected[b][:, column][:, :, column]).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_reading_changes_nothing(kernel):
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5", kernel)
    before = generate(model, values)[1]
    vtok.patch(model, Watch(layer=2, back=1, seen=[]))
    assert torch.equal(generate(model, values)[1], before)


def test_layers_that_cannot_be_read():
    layer = text_model(build("LLaVA-1.5")).layers[0]
    assert why_not(layer) is None
    del layer.self_attn.q_proj
    assert why_not(layer) == "LlamaAttention has no q_proj"
    model = build("LLaVA-1.5")
    text_model(model).layers[1].self_attn.sinks = torch.zeros(4)
    with pytest.raises(vtok.UnsupportedModelError, match="cannot be read: LlamaAttention has attention sinks"):
        vtok.patch(model, Attended())
    vtok.patch(model, Columns(((2, 3),)))
