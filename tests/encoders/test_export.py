"""Patched models under torch.export: the batch stays free."""

import pytest
import torch
from zoo import SETTINGS, STATIC, attach, build, images

from vtok.registry import encoder_methods

QUICK = ("random", "zero_tprune")
SHORT = {"zero_tprune": {"layers": [0, 1], "retain": 0.8}, "ats": {"layers": [0, 1]}}  # the model is cut to two blocks


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in encoder_methods()])
def test_a_dynamic_batch(method):
    model, x = build("timm: ViT"), images("timm: ViT")
    del model.blocks[2:]
    attach("timm: ViT", model, method, **{**SETTINGS[method], **STATIC.get(method, {}), **SHORT.get(method, {})})
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for other in (x, x[:1], images("timm: ViT", batch=5)):
            assert (exported(other) - model(other)).abs().max() <= 1e-5
