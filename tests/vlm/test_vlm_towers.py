"""Methods inside the vision tower of a vision-language model, alone and with methods on the prompt (`helpers_towers`)."""

import copy
import functools

import pytest
import torch
from helpers_towers import METHODS, TOKENWISE, columns, deep, left_by, note_input, oracle, tower_of
from vlm_zoo import Columns, Nearest, assert_same, generate, inputs, text_model, visual

import vtok
from vtok.core.prompt import ImageFeatures, View
from vtok.patches.hf_vlm.families import find
from vtok.targets.resolve import run_of


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOKENWISE)
def test_equal_to_the_tower_by_itself(name, method):
    """Two rows, the second padded on the left, the first with two images; ATS keeps another number in each."""
    values, model, config = inputs(name), deep(name), METHODS[method]
    features, alive = left_by(model, values, config)
    assert 0 < alive.sum() < alive.numel()
    if method == "ats":
        assert len(set(alive.sum(1).tolist())) > 1, "the check would not be about ragged images"
    expected = oracle(model, values, features, alive)
    found = generate(vtok.patch(model, config), values)
    assert_same(found, expected)
    (prompt,) = vtok.info(model).prompts
    (row,) = prompt.rows
    assert row.place == "vision tower"
    gone = (~columns(model, values, alive)).sum(1).tolist()
    assert [a - b for a, b in zip(row.tokens_in, row.tokens_out)] == gone
    cache = found[2].past_key_values
    assert type(cache).get_seq_length(cache, 0) < values["input_ids"].shape[1] + 7 - min(gone) + 1, "the cache is shorter"


def with_class_tokens(values):
    """The same prompts with one more placeholder an image."""
    rows = [[t for t in row if t != 0] for row in values["input_ids"].tolist()]
    rows = [[u for i, t in enumerate(row) for u in ((t, 119) if t == 117 else (t,))] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    assert (ids == 119).sum() == 3 * 17
    return {**values, "input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [-2, -1, 2])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_layer_that_the_model_takes(layer, strategy, kernel):
    """LLaVA's own checkpoints take the last but one; with "full" the class token stands in the prompt too."""
    model, values = deep("LLaVA-1.5", layer, strategy), inputs("LLaVA-1.5")
    if strategy == "full":
        values = with_class_tokens(values)
    model.set_attn_implementation(kernel)
    features, alive = left_by(model, values, METHODS["tome"])
    states = {-2: 3, -1: 4, 2: 2}[layer]
    assert alive.shape[1] - alive.sum(1).max() == 3 * states
    expected = oracle(model, values, features, alive)
    assert_same(generate(vtok.patch(model, METHODS["tome"]), values), expected)


def _second(model, values, features, alive, keep):
    """[I, n] bool: what uniform pruning leaves of the tokens that are left."""
    (vlm,) = find(model)
    reducer = vtok.UniformGrid(keep=keep).build_vlm(vlm.info)
    after = torch.zeros_like(alive)
    for image in range(len(alive)):
        (patches,) = alive[image].nonzero(as_tuple=True)
        tokens = features[image][patches]
        plan = reducer.features(ImageFeatures(tokens[None], (View(0, 1, len(patches)),), patches=patches[None]))
        after[image, patches[plan.keep[0]]] = True
    return after


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["pitome", "ats"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_with_methods_on_the_prompt(name, method, order):
    """In the tower, before the LLM and between its layers; the order in the list does not matter."""
    values, model = inputs(name), deep(name)
    inside, layers = METHODS[method], Columns(((2, 2), (3, 0)))
    features, alive = left_by(model, values, inside)
    after = _second(model, values, features, alive, 0.5)
    assert (after.sum(1) < alive.sum(1)).all()
    before = columns(model, values, after)
    seen, column = visual(model, values["input_ids"]), torch.arange(values["input_ids"].shape[1])
    first = column.where(before & (values["attention_mask"] == 1), len(column)).amin(1, keepdim=True)
    middle = before & ((column + first) % 2 == 0) | before & ~seen  # as `Columns` counts
    keeps = {0: before, 1: before, 2: middle, 3: middle & ~seen}
    expected = oracle(model, values, features, keeps)
    vtok.patch(model, [inside, vtok.UniformGrid(keep=0.5), layers][::order])
    assert_same(generate(model, values), expected)
    rows = vtok.info(model).prompts[0].rows
    assert [row.place for row in rows] == ["vision tower", "before the LLM", "decoder layer 2", "decoder layer 3"]
    assert rows[1].tokens_in == rows[0].tokens_out
    assert rows[1].tokens_out == tuple((before & visual(model, values["input_ids"])).sum(1).tolist())
    assert set(rows[3].tokens_out) == {0}


@pytest.mark.parametrize("method", ["pitome", "ats"])
def test_folding_what_is_left(method):
    """A method that merges features does so among the tokens that the tower left."""
    values, model = inputs("LLaVA-1.5"), deep("LLaVA-1.5")
    features, alive = left_by(model, values, METHODS[method])
    after = torch.zeros_like(alive)
    for image in range(len(alive)):
        (patches,) = alive[image].nonzero(as_tuple=True)
        x = features[image, patches]
        for j in range(0, len(patches), 4):
            features[image, patches[j]], after[image, patches[j]] = x[j : j + 4].mean(0), True
    expected = oracle(model, values, features, after)
    assert_same(generate(vtok.patch(model, [Nearest(), METHODS[method]]), values), expected)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_pivot_of_todre(strategy):
    """The token that the class token looks at most among those that are left; alone if one stays."""
    model, values = deep("LLaVA-1.5", -1, strategy), inputs("LLaVA-1.5")
    values = with_class_tokens(values) if strategy == "full" else values
    inside, skip = vtok.ToMe(r=[3, 3, 0, 0]), int(strategy == "default")
    tower, entered = tower_of(model), []
    vtok.patch(tower, inside)
    handle = tower.encoder.layers[3].register_forward_pre_hook(functools.partial(note_input, entered))
    with torch.no_grad():
        tower(values["pixel_values"])
        state, block = run_of(tower).current.states[3], tower.encoder.layers[3]
        h = block.layer_norm1(entered[0])
        q, k = (p(h).unflatten(2, (2, -1)).transpose(1, 2) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
        logits = q[:, :, :1] @ k.transpose(2, 3) * block.self_attn.scale + state.size.log()[:, None, None]
        best = logits.softmax(-1)[:, :, 0, 1:].mean(1).argmax(1) + 1
    handle.remove()
    vtok.unpatch(tower)
    alive = torch.zeros(3, 17 - skip, dtype=torch.bool)
    alive[torch.arange(3), state.index[torch.arange(3), best] - skip] = True
    features, _ = left_by(model, values, inside)
    expected = oracle(model, values, features, alive)
    vtok.patch(model, [vtok.ToDRE(keep_tokens=1, pivot="cls", probe=None), inside])
    assert_same(generate(model, values), expected)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_every_baseline_takes_what_is_left(method):
    values, model = inputs("LLaVA-1.5"), deep("LLaVA-1.5")
    vtok.patch(model, [METHODS["ats"], vtok.METHODS.get(method)(keep=0.01)])
    generate(model, values, steps=2)
    assert vtok.info(model).prompts[0].rows[1].tokens_out == (2, 1), "one token of every image stays"


@pytest.mark.parametrize("method", ["tome", "ats"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_prune_inputs(name, method):
    """The same as the hooks; the model is left without any."""
    values, model = inputs(name), deep(name)
    for methods in (METHODS[method], [METHODS[method], vtok.UniformGrid(keep=0.5)]):
        short = vtok.prune_inputs(model, values, methods)
        assert short["input_ids"].shape[1] < values["input_ids"].shape[1]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in text_model(model).modules())
        assert run_of(model) is None
        found = generate(model, short)
        expected = generate(vtok.patch(copy.deepcopy(model), methods), values)
        assert_same(found, expected)
        assert all(bool(x.isfinite().all()) for x in short["mm_encoder_outputs"]["image"].pooler_output)


@pytest.mark.parametrize("name", TOKENWISE)
def test_compact_positions(name):
    values, model = inputs(name), deep(name)
    methods = [METHODS["tome"], vtok.UniformGrid(keep=0.6)]
    short = vtok.prune_inputs(model, values, methods, positions="compact")
    found = generate(vtok.patch(copy.deepcopy(model), methods, positions="compact"), values)
    assert_same(found, generate(model, short))
    kept = generate(vtok.patch(copy.deepcopy(model), methods), values)
    assert (found[1] - kept[1]).abs().max() > 1e-3, "positions do matter"


@pytest.mark.parametrize("name", TOKENWISE)
def test_ways_to_generate(name):
    """Beams repeat encoded images; without a cache prompts are read again; static caches hold what is left."""
    values, model = inputs(name), deep(name)
    method = METHODS["ats" if name == "LLaVA-1.5" else "pitome"]
    features, alive = left_by(model, values, method)
    patched = vtok.patch(copy.deepcopy(model), method)

    def beams(model, values):
        given = {key: copy.copy(value) for key, value in values.items()}
        out = model.generate(
            **given, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences, out.sequences_scores

    found, expected = beams(patched, values), oracle(model, values, features, alive, beams)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() <= 1e-5
    expected = oracle(model, values, features, alive)
    assert_same(generate(patched, values, use_cache=False), expected)
    assert_same(generate(patched, values, cache_implementation="static"), expected)
    with torch.no_grad():  # no generate(): pixels go straight into the model
        assert (patched(**values).logits[:, -1] - expected[1][:, 0]).abs().max() <= 1e-5
