"""Images of one batch that keep different numbers of tokens: layers that look at tokens one by one see the real ones alone."""

import pytest
import torch
import zoo
from torch.nn.modules.module import register_module_forward_pre_hook
from zoo import EXAMPLES

import vtok
from vtok.core.tokens import TokenState
from vtok.patches import padding

BATCH = 5
NAMES = [
    name
    for name in (
        "timm: ViT",
        "timm: ViT res-post-norm",
        "open_clip: ViT",
        "transformers: ViT",
        "transformers: SigLIP tower",
        "transformers: DINOv2 classifier, registers",
    )
    if name in EXAMPLES
]


def _model(name, train=False, **extra):
    model = zoo.attach(name, zoo.build(name, torch.float64), "ats", **extra)
    return model.train() if train else model


def _seen(model, images):
    """(output, rows that every MLP was given)."""
    rows, layers = [], {id(block.mlp) for block in zoo.block_list(model)}

    def watch(module, args):  # of all modules: one of a layer's own would have it shown whole batches
        if id(module) in layers:
            rows.append(args[0].shape[:2].numel())

    hook = register_module_forward_pre_hook(watch)
    try:
        return model(images), rows
    finally:
        hook.remove()


def _real(model):
    """Rows that are real in every block."""
    return [sum(block.per_image or (BATCH * block.tokens_out,)) for block in vtok.info(model).towers[0].blocks]


@pytest.mark.parametrize("name", NAMES)
def test_real_rows_alone_give_the_same(name, monkeypatch):
    model, images = _model(name), zoo.images(name, BATCH, torch.float64)
    monkeypatch.setattr(padding, "WORTH", 1.0)
    with torch.no_grad():
        out, rows = _seen(model, images)
        assert rows == _real(model)
        assert any(block.per_image for block in vtok.info(model).towers[0].blocks)
        monkeypatch.setattr(padding, "WORTH", 0.0)
        padded, more = _seen(model, images)
    assert sum(more) > sum(rows)
    torch.testing.assert_close(out, padded, rtol=0, atol=1e-12)


def test_gradients_are_those_of_padded_batches(monkeypatch):
    images = zoo.images(NAMES[0], BATCH, torch.float64)
    found = []
    for share in (padding.WORTH, 0.0):
        monkeypatch.setattr(padding, "WORTH", share)
        model = _model(NAMES[0])
        model(images).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["mask", "train", "one image", "rotary"])
def test_nothing_is_packed(how):
    """Where rows are not known on the host, where DropPath drops whole images, where nothing is padding, and where every image
    has rotary tables of its own."""
    name = "timm: EVA-02 rotary, SwiGLU" if how == "rotary" else NAMES[0]
    model = _model(name, train=how == "train", **({"mode": "mask"} if how == "mask" else {}))
    images = zoo.images(name, 1 if how == "one image" else BATCH, torch.float64)
    with torch.no_grad():
        _, rows = _seen(model, images)
    blocks = vtok.info(model).towers[0].blocks
    assert rows == [len(images) * block.tokens_out for block in blocks]


def test_rows_go_back_where_they_came_from():
    state = TokenState(0, 4, counts=(2, 4, 1))
    real = padding.real_rows(state, 4)
    t = torch.randn(3, 4, 5)
    packed = real.together(t)
    assert packed.shape == (1, 7, 5)
    keep = torch.arange(4) < torch.tensor([2, 4, 1])[:, None]
    assert torch.equal(packed[0], t[keep])
    assert torch.equal(real.apart(packed), t * keep[..., None])
    heads = packed.unflatten(-1, (5, 1)).transpose(1, 2)  # [1, 5, 7, 1]
    assert torch.equal(real.heads_apart(heads).transpose(1, 2).flatten(2), t * keep[..., None])
    assert padding.real_rows(state._replace(counts=(4, 4, 4)), 4) is None
    assert padding.real_rows(state._replace(counts=None), 4) is None


def _hook(model):
    """Adds to every image a vector of its own, as people steer features."""
    steer = torch.randn(BATCH, 1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.blocks[2].mlp.register_forward_hook(lambda _module, _args, out: out + steer)


def _wrapped(model):
    inner = model.blocks[2].mlp.forward
    model.blocks[2].mlp.forward = lambda x: inner(x) * torch.arange(1, len(x) + 1)[:, None, None]


def _dropping(model):
    """Whole images, in a layer that was left in training mode."""
    from timm.layers import DropPath

    model.blocks[2].drop_path2 = DropPath(0.5).train()


class Pooled(torch.nn.Module):
    """Adds what the tokens of an image are on average."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean(1, keepdim=True)


def _mixing(model):
    model.blocks[2].mlp = Pooled(model.blocks[2].mlp).eval()


@pytest.mark.parametrize("change", [_hook, _wrapped, _dropping, _mixing])
def test_whoever_looks_at_a_layer_is_shown_whole_batches(change, monkeypatch):
    found = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(padding, "WORTH", share)
        model, images = _model(NAMES[0]), zoo.images(NAMES[0], BATCH, torch.float64)
        change(model)
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(model(images))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_a_layer_that_does_not_look_at_tokens_one_by_one_is_refused():
    real = padding.real_rows(TokenState(0, 4, counts=(2, 4, 1)), 4)
    for shape in ((1, 6, 5), (3, 7, 5)):
        with pytest.raises(vtok.StateError, match=r"looks at more than one token at a time; pass mode='mask' to ats"):
            real.apart(torch.zeros(shape))


@pytest.mark.parametrize(("method", "extra"), [("ats", {"mode": "mask"}), ("tome", {}), ("pitome", {})])
def test_a_trace_of_one_image_serves_several(method, extra):
    model, images = zoo.attach(NAMES[0], zoo.build(NAMES[0]), method, **extra), zoo.images(NAMES[0], 3)
    with torch.no_grad():
        traced = torch.jit.trace(model, images[:1], check_trace=False)
        torch.testing.assert_close(traced(images), model(images), rtol=0, atol=1e-5)
