"""Models whose linear layers were quantised, before or after vtok patched them: weights are packed, or no attribute at all."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLES, build, config_for, images

import vtok
from vtok.eval.benchmarks.flops import count_macs
from vtok.patches.attention import Tap

# Upstream reads `weight` itself in EVA, BEiT and SigLIP2, and cannot run these under quantisation.
NAMES = [
    name
    for name in (
        "timm: ViT",
        "timm: ViT map pool (SigLIP)",
        "timm: ViT parallel blocks",
        "timm: NaFlexViT",
        "open_clip: ViT custom blocks",
        "transformers: ViT",
        "transformers: DINOv2",
    )
    if name in EXAMPLES
]


class Packed(nn.Module):
    """A linear layer that holds two weights in every byte, as bitsandbytes writes four bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().max() / 7
        numbers = (linear.weight.detach() / self.scale).round().to(torch.int64).flatten() + 8
        self.weight = nn.Parameter((numbers[::2] * 16 + numbers[1::2]).to(torch.uint8)[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.stack([self.weight >> 4, self.weight & 15], -1).flatten().to(x.dtype) - 8
        return nn.functional.linear(x, (numbers * self.scale).view(self.out_features, -1), self.bias)


def packed(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Packed(child))
    return model


def dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantise", [dynamic, packed])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_models_cost_what_they_cost_and_run(name, quantise):
    x, reference = images(name), build(name)
    model = quantise(build(name))
    assert vtok.supports(model).methods == vtok.supports(reference).methods
    with torch.no_grad():
        plain = model(x)
        for method, knobs in (("tome", {"r": 4}), ("random", {"keep": 0.8}), ("ats", {"num_tokens": 24})):
            config = config_for(name, method, reference, **knobs)
            expected = vtok.plan(reference, config)
            assert vtok.plan(model, config).estimate == expected.estimate
            out = vtok.patch(model, config)(x)
            assert torch.isfinite(out).all() and not torch.equal(out, plain)
            assert torch.equal(vtok.unpatch(model)(x), plain)
            later = vtok.patch(build(name), config)
            looks = any(isinstance(h, Tap) for m in later.modules() if type(m) is nn.Linear for h in m._forward_hooks.values())
            later = quantise(later)
            if looks and quantise is packed:  # a method looks at what was replaced
                with pytest.raises(vtok.StateError, match="was replaced after vtok patched the model"):
                    later(x)
            else:
                assert torch.equal(later(x), out)
    assert count_macs(reference, x).model > 0


def test_supports_never_raises():
    from timm.models.vision_transformer import VisionTransformer

    class Odd(VisionTransformer):
        """Says that it is a tower, and fails when it is looked at."""

        def __init__(self):
            nn.Module.__init__(self)

        @property
        def blocks(self):
            raise RuntimeError("this layer was moved away")

    support = vtok.supports(Odd())
    assert not support
    assert "Odd could not be examined: " in support.reason
