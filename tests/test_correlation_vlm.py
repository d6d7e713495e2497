"""Correlation-guided compression inside vision-language models: against the definition on the unpatched tower's own attention,
against masking, image by image, and what it refuses."""

import copy

import pytest
import torch
from helpers_correlation import CROPPING, cropping, expected, pages, whole_pages
from vlm_zoo import MaskOracle, assert_same, generate

import vtok
from vtok.patches import hf_features as hf
from vtok.patches.hf_vlm import find

ALPHA, BETA = 0.6, 2
SETTING = {"alpha": ALPHA, "beta": BETA, "sampling": "topk"}


def chosen(name, values, model=None, **setting):
    """(rows that stay, features) of every image, as the patched model's hooks get them."""
    model = cropping(name) if model is None else model
    (vlm,) = find(model)
    reducer = vtok.Correlation(**{**SETTING, **setting}).build_vlm(vlm.info)
    from vtok.patches.tower_taps import TowerTaps

    taps = TowerTaps(reducer.tower_blocks)
    with torch.no_grad(), taps.on(vlm.tower):
        outputs = hf.encode(vlm.module, values, taps)
        whole = list(outputs["image"].pooler_output)
        found = hf.choose(vlm.module, outputs, reducer, vlm.spec, values)
    lengths = [len(x) for x in whole]
    return list(found.rows["image"].split(lengths)), list(found.outputs["image"].pooler_output), whole


def columns(values, stays):
    alive = torch.ones_like(values["input_ids"], dtype=torch.bool)
    alive[values["input_ids"] == 119] = torch.cat(stays)
    return alive


@pytest.mark.parametrize("aggregation", ["nearest", "none"])
@pytest.mark.parametrize("name", CROPPING)
def test_by_the_definition(name, aggregation):
    """Rows that stay, and what they hold, from the unpatched tower's own attention; the whole page bit for bit."""
    values = pages(name)
    stays, features = expected(name, values, ALPHA, BETA, aggregation)
    found, changed, whole = chosen(name, values, aggregation=aggregation)
    shares = []
    for image, (a, b, x, y) in enumerate(zip(stays, found, features, changed)):
        assert a.tolist() == b.tolist(), (image, a.long().tolist(), b.long().tolist())
        assert (x[a] - y[b]).abs().max() <= 1e-5
        shares.append(a.float().mean().item())
    assert min(shares) < 0.9
    assert len({round(share, 3) for share in shares}) > 1, "images that keep different shares"
    for image, cut in enumerate(whole_pages(name)):
        for number in (number for number, (_, page) in enumerate(cut) if page):
            rows = slice(16 * number, 16 * (number + 1))
            assert bool(found[image][rows].all())
            assert torch.equal(changed[image][rows], whole[image][rows])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CROPPING)
def test_dropping_is_masking(name, kernel):
    """generate() equals the whole prompt with features folded by hand, under a mask; prune_inputs equals both."""
    values = pages(name)
    stays, features = expected(name, values, ALPHA, BETA)
    reference = cropping(name, kernel)
    outputs = hf.encode(reference.model, values)
    images = [x.to(y) for x, y in zip(features, outputs["image"].pooler_output)]
    parted = isinstance(outputs["image"].pooler_output, (list, tuple))
    outputs["image"].pooler_output = images if parted else torch.stack(images)
    encoded = {k: v for k, v in values.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad(), MaskOracle(reference, dict.fromkeys(range(4), columns(values, stays))):
        oracle = generate(reference, {**encoded, "mm_encoder_outputs": copy.copy(outputs)})
    model = vtok.patch(cropping(name, kernel), "correlation", **SETTING)
    found = generate(model, values)
    assert_same(found, oracle)
    (row,) = vtok.info(model).prompts[0].rows
    dropped = (~columns(values, stays)).sum(1).tolist()
    assert [a - b for a, b in zip(row.tokens_in, row.tokens_out)] == dropped
    assert dropped[0] != dropped[1], "unequal counts"
    vtok.unpatch(model)
    short = vtok.prune_inputs(model, values, "correlation", **SETTING)
    assert_same(generate(model, short), oracle)
    assert not torch.equal(generate(model, values, steps=1)[1], found[1][:, :1])
