"""Bad input gets a message that says what was wrong, what was found and what to do. Each message is read here."""

import pytest
import timm
import torch
from helpers_errors import message_of
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.torch_version import TorchVersion
from zoo import Nothing, build, images

import vtok
from vtok.core.tokens import Place
from vtok.methods.ats import ATS


@pytest.fixture
def model():
    return build("timm: ViT")


def test_unknown_method(model):
    text = message_of(vtok.UnknownNameError, vtok.patch, model, "pitom")
    assert "unknown method 'pitom'" in text
    assert "did you mean 'pitome'?" in text
    assert "zero_tprune" in text


def test_unknown_parameter(model):
    text = message_of(vtok.UnknownNameError, vtok.patch, model, "pitome", ratoi=0.9)
    assert "unknown parameter of pitome 'ratoi'" in text
    assert "did you mean 'ratio'?" in text


def test_parameters_beside_a_config_object(model):
    assert "PiToMe(ratio=...)" in message_of(vtok.ConfigError, vtok.patch, model, vtok.PiToMe(), ratio=0.9)


def test_a_method_that_is_no_method(model):
    assert "unknown method '3'" in message_of(vtok.UnknownNameError, vtok.patch, model, 3)


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("tome", {"r": 500}, ["r=500 in block 0", "64 patches", "at most 32"]),
        ("tome", {"r": -1}, ["cannot be negative"]),
        ("tome", {"r": 2.5}, ["must be whole", "2.5"]),
        ("tome", {"r": [1, 2, 3, 4, 5]}, ["lists 5 blocks", "has 4"]),
        ("tome", {"r": (8, -1, 2)}, ["(r, inflect)", "pass a list"]),
        ("pitome", {"r": 500}, ["r=500", "at most 32"]),
        ("pitome", {"ratio": 0.9, "r": 3}, ["ratio or r, not both"]),
        ("pitome", {"ratio": 1.2}, ["fraction in (0, 1]", "1.2"]),
        ("pitome", {"preset": "official"}, ["unknown preset 'official'", "official_deit"]),
        ("pitome", {"preset": "official_deit", "margin": 0.5}, ["fixes the margins"]),
        ("pitome", {"alpha": -1.0}, ["alpha", ">= 0"]),
        ("ats", {"num_tokens": 0}, ["whole number >= 1"]),
        ("ats", {"num_tokens": 8, "keep": 0.5}, ["num_tokens or keep, not both"]),
        ("ats", {"mode": "dorp"}, ["mode must be one of drop, mask"]),
        ("ats", {"parity": True, "num_tokens": 8}, ["parity=True", "cannot be set"]),
        ("ats", {"layers": [7]}, ["layers names block 7", "blocks 0 to 3"]),
        ("zero_tprune", {"layers": [1, 2], "retain": [0.9]}, ["retain has 1 values for 2 layers"]),
        ("zero_tprune", {"layers": [1]}, ["layers is given without retain"]),
        ("zero_tprune", {"layers": [1, 1], "retain": 0.9}, ["names a block twice"]),
        ("zero_tprune", {"retain": 0.0}, ["retain is a fraction in (0, 1]"]),
        ("zero_tprune", {"r": 60}, ["r=60", "at most 32"]),
        ("zero_tprune", {"metric": "cosine"}, ["metric must be one of cos, dot"]),
        ("zero_tprune", {"head_filter": (0.7, 0.1)}, ["(low, high)"]),
        ("random", {"keep": 0}, ["keep is a fraction in (0, 1]"]),
        ("random", {"seed": 1.5}, ["seed must be a whole number"]),
        ("uniform", {"keep": True}, ["keep is a fraction"]),
        ("tome", {"prop_attn": "yes"}, ["prop_attn is True or False, got 'yes'"]),
        ("pitome", {"prop_attn": 1}, ["prop_attn is True or False"]),
        ("pitome", {"preset": ["official_deit"]}, ["unknown preset"]),
        ("ats", {"parity": "no"}, ["parity is True or False"]),
        ("ats", {"layers": 5}, ["layers is a list of block numbers", "got 5"]),
        ("ats", {"layers": [1.5]}, ["layers is a list of block numbers"]),
        ("uniform", {"layers": "12"}, ["layers is a list of block numbers"]),
        ("zero_tprune", {"layers": 1, "retain": 0.5}, ["layers is a list of block numbers"]),
        ("zero_tprune", {"layers": ["a"], "retain": 0.5}, ["layers is a list of block numbers"]),
        ("zero_tprune", {"head_filter": 3}, ["head_filter is (low, high) or None, got 3"]),
        ("zero_tprune", {"head_filter": ("a", "b")}, ["head_filter is (low, high) or None"]),
        ("tome", {"r": 3, "flops": 0.6}, ["flops sets r of tome", "not both"]),
        ("pitome", {"r": 3, "flops": 0.6}, ["flops sets r of pitome", "not both"]),
        ("ats", {"num_tokens": 30, "flops": 0.6}, ["flops sets num_tokens of ats", "not both"]),
        ("random", {"keep": 0.5, "flops": 0.6}, ["flops sets keep of random", "not both"]),
        ("tome", {"r": 3, "input_size": 64}, ["input_size is (channels, height, width), got 64"]),
        ("tome", {"r": 3, "input_size": (3, 64)}, ["input_size is (channels, height, width)"]),
        ("ats", {"flops": 0.6, "calibration": [1]}, ["calibration is a batch of images", "got list"]),
        (
            "ats",
            {"flops": 0.6, "calibration": torch.zeros(3, 64, 64)},
            ["calibration is a batch of images", "shape [3, 64, 64]"],
        ),
    ],
)
def test_values_that_make_no_sense(model, method, params, words):
    text = message_of(vtok.ConfigError, vtok.patch, model, method, **params)
    for word in words:
        assert word in text, text
    assert not vtok.info(model).patched


def test_empty_lists_reduce_nothing(model):
    for method, params in (("tome", {"r": []}), ("pitome", {"r": []}), ("pitome", {"ratio": []}), ("ats", {"layers": []})):
        assert set(vtok.plan(model, method, **params).tokens) == {65}


def test_budgets_that_cannot_be_met(model):
    text = message_of(vtok.BudgetError, vtok.patch, model, "tome", flops=0.05)
    assert "cannot bring VisionTransformer down to flops=0.05" in text
    assert "strongest setting still needs 0." in text
    assert "in (0, 1], got 1.5" in message_of(vtok.ConfigError, vtok.patch, model, "tome", flops=1.5)
    both = [vtok.ToMe(r=[4, 0, 0, 0]), vtok.RandomDrop(keep=0.9, layers=[3])]
    assert "sets the knob of one method" in message_of(vtok.ConfigError, vtok.patch, model, both, flops=0.5)


def test_a_default_that_a_shallow_tower_cannot_meet_is_no_budget_of_the_users():
    net = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=4)
    with pytest.raises(vtok.ConfigError) as caught:
        vtok.patch(net, "tome")
    assert not isinstance(caught.value, vtok.BudgetError)
    assert "the default of tome leaves 0.6 of the blocks' FLOPs, for which VisionTransformer is too shallow; give r" in str(
        caught.value
    )
    with pytest.raises(vtok.BudgetError, match="cannot bring"):
        vtok.patch(net, "tome", flops=0.5)


def test_two_methods_in_one_block(model):
    text = message_of(vtok.ConfigError, vtok.patch, model, ["tome", vtok.RandomDrop(layers=[3])])
    assert "two methods reduce in block 3" in text
    assert "different layers" in text


def test_two_methods_in_different_blocks(model):
    vtok.patch(model, [vtok.ToMe(r=[6, 6]), vtok.RandomDrop(keep=0.5, layers=[3])])
    with torch.no_grad():
        model(images("timm: ViT"))
    assert [b.tokens_out for b in vtok.info(model).towers[0].blocks] == [59, 53, 53, 27]


def test_padding_is_not_handed_to_other_methods(model):
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, [ATS(layers=[1]), vtok.RandomDrop(layers=[3])])
    assert "patch it alone" in text


def test_unsupported_blocks():
    with torch.device("meta"):
        model = timm.create_model("vit_relpos_small_patch16_224")
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "tome")
    assert "block 0 of VisionTransformerRelPos is a timm.models.vision_transformer_relpos.RelPosBlock" in text
    assert "supported: timm's plain ViTs" in text


def test_unknown_attention():
    class MyAttention(nn.Module):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model = build("timm: ViT")
    model.blocks[2].attn = MyAttention()
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "tome")
    assert "block 2 of VisionTransformer attends with" in text
    assert "MyAttention, which vtok does not know" in text


@pytest.mark.parametrize("nothing", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 8, 3))])
def test_nothing_to_patch(nothing):
    text = message_of(vtok.UnsupportedModelError, vtok.patch, nothing, "tome")
    assert "holds nothing that vtok can patch" in text
    assert "VisionTransformer" in text
    assert "the prompts of transformers' LLaVA" in text
    assert " object at 0x" not in text


def test_parameters_in_the_name_of_a_method(model):
    text = message_of(vtok.ConfigError, vtok.patch, model, "tome:r=8")
    assert "'tome:r=8' holds parameters" in text
    assert "'tome', r=8" in text
    assert "'divprune', keep=0.1" in message_of(vtok.ConfigError, vtok.plan, model, ["tome", "divprune:keep=0.1"])


def test_not_a_module():
    assert "got str" in message_of(vtok.UnsupportedModelError, vtok.patch, "vit_base", "tome")
    assert "got str" in message_of(vtok.UnsupportedModelError, vtok.unpatch, "vit_base")


def test_a_class_in_place_of_a_config(model):
    assert "pass an object of it: vtok.ToMe(...)" in message_of(vtok.ConfigError, vtok.patch, model, vtok.ToMe)


def test_a_forward_replaced_by_someone_else(model):
    original = model.blocks[1].forward
    model.blocks[1].forward = lambda *args, **kwargs: original(*args, **kwargs)
    text = message_of(vtok.StateError, vtok.patch, model, "tome", r=4)
    assert "forward of this Block was replaced on the instance" in text
    assert "Patch with vtok first" in text
    assert not any(hasattr(block, "_vtok") for block in model.blocks)


def test_a_refused_patch_changes_nothing():
    """Neither half of the towers nor an earlier patch is touched when a forward turns out to be replaced."""

    def replace(module):
        original = module.forward
        module.forward = lambda *args, **kwargs: original(*args, **kwargs)

    pair = nn.ModuleList([build("timm: ViT"), build("timm: ViT")])
    replace(pair[1].blocks[3])
    assert "was replaced" in message_of(vtok.StateError, vtok.patch, pair, "tome", r=4)
    assert not vtok.info(pair).patched
    patched = vtok.patch(build("timm: ViT"), "tome", r=4)
    replace(patched.blocks[3])
    before = str(vtok.info(patched))
    text = message_of(vtok.StateError, vtok.patch, patched, "pitome")
    assert len(text) < 300, "the whole module was printed"
    assert str(vtok.info(patched)) == before


def test_a_class_put_on_top_of_ours(model):
    vtok.patch(model, "tome", r=4)
    block = model.blocks[1]
    block.__class__ = type("Wrapped", (type(block),), {})
    text = message_of(vtok.StateError, vtok.unpatch, model)
    assert "was wrapped by another tool" in text


def test_methods_that_need_a_class_token():
    model = build("timm: ViT average pool")
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "ats", num_tokens=30)
    assert "reads the attention of a class token and VisionTransformer has none" in text
    assert 'query="mean"' in text
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "zero_tprune")
    assert 'cls_init="uniform"' in text


def test_methods_that_need_probabilities():
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("timm: ViT differential attention"), "ats", num_tokens=30)
    assert "difference of two softmaxes" in text


def test_a_tap_that_does_not_exist():
    greedy = Nothing(place=Place.BLOCK_END, needs=frozenset("kv"))
    text = message_of(vtok.UnsupportedModelError, vtok.patch, build("timm: ViT differential attention"), greedy)
    assert "DiffAttention does not show v" in text


@pytest.mark.skipif(TorchVersion(timm.__version__) < "1.0.26", reason="timm has this pool since 1.0.26")
def test_pools_that_cannot_see_sizes():
    from timm.models.vision_transformer import VisionTransformer

    kwargs = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
    model = VisionTransformer(**kwargs, global_pool="prr").eval()
    text = message_of(vtok.UnsupportedModelError, vtok.patch, model, "tome", r=4)
    assert "tome cannot be used on VisionTransformer: its attention pool (prr) takes no mask" in text
    vtok.patch(model, "random", keep=0.8)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


def test_causal_attention(model):
    vtok.patch(model, "tome", r=4)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(images("timm: ViT")))
        text = message_of(vtok.UnsupportedModelError, model.blocks[0], tokens, is_causal=True)
    assert "vtok patches encoders" in text


def test_packed_input():
    model = vtok.patch(build("timm: NaFlexViT"), "random", input_size=(3, 64, 64))
    packed = {"patches": torch.zeros(1, 4, 192), "patch_coord": torch.zeros(1, 4, 2), "patch_valid": torch.ones(1, 4)}
    text = message_of(vtok.UnsupportedModelError, model, packed)
    assert "packed NaFlex input is not supported" in text
