"""Correlation-guided compression inside vision-language models: against the definition on the unpatched tower's own attention,
against masking, and image by image."""

import copy

import numpy as np
import pytest
import torch
from helpers_correlation import (
    ALPHA,
    BETA,
    CROPPING,
    Tower,
    chosen,
    columns,
    cropping,
    expected,
    members_of,
    pages,
    setting_of,
    whole_pages,
)
from vlm_zoo import MaskOracle, assert_same, generate

import vtok
from vtok.patches.hf_vlm import image_features as hf


@pytest.mark.parametrize("aggregation", ["nearest", "none"])
@pytest.mark.parametrize("name", CROPPING)
def test_by_the_definition(name, aggregation):
    """Rows that stay, and what they hold, from the unpatched tower's own attention; the whole page bit for bit."""
    values = pages(name)
    stays, features = expected(name, values, ALPHA[name], BETA, aggregation)
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
    stays, features = expected(name, values, ALPHA[name], BETA)
    reference = cropping(name, kernel)
    outputs = hf.encode(reference.model, values)
    images = [x.to(y) for x, y in zip(features, outputs["image"].pooler_output)]
    parted = isinstance(outputs["image"].pooler_output, (list, tuple))
    outputs["image"].pooler_output = images if parted else torch.stack(images)
    encoded = {k: v for k, v in values.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad(), MaskOracle(reference, dict.fromkeys(range(4), columns(values, stays))):
        oracle = generate(reference, {**encoded, "mm_encoder_outputs": copy.copy(outputs)})
    model = vtok.patch(cropping(name, kernel), "correlation", **setting_of(name))
    found = generate(model, values)
    assert_same(found, oracle)
    (row,) = vtok.info(model).prompts[0].rows
    dropped = (~columns(values, stays)).sum(1).tolist()
    assert [a - b for a, b in zip(row.tokens_in, row.tokens_out)] == dropped
    assert dropped[0] != dropped[1], "unequal counts"
    vtok.unpatch(model)
    short = vtok.prune_inputs(model, values, "correlation", **setting_of(name))
    assert_same(generate(model, short), oracle)
    assert not torch.equal(generate(model, values, steps=1)[1], found[1][:, :1])


@pytest.mark.parametrize("name", CROPPING)
def test_one_by_one(name):
    """What is kept of a page depends on that page alone: neither on the batch nor on padding, draws included."""
    values = pages(name)
    setting = {"sampling": "multinomial", "seed": 3}
    stays, features, _ = chosen(name, values, **setting)
    images = 0
    for row in range(2):
        real = values["attention_mask"][row] == 1
        one = {
            "input_ids": values["input_ids"][row : row + 1, real],
            "attention_mask": values["attention_mask"][row : row + 1, real],
        }
        pixels = [slice(0, 4), slice(4, 9)][row] if name == "InternVL" else slice(row, row + 1)
        one |= {key: values[key][pixels] for key in values if key not in one}
        alone, changed, _ = chosen(name, one, **setting)
        for a, x in zip(alone, changed):
            assert a.tolist() == stays[images].tolist()
            assert (x[a] - features[images][a]).abs().max() <= 1e-5
            images += 1
    assert images == len(stays)


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_seeds(name):
    values = pages(name)
    runs = [torch.cat(chosen(name, values, sampling="multinomial", seed=seed)[0]).tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert sum(runs[0]) != len(runs[0])
    top = [torch.cat(chosen(name, values, seed=seed)[0]).tolist() for seed in (1, 2)]
    assert top[0] == top[1], "topk draws nothing"


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_thresholds_at_their_ends(name):
    """alpha=1 finds nothing redundant, padding apart; at -1 everything is, and outliers alone stay, or one token."""
    values = pages(name)
    stays, features, whole = chosen(name, values, alpha=1.0)
    tower, view = Tower(name, values), 0
    for image, cut in enumerate(whole_pages(name)):
        for number in range(len(cut)):
            members, rows = members_of(name, tower, image, view, number, values)
            assert stays[image][rows].tolist() == [bool(patches) for patches in members]
            view += 1
    assert all(torch.equal(a[s], b[s]) for a, b, s in zip(features, whole, stays))
    least = chosen(name, values, alpha=-1.0, beta=0)[0]
    assert [s.tolist() for s in least] == [s.tolist() for s in expected(name, values, -1.0, 0)[0]]
    assert sum(int(s.sum()) for s in least) < 0.7 * sum(len(s) for s in least)
    more = chosen(name, values, alpha=-1.0, beta=0, min_tokens=5)[0]
    assert all(bool((m | ~s).all()) for m, s in zip(more, least))
    assert sum(int(s.sum()) for s in least) < sum(int(m.sum()) for m in more)


def test_lines_without_tokens_lose_their_newline():
    stays, _, whole = chosen("LLaVA-NeXT", pages("LLaVA-NeXT"), alpha=-1.0, beta=0, iqr_factor=1e6, aggregation="none")
    newline = cropping("LLaVA-NeXT").model.image_newline
    for mask, x in zip(stays, whole):
        ends = (x == newline).all(-1).nonzero()[:, 0].tolist()
        starts = [16, *(end + 1 for end in ends[:-1])]
        assert [bool(mask[end]) for end in ends] == [bool(mask[a:b].any()) for a, b in zip(starts, ends)]
        assert not all(bool(mask[end]) for end in ends)


def test_crops_that_llava_onevision_shrinks():
    """Four crops of which the model shows one view's worth: scores shrink as the features do, by the model's own function."""
    name, values = "LLaVA-OneVision", pages("LLaVA-OneVision")
    model = cropping(name)
    for config in (model.config, model.model.config):
        config.vision_aspect_ratio = "anyres_max_1"
    sizes, tower = values["image_sizes"], Tower(name, values)
    found, _, whole = chosen(name, values, model, aggregation="none")
    views = 0
    for image, count in enumerate((3, 5)):
        here = range(views, views + count)
        channels = torch.zeros(count, 16, 3)
        for v, view in enumerate(here):
            real = _shown(model, sizes[image], count)[v]
            keys = tower.keys[view] / tower.keys[view].norm(dim=-1, keepdim=True)
            for i in real:
                close = sorted((float(keys[i] @ keys[j]) for j in real if j != i), reverse=True)
                channels[v, i, 0] = close[BETA] if len(close) > BETA else -1
            channels[v, [i for i in range(16) if i not in real], 0] = -1
            channels[v, :, 1], channels[v, :, 2] = (torch.tensor(tower.received(p, view)) for p in (tower.low, tower.deep))
        gap = torch.full((3,), torch.nan)
        packed = model.model.pack_image_features([channels], sizes[image : image + 1], gap, "anyres_max_1")[0][0]
        assert len(packed) == len(found[image]) == len(whole[image])
        lines = packed[16:].unflatten(0, (-1, int(packed[16:].isnan().any(-1).nonzero()[0, 0]) + 1))[:, :-1]
        mask = found[image][16:].unflatten(0, (len(lines), -1))[:, :-1]
        rows, columns = lines.shape[:2]
        high, wide, top, side = _cut(sizes[image], count)
        owner = torch.empty(rows, columns, dtype=torch.long)
        for r in range(rows):
            for c in range(columns):
                y, x = int((r + 0.5) * high / rows) + top, int((c + 0.5) * wide / columns) + side
                owner[r, c] = (y // 4) * (2 if count == 5 or sizes[image][1] > sizes[image][0] else 1) + x // 4
        for view in owner.unique():
            mine = owner == view
            critical, low, deep = lines[mine].unbind(-1)
            q1, q3 = np.percentile(deep.numpy(), [25, 75])
            keep = deep > q3 + 1.5 * (q3 - q1)
            order = low.argsort(descending=True, stable=True)[: int((critical <= ALPHA[name]).sum())]
            keep[order] = True
            if not keep.any():
                keep[low.argmax()] = True
            assert mask[mine].tolist() == keep.tolist()
        views += count
    assert not all(bool(m.all()) for m in found)


def _cut(size, count):
    """(lines and columns of patches that show the image, first line, first column) of the joined crops."""
    high, wide = (8, 8) if count == 5 else (4, 8) if size[1] > size[0] else (8, 4)
    h, w = (int(s) for s in size)
    if w / h > wide / high:
        edge = (high - int(round(h * wide / w, 7))) // 2
        return high - 2 * edge, wide, edge, 0
    edge = (wide - int(round(w * high / h, 7))) // 2
    return high, wide - 2 * edge, 0, edge


def _shown(model, size, count):
    """Patches of every view that are no padding."""
    high, wide, top, side = _cut(size, count)
    across = 2 if count == 5 or size[1] > size[0] else 1
    found = [list(range(16))]
    for crop in range(count - 1):
        r, c = 4 * (crop // across), 4 * (crop % across)
        cells = [(y, x) for y in range(4) for x in range(4)]
        found.append([4 * y + x for y, x in cells if top <= y + r < top + high and side <= x + c < side + wide])
    return found


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Idefics3"])
def test_neighbours_are_taken_in(name):
    """knn: every kept token of a crop plus its nearest neighbours, weighted by attention; the page untouched."""
    values, k = pages(name), 3
    stays, features, whole = chosen(name, values, aggregation="knn", k=k)
    tower, view = Tower(name, values), 0
    for image, cut in enumerate(whole_pages(name)):
        for number, (_, page) in enumerate(cut):
            members, rows = members_of(name, tower, image, view, number, values)
            if page:
                assert torch.equal(features[image][rows], whole[image][rows])
            else:
                weight = tower.received(tower.low, view)
                unit = tower.keys[view] / tower.keys[view].norm(dim=-1, keepdim=True)
                tokens = [t for t, patches in enumerate(members) if patches]
                metric = {t: unit[members[t]].sum(0) for t in tokens}
                cosine = lambda a, b: float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm()))  # noqa: B023, E731
                for t in (t for t in tokens if stays[image][rows[t]]):
                    near = sorted((s for s in tokens if s != t), key=lambda s: -cosine(t, s))[:k]
                    expect = whole[image][rows[t]].double()
                    for s in near:
                        expect = expect + float(weight[members[s]].sum()) * whole[image][rows[s]].double()
                    assert (features[image][rows[t]] - expect).abs().max() <= 1e-5
            view += 1
