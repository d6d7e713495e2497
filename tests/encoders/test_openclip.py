"""open_clip models as people use them: CLIP and CoCa, image and text, intermediate outputs, masks, the registry."""

import copy
import dataclasses

import pytest
import torch
import zoo
from zoo import EXAMPLES, Nothing, attach, build, images

import vtok
from vtok.core.tokens import Place
from vtok.eval.benchmarks.flops import count_macs
from vtok.patches.block import ReducingBlock
from vtok.patches.module_swap import Hook, Mixin
from vtok.patches.openclip_vit.adapter import BLOCKS
from vtok.patches.protocol import look_up
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of

open_clip = pytest.importorskip("open_clip")

NAME = "open_clip: ViT"
VISION = {"image_size": 64, "patch_size": 8, "width": 48, "layers": 4, "head_width": 12}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
RESNET = {**VISION, "layers": (1, 1, 1, 1), "width": 8}


def clip(vision=VISION, cls=None, **extra):
    torch.manual_seed(0)
    return (cls or open_clip.CLIP)(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**TEXT), **extra).eval()


def coca(**vision):
    torch.manual_seed(0)
    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True}
    decoder = {**TEXT, "width": 16, "dim_head": 8, "n_queries": 6, "attn_pooler_heads": 2}
    text = {**TEXT, "width": 16, "embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(16, decoder, text, {**VISION, **pool, **vision}).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.25)  # open_clip leaves it as the memory was
    return model


def pictures(batch=3):
    return images(NAME, batch)


def words(batch=3):
    return torch.randint(1, 50, (batch, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("method", encoder_methods())
def test_the_text_tower_is_never_touched(cls, method):
    """Its blocks are of the same class as those of the image tower."""
    model, x, text = clip(cls=cls), pictures(), words()
    own = {n: type(m) for n, m in model.named_modules() if not n.startswith("visual")}
    assert any(look_up(m, BLOCKS) for n, m in model.named_modules() if not n.startswith("visual"))
    with torch.no_grad():
        before, reference = model.encode_text(text), model(x, text)
        vtok.patch(model, method, **zoo.SETTINGS[method])
        assert {n: type(m) for n, m in model.named_modules() if not n.startswith("visual")} == own
        for n, m in model.named_modules():
            if not n.startswith("visual"):
                assert not isinstance(m, Mixin)
                assert not any(isinstance(h, Hook) for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        assert torch.equal(model.encode_text(text), before)
        image, words_, scale = model(x, text)
        assert torch.equal(words_, reference[1])
        assert torch.equal(scale, reference[2])
        assert not torch.equal(image, reference[0])
        assert torch.equal(image, model.encode_image(x, normalize=True))
        for got, expected in zip(vtok.unpatch(model)(x, text), reference):
            assert torch.equal(got, expected)


def test_supports_and_info_name_the_image_tower():
    model = clip()
    support = vtok.supports(model)
    assert support
    assert support.towers == (("visual", "VisionTransformer", 4, "ResidualAttentionBlock x4"),)
    assert {name for name, why in support.methods.items() if why is None} == set(encoder_methods())
    vtok.patch(model, "tome", r=6)
    info = vtok.info(model, probe=pictures())
    assert "visual (VisionTransformer): tome" in str(info)
    assert [b.tokens_out for b in info.towers[0].blocks] == [59, 53, 47, 41]
    assert {b.kernel for b in info.towers[0].blocks} == {"flash (cpu)"}
    assert vtok.supports(model).towers == support.towers
    idle = vtok.info(vtok.patch(model, vtok.RandomDrop(keep=0.5, layers=[3])), probe=pictures())
    assert [b.kernel for b in idle.towers[0].blocks] == ["native multi-head"] * 3 + ["flash (cpu)"]


def test_budgets_and_saved_patches(tmp_path):
    model = vtok.patch(clip(), "tome", flops=0.7)
    x = pictures()
    with torch.no_grad():
        reference = model.encode_image(x)
    assert vtok.info(model).towers[0].estimate.fraction == pytest.approx(0.7, abs=0.02)
    vtok.save_config(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(vtok.patch(clip(), tmp_path).encode_image(x), reference)


def test_nothing_reduced_is_close_where_the_native_kernel_is_replaced():
    model, x = clip(), pictures()
    with torch.no_grad():
        reference = model.encode_image(x)
        for place in Place:
            vtok.patch(model, Nothing(place=place, needs=frozenset("qk")))
            assert (model.encode_image(x) - reference).norm() <= 3e-7 * reference.norm()


def test_the_pooled_tokens_of_coca_feed_its_decoder():
    model, x, text = coca(), pictures(), words()
    with torch.no_grad():
        reference = model(x, text)
        vtok.patch(model, "pitome", ratio=0.8)
        reduced = model(x, text)
        assert reduced["logits"].shape == reference["logits"].shape
        assert not torch.equal(reduced["image_features"], reference["image_features"])
        assert torch.equal(reduced["text_features"], reference["text_features"])
        pooled, tokens = model.visual(x)
        assert tokens.shape == (3, 5, 16)
        assert torch.equal(torch.nn.functional.normalize(pooled, dim=-1), reduced["image_features"])
        again = vtok.unpatch(model)(x, text)
    assert all(torch.equal(again[k], reference[k]) for k in reference if isinstance(reference[k], torch.Tensor))


@pytest.mark.parametrize("pool", ["tok", "avg", "none"])
def test_output_tokens_are_those_that_are_left(pool):
    """With `output_tokens`, and without any pooling, callers get the reduced tokens; `unmerge` puts them back."""
    visual = clip({**VISION, "pool_type": pool, "output_tokens": True}).visual
    x = pictures()
    vtok.patch(visual, "tome", r=6, trace=True)
    with torch.no_grad():
        pooled, tokens = visual(x)
    skipped = 0 if pool == "none" else 1
    assert tokens.shape == (3, 41 - skipped, 48)
    assert pooled.shape == ((3, 41, 16) if pool == "none" else (3, 16))
    counted, seen = count_macs(visual, x), vtok.info(visual).towers[0].estimate
    assert counted.model == seen.macs
    if pool == "none":
        assert vtok.unmerge(visual, tokens).shape == (3, 65, 48)


def test_intermediate_outputs():
    model, x = vtok.patch(clip(), "tome", r=[0, 6, 6, 6]), pictures()
    with torch.no_grad():
        features = model.encode_image(x)
        out = model.forward_intermediates(x, image_output_fmt="NLC", image_output_extra_tokens=True, normalize=False)
        assert [t.shape[1] for t in out["image_intermediates"]] == [64, 58, 52, 46]
        assert torch.equal(out["image_features"], features)
        early = model.forward_intermediates(x, image_indices=[0], stop_early=True, intermediates_only=True)
        assert early["image_intermediates"][0].shape == (3, 48, 8, 8)
        with pytest.raises(vtok.StateError, match="output_fmt='NLC'"):
            model.forward_intermediates(x)
        with pytest.raises(vtok.StateError, match="output_fmt='NLC'"):
            model.forward_intermediates(x, image_indices=[1], stop_early=True)


def test_a_map_that_would_scramble_tokens_is_refused():
    """16 of 64 tokens with 48 channels fill an 8 x 8 map with 12 channels: upstream's reshape does not notice."""
    visual = vtok.patch(clip().visual, "random", keep=0.5)
    with torch.no_grad(), pytest.raises(vtok.StateError, match="no longer fill"):
        visual.forward_intermediates(pictures(), indices=[1], stop_early=True)


@pytest.mark.parametrize("method", encoder_methods())
def test_patch_dropout_comes_before_reduction(method):
    """In training every image keeps its own random patches; indices count what is left of them."""
    model = clip({**VISION, "patch_dropout": 0.5}).train()
    vtok.patch(model, method, **zoo.SETTINGS[method], trace=True)
    model.encode_image(pictures()).square().sum().backward()
    run = run_of(model)
    assert run.current.length == 33
    assert run.current.tokens(4) < 33
    assert run.current.final.group.shape == (3, 33)
    assert all(torch.isfinite(p.grad).all() for p in model.visual.parameters())
    assert "saw 32 patches" in str(vtok.info(model))
    with torch.no_grad():
        model.eval().encode_image(pictures())
    assert run.current.length == 65


def _masks(batch, heads, rows):
    """Masks as open_clip's blocks take them: additive [N, N], one for every image and head, boolean (True = not attended)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(batch * heads, rows, rows, generator=generator, dtype=torch.float64) < 0.3
    hidden[:, :, 0] = False  # nobody is left with nothing to attend to
    added = torch.zeros_like(hidden, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    return {"two": added[0], "three": added, "boolean": hidden[0]}


@pytest.mark.parametrize("kind", ["two", "three", "boolean"])
@pytest.mark.parametrize("name", [NAME, "open_clip: ViT custom blocks, all norms"])
def test_attention_masks_keep_their_meaning(name, kind):
    """Given to the stack of blocks by hand: the same result step by step, and masked tokens may go without a trace."""
    visual, x = build(name, torch.float64), images(name, dtype=torch.float64)
    mask = _masks(2, 4, 65)[kind]
    with torch.no_grad():
        tokens = visual._embeds(x)
        reference = visual.transformer(tokens, attn_mask=mask)
        for place in (Place.BLOCK_PRE, Place.BLOCK_MID):
            vtok.patch(visual, Nothing(place=place, needs=frozenset("k")))
            assert (visual.transformer(tokens, attn_mask=mask) - reference).abs().max() <= 1e-11 * reference.abs().max()
        dropped = attach(name, visual, "uniform").transformer(tokens, attn_mask=mask)
        alone = [visual.transformer(t[None], attn_mask=m) for t, m in zip(tokens, _per_image(mask, len(tokens)))]
    assert dropped.shape[1] < 40
    assert (dropped - torch.cat(alone)).abs().max() <= 1e-10 * dropped.abs().max()


def _per_image(mask, batch):
    return mask.chunk(batch) if mask.ndim == 3 else [mask] * batch


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.startswith("open_clip: timm")])
def test_wrapped_trunks_are_found_once_and_priced_whole(name):
    model = clip()
    model.visual = build(name)
    support = vtok.supports(model)
    assert [(path, depth) for path, _, depth, _ in support.towers] == [("visual", 4)]
    x = pictures()
    with torch.no_grad():
        reference = model.encode_image(x)
        vtok.patch(model, "tome", r=6)
        out = model.encode_image(x)
        assert not torch.equal(out, reference)
        assert sum(isinstance(m, ReducingBlock) for m in model.modules()) == 4
        assert count_macs(model.visual, x).model == vtok.info(model).towers[0].estimate.macs
        assert vtok.plan(model, "tome", r=6).estimate.base_macs == count_macs(vtok.unpatch(model).visual, x).model
        assert torch.equal(model.encode_image(x), reference)
    if "map pool" in name:
        assert "class token" in support.methods["ats"]
        with pytest.raises(vtok.StateError, match="output_fmt='NLC'"), torch.no_grad():
            vtok.patch(model, "tome", r=6).forward_intermediates(x)


def test_a_trunk_alone_is_the_business_of_its_own_adapter():
    trunk = build("open_clip: timm trunk").trunk
    assert vtok.supports(trunk).towers[0][0] == ""


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        (RESNET, ["the image tower visual is a ModifiedResNet", "open_clip's VisionTransformer"]),
        ({"timm_model_name": "test_resnet", "timm_pool": ""}, ["visual is a TimmModel around a ResNet", "open_clip's"]),
        ({**VISION, "scaled_cosine_attn": True}, ["block 0 uses scaled cosine attention", "open_clip itself cannot run"]),
    ],
)
def test_other_towers_are_refused_with_what_is_supported(vision, words):
    model = clip(vision)
    with pytest.raises(vtok.UnsupportedModelError) as caught:
        vtok.patch(model, "tome")
    for word in words:
        assert word in str(caught.value)
    assert not vtok.supports(model)
    assert str(caught.value) in str(vtok.supports(model))


def test_unknown_blocks_and_sizes_are_refused():
    model = clip()
    model.visual.transformer.resblocks[2] = torch.nn.Identity()
    with pytest.raises(vtok.UnsupportedModelError, match=r"block 2 is a torch\.nn.*Identity.*known: open_clip"):
        vtok.patch(model, "tome")
    model = clip()
    model.visual.transformer.resblocks[1].attn = torch.nn.Identity()
    with pytest.raises(vtok.UnsupportedModelError, match=r"block 1 attends with .*Identity.*known: open_clip"):
        vtok.patch(model, "tome")
    model = clip()
    model.visual.transformer.resblocks = torch.nn.ModuleList()
    with pytest.raises(vtok.UnsupportedModelError, match="no blocks left"):
        vtok.patch(model, "tome")
    with pytest.raises(vtok.UnsupportedModelError, match="force_image_size"):
        vtok.plan(clip(), "tome", input_size=(3, 32, 32))


def test_upstream_defects_that_contract_tests_leave_out():
    """Once open_clip mends these, drop NOT_CHECKPOINTED, the refusal of scaled cosine attention, the examples' equal widths."""
    x = pictures()
    for patched in (False, True):
        custom = clip({**VISION, "block_type": "custom"}).visual
        custom.set_grad_checkpointing()
        with pytest.raises(TypeError, match="positional arguments"):
            (vtok.patch(custom, "tome", r=6) if patched else custom)(x)
    with pytest.raises(RuntimeError, match="3D tensor"):
        clip({**VISION, "scaled_cosine_attn": True}).visual(x)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        clip({**VISION, "attentional_pool": "cascade"}).visual(x)


def test_copies_of_a_whole_model_are_patched_on_their_own():
    model, x = vtok.patch(clip(), "tome", r=6), pictures()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        reduced = model.encode_image(x)
        vtok.unpatch(model)
        assert torch.equal(twin.encode_image(x), reduced)
        assert not torch.equal(model.encode_image(x), reduced)


SAMPLE = (
    "ViT-B-32-quickgelu",
    "ViT-L-14",
    "coca_base",
    "EVA02-B-16",
    "ViT-B-16-SigLIP2-256",
    "ViTamin-S",
    "RN50",
    "convnext_base",
)
CONVOLUTIONS = ("RN", "convnext", "swin")


def _covered(name):
    """Whether the image tower of an architecture is covered; whatever is not must say why."""
    config = open_clip.get_model_config(name)
    fields = {f.name for f in dataclasses.fields(open_clip.CLIPVisionCfg)}
    vision = open_clip.CLIPVisionCfg(**{k: v for k, v in config["vision_cfg"].items() if k in fields})
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    support = vtok.supports(visual)
    if not support:
        assert "supported: " in support.reason or "known: " in support.reason, (name, support.reason)
        return False
    assert support.methods["random"] is support.methods["tome"] is None, (name, support.methods)
    return True


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_registered_architectures(name):
    assert _covered(name) == (not name.startswith(CONVOLUTIONS))


@pytest.mark.slow
def test_all_registered_architectures(capsys):
    covered = {name: _covered(name) for name in open_clip.list_models()}
    refused = sorted(name for name, yes in covered.items() if not yes)
    with capsys.disabled():
        print(f"\nopen_clip {open_clip.__version__}: {sum(covered.values())} of {len(covered)} image towers covered")
        print(f"refused: {', '.join(refused)}")
    assert all(not name.startswith(CONVOLUTIONS) for name, yes in covered.items() if yes)
    assert len(refused) <= 0.22 * len(covered)


def test_a_wrapped_trunk_is_counted_once():
    """The tower of another backend inside open_clip's wrapper is one tower, in every cost."""
    from vtok.eval.common.settings import pass_cost, towers

    model, x = build("open_clip: timm trunk"), images("open_clip: timm trunk")
    assert len(towers(model)) == 1
    base = vtok.plan(model, "tome", r=0).estimate.base_macs
    assert pass_cost(model).macs == base
    with torch.no_grad():
        assert count_macs(model, x).model == base
        vtok.patch(model, "tome", r=6)(x)
    assert pass_cost(model).base_macs == base > pass_cost(model).macs
