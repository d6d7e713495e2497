"""Models by name: every home, sizes, seeds, weights, and names that lead nowhere."""

import pytest
import torch

import vtok
from vtok.errors import ConfigError, UnknownNameError
from vtok.eval.models.by_name import HUGGING_FACE, load_model, sample_images

NAMES = {
    "deit_tiny_patch16_224": "VisionTransformer",
    "open_clip:ViT-B-16": "VisionTransformer",
    "open_clip:ViT-B-16-SigLIP": "TimmModel",
    "transformers:vit-base-patch16-224": "ViTForImageClassification",
    "transformers:clip-vit-base-patch16": "CLIPVisionModelWithProjection",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_home_give_a_tower_without_weights(name):
    model = load_model(name, meta=True)
    assert type(model).__name__ == NAMES[name] and not model.training
    assert all(p.is_meta for p in model.parameters())
    rows = vtok.plan(model, "tome", r=8).estimate.rows
    assert rows[-1].tokens_out < rows[0].tokens_in


def test_bundled_vision_language_models_are_found_by_name():
    model = load_model("reference-llava")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert vtok.plan(model, "divprune", keep_tokens=64).estimate.fraction < 1
    with pytest.raises(UnknownNameError, match=r"bundled model 'reference-lava'; did you mean 'reference-llava'"):
        load_model("reference-lava")
    with pytest.raises(ConfigError, match="reference-llava has a size of its own"):
        load_model("reference-llava", img_size=96)


def test_the_built_in_architectures_are_the_usual_ones():
    """ViT-B/16 has 17.56 GMACs with its head, whichever library builds it."""
    macs = [vtok.plan(load_model(f"transformers:{name}", meta=True), "tome", r=8).estimate.base_macs for name in HUGGING_FACE]
    macs.append(vtok.plan(load_model("open_clip:ViT-B-16", meta=True), "tome", r=8).estimate.base_macs)
    assert macs == pytest.approx([17.56e9] * 3, rel=0.001)


@pytest.mark.parametrize(
    ("name", "size"), [("transformers:clip-vit-base-patch16", 96), ("open_clip:ViT-B-16", 96), ("deit_tiny_patch16_224", 96)]
)
def test_the_input_size_can_be_chosen(name, size):
    model = load_model(name, img_size=size, meta=True)
    assert vtok.plan(model, "tome", r=1).estimate.rows[0].tokens_in == 37  # 6 x 6 patches and a class token


@pytest.mark.parametrize("name", ["transformers:clip-vit-base-patch16", "open_clip:ViT-S-32-alt", "deit_tiny_patch16_224"])
def test_random_weights_follow_the_seed_and_images_fit(name):
    one, same, other = (load_model(name, img_size=32, seed=seed) for seed in (0, 0, 1))
    images = sample_images(name, one, 2)
    with torch.inference_mode():
        outs = [m(images) for m in (one, same, other)]
    values = [o if isinstance(o, torch.Tensor) else o[0] for o in outs]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_a_folder_of_hugging_face_gives_its_image_tower(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config={**vision, "patch_size": 8}, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    loaded, random = (load_model(f"transformers:{tmp_path}", pretrained=pretrained) for pretrained in (True, False))
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images)[0], whole.vision_model(images)[0])
        assert not torch.equal(random(images)[0], whole.vision_model(images)[0])


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("open_clip:ViT-B-61", {}, UnknownNameError, "did you mean 'ViT-B-16'"),
        ("open_clip:ViT-B-16", {"pretrained": True}, ConfigError, "open_clip:ViT-B-16/TAG with TAG in openai"),
        ("open_clip:ViT-B-16/no_such_tag", {}, ConfigError, "cannot make ViT-B-16 no_such_tag"),
        ("transformers:vit-base-patch61", {}, UnknownNameError, "did you mean 'vit-base-patch16-224'"),
        ("transformers:vit-base-patch16-224", {"pretrained": True}, ConfigError, "is an architecture"),
        ("transformers:nobody/nothing", {}, ConfigError, "cannot load nobody/nothing"),
        ("reference", {"img_size": 56}, ConfigError, "has a size of its own"),
    ],
)
def test_names_that_lead_nowhere(name, options, error, says):
    with pytest.raises(error, match=says):
        load_model(name, **options)
