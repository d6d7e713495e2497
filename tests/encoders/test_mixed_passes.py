"""Passes of one model that others mix, cut or compute again, and blocks that are not what their class says."""

import functools
import types

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import vtok

METHODS = {"tome": {"r": 2}, "pitome": {"ratio": 0.9}, "ats": {}, "zero_tprune": {}, "random": {"keep": 0.7}}
MERGING_OR_RAGGED = ("tome", "pitome", "ats")


def _model(method=None, trace=False, **shape):
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "depth": 4}
    model = VisionTransformer(**{**given, **shape}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model if method is None else vtok.patch(model, method, trace=trace, **METHODS[method])


def _images(seed, batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _embedded(model, x):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


@pytest.mark.parametrize("method", METHODS)
def test_two_streams_block_by_block(method):
    model, one, two = _model(method), _images(1), _images(2)
    with torch.no_grad():
        expected = [model.blocks(_embedded(model, x)) for x in (one, two)]
        a, b = _embedded(model, one), _embedded(model, two)
        for block in model.blocks:
            a, b = block(a), block(b)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_features_of_two_batches_and_then_their_heads(method, pool):
    model = _model(method, global_pool=pool, class_token=pool != "map")
    one, two = _images(1), _images(2, batch=2)
    with torch.no_grad():
        expected = [model(x) for x in (one, two)]
        features = [model.forward_features(x) for x in (one, two)]
        for tokens, logits in zip(features, expected):
            assert torch.equal(model.forward_head(tokens), logits)
        many = [model.forward_features(_images(seed)) for seed in range(20)]  # more than there are passes remembered
        assert torch.equal(model.forward_head(many[0]), model(_images(0)))
        with pytest.raises(vtok.StateError, match=r"what follows the blocks was given .* tokens of 1 images"):
            model.forward_head(features[0][:1])


@pytest.mark.parametrize("method", METHODS)
def test_unmerge_knows_whose_tokens_they_are(method):
    model = _model(method, trace=True)
    with torch.no_grad():
        first = model.forward_features(_images(1))
        whole = vtok.unmerge(model, first)
        model.forward_features(_images(2))
    assert torch.equal(vtok.unmerge(model, first), whole)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("method", MERGING_OR_RAGGED)
def test_a_checkpoint_around_blocks_and_pool(method, whole, reentrant):
    """Two passes, then backward: what is computed again pools by the sizes of its own pass."""

    def gradients(again):
        model = _model(method, global_pool="avg").train().double()
        total = torch.zeros((), dtype=torch.float64)
        for seed in (1, 2):
            x = _images(seed).double().requires_grad_()
            if whole:
                out = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
            else:
                tokens = _embedded(model, x)

                def rest(t, model=model):
                    return model.forward_head(model.norm(model.blocks(t)))

                out = checkpoint(rest, tokens, use_reentrant=reentrant) if again else rest(tokens)
            total = total + out.square().sum()
        total.backward()
        return [parameter.grad for parameter in model.parameters()]

    for expected, found in zip(gradients(False), gradients(True)):
        assert (expected is None and found is None) or torch.equal(expected, found)


def test_tokens_that_nobody_can_place_are_refused():
    model = _model("tome")
    with torch.no_grad():
        tokens = model.blocks[:2](_embedded(model, _images(1)))
        expected = model.blocks[2:](tokens)
        assert torch.equal(model.blocks[2:](tokens), expected), "known again, although all blocks have run"
        with pytest.raises(vtok.StateError, match="block 2 was given tokens of which vtok does not know"):
            model.blocks[2](tokens + 0)
        for change, said in ((lambda t: t[:1], "13 tokens of 1 images"), (lambda t: torch.cat([t, t], 1), "26 tokens of 3")):
            hook = model.blocks[2].register_forward_pre_hook(lambda _, args, change=change: change(args[0]))
            with pytest.raises(vtok.StateError, match=f"block 2 was given {said}.*but 13 of 3 left block 1"):
                model(_images(1))
            hook.remove()
        hook = model.blocks[2].register_forward_pre_hook(lambda _, args: args[0] + 0)
        assert torch.equal(model(_images(1)), _model("tome")(_images(1))), (
            "tokens that a hook made anew are still in their place"
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_was_taken_out_is_passed_over(method):
    model, x = _model(method), _images(1)
    skipped = _model(method)
    skipped.blocks[1] = nn.Identity()
    with torch.no_grad():
        tokens = model.blocks[0](_embedded(model, x))
        expected = model.blocks[2:](tokens)
        assert torch.equal(skipped.blocks(_embedded(skipped, x)), expected)


@pytest.mark.parametrize("method", ["tome", "pitome", "zero_tprune", "random"])
def test_gradients_of_every_sample_by_vmap(method):
    model, x = _model(method), _images(1)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return functional_call(model, weights, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)["patch_embed.proj.weight"]
    for image, gradient in zip(x, found):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        torch.testing.assert_close(gradient, model.patch_embed.proj.weight.grad, rtol=1e-3, atol=1e-4)


class Louder(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 1.5 * super().forward(x, attn_mask, is_causal)


@pytest.mark.parametrize("method", METHODS)
def test_a_block_with_a_forward_of_its_own_is_refused(method):
    with pytest.raises(vtok.UnsupportedModelError, match="Louder has a forward of its own"):
        vtok.patch(_model(block_fn=Louder), method, **METHODS[method])
    late = _model()
    late.blocks[0].__class__ = Louder  # in front of all that is reduced: runs as it is
    x = _images(1)
    vtok.patch(late, "tome", r=[0, 0, 2])
    calls = []
    late.blocks[0].register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    with torch.no_grad():
        late(x)
        entered, left = calls[0]
        assert torch.equal(left, 1.5 * Block.forward(vtok.unpatch(late).blocks[0], entered))


def test_attention_that_ats_takes_apart_must_be_what_it_says():
    model = _model()
    attention = type(model.blocks[2].attn)
    louder = {"forward": lambda self, x, **kw: 2 * attention.forward(self, x, **kw)}
    model.blocks[2].attn.__class__ = type("Louder", (attention,), louder)
    with pytest.raises(vtok.UnsupportedModelError, match=r"Louder has a forward of its own"):
        vtok.patch(model, "ats")
    found, called = vtok.patch(model, "tome", r=[0, 0, 2]), []
    found.blocks[2].attn.register_forward_hook(lambda module, args, out: called.append((args[0], out)))
    with torch.no_grad():
        found(_images(1))  # which calls it whole
        entered, left = called[0]
        assert torch.equal(left, 2 * attention.forward(vtok.unpatch(model).blocks[2].attn, entered))
    model.blocks[2].attn.__class__ = type("Idle", (attention,), {"forward": lambda self, x, **kw: x})
    with pytest.raises(vtok.StateError, match="forward of this Idle does not call its k_norm"):
        vtok.patch(model, "tome", r=2)(_images(1))

    model = _model("ats")
    own = model.blocks[2].attn.forward
    model.blocks[2].attn.forward = types.MethodType(lambda self, x, **kw: 2 * own(x, **kw), model.blocks[2].attn)
    with pytest.raises(vtok.UnsupportedModelError, match="somebody replaced the forward of the Attention"):
        model(_images(1))

    model = _model("ats")
    model.blocks[2].attn.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(vtok.UnsupportedModelError, match="somebody hooked the Attention"):
        model(_images(1))


def test_hooks_on_all_modules_and_those_of_accelerate_that_are_gone_change_nothing():
    x = _images(1)
    expected = _model("ats")(x)
    seen = _model("ats")
    for module in seen.modules():
        module.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(seen(x), expected)

    hooks = pytest.importorskip("accelerate.hooks")
    left = _model()
    for block in left.blocks:
        hooks.add_hook_to_module(block.attn, hooks.ModelHook())
        hooks.remove_hook_from_module(block.attn)
    assert torch.equal(vtok.patch(left, "ats", **METHODS["ats"])(x), expected)


class Wrapped(Block):
    @functools.wraps(Block.forward)
    def forward(self, *args, **kwargs):
        return 1.5 * super().forward(*args, **kwargs)


def test_a_forward_of_its_own_behind_a_copied_signature_is_refused_and_one_that_runs_whole_is_not():
    with pytest.raises(vtok.UnsupportedModelError, match="Wrapped has a forward of its own"):
        vtok.patch(_model(block_fn=Wrapped), "tome", r=2)
    model, x, calls = _model(), _images(1), []
    model.blocks[2].__class__ = Louder  # behind all that is reduced, where no size has to be told
    vtok.patch(model, "random", keep=0.7, layers=[1])
    model.blocks[2].register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    with torch.no_grad():
        model(x)
        entered, left = calls[0]
        assert torch.equal(left, 1.5 * Block.forward(vtok.unpatch(model).blocks[2], entered))


class Pair(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask, is_causal), 0


def test_a_block_in_front_that_returns_more_than_tokens():
    model, x = _model(), _images(1)
    vtok.patch(model, "tome", r=[0, 0, 2])
    expected = model(x)
    vtok.unpatch(model)
    model.blocks[0].__class__ = Pair
    vtok.patch(model, "tome", r=[0, 0, 2])
    with torch.no_grad():
        tokens, _ = model.blocks[0](_embedded(model, x))
        assert torch.equal(model.forward_head(model.norm(model.blocks[1:](tokens))), expected)


def test_two_ways_on_from_the_same_tokens():
    model, x = _model("tome").train(), _images(1)
    found = []
    for wrap in (lambda block, t: block(t), lambda block, t: checkpoint(block, t, use_reentrant=False)):
        model.zero_grad()
        tokens = model.blocks[0](_embedded(model, x))
        ends = []
        for _ in range(2):
            t = tokens
            for block in model.blocks[1:]:
                t = wrap(block, t)
            ends.append(t)
        (ends[0].square().sum() + ends[1].sum()).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hooked", [(2,), (1, 2, 3)])
def test_a_checkpoint_around_a_model_whose_tokens_a_hook_changes(hooked, reentrant):
    """Several passes before one backward: none may be taken for another by where its tensors once lay."""
    found = []
    for checkpointed in (False, True):
        model = _model("tome", global_pool="avg").train().double()
        model.prompt = nn.Parameter(torch.full((24,), 0.1, dtype=torch.float64))
        for i in hooked:
            model.blocks[i].register_forward_pre_hook(lambda _, args, prompt=model.prompt: (args[0] + prompt,))
        images = [_images(seed).double().requires_grad_() for seed in range(4)]
        outputs = [checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x) for x in images]
        sum(out.square().sum() for out in outputs).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_block_in_several_places_is_refused():
    model = _model()
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    with pytest.raises(vtok.UnsupportedModelError, match="blocks 0 and 1 are one Block"):
        vtok.patch(model, "tome", r=2)
