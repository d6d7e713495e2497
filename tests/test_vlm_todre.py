"""ToDRE on vision-language models: loops from the paper's equations say what stays, the masked whole prompt what comes out."""

import copy
import math
import threading

import pytest
import torch
from vlm_zoo import (
    EXAMPLES,
    MaskOracle,
    assert_same,
    build,
    generate,
    inputs,
    text_model,
    tower_probs,
    visual,
)

import vtok
from vtok.eval.flops import count_prompt_macs
from vtok.methods import todre
from vtok.patches import hf_features as hf
from vtok.patches.hf_vlm import find
from vtok.resolve import run_of

KEEP = 0.3
MAIN = ["LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2.5-VL", "InternVL", "Idefics3", "Gemma3", "PaliGemma"]
EACH = [*MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES if name not in MAIN)]


def _kernel(name):
    return EXAMPLES[name].kernels[-1]


# What should stay, by loops.
def _first_token(name, x, maps, i, views):
    """Class attention where the tower has a class token, among the thumbnail's tokens; else the token nearest to the mean."""
    if name.startswith("LLaVA-NeXT") or (name.startswith("LLaVA") and "One" not in name):
        return int(maps[sum(views[:i])].argmax())  # the first view of an image; its 16 tokens come first
    if name == "InternVL":  # 8 x 8 patches, of which 2 x 2 become a token
        patches = maps[i].view(8, 8)
        sums = [patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum() for r in range(4) for c in range(4)]
        return int(torch.stack(sums).argmax())
    mean = x.mean(0)
    return int(torch.stack([(row - mean).square().sum() for row in x]).argmin())


def _diverse(x, first, count):
    """Algorithm 1, every step from scratch."""
    unit = x / x.norm(dim=1, keepdim=True)
    taken = [first]
    while len(taken) < count:
        sums = [math.inf if i in taken else float(sum(unit[i] @ unit[j] for j in taken)) for i in range(len(x))]
        taken.append(min(range(len(x)), key=sums.__getitem__))
    return taken


def _alive(name, values, keep=KEEP):
    """[B, L] bool: what stage 1 leaves of every image."""
    model = build(name, _kernel(name))
    (vlm,) = find(model)
    with torch.no_grad():
        outputs = hf.encode(vlm.module, values)
    probs = {} if vlm.tower is None or not vlm.info.tower.has_cls else tower_probs(name, values)
    stays = torch.ones_like(values["input_ids"], dtype=torch.bool)
    for modality, output in outputs.items():
        maps, views = None, []
        if modality in probs:
            maps = probs[modality][vlm.info.tower.feature_block][:, :, 0, 1:].mean(1)
            views = [len(maps) // len(output.pooler_output)] * len(output.pooler_output)
        rows = []
        for i, x in enumerate(output.pooler_output):
            row = torch.zeros(len(x), dtype=torch.bool)
            row[_diverse(x, _first_token(name, x, maps, i, views), max(1, round(keep * len(x))))] = True
            rows.append(row)
        stays[values["input_ids"] == vlm.tokens[modality]] = torch.cat(rows)
    return stays


def _ratios(name, values, alive, layer):
    """[B]: both ratios of eq. 8 in one layer of the whole prompt, from eager attention under the layer's own mask."""
    model, kept = build(name, "eager"), []
    seen, real = visual(model, values["input_ids"]), values["attention_mask"].bool()
    hook = text_model(model).layers[layer].self_attn.register_forward_hook(lambda m, a, out: kept.append(out[1]))
    with MaskOracle(model, dict.fromkeys(range(4), alive)):
        generate(model, values, steps=1)
    hook.remove()
    probs = kept[0].mean(1)  # [B, L, L]
    text = real & ~seen & (seen.cumsum(1) > 0)
    image = seen & alive & real
    found = []
    for b in range(len(probs)):
        sums = [probs[b][q][:, k].sum() / probs[b][q][:, alive[b] & real[b]].sum() for q, k in _pairs(text[b], image[b])]
        found.append([float(s) for s in sums])
    return found


def _pairs(text, image):
    return (text, image), (image, text)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_both_stages(name):
    """Stage 1 keeps what loops keep; stage 2 drops in front of layer 3 what its threshold says, prompt by prompt."""
    values, model = inputs(name), build(name, _kernel(name))
    alive = _alive(name, values)
    assert 0.2 < float((alive & visual(model, values["input_ids"])).sum() / visual(model, values["input_ids"]).sum()) < 0.4
    none = alive & ~visual(model, values["input_ids"])
    forth_and_back = _ratios(name, values, alive, 2)
    forth = [pair[0] for pair in forth_and_back]
    assert all(0 < x < 1 for x in forth)
    low, high = sorted(range(2), key=lambda b: max(forth_and_back[b]))
    between = (max(forth_and_back[low]) + max(forth_and_back[high])) / 2
    one = torch.where(torch.tensor([[b == low] for b in range(2)]), none, alive)
    for tau, last in ((0.0, alive), (1.0, none), (between, one)):
        with MaskOracle(build(name, _kernel(name)), {0: alive, 1: alive, 2: alive, 3: last}) as oracle:
            expected = generate(oracle.model, values)
        found = generate(vtok.patch(model, "todre", keep=KEEP, tau=tau), values)
        assert_same(found, expected)
        rows = vtok.info(model).prompts[0].rows
        kept = (alive & visual(model, values["input_ids"])).sum(1).tolist()
        assert list(rows[0].tokens_out) == kept
        if tau > 0:
            assert list(rows[1].tokens_out) == [0 if tau == 1 or b == low else kept[b] for b in range(2)]
        else:
            assert len(rows) == 1
    if name in ("LLaVA-1.5", "Qwen2.5-VL"):
        assert forth_and_back[1][1] == 0, "a causal LLM shows an image no text behind it"
    if name == "PaliGemma":
        assert forth_and_back[0][1] > 0, "here the image sees the question"


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("selector", ["max_sum", "k_center"])
def test_the_hook_free_form(name, selector):
    if "window" in name:
        pytest.skip("a short prompt cannot keep windows to the columns of the long one")
    values, model = inputs(name), build(name, _kernel(name))
    with pytest.warns(UserWarning, match="in front of decoder layer 3 as well needs hooks"):
        short = vtok.prune_inputs(model, values, "todre", keep=KEEP, selector=selector)
    assert torch.equal(
        short["input_ids"], vtok.prune_inputs(model, values, "todre", keep=KEEP, selector=selector, probe=None)["input_ids"]
    )
    expected = generate(vtok.patch(build(name, _kernel(name)), "todre", keep=KEEP, selector=selector, probe=None), values)
    assert_same(generate(model, short), expected)


@pytest.mark.parametrize("name", EACH)
def test_beams_and_caches(name):
    """Beams, a static cache and no cache at all come to what the masked prompt comes to."""
    values, params = inputs(name), {"keep": KEEP, "tau": 1.0}
    alive = _alive(name, values)
    none = alive & ~visual(build(name, _kernel(name)), values["input_ids"])
    layers = {0: alive, 1: alive, 2: alive, 3: none}

    def beams(model):
        copied = {key: copy.copy(value) for key, value in values.items()}
        return model.generate(**copied, max_new_tokens=5, num_beams=3, do_sample=False)

    with MaskOracle(build(name, _kernel(name)), layers) as oracle:
        expected, ranked = generate(oracle.model, values), beams(oracle.model)
    model = vtok.patch(build(name, _kernel(name)), "todre", **params)
    assert torch.equal(beams(model), ranked)
    if "sdpa" in EXAMPLES[name].kernels:  # transformers 5.24 fails on a static cache with eager windows, unpatched
        assert_same(generate(model, values, cache_implementation="static"), expected)
    assert_same(generate(model, values, use_cache=False), expected)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_no_cache_keeps_the_decision_of_the_first_pass(name, monkeypatch):
    """Later passes have more text, whose attention might decide otherwise."""
    values, asked = inputs(name), []
    original = todre.layer_relevance
    monkeypatch.setattr(todre, "layer_relevance", lambda *args: asked.append(1) or original(*args))
    tau = sum(max(pair) for pair in _ratios(name, values, _alive(name, values), 2)) / 2
    model = vtok.patch(build(name), "todre", keep=KEEP, tau=tau)
    expected = generate(model, values)
    assert len(asked) == 1
    assert_same(generate(model, values, use_cache=False), expected)
    assert len(asked) == 2


def _row(name, values, b):
    """One prompt of a batch by itself, without padding."""
    real = values["attention_mask"][b].bool()
    one = {
        k: v[b : b + 1, real]
        for k, v in values.items()
        if k in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    if name == "Qwen2.5-VL":
        sizes = values["image_grid_thw"].prod(1)
        images, patches = ((0, 2), (0, int(sizes[:2].sum()))) if b == 0 else ((2, 3), (int(sizes[:2].sum()), None))
        one["image_grid_thw"] = values["image_grid_thw"][slice(*images)]
        one["pixel_values"] = values["pixel_values"][slice(*patches)]
        return one
    shared = len(values["pixel_values"]) == 2  # one entry a prompt
    images = slice(b, b + 1) if shared else (slice(0, 2) if b == 0 else slice(2, 3))
    for key in ("pixel_values", "image_sizes"):
        if key in values:
            one[key] = values[key][images]
    return one


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "Idefics3", "Gemma3", "PaliGemma"])
def test_a_batch_is_its_rows(name):
    """Counts and decisions of a prompt do not depend on what it is batched with."""
    values = inputs(name)
    tau = sum(max(pair) for pair in _ratios(name, values, _alive(name, values), 2)) / 2
    model = vtok.patch(build(name), "todre", keep=KEEP, tau=tau)
    together = generate(model, values)
    rows = vtok.info(model).prompts[0].rows
    for b in range(2):
        alone = generate(model, _row(name, values, b))
        assert (alone[1][0] - together[1][b]).abs().max() <= 1e-5 * max(1.0, float(together[1].abs().max()))
        found = vtok.info(model).prompts[0].rows
        left = found[1].tokens_out if len(found) > 1 else found[0].tokens_out  # no row where the stage dropped nothing
        assert left == (rows[1].tokens_out[b],)


@pytest.mark.parametrize("name", EACH)
def test_bits(name):
    model, values = build(name, _kernel(name)), inputs(name)
    before = generate(model, values, steps=3)
    classes = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    vtok.patch(model, "todre", keep=1.0, probe=None)
    assert torch.equal(generate(model, values, steps=3)[1], before[1])
    vtok.patch(model, "todre", keep=KEEP, tau=1.0)
    assert not torch.equal(generate(model, values, steps=3)[1], before[1])
    vtok.unpatch(model)
    assert [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == classes
    assert torch.equal(generate(model, values, steps=3)[1], before[1])
    vtok.patch(model, "todre", keep_tokens=10_000, tau=0)
    assert torch.equal(generate(model, values, steps=3)[1], before[1])


def test_several_layers_of_which_the_first_that_passes_drops():
    """The paper's ablation: all later layers have no visual tokens; a layer whose ratio is too high drops nothing."""
    name, values = "LLaVA-1.5", inputs("LLaVA-1.5")
    alive = _alive(name, values)
    none = alive & ~visual(build(name), values["input_ids"])
    first, second = (torch.tensor(_ratios(name, values, alive, layer))[:, 0] for layer in (1, 2))
    tau = float(torch.cat([first, second]).sort().values[1:3].mean())
    early, late = first < tau, second < tau
    layers = {0: alive, 1: alive, 2: torch.where(early[:, None], none, alive)}
    layers[3] = torch.where((early | late)[:, None], none, alive)
    assert early.sum() + late.sum() == 2
    with MaskOracle(build(name), layers) as oracle:
        expected = generate(oracle.model, values)
    model = vtok.patch(build(name), "todre", keep=KEEP, tau=tau, probe=[1, 0.75])
    assert_same(generate(model, values), expected)
    whole = vtok.patch(model, "todre", keep=KEEP, tau=1.0, probe=[1.0])
    assert len(whole.model.language_model.layers[3]._forward_pre_hooks) == 1
    generate(model, values)
    assert len(vtok.info(model).prompts[0].rows) == 1, "behind the last layer there is nothing to drop"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "InternVL", "Qwen2.5-VL"])
def test_half_precision_chooses_like_fp32(name, dtype, monkeypatch):
    """On the features of a half-precision model the choice is the one of fp32 arithmetic; so it is under autocast."""
    values, seen = inputs(name), []
    original = todre.SELECTORS["max_sum"]

    def spied(tokens, count, pivot):
        order = original(tokens, count, pivot)
        seen.append((tokens, count, pivot, order))
        return order

    monkeypatch.setitem(todre.SELECTORS, "max_sum", spied)
    model = vtok.patch(build(name).to(dtype), "todre", keep=KEEP, tau=1.0)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    assert generate(model, half)[1].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(vtok.patch(build(name), "todre", keep=KEEP, tau=1.0), values)[1].isfinite().all()
    assert {entry[0].dtype for entry in seen} >= {dtype}
    for tokens, count, pivot, order in seen:
        assert torch.equal(order, original(tokens.float(), count, pivot))
        loops = [_diverse(x.float(), int(p), count) for x, p in zip(tokens, pivot)]
        assert [sorted(o.tolist()) for o in order] == [sorted(loop) for loop in loops]


def test_threads():
    model = vtok.patch(build("LLaVA-1.5"), "todre", keep=KEEP, tau=0.4)
    prompts = [inputs("LLaVA-1.5", seed) for seed in range(2)]
    prompts[1] = {k: v[1:] if k != "pixel_values" else v[2:] for k, v in prompts[1].items()}
    alone, found, counts = [generate(model, p) for p in prompts], [None, None], [None, None]

    def work(i):
        for _ in range(3):
            found[i] = generate(model, prompts[i])
        counts[i] = vtok.info(model).prompts[0].rows[0].tokens_in

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i][1], alone[i][1]) for i in range(2))
    assert counts == [(32, 16), (16,)]


@pytest.mark.parametrize(
    "config",
    [
        vtok.ToDRE(),
        vtok.ToDRE(keep_tokens=5, probe=[1, 0.75], tau=0.3, criterion="text_to_visual"),
        vtok.ToDRE(keep=0.5, selector="k_center", pivot="random", seed=3, probe=None),
        vtok.ToDRE(pivot=2, cls_layer=-1, single_head=True, probe=2),
    ],
)
def test_saved_configs(tmp_path, config):
    model, values = vtok.patch(build("LLaVA-1.5"), config), inputs("LLaVA-1.5")
    vtok.save_config(model, tmp_path / "run.json")
    other = vtok.patch(build("LLaVA-1.5"), tmp_path / "run.json")
    assert vtok.info(other).prompts[0].configs == (config,)
    assert torch.equal(generate(other, values)[1], generate(model, values)[1])
    assert "todre" in str(vtok.info(other))


# Odd prompts.
def test_a_prompt_without_an_image():
    model, plain = vtok.patch(build("LLaVA-1.5"), "todre", tau=1.0), build("LLaVA-1.5")
    text = {"input_ids": torch.tensor([[1, 6, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(generate(model, text)[1], generate(plain, text)[1])


def test_rows_with_and_without_images():
    """A row of text alone loses nothing in either stage."""
    values = inputs("LLaVA-1.5")
    ids = values["input_ids"].clone()
    ids[1] = torch.where(ids[1] == 119, 57, ids[1])
    values = {**values, "input_ids": ids, "pixel_values": values["pixel_values"][:2]}
    alive = _alive("LLaVA-1.5", values)
    none = alive & (ids != 119)
    with MaskOracle(build("LLaVA-1.5"), {0: alive, 1: alive, 2: alive, 3: none}) as oracle:
        expected = generate(oracle.model, values)
    model = vtok.patch(build("LLaVA-1.5"), "todre", keep=KEEP, tau=1.0)
    assert_same(generate(model, values), expected)
    assert [row.tokens_out for row in vtok.info(model).prompts[0].rows] == [(10, 0), (0, 0)]


def _image_at(before, behind):
    ids = torch.tensor([[*range(5, 5 + before), *[119] * 16, *range(30, 30 + behind)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs("LLaVA-1.5")["pixel_values"][:1]}


@pytest.mark.parametrize("before", [0, 4])
def test_where_the_image_stands(before):
    values = _image_at(before, 5)
    alive = _alive("LLaVA-1.5", values)
    none = alive & (values["input_ids"] != 119)
    with MaskOracle(build("LLaVA-1.5"), {0: alive, 1: alive, 2: alive, 3: none}) as oracle:
        expected = generate(oracle.model, values)
    assert_same(generate(vtok.patch(build("LLaVA-1.5"), "todre", keep=KEEP, tau=1.0), values), expected)


def test_an_image_at_the_end():
    """Behind all text there is nobody to ask, and nothing is dropped inside the LLM."""
    values, model = _image_at(9, 0), build("LLaVA-1.5")
    generate(vtok.patch(model, "todre", keep=KEEP, tau=1.0), values)
    assert [row.tokens_out for row in vtok.info(model).prompts[0].rows] == [(5,)]
    params = {"keep": KEEP, "probe": None, "positions": "compact"}
    short = vtok.prune_inputs(vtok.unpatch(model), values, "todre", **params)
    assert_same(generate(vtok.patch(model, "todre", **params), values), generate(build("LLaVA-1.5"), short))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_one_token_of_every_image_stays(name):
    model, values = vtok.patch(build(name, _kernel(name)), "todre", keep=1e-6), inputs(name)
    with torch.no_grad():
        model(**values)
    (vlm,) = find(model)
    with torch.no_grad():
        images = sum(len(out.pooler_output) for out in hf.encode(vlm.module, values).values())
    assert sum(vtok.info(model).prompts[0].rows[0].tokens_out) == images


# Behind a method inside the tower.
@pytest.mark.parametrize("method", [vtok.ToMe(r=[5, 0]), vtok.PiToMe(ratio=[0.6, 1.0]), vtok.ATS(keep=0.6, layers=[0])])
@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "InternVL"])
def test_class_attention_of_a_tower_that_merges(name, method, monkeypatch):
    """The pivot is chosen among the tokens that are left, each at its patch, by the attention that their block computed."""
    if method.name == "ats" and name != "LLaVA-1.5":
        pytest.skip("methods that drop are refused where the connector needs the grid")
    model, scores, maps = build(name, "eager"), [], []
    original = todre.class_scores
    monkeypatch.setattr(todre, "class_scores", lambda *args: scores.append((args[0], original(*args))) or scores[-1][1])
    vtok.patch(model, [method, vtok.ToDRE(keep=KEEP, probe=None)])
    (vlm,) = find(model)
    block = vlm.tower.blocks[vlm.info.tower.feature_block]
    hook = block.attention.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    with torch.no_grad():
        model(**inputs(name))
    hook.remove()
    state = run_of(vlm.tower.module).current.states[vlm.info.tower.feature_block]
    mean = maps[0][:, :, 0].mean(1)
    whole = torch.zeros(len(mean), state.length)
    for view in range(len(mean)):
        for row in range(mean.shape[1]):
            if state.keep is None or state.keep[view, row]:
                whole[view, state.index[view, row]] = mean[view, row]
    whole = whole[:, 1:]
    assert (whole == 0).any(), "nothing was merged"
    if name == "InternVL":
        whole = whole.view(-1, 4, 2, 4, 2).sum((2, 4)).flatten(1)
    if name == "LLaVA-NeXT":
        whole = whole[::3]
    for images, (found, start) in scores:
        assert start == 0
        for b in range(len(found)):
            wanted = [x if images.patches is None else x[images.patches[b]] for x in whole]
            assert any(x.shape == found[b].shape and (x - found[b]).abs().max() <= 1e-6 for x in wanted)
    assert sum(len(found) for _, (found, _) in scores) == len(whole)


def test_merging_in_the_tower_then_both_stages():
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    vtok.patch(model, [vtok.ToMe(r=[5, 0]), vtok.ToDRE(keep=0.5, tau=1.0)])
    together = generate(model, values)
    rows = vtok.info(model).prompts[0].rows
    assert [row.tokens_out for row in rows] == [
        (22, 11),
        (12, 6),
        (0, 0),
    ]  # 16 - 5 = 11 an image; half of them, rounded to even
    for b in range(2):
        alone = generate(model, _row("LLaVA-1.5", values, b))
        assert (alone[1][0] - together[1][b]).abs().max() <= 1e-5 * max(1.0, float(together[1].abs().max()))


# What is refused.
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"keep": 0}, vtok.ConfigError, ["keep is a fraction in (0, 1], got 0"]),
        ({"keep": 1.5}, vtok.ConfigError, ["got 1.5"]),
        ({"keep": 0.5, "keep_tokens": 3}, vtok.ConfigError, ["give keep or keep_tokens, not both"]),
        ({"keep_tokens": 0}, vtok.ConfigError, ["whole number >= 1, got 0"]),
        ({"keep_tokens": 2.5}, vtok.ConfigError, ["whole number >= 1, got 2.5"]),
        ({"tau": 1.5}, vtok.ConfigError, ["tau is a share of attention in [0, 1], got 1.5"]),
        ({"tau": "low"}, vtok.ConfigError, ["tau is a share"]),
        ({"probe": 4}, vtok.ConfigError, ["probe=4 names no layer of a decoder of 4"]),
        ({"probe": -5}, vtok.ConfigError, ["probe=-5"]),
        ({"probe": 0.1}, vtok.ConfigError, ["probe=0.1 names no layer"]),
        ({"probe": "late"}, vtok.ConfigError, ["shares of the depth such as 0.875", "late"]),
        ({"selector": "max_som"}, vtok.UnknownNameError, ["did you mean 'max_sum'?"]),
        ({"criterion": "bot"}, vtok.UnknownNameError, ["did you mean 'both'?"]),
        ({"pivot": "centre"}, vtok.UnknownNameError, ["did you mean 'center'?"]),
        ({"pivot": -1}, vtok.ConfigError, ["or a token number; got -1"]),
        ({"pivot": 0.5}, vtok.ConfigError, ["or a token number; got 0.5"]),
        ({"seed": 1.5}, vtok.ConfigError, ["seed is a whole number, got 1.5"]),
        ({"cls_layer": 2}, vtok.ConfigError, ["cls_layer=2 names no block", "which has 2"]),
        ({"single_head": 1}, vtok.ConfigError, ["single_head is True or False"]),
        ({"keeps": 0.5}, vtok.UnknownNameError, ["did you mean 'keep'?"]),
    ],
)
def test_values_that_make_no_sense(params, error, words):
    with pytest.raises(error) as caught:
        vtok.patch(build("LLaVA-1.5"), "todre", **params)
    assert all(word in str(caught.value) for word in words), caught.value


def test_class_attention_where_there_is_none():
    for name, words in (("Qwen2.5-VL", "runs the patches of all images as one"), ("PaliGemma", "it has no class token")):
        with pytest.raises(vtok.UnsupportedModelError, match=rf'{words}.*pass pivot="center"'):
            vtok.patch(build(name), "todre", pivot="cls")
        assert vtok.supports(build(name)).methods["todre"] is None
    model = vtok.patch(build("LLaVA-1.5"), "todre", pivot=16)
    with pytest.raises(vtok.ConfigError, match="pivot=16 is no token of an image of 16"):
        model(**inputs("LLaVA-1.5"))


def test_patches_that_cannot_be_told_among_the_tokens(monkeypatch):
    """Explicit class attention says so; the default then starts from the center."""
    monkeypatch.setattr(todre, "class_scores", lambda *args: None)
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    with pytest.raises(vtok.StateError, match=r"LlavaModel's vision tower saw cannot be told among the 16 visual tokens"):
        vtok.patch(model, "todre", pivot="cls")(**values)
    found = generate(vtok.patch(model, "todre"), values)
    assert torch.equal(found[1], generate(vtok.patch(model, "todre", pivot="center"), values)[1])


def test_models_without_a_prompt():
    with pytest.raises(
        vtok.UnsupportedModelError, match="todre drops visual tokens from the prompts of vision-language models"
    ):
        vtok.patch(build("LLaVA-1.5").model.vision_tower, "todre")


# What it costs.
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_the_cost_of_choosing_among_features(name):
    """As counted, tower block, class token and selection included."""
    model, values = build(name, _kernel(name)), inputs(name)
    vtok.patch(model, "todre", keep=KEEP, probe=None)
    counted = count_prompt_macs(model, values)
    estimate = vtok.info(model).prompts[0].estimate
    assert estimate.reduction_macs == counted.reduction > 0
    assert estimate.exact


def test_the_cost_of_both_stages_where_all_text_follows_one_image():
    model, values = build("LLaVA-1.5"), _image_at(0, 6)
    for tau in (0.1, 1.0):
        vtok.patch(model, "todre", keep=KEEP, tau=tau)
        counted = count_prompt_macs(model, values)
        assert vtok.info(model).prompts[0].estimate.reduction_macs == counted.reduction


def test_a_budget():
    model = build("LLaVA-1.5")
    for share in (0.8, 0.6):
        vtok.patch(model, "todre", flops=share, prompt={"images": 3, "text_tokens": 10})
        (found,) = vtok.info(model).prompts
        assert abs(found.budget.reached - share) <= 0.04
        assert found.configs[0].probe == 7 / 8
