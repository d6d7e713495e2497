"""What is refused, when and how; and that nothing of vLLM is changed for models whose config has no key "vtok"."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engines import ask, engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def refused(folder, settings, **options):
    with pytest.raises(Exception) as caught, engine(folder, settings, **options):  # noqa: PT011  pydantic wraps some of them
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fastv"}, "holds the same tokens in all layers"),
        ({"method": "todre", "probe": 0.5}, 'pass "probe": null'),
        ({"method": "cdpruner"}, 'pass "relevance": "none"'),
        ({"method": "prumerge"}, "depends on the image"),
        ({"method": "prumerge", "keep": 0.2}, 'as by "layer": 1'),
        ({"method": "tome"}, "inside vision encoders"),
        ({"method": "divprun"}, "did you mean 'divprune'"),
        ({"method": "divprune", "kep": 0.2}, "unknown parameter of divprune 'kep'"),
        ({"method": "evs"}, "reads none"),
        ({}, '{"method": name, parameters of the method}'),
        ("divprune", "takes"),
    ],
)
def test_settings_that_cannot_be_served_stop_the_engine_in_one_sentence(model, settings, message):
    assert message in refused(model("llava"), settings)


def test_a_method_that_looks_at_the_tower_is_refused_where_it_cannot(model):
    message = refused(model("qwen25"), {"method": "fastervlm"})
    assert "runs the patches of all images as one sequence" in message


def test_a_release_that_was_not_run_is_refused(model, monkeypatch):
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    monkeypatch.setattr(ModelRegistry, "vtok_release", "0.99.1")
    assert "found 0.99.1" in refused(model("llava"), {"method": "divprune"})
    with engine(model("llava")) as llm:  # without the key it serves
        assert len(ask(llm, [("w1 w2", [])])) == 1


def test_a_model_that_is_not_covered_is_refused(tmp_path):
    from transformers import LlamaConfig

    from vtok.serving.vllm_plugin.plugin import check_model

    with pytest.raises(TypeError, match="does not prune visual tokens of PaliGemmaForConditionalGeneration"):
        check_model("PaliGemmaForConditionalGeneration", LlamaConfig(vtok={"method": "divprune"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_pruning_rate": 0.5}, "leave one of them out"),
        ({"tensor_parallel_size": 2}, None),
    ],
)
def test_set_ups_that_were_not_run(model, options, message):
    if message is None:  # said by the worker alone: asked of the function
        from types import SimpleNamespace

        from transformers import AutoConfig

        from vtok.serving.vllm_plugin.worker import start

        config = AutoConfig.from_pretrained(model("llava"))
        config.vtok = {"method": "fastervlm", "keep": 0.5}
        whole = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config),
            lora_config=None,
            speculative_config=None,
            parallel_config=SimpleNamespace(tensor_parallel_size=2),
        )
        with pytest.raises(TypeError, match="use one rank"):
            start("LlavaForConditionalGeneration", whole)
        config.vtok = {"method": "divprune"}
        assert start("LlavaForConditionalGeneration", whole).config.name == "divprune"
        whole.speculative_config = object()
        with pytest.raises(TypeError, match="without speculative decoding only"):
            start("LlavaForConditionalGeneration", whole)
        return
    assert message in refused(model("qwen25"), {"method": "divprune"}, **options)


def test_without_the_key_the_classes_are_vllms_own(model):
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor

    with engine(model("llava")) as llm:
        inside = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert type(inside) is LlavaForConditionalGeneration
        processor = llm.llm_engine.input_processor.renderer.get_mm_processor()
        assert type(processor) is LlavaMultiModalProcessor


def test_a_prompt_that_ends_with_an_image_is_refused_and_the_engine_goes_on(model):
    from asked import GRID_SIZES, picture

    with engine(model("qwen25"), {"method": "divprune"}) as llm:
        image = picture(1, GRID_SIZES[0])
        with pytest.raises(ValueError, match="end with text"):
            ask(llm, [("w1 <|vision_start|> <|image_pad|>", [image])])
        assert len(ask(llm, [("w1 <|vision_start|> <|image_pad|> <|vision_end|> w2", [image])])) == 1
        processor = llm.llm_engine.input_processor.renderer.get_mm_processor()
        made = processor.get_dummy_mm_inputs({"image": 1})  # which engines on GPUs measure their memory with
        (place,) = made["mm_placeholders"]["image"]
        grid = made["mm_kwargs"]["image"][0]["image_grid_thw"].data
        assert 0 < place.length < int(grid.prod()) // 4


def test_stages_inside_the_llm_are_left_out_where_nothing_was_said_of_them(model):
    with engine(model("llava"), {"method": "todre", "keep": 0.1}) as llm:
        inside = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert inside.vtok.config.probe is None and "left out" in inside.vtok.left_out
