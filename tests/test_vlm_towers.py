"""Methods inside the vision tower of a vision-language model, alone and with methods on the prompt.

The oracle patches the tower by itself (the encoder adapter, which has tests of its own), runs the connector by hand, and hides
the patches that no token stands for with an explicit mask over the whole prompt of the unpatched model.
"""

import copy
import functools
import io
import warnings

import pytest
import torch
from vlm_zoo import (
    Columns,
    MaskOracle,
    Nearest,
    assert_same,
    build,
    generate,
    inputs,
    text_model,
    visual,
)

import vtok
from vtok.patches.hf_vlm import find
from vtok.prompt import ImageFeatures, View
from vtok.resolve import run_of

TOKENWISE = ["LLaVA-1.5", "PaliGemma"]
GRIDS = ["LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3", "SmolVLM", "Gemma3"]
PACKED = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
METHODS = {
    "tome": vtok.ToMe(r=3),
    "pitome": vtok.PiToMe(ratio=0.75),
    "official_llava": vtok.PiToMe(preset="official_llava", ratio=0.8),
    "ats": vtok.ATS(keep=0.6, layers=[0, 1], query="mean"),
    "zero_tprune": vtok.ZeroTPrune(layers=[0, 1], retain=0.7, cls_init="uniform"),
}


def _deep(name, layer=-1, strategy=None, seed=3):
    """An example whose tower has four blocks; features from `layer`."""
    model = build(name)
    tower = model.model.vision_tower
    torch.manual_seed(seed)
    blocks = tower.encoder.layers
    for _ in range(2):
        block = copy.deepcopy(blocks[0])
        for p in block.parameters():
            p.data += 0.1 * torch.randn_like(p)
        blocks.append(block)
    tower.config.num_hidden_layers = model.config.vision_config.num_hidden_layers = 4
    if name != "PaliGemma":
        model.config.vision_feature_layer = layer
        model.config.vision_feature_select_strategy = strategy or "default"
    return model.eval()


def _grid_model(name):
    model = build(name)
    if name == "Gemma3":  # born with a projection of zeros
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return model


def _tower(model):
    (vlm,) = find(model)
    return vlm.tower.module


def _left(model, values, method):
    """(features [I, n, D] with zeros where no token is, alive [I, n] bool), by the tower patched alone."""
    tower, config = _tower(model), model.config
    skip = int(getattr(config, "vision_feature_select_strategy", None) == "default")
    vtok.patch(tower, method)
    with torch.no_grad():
        out = tower(values["pixel_values"], output_hidden_states=True)
        layer = getattr(config, "vision_feature_layer", None)
        x = out.last_hidden_state if layer is None else out.hidden_states[layer]
        x = model.model.multi_modal_projector(x[:, skip:])
    states = run_of(tower).current.states
    state = states[-1 if layer is None else layer]
    n = state.length - skip
    features, alive = torch.zeros(len(x), n, x.shape[2]), torch.zeros(len(x), n, dtype=torch.bool)
    for image in range(len(x)):
        for row in range(x.shape[1]):
            if state.keep is None or state.keep[image, row + skip]:
                patch = row if state.index is None else int(state.index[image, row + skip]) - skip
                assert not alive[image, patch], "two tokens at one patch"
                features[image, patch], alive[image, patch] = x[image, row], True
    vtok.unpatch(tower)
    return features, alive


def _encoded(model, values, features):
    """What generate() takes in place of pixels."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    images = features if hasattr(model.config, "projection_dim") else list(features)
    rest = {k: v for k, v in values.items() if k != "pixel_values"}
    return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}}


def _columns(model, values, alive):
    keep = torch.ones_like(values["input_ids"], dtype=torch.bool)
    keep[visual(model, values["input_ids"])] = alive.flatten()
    return keep


def _oracle(model, values, features, alive, call=generate):
    """alive: [I, n] for all layers, or a mapping: decoder layer -> [B, L]."""
    layers = alive if isinstance(alive, dict) else dict.fromkeys(range(4), _columns(model, values, alive))
    with MaskOracle(model, layers):
        return call(model, _encoded(model, values, features))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOKENWISE)
def test_equal_to_the_tower_by_itself(name, method):
    """Two rows, the second padded on the left, the first with two images; ATS keeps another number in each."""
    values, model, config = inputs(name), _deep(name), METHODS[method]
    features, alive = _left(model, values, config)
    assert 0 < alive.sum() < alive.numel()
    if method == "ats":
        assert len(set(alive.sum(1).tolist())) > 1, "the check would not be about ragged images"
    expected = _oracle(model, values, features, alive)
    found = generate(vtok.patch(model, config), values)
    assert_same(found, expected)
    (prompt,) = vtok.info(model).prompts
    (row,) = prompt.rows
    assert row.place == "vision tower"
    gone = (~_columns(model, values, alive)).sum(1).tolist()
    assert [a - b for a, b in zip(row.tokens_in, row.tokens_out)] == gone
    cache = found[2].past_key_values
    assert type(cache).get_seq_length(cache, 0) < values["input_ids"].shape[1] + 7 - min(gone) + 1, "the cache is shorter"


def _with_class_tokens(values):
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
    model, values = _deep("LLaVA-1.5", layer, strategy), inputs("LLaVA-1.5")
    if strategy == "full":
        values = _with_class_tokens(values)
    model.set_attn_implementation(kernel)
    features, alive = _left(model, values, METHODS["tome"])
    states = {-2: 3, -1: 4, 2: 2}[layer]
    assert alive.shape[1] - alive.sum(1).max() == 3 * states
    expected = _oracle(model, values, features, alive)
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
    values, model = inputs(name), _deep(name)
    inside, layers = METHODS[method], Columns(((2, 2), (3, 0)))
    features, alive = _left(model, values, inside)
    after = _second(model, values, features, alive, 0.5)
    assert (after.sum(1) < alive.sum(1)).all()
    before = _columns(model, values, after)
    seen, column = visual(model, values["input_ids"]), torch.arange(values["input_ids"].shape[1])
    first = column.where(before & (values["attention_mask"] == 1), len(column)).amin(1, keepdim=True)
    middle = before & ((column + first) % 2 == 0) | before & ~seen  # as `Columns` counts
    keeps = {0: before, 1: before, 2: middle, 3: middle & ~seen}
    expected = _oracle(model, values, features, keeps)
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
    values, model = inputs("LLaVA-1.5"), _deep("LLaVA-1.5")
    features, alive = _left(model, values, METHODS[method])
    after = torch.zeros_like(alive)
    for image in range(len(alive)):
        (patches,) = alive[image].nonzero(as_tuple=True)
        x = features[image, patches]
        for j in range(0, len(patches), 4):
            features[image, patches[j]], after[image, patches[j]] = x[j : j + 4].mean(0), True
    expected = _oracle(model, values, features, after)
    assert_same(generate(vtok.patch(model, [Nearest(), METHODS[method]]), values), expected)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_pivot_of_todre(strategy):
    """The token that the class token looks at most among those that are left; alone if one stays."""
    model, values = _deep("LLaVA-1.5", -1, strategy), inputs("LLaVA-1.5")
    values = _with_class_tokens(values) if strategy == "full" else values
    inside, skip = vtok.ToMe(r=[3, 3, 0, 0]), int(strategy == "default")
    tower, entered = _tower(model), []
    vtok.patch(tower, inside)
    handle = tower.encoder.layers[3].register_forward_pre_hook(functools.partial(_note, entered))
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
    features, _ = _left(model, values, inside)
    expected = _oracle(model, values, features, alive)
    vtok.patch(model, [vtok.ToDRE(keep_tokens=1, pivot="cls", probe=None), inside])
    assert_same(generate(model, values), expected)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_every_baseline_takes_what_is_left(method):
    values, model = inputs("LLaVA-1.5"), _deep("LLaVA-1.5")
    vtok.patch(model, [METHODS["ats"], vtok.METHODS.get(method)(keep=0.01)])
    generate(model, values, steps=2)
    assert vtok.info(model).prompts[0].rows[1].tokens_out == (2, 1), "one token of every image stays"


@pytest.mark.parametrize("method", ["tome", "ats"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_prune_inputs(name, method):
    """The same as the hooks; the model is left without any."""
    values, model = inputs(name), _deep(name)
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
    values, model = inputs(name), _deep(name)
    methods = [METHODS["tome"], vtok.UniformGrid(keep=0.6)]
    short = vtok.prune_inputs(model, values, methods, positions="compact")
    found = generate(vtok.patch(copy.deepcopy(model), methods, positions="compact"), values)
    assert_same(found, generate(model, short))
    kept = generate(vtok.patch(copy.deepcopy(model), methods), values)
    assert (found[1] - kept[1]).abs().max() > 1e-3, "positions do matter"


@pytest.mark.parametrize("name", TOKENWISE)
def test_ways_to_generate(name):
    """Beams repeat encoded images; without a cache prompts are read again; static caches hold what is left."""
    values, model = inputs(name), _deep(name)
    method = METHODS["ats" if name == "LLaVA-1.5" else "pitome"]
    features, alive = _left(model, values, method)
    patched = vtok.patch(copy.deepcopy(model), method)

    def beams(model, values):
        given = {key: copy.copy(value) for key, value in values.items()}
        out = model.generate(
            **given, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences, out.sequences_scores

    found, expected = beams(patched, values), _oracle(model, values, features, alive, beams)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() <= 1e-5
    expected = _oracle(model, values, features, alive)
    assert_same(generate(patched, values, use_cache=False), expected)
    assert_same(generate(patched, values, cache_implementation="static"), expected)
    with torch.no_grad():  # no generate(): pixels go straight into the model
        assert (patched(**values).logits[:, -1] - expected[1][:, 0]).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["pitome", "ats"])
def test_a_batch_is_its_rows(method):
    values = inputs("LLaVA-1.5")
    model = vtok.patch(_deep("LLaVA-1.5"), [METHODS[method], vtok.UniformGrid(keep=0.7)])
    both = generate(model, values)
    for row, images in enumerate((slice(0, 2), slice(2, 3))):
        real = values["attention_mask"][row] == 1
        one = {k: values[k][row, real][None] for k in ("input_ids", "attention_mask")}
        alone = generate(model, {**one, "pixel_values": values["pixel_values"][images]})
        assert torch.equal(alone[0][0], both[0][row])
        assert (alone[1][0] - both[1][row]).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [vtok.ToMe(r=0), vtok.PiToMe(ratio=1.0), vtok.ATS(keep=1.0)], ids=str)
def test_nothing_to_reduce(config):
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    before = generate(model, values)
    vtok.patch(model, config)
    assert vtok.info(model).patched
    if not isinstance(config, vtok.ATS):  # samples of a grid as fine as the tokens still leave duplicates out
        assert torch.equal(generate(model, values)[1], before[1])
    assert torch.equal(generate(vtok.unpatch(model), values)[1], before[1])


def _copies(x, state):
    """[V, N0, C]: each patch the token that it ended in, one by one."""
    out = torch.zeros(len(x), state.length, x.shape[2])
    for image in range(len(x)):
        for patch in range(state.length):
            out[image, patch] = x[image, int(state.group[image, patch])]
    return out


class _Returns:
    """Makes an unpatched tower return given tokens, call by call."""

    def __init__(self, tower, method):
        self.tower, self.twin, self.method = tower, copy.deepcopy(tower), method
        vtok.patch(self.twin, method, trace=True)

    def __enter__(self):
        self.handle = self.tower.register_forward_hook(self._hook, with_kwargs=True)

    def __exit__(self, *_):
        self.handle.remove()

    def _hook(self, module, args, kwargs, output):
        other = self.twin(*args, **kwargs)
        states = run_of(self.twin).current.states
        output.last_hidden_state = _copies(other.last_hidden_state, states[-1])
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if x is None else _copies(x, s) for x, s in zip(other.hidden_states, states, strict=True)
            )
        return output


@pytest.mark.parametrize("method", ["tome", "pitome"])
@pytest.mark.parametrize("name", GRIDS)
def test_grids(name, method):
    """Where the grid is needed, every patch gets the features of the token that it was merged into; the prompt stays."""
    values, model = inputs(name), _grid_model(name)
    plain = generate(model, values, steps=3)
    with _Returns(_tower(model), METHODS[method]):
        expected = generate(model, values)
    assert (expected[1][:, :3] - plain[1]).abs().max() > 1e-3, "merging changes nothing: the check would be empty"
    with pytest.warns(UserWarning, match="merged tokens are put back on the grid: the tower gets cheaper, the prompt keeps"):
        vtok.patch(model, METHODS[method])
    found = generate(model, values)
    assert_same(found, expected)
    info = vtok.info(model)
    assert info.towers[0].blocks[-1].tokens_out < info.towers[0].blocks[0].tokens_in
    assert "put back on the grid" in str(info)
    assert "the last prompt kept all its visual tokens" in str(info)
    assert torch.equal(generate(vtok.unpatch(model), values, steps=3)[1], plain[1])


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Idefics3", "Gemma3"])
def test_grids_with_methods_on_the_prompt(name):
    values, model, method = inputs(name), _grid_model(name), METHODS["tome"]
    only = vtok.patch(copy.deepcopy(model), "uniform", keep=0.4)
    with _Returns(_tower(only), method):
        expected = generate(only, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vtok.patch(model, [vtok.UniformGrid(keep=0.4), method])
        short = vtok.prune_inputs(_grid_model(name), values, [vtok.UniformGrid(keep=0.4), method])
    assert_same(generate(model, values), expected)
    assert_same(generate(_grid_model(name), short), expected)
    assert [row.place for row in vtok.info(model).prompts[0].rows] == ["before the LLM"]


def _note(entered, module, args):
    entered.append(args[0].clone())


def test_patches_that_are_padding():
    """Idefics3: real patches are reduced as if alone; padding, which nobody attends to, still shows what it did."""
    model, values, method = build("Idefics3"), inputs("Idefics3"), METHODS["tome"]
    pixels, mask = values["pixel_values"].clone(), torch.ones(2, 2, 32, 32, dtype=torch.bool)
    mask[0, 1, :, 20:], mask[1, 0, 24:] = False, False
    pixels = pixels * mask[:, :, None]
    values = {**values, "pixel_values": pixels, "pixel_attention_mask": mask.long()}
    tower = copy.deepcopy(_tower(model))
    images = pixels.flatten(0, 1)[:3]
    grids = mask.flatten(0, 1)[:3, ::4, ::4].contiguous()
    expected = []
    for image, grid in zip(images, grids):
        vtok.patch(tower, method, trace=True)
        entered = []
        handles = [block.register_forward_pre_hook(functools.partial(_note, entered)) for block in tower.encoder.layers]
        with torch.no_grad():
            last = tower(image[None], patch_attention_mask=grid[None]).last_hidden_state
        states = run_of(tower).current.states
        for handle in handles:
            handle.remove()
        vtok.unpatch(tower)
        real = grid.flatten()
        group, out = states[-1].group[0], torch.zeros(64, last.shape[2])
        for patch in range(64):
            if real[patch]:
                out[patch] = last[0, group[patch]]
        if not real.all():
            with torch.no_grad():
                pad = entered[0][:, ~real][:, :1]
                for i, block in enumerate(tower.encoder.layers):
                    keep = torch.ones(entered[i].shape[1], dtype=torch.bool) if states[i].keep is None else states[i].keep[0]
                    size = torch.ones(len(keep)) if states[i].size is None else states[i].size[0]
                    attention, h = block.self_attn, block.layer_norm1(entered[i][:, keep])
                    q = attention.q_proj(block.layer_norm1(pad)).unflatten(2, (2, -1)).transpose(1, 2)
                    k, v = (p(h).unflatten(2, (2, -1)).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
                    weight = (q @ k.transpose(2, 3) * attention.scale + size[keep].log()).softmax(-1)
                    pad = pad + attention.out_proj((weight @ v).transpose(1, 2).flatten(2))
                    pad = pad + block.mlp(block.layer_norm2(pad))
                out[~real] = tower.post_layernorm(pad)[0, 0]
        expected.append(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vtok.patch(model, method)
    with torch.no_grad():
        found = _tower(model)(images, patch_attention_mask=grids).last_hidden_state
    assert (found - torch.stack(expected)).abs().max() <= 1e-5
    assert generate(model, values)[1].isfinite().all()


@pytest.mark.parametrize("name", ["LLaVA-1.5", "PaliGemma", "LLaVA-NeXT"])
def test_life(name, tmp_path):
    """Bits after unpatching, the patch before, copies, pickles, files, state_dicts."""
    warnings.filterwarnings("ignore", message=".*put back on the grid")
    model, values = build(name), inputs(name)
    plain, keys = generate(model, values), list(model.state_dict())
    model = build(name)
    methods = [vtok.PiToMe(ratio=0.8), vtok.UniformGrid(keep=0.7)]
    vtok.patch(model, methods)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    if name in TOKENWISE:  # transformers' own hooks on the other one cannot be pickled
        torch.save(model, buffer)
        buffer.seek(0)
    vtok.save_config(model, tmp_path)
    before = generate(model, values)
    assert not torch.equal(before[1], plain[1])
    copies = [copy.deepcopy(model), vtok.patch(build(name), tmp_path)]
    if name in TOKENWISE:
        copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert torch.equal(generate(other, values)[1], before[1])
        assert [c.name for c in vtok.info(other).prompts[0].configs] == ["pitome", "uniform"]
        assert torch.equal(generate(vtok.unpatch(other), values)[1], plain[1])
    with vtok.patched(model, "random", keep=0.3):
        assert run_of(model) is None
        assert not torch.equal(generate(model, values)[1], before[1])
    assert torch.equal(generate(model, values)[1], before[1])
    vtok.unpatch(model)
    assert torch.equal(generate(model, values)[1], plain[1])
    assert not any("_vtok" in m.__dict__ for m in model.modules())


def test_trace():
    """Which patches were merged, for pictures of it."""
    model, values = _deep("LLaVA-1.5"), inputs("LLaVA-1.5")
    vtok.patch(model, "tome", r=3, trace=True)
    with torch.no_grad():
        model(**values)
        state = run_of(model).current.final
        numbers = torch.arange(5.0).expand(3, 5)[..., None]
        assert state.index.shape == (3, 5)
        assert torch.equal(vtok.unmerge(model, numbers)[..., 0].long(), state.group)
    assert "none of these methods acts: uniform" in _message(vtok.ConfigError, vtok.patch, model, "uniform", trace=True)


def test_training():
    """Gradients reach the tower through what is left; logits and loss have the length of the prompt."""
    model, values = _deep("LLaVA-1.5"), inputs("LLaVA-1.5")
    labels = values["input_ids"].masked_fill(visual(model, values["input_ids"]) | (values["attention_mask"] == 0), -100)
    vtok.patch(model.train(), METHODS["pitome"])
    loss = model(**values, labels=labels).loss
    loss.backward()
    grads = [p.grad for p in _tower(model).encoder.layers[0].parameters()]
    assert loss.isfinite()
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


def _message(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("name", PACKED)
def test_packed_towers(name):
    text = _message(vtok.UnsupportedModelError, vtok.patch, build(name), "pitome")
    assert "runs the patches of all images as one sequence" in text
    assert "methods that act on its prompts: " in text
    assert "uniform" in text


@pytest.mark.parametrize("method", ["ats", "zero_tprune"])
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Gemma3"])
def test_dropping_where_the_grid_is_needed(name, method):
    model = build(name)
    text = _message(vtok.UnsupportedModelError, vtok.patch, model, method)
    assert f"{method} drops tokens inside the vision tower, but what follows it in {type(model.model).__name__}" in text
    assert "choose a method that merges (pitome, tome)" in text
    assert not vtok.info(model).patched


def test_values_that_make_no_sense():
    model = vtok.patch(_deep("LLaVA-1.5", -2), "tome", r=2)
    for method, words in (
        ([vtok.ToMe(r=2), vtok.PiToMe(ratio=0.9)], "two methods reduce in block 0"),
        ([vtok.ToMe(r=2), vtok.ATS(layers=[3])], "patch it alone"),
        (vtok.ATS(layers=[3]), "from block 3 of the vision tower on, but LlavaModel takes what leaves block 2"),
        (vtok.ATS(layers=[9]), "layers names block 9"),
        (vtok.UniformGrid(layers=[1]), "leave layers out"),
    ):
        assert words in _message(vtok.VtokError, vtok.patch, model, method)
    assert vtok.info(model).towers[0].configs == (vtok.ToMe(r=2),), "the earlier patch is still there"
    assert "no single knob that a FLOPs budget for a vision-language model" in _message(
        vtok.ConfigError, vtok.patch, model, "tome", flops=0.5
    )
    assert "call vtok.unpatch" in _message(vtok.ConfigError, vtok.prune_inputs, model, inputs("LLaVA-1.5"), "tome", r=1)


def test_features_that_cannot_lose_tokens():
    model = _deep("LLaVA-1.5", [-2, -1])
    assert "from layers [-2, -1] of the vision tower side by side" in _message(
        vtok.UnsupportedModelError, vtok.patch, model, "tome"
    )
    model = _deep("LLaVA-1.5")
    model.model.vision_tower = build("PaliGemma").model.vision_tower
    assert "has no class token: once patches are merged" in _message(vtok.UnsupportedModelError, vtok.patch, model, "tome")
    model, values = vtok.patch(_deep("LLaVA-1.5"), "tome", r=2), inputs("LLaVA-1.5")
    assert "another vision_feature_layer" in _message(vtok.StateError, generate, model, values, vision_feature_layer=-2)
    early = build("LLaVA-1.5").model.get_image_features(values["pixel_values"], return_dict=True)
    rest = {k: v for k, v in values.items() if k != "pixel_values"}
    text = _message(vtok.StateError, generate, model, {**rest, "mm_encoder_outputs": {"image": early}})
    assert "was not encoded by the vision tower that vtok patched" in text


def test_methods_that_compare_patches_of_the_tower():
    model = build("LLaVA-NeXT")
    compress = vtok.METHODS.get("correlation")(alpha=0.5)
    assert "but tome reduces them from block 0 on" in _message(vtok.ConfigError, vtok.patch, model, [compress, vtok.ToMe(r=2)])
    late = vtok.ToMe(r=[0, 2])  # behind the block that it looks at
    with pytest.warns(UserWarning, match="put back on the grid"):
        vtok.patch(model, [compress.replace(low_layer=0, deep_layer=1), late])
    assert generate(model, inputs("LLaVA-NeXT"), steps=2)[1].isfinite().all()


def test_supports():
    support = vtok.supports(build("LLaVA-1.5"))
    assert all(support.methods[name] is None for name in ("ats", "pitome", "tome", "zero_tprune"))
    assert "tome: yes, in the vision tower: the prompt gets shorter too" in str(support)
    assert "uniform: yes, on the prompt" in str(support)
    support = vtok.supports(build("PaliGemma"))
    assert support.on_request["ats"] == {"query": "mean"}
    support = vtok.supports(build("Gemma3"))
    assert "in the vision tower alone: merged tokens are put back on the grid" in str(support)
    assert "needs every patch" in support.methods["ats"]
    assert "one sequence" in vtok.supports(build("Qwen2-VL")).methods["tome"]
