"""Threads, fake tensors, compilation, kernels, other tools that patch models."""

import copy
import threading

import pytest
import torch
from torch.torch_version import TorchVersion
from zoo import EXAMPLES, FAMILIES, STATIC, attach, block_list, build, covering, images, pairs

import vtok
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of, towers


@pytest.mark.parametrize("method", encoder_methods())
def test_two_threads_give_the_single_thread_result(method):
    name = "timm: ViT"
    model = attach(name, build(name), method)
    inputs = [images(name, batch=b, seed=b) for b in (1, 2, 3, 4)]
    with torch.no_grad():
        alone = [model(x) for x in inputs]
    failures, barrier = [], threading.Barrier(len(inputs))

    def work(x, expected):
        try:
            barrier.wait()
            for _ in range(15):
                with torch.no_grad():
                    got = model(x)
                if not torch.equal(got, expected):
                    failures.append((got - expected).abs().max().item())
                if vtok.info(model).towers[0].blocks[-1].tokens_out < 1:
                    failures.append("lost its own pass")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(("name", "method"), covering(pairs(FAMILIES), 0))
def test_no_host_synchronisation(name, method):
    """Under fake tensors any read of a value raises."""
    from torch._subclasses import FakeTensorMode

    with torch.no_grad():
        shape = build(name)(images(name)).shape
    model = attach(name, build(name), method, **STATIC.get(method, {}))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        out = model(torch.empty(2, *EXAMPLES[name].input_size))
    assert out.shape == shape
    assert run_of(model).current.tokens(4) < run_of(model).current.length


def _compiled_equals_eager(name, method, backend):
    model, x = build(name), images(name)
    del block_list(model)[3:]
    settings = {"layers": [0, 1, 2], "retain": 0.8} if method == "zero_tprune" else {}
    attach(name, model, method, **STATIC.get(method, {}), **settings)
    with torch.no_grad():
        eager = model(x)
        counts = [run_of(model).current.tokens(i) for i in range(4)]
        assert counts[-1] < counts[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        got = compiled(x)
        assert [run_of(model).current.tokens(i) for i in range(4)] == counts
        assert vtok.info(model).towers[0].blocks[-1].tokens_out == counts[-1]
    assert (got - eager).abs().max() <= 1e-4 * eager.abs().max()


def _one_method_each():
    """Every second family with one method, of which each comes up."""
    methods, combinations = encoder_methods(), set(pairs(FAMILIES))
    chosen = [(name, methods[i % len(methods)]) for i, name in enumerate(FAMILIES) if i % 2]
    chosen += [(FAMILIES[0], "tome"), ("timm: ViT differential attention", "tome")]
    return [pair for pair in dict.fromkeys(chosen) if pair in combinations]


_untraceable = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7",
    reason="transformers looks into code objects, which torch 2.6 cannot trace: unpatched models do not compile either",
)


def _traceable(combinations):
    return [pytest.param(*c, marks=_untraceable if c[0].startswith("transformers: ") else ()) for c in combinations]


@pytest.mark.parametrize(("name", "method"), _traceable(_one_method_each()))
def test_compiles_without_graph_breaks(name, method):
    _compiled_equals_eager(name, method, "eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), _traceable(pairs(FAMILIES)))
def test_compiles_without_graph_breaks_ahead_of_time(name, method):
    _compiled_equals_eager(name, method, "aot_eager")


@pytest.mark.compile
@pytest.mark.parametrize("method", encoder_methods())
def test_compiles_with_inductor(method):
    _compiled_equals_eager("timm: ViT", method, "inductor")


@pytest.mark.parametrize("method", encoder_methods())
def test_empty_batches_and_meta_tensors(method):
    name = "timm: ViT"
    model, x = attach(name, build(name), method), images(name)
    with torch.no_grad():
        assert model(x[:0]).shape == (0, 10)
        if method != "ats":  # its counts depend on what the image holds
            assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (len(x), 10)


def test_compiled_models_follow_patch_and_unpatch():
    name = "timm: ViT"
    model, x = build(name), images(name)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        reference = compiled(x)
        vtok.patch(compiled, "tome", r=6)
        reduced = compiled(x)
        assert not torch.allclose(reduced, reference, atol=1e-3)
        vtok.unpatch(compiled)
        assert torch.allclose(compiled(x), reference, atol=1e-6)


@pytest.mark.parametrize(("name", "method"), covering(pairs(), 1))
def test_fused_attention_stays(name, method):
    """Every block keeps the fused kernel; a whole attention map is built only where Zero-TPrune prunes."""
    model, x = build(name), images(name)
    unpatched = [b.kernel for b in vtok.info(model, probe=x).towers[0].blocks]
    # Values wider than keys, a 3-D bias: torch itself falls back. BLIP has no fused kernel.
    if not any(word in name for word in ("differential", "timm: BEiT shared", "BLIP")):
        # open_clip's own blocks run torch's inference kernel until tokens have sizes or a method looks at keys
        assert set(unpatched) in ({"flash (cpu)"}, {"native multi-head"})
    attach(name, model, method)
    maps = {"zero_tprune": {0, 2}, "ats": {1, 2, 3}}.get(method, set())
    if method == "ats" and model_has_cls(model):
        maps = set()  # one row of attention, not a map
    for block in vtok.info(model, probe=x).towers[0].blocks:
        ran = set(block.kernel.split(" + "))
        if block.block in maps:
            assert "math" in ran
        else:
            assert ran in ({"flash (cpu)"}, {unpatched[block.block]}), (block.block, block.kernel)


def model_has_cls(model):
    return towers(model, None)[0][1].has_cls


def test_accelerate_hooks_before_and_after():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    name = "timm: ViT"
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model(x)
        reduced = attach(name, model, "tome")(x)
        vtok.unpatch(model)
        for block in model.blocks:
            add_hook_to_module(block, ModelHook())
        assert torch.equal(attach(name, model, "tome")(x), reduced), "hooks first: the swap had no effect"
        assert torch.equal(vtok.unpatch(model)(x), reference)
        for block in model.blocks:
            remove_hook_from_module(block)
        attach(name, model, "tome")
        for block in model.blocks:
            add_hook_to_module(block, ModelHook())
        assert torch.equal(model(x), reduced)
        for block in model.blocks:
            remove_hook_from_module(block)
        assert torch.equal(vtok.unpatch(model)(x), reference)


def test_partial_passes():
    """Intermediate outputs, a slice of the blocks, features alone: any entry point that starts at block 0 works."""
    name = "timm: ViT"
    model, x = attach(name, build(name), "tome"), images(name)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(model.forward_head(model.forward_features(x)), logits)
        tokens = model._pos_embed(model.patch_embed(x))
        assert torch.equal(model.forward_head(model.norm(model.blocks(tokens))), logits)
        assert model.blocks[:2](tokens).shape[1] == tokens.shape[1] - 12
        steps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        assert [s.shape[1] for s in steps] == [58, 52, 46, 40]
        with pytest.raises(vtok.StateError, match="output_fmt='NLC'"):
            model.forward_intermediates(x)
        with pytest.raises(vtok.StateError, match="block 2 was called although block 0 has not run"):
            attach(name, build(name), "tome").blocks[2](tokens)


def test_intermediate_grids_are_whole_or_refused():
    """60 tokens of 48 numbers fill an 8 x 8 grid of 45 channels: a reshape alone would not notice."""
    name = "timm: ViT"
    model, x = build(name), images(name)
    with torch.no_grad():
        reference = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        vtok.patch(model, "tome", r=4)
        for call in (model.forward_intermediates, model.get_intermediate_layers):
            with pytest.raises(vtok.StateError, match="no longer fill the patch grid"):
                call(x, **({"reshape": True} if call == model.get_intermediate_layers else {}))
        with pytest.raises(vtok.StateError, match="no longer fill the patch grid"):
            model.forward_intermediates(x, 1, False, False, False, "NCHW")
        vtok.patch(model, "ats", num_tokens=10_000, mode="mask", layers=[3])  # as many rows, but moved
        with pytest.raises(vtok.StateError, match="no longer fill the patch grid"):
            model.forward_intermediates(x)
        for stop_early in (False, True):  # blocks before the first reduction are whole
            early = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=stop_early)
            assert all(torch.equal(a, b) for a, b in zip(early, reference))


def test_unmerge_puts_tokens_back():
    name = "timm: ViT"
    model, x = attach(name, build(name), "tome", trace=True), images(name)
    with torch.no_grad():
        tokens = model.forward_features(x)
    whole = vtok.unmerge(model, tokens)
    assert whole.shape[1] == 65
    group = run_of(model).current.final.group
    assert torch.equal(whole, tokens.gather(1, group[..., None].expand(-1, -1, tokens.shape[-1])))
    pruned = attach(name, build(name), "random", trace=True)
    with torch.no_grad():
        tokens = pruned.forward_features(x)
    filled = vtok.unmerge(pruned, tokens, fill=-7.0)
    assert ((filled == -7).all(-1).sum(1) == 65 - tokens.shape[1]).all()
    with pytest.raises(vtok.StateError, match="trace=True"):
        vtok.unmerge(attach(name, build(name), "random"), tokens)
    for other in (tokens[:, 1:], tokens[:1], torch.cat([tokens, tokens], 1)):  # other tokens than the last pass left
        with pytest.raises(vtok.StateError, match=r"the last forward pass left .* tokens"):
            vtok.unmerge(pruned, other)
