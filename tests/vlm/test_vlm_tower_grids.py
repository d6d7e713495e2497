"""Vision towers whose patches are needed on their grid: merged tokens are put back, methods that drop are refused."""

import copy
import functools
import warnings

import pytest
import torch
from helpers_errors import message_of
from helpers_towers import METHODS, note_input, tower_of
from vlm_zoo import assert_same, build, generate, inputs

import vtok
from vtok.patches.module_swap import remove_hooks
from vtok.targets.resolve import run_of

GRIDS = ["LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3", "SmolVLM", "Gemma3"]


def grid_model(name):
    model = build(name)
    if name == "Gemma3":  # born with a projection of zeros
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return model


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
        for module in self.twin.modules():  # a copy of a part: what belongs to the patched model stays behind
            remove_hooks(module)
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
    values, model = inputs(name), grid_model(name)
    plain = generate(model, values, steps=3)
    with _Returns(tower_of(model), METHODS[method]):
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
    values, model, method = inputs(name), grid_model(name), METHODS["tome"]
    only = vtok.patch(copy.deepcopy(model), "uniform", keep=0.4)
    with _Returns(tower_of(only), method):
        expected = generate(only, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vtok.patch(model, [vtok.UniformGrid(keep=0.4), method])
        short = vtok.prune_inputs(grid_model(name), values, [vtok.UniformGrid(keep=0.4), method])
    assert_same(generate(model, values), expected)
    assert_same(generate(grid_model(name), short), expected)
    assert [row.place for row in vtok.info(model).prompts[0].rows] == ["before the LLM"]


def test_patches_that_are_padding():
    """Idefics3: real patches are reduced as if alone; padding, which nobody attends to, still shows what it did."""
    model, values, method = build("Idefics3"), inputs("Idefics3"), METHODS["tome"]
    pixels, mask = values["pixel_values"].clone(), torch.ones(2, 2, 32, 32, dtype=torch.bool)
    mask[0, 1, :, 20:], mask[1, 0, 24:] = False, False
    pixels = pixels * mask[:, :, None]
    values = {**values, "pixel_values": pixels, "pixel_attention_mask": mask.long()}
    tower = copy.deepcopy(tower_of(model))
    images = pixels.flatten(0, 1)[:3]
    grids = mask.flatten(0, 1)[:3, ::4, ::4].contiguous()
    expected = []
    for image, grid in zip(images, grids):
        vtok.patch(tower, method, trace=True)
        entered = []
        handles = [block.register_forward_pre_hook(functools.partial(note_input, entered)) for block in tower.encoder.layers]
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
        found = tower_of(model)(images, patch_attention_mask=grids).last_hidden_state
    assert (found - torch.stack(expected)).abs().max() <= 1e-5
    assert generate(model, values)[1].isfinite().all()


@pytest.mark.parametrize(("method", "params"), [("ats", {}), ("zero_tprune", {}), ("uniform", {"layers": [0]})])
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "InternVL", "Gemma3"])
def test_dropping_where_the_grid_is_needed(name, method, params):
    model = build(name)
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, method, **params)
    assert f"{method} drops tokens inside the vision tower, but what follows it in {type(model.model).__name__}" in text
    assert "choose a method that merges (pitome, tome)" in text
    assert not vtok.info(model).patched


def test_methods_that_compare_patches_of_the_tower():
    model = build("LLaVA-NeXT")
    compress = vtok.METHODS.get("correlation")(alpha=0.5)
    assert "but tome reduces them from block 0 on" in message_of(
        vtok.ConfigError, vtok.patch, model, [compress, vtok.ToMe(r=2)]
    )
    late = vtok.ToMe(r=[0, 2])  # behind the block that it looks at
    with pytest.warns(UserWarning, match="put back on the grid"):
        vtok.patch(model, [compress.replace(low_layer=0, deep_layer=1), late])
    assert generate(model, inputs("LLaVA-NeXT"), steps=2)[1].isfinite().all()
