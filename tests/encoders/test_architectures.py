"""Architectures of published checkpoints: built on the meta device, as large as their files, planned offline."""

import pytest

import vtok
from vtok.eval.models import architectures
from vtok.eval.models.by_name import load_model
from vtok.patches.hf_vlm.families import OLDEST, release

pytest.importorskip("transformers")
vlms = pytest.mark.skipif(release() < OLDEST, reason="vision-language models need a younger transformers")

# billions of parameters of the checkpoints' safetensors files
PARAMETERS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.292,
    "Qwen/Qwen3-VL-8B-Instruct": 8.767,
    "Salesforce/blip-itm-base-coco": 0.224,
    "Salesforce/blip-itm-base-flickr": 0.224,
    "llava-hf/llava-1.5-13b-hf": 13.351,
    "llava-hf/llava-1.5-7b-hf": 7.063,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.030,
    "llava-hf/llava-v1.6-vicuna-13b-hf": 13.352,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7.063,
}


def test_the_table_is_whole():
    assert set(architectures.PUBLISHED) == set(PARAMETERS)


@vlms
@pytest.mark.parametrize("name", PARAMETERS)
def test_size_of_the_checkpoint(name):
    model = load_model(f"transformers:{name}", meta=True)
    assert all(p.is_meta for p in model.parameters()) and not model.training
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.0006)


@vlms
@pytest.mark.parametrize(
    ("name", "visual"),
    [
        ("llava-hf/llava-1.5-7b-hf", 576),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", 2880 + 48),  # the thumbnail, four crops, and a newline behind each of 48 rows
        ("Qwen/Qwen2.5-VL-7B-Instruct", 256),
    ],
)
def test_prompts_are_planned_without_weights(name, visual):
    model = load_model(f"transformers:{name}", meta=True)
    plan = vtok.plan(model, "uniform", keep=0.5, prompt={"text_tokens": 60})
    assert f"{visual} visual tokens" in str(plan)
    assert plan.tokens == (60 + visual // 2,) * len(plan.estimate.layers)


def test_the_image_tower_of_blip():
    model = load_model("transformers:Salesforce/blip-itm-base-coco", meta=True)
    plan = vtok.plan(model, "pitome", ratio=0.95, preset="official_blip")
    assert plan.estimate.rows[0].tokens_in == 577 and len(plan.estimate.rows) == 12
