"""What is particular to Hugging Face encoders: kernels, recorded outputs, other resolutions, what is refused."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from zoo import EXAMPLES, Nothing, attach, build, images, pairs

import vtok
from vtok.patches.hf_vision.examples import _TEXT, _TINY
from vtok.patches.hf_vision.tables import ATTENTIONS, BLOCKS, OWNERS, TOWERS
from vtok.targets.resolve import run_of

HF = [name for name in EXAMPLES if name.startswith("transformers: ")]


def inner(model):
    """The transformers model inside an example."""
    return model.model


def test_every_row_of_the_tables_is_a_class_of_this_version():
    from importlib import import_module

    for table in (ATTENTIONS, BLOCKS, OWNERS, TOWERS):
        for name in table:
            module, _, cls = name.rpartition(".")
            assert isinstance(getattr(import_module(module), cls), type), name


def test_examples_cover_the_tables():
    """Every encoder is exercised; Idefics2's and SmolVLM's classes are copies of Idefics3's."""
    from vtok.patches.protocol import look_up

    found = {table: set() for table in ("blocks", "towers", "owners")}
    for name in HF:
        for module in build(name).modules():
            for key, table in (("blocks", BLOCKS), ("towers", TOWERS), ("owners", OWNERS)):
                if look_up(module, table) is not None:
                    found[key].add(f"{type(module).__module__}.{type(module).__qualname__}")
    assert set(BLOCKS) - found["blocks"] == {"transformers.models.idefics2.modeling_idefics2.Idefics2EncoderLayer"}
    assert {n.rpartition(".")[2] for n in set(TOWERS) - found["towers"]} == {"Idefics2VisionTransformer"}
    text = {"BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipModel"}
    assert {n.rpartition(".")[2] for n in set(OWNERS) - found["owners"]} == text


@pytest.mark.parametrize(("name", "method"), [p for p in pairs(HF) if p[1] in ("tome", "ats", "zero_tprune")])
def test_eager_gives_the_numbers_of_sdpa(name, method):
    model, x = attach(name, build(name), method), images(name)
    with torch.no_grad():
        fused = model(x)
        inner(model).set_attn_implementation("eager")
        eager = model(x)
    assert (eager - fused).abs().max() <= 2e-5 * fused.abs().max()


@pytest.fixture
def flash(monkeypatch):
    """Stands in for a flash kernel: what it cannot do, a mask, is an error here."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def kernel(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert attention_mask is None
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)


@pytest.mark.parametrize("name", ["transformers: ViT", "transformers: CLIP tower", "transformers: DINOv3 rotary, registers"])
def test_flash_is_refused_only_where_sizes_matter(name, flash):
    model, x = build(name), images(name)
    pruned = [
        ("random", {"keep": 0.8}),
        ("zero_tprune", {"layers": [0, 2], "retain": 0.8}),
        ("tome", {"r": 6, "prop_attn": False}),
    ]
    with torch.no_grad():
        expected = []
        for method, knobs in pruned:
            expected.append(vtok.patch(model, method, **knobs)(x))
        vtok.unpatch(model)
        inner(model).config._attn_implementation = "flash_attention_2"
        for (method, knobs), reference in zip(pruned, expected):
            assert torch.allclose(vtok.patch(model, method, **knobs)(x), reference, atol=1e-5), method
        vtok.unpatch(model)
        for method, knobs in (("tome", {"r": 6}), ("pitome", {}), ("ats", {"num_tokens": 30})):
            with pytest.raises(vtok.UnsupportedModelError, match=r"flash_attention_2.*set_attn_implementation\('sdpa'\)"):
                vtok.patch(model, method, **knobs)
        support = vtok.supports(model)
        assert "flash_attention_2" in support.methods["tome"]
        assert support.on_request == {"tome": {"prop_attn": False}, "pitome": {"prop_attn": False}}
        inner(model).config._attn_implementation = "sdpa"
        vtok.patch(model, "tome", r=6)
        inner(model).config._attn_implementation = "flash_attention_2"  # after patching: said when it runs
        with pytest.raises(vtok.UnsupportedModelError, match="flash_attention_2"):
            model(x)


def test_hidden_states_have_the_length_they_had():
    name = "transformers: ViT"
    model, x = attach(name, build(name), "tome"), images(name)
    with torch.no_grad():
        out = inner(model)(x, output_hidden_states=True)
        assert [h.shape[1] for h in out.hidden_states] == [65, 59, 53, 47, 41]
        assert torch.equal(out.logits, model(x))
        vtok.unpatch(model)
        assert [h.shape[1] for h in inner(model)(x, output_hidden_states=True).hidden_states] == [65] * 5


@pytest.mark.parametrize(
    "name", ["transformers: ViT", "transformers: SigLIP tower, attention pool", "transformers: InternVL tower"]
)
def test_attentions_are_those_of_the_tokens_that_were_left(name):
    model, x = build(name), images(name)
    inner(model).set_attn_implementation("eager")
    attach(name, model, "tome")
    with torch.no_grad():
        maps = inner(model)(x, output_attentions=True).attentions
    first = run_of(model).current.length
    assert [m.shape for m in maps] == [(2, 4, n, n) for n in (first, first - 6, first - 12, first - 18)]
    for m in maps:
        assert torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5)


def test_attentions_that_are_never_computed_are_refused():
    name = "transformers: ViT"
    model, x = attach(name, build(name), "ats"), images(name)
    with (
        torch.no_grad(),
        pytest.raises(vtok.UnsupportedModelError, match="output_attentions=True has nothing to return for blocks 1, 2, 3"),
    ):
        inner(model)(x, output_attentions=True)
    with torch.no_grad():
        inner(model)(x, output_attentions=False)


def test_attentions_of_blocks_that_see_all_tokens():
    """BLIP's attention takes no sizes of merged tokens; in front of the first reduction there are none."""
    name = "transformers: BLIP tower"
    model, x = build(name), images(name)
    inner(model).set_attn_implementation("eager")
    with torch.no_grad():
        expected = inner(model)(x, output_attentions=True).attentions
        found = inner(vtok.patch(model, "uniform", keep=1.0))(x, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    vtok.patch(model, "tome", r=[0, 0, 6, 6])
    with torch.no_grad(), pytest.raises(vtok.UnsupportedModelError, match="nothing to return for blocks 2, 3:"):
        inner(model)(x, output_attentions=True)


@pytest.mark.parametrize(
    "name",
    [
        "transformers: ViT",
        "transformers: CLIP tower",
        "transformers: SigLIP tower, attention pool",
        "transformers: BEiT relative bias, average pool",
        "transformers: BLIP tower",
        "transformers: DINOv2",
        "transformers: DINOv3 rotary, registers",
        "transformers: ViT-MSN",
    ],
)
def test_another_resolution(name):
    """`interpolate_pos_encoding`, or nothing where an encoder always interpolates: the split path equals upstream there too."""
    model = build(name, torch.float64)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    extra = {} if "DINO" in name else {"interpolate_pos_encoding": True}

    def run():
        out = inner(model)(x, **extra)
        return getattr(out, model.field)

    with torch.no_grad():
        reference = run()
        vtok.patch(model, Nothing())
        assert (run() - reference).abs().max() <= 1e-11 * reference.abs().max()
        vtok.patch(model, "tome", r=6, input_size=(3, 64, 96))
        run()
    tower = vtok.info(model).towers[0]
    prefix = run_of(model).num_prefix
    assert [b.tokens_out - prefix for b in tower.blocks] == [90, 84, 78, 72]
    assert "the last pass saw 96 patches" in str(tower)
    assert vtok.plan(model, "tome", r=6, input_size=(3, 64, 96)).tokens[-1] == prefix + 72


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("transformers: SigLIP tower, attention pool", "SiglipVisionModel has none"),
        ("transformers: Idefics3 tower", "Idefics3VisionTransformer has none"),
        ("transformers: SigLIP2 classifier, average pool", "Siglip2VisionModel has none"),
    ],
)
def test_methods_that_read_a_class_token_refuse_unless_told_otherwise(name, needs):
    model, x = build(name), images(name)
    for method, instead in (("ats", {"query": "mean"}), ("zero_tprune", {"cls_init": "uniform"})):
        words = " ".join(f'{key}="{value}"' for key, value in instead.items())
        with pytest.raises(vtok.UnsupportedModelError, match=needs) as caught:
            vtok.patch(model, method)
        assert words in str(caught.value)
        with torch.no_grad():
            vtok.patch(model, method, **instead)(x)
        tower = vtok.info(model).towers[0]
        assert tower.blocks[-1].tokens_out < 64


@pytest.mark.parametrize("model", ["ViTForMaskedImageModeling", "DeiTForMaskedImageModeling", "BeitForMaskedImageModeling"])
def test_models_that_need_every_patch_are_refused(model):
    config = getattr(transformers, model.partition("For")[0] + "Config")(**_TINY)
    whole = getattr(transformers, model)(config)
    with pytest.raises(vtok.UnsupportedModelError, match=rf"{model} may need every patch .* vtok\.patch\(model\.\w+, \.\.\.\)"):
        vtok.patch(whole, "tome", r=4)
    assert not vtok.supports(whole)


def test_mae_pretraining_is_refused_and_its_encoder_is_not():
    config = transformers.ViTMAEConfig(**_TINY, mask_ratio=0.5, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    model = transformers.ViTMAEForPreTraining(config).eval()
    with pytest.raises(vtok.UnsupportedModelError, match=r"vtok\.patch\(model\.vit"):
        vtok.patch(model, "tome", r=4)
    vtok.patch(model.vit, "tome", r=4)
    decoder = [m for m in model.decoder.modules() if hasattr(m, "_vtok")]
    with torch.no_grad():
        assert model.vit(torch.randn(2, 3, 64, 64)).last_hidden_state.shape == (2, 33 - 16, 48)
    assert not decoder
    assert vtok.plan(model.vit, "tome", r=4).tokens == (29, 25, 21, 17)


def test_blip_with_a_text_model_is_pruned_but_not_merged():
    config = transformers.BlipConfig(text_config={**_TEXT, "encoder_hidden_size": 48}, vision_config=_TINY, projection_dim=24)
    model = transformers.BlipForImageTextRetrieval(config).eval()
    with pytest.raises(vtok.UnsupportedModelError, match="its text model attends to the image tokens"):
        vtok.patch(model, "tome", r=4)
    vtok.patch(model, "random", keep=0.8)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[1, 5, 6, 2]] * 2), pixel_values=torch.randn(2, 3, 64, 64))
    assert out.itm_score.shape == (2, 2)
    assert vtok.info(model).towers[0].blocks[-1].tokens_out < 40


def test_a_layer_that_is_not_known():
    model = build("transformers: ViT")

    class Other(torch.nn.Module):
        pass

    inner(model).vit.layers[1] = Other()
    with pytest.raises(
        vtok.UnsupportedModelError, match=r"block 1 of ViTModel holds a .*Other, which vtok cannot patch .*supported: "
    ):
        vtok.patch(model, "tome")


def test_inputs_by_name():
    """`probe` and `calibration` may be mappings: what processors return."""
    model = inner(build("transformers: CLIP, both towers"))
    inputs = transformers.BatchFeature({"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": torch.randn(1, 3, 64, 64)})
    vtok.patch(model, "tome", r=6)
    tower = vtok.info(model, probe=inputs).towers[0]
    assert (tower.path, tower.blocks[-1].tokens_out, tower.blocks[-1].kernel) == ("vision_model", 41, "flash (cpu)")
    vtok.unpatch(model)
    calibration = {"pixel_values": torch.randn(4, 3, 64, 64)}
    assert vtok.plan(model, "ats", num_tokens=30, calibration=calibration).estimate.exact


def test_plans_of_a_model_with_a_text_tower_are_those_of_its_image_tower_and_projection():
    whole, alone = inner(build("transformers: CLIP, both towers")), inner(build("transformers: CLIP tower"))
    difference = vtok.plan(whole, "tome", r=6).estimate.macs - vtok.plan(alone, "tome", r=6).estimate.macs
    assert difference == 48 * 24
