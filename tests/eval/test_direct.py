"""`vtok.benchmark` and `vtok.evaluate`: the same numbers as the program's, for models that a program holds."""

import inspect
import json

import pytest
import torch
import vlm_zoo
import zoo

import vtok
from vtok.eval import direct
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.throughput import measure
from vtok.eval.direct import benchmark, settings_of
from vtok.eval.report.read import read
from vtok.eval.tasks.imagenet import evaluate
from vtok.eval.tasks.timm_pipeline import Options

NAME, TOWER = "timm: ViT", "transformers: ViT"
QUICK = {"pairs": 5, "profile": False}
METHODS = ["random:keep=0.9", vtok.ToMe(r=8), ("pitome", {"flops": 0.7})]


@pytest.fixture(scope="module")
def speeds():
    return vtok.benchmark(zoo.build(NAME), METHODS, zoo.images(NAME), **QUICK)


@pytest.fixture(scope="module")
def scores():
    return vtok.evaluate("reference-vit", "imagenet", ["tome:flops=0.6", "random:flops=0.6"], num_samples=100, batch_size=50)


def test_benchmark_measures_what_the_program_measures(speeds):
    again = measure(zoo.build(NAME), zoo.images(NAME), settings_of(METHODS), pairs=5, profile=False, memory=False)
    for ours, theirs in zip(speeds.results, again, strict=True):
        assert (ours.setting, ours.tokens, ours.gmacs) == (theirs.setting, theirs.tokens, theirs.gmacs)
        assert ours.peak_memory_mb is None, "on a CPU memory takes processes: only where it is asked for"


def test_the_frame_has_the_settings_in_their_order_with_their_own_times(speeds):
    frame = speeds.to_pandas()
    assert list(frame["setting"]) == ["random(keep=0.9)", "tome(r=8)", "pitome(flops=0.7)"]
    for row, result in zip(frame.to_dict("records"), speeds.results, strict=True):
        assert row["speedup"] == result.speedup and row["implied_speedup"] == result.implied_speedup
        assert row["step_time_ms_patched"] == result.step_time_ms["patched"]
        assert row["samples_per_sec_patched"] == row["samples_per_sec"] == result.samples_per_sec["patched"]


def test_a_result_is_a_table_wherever_it_is_shown(speeds, scores, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for result, names in ((speeds, ["random", "tome", "pitome"]), (scores, ["unpatched", "tome", "random"])):
        for words in (str(result), repr(result), result.markdown(), result._repr_html_()):
            assert all(name in words for name in names)
        assert max(map(len, str(result).splitlines()[:-10])) <= 120
        assert result._repr_html_().count("<tr>") == len(names) + 1
        picture = result.plot(tmp_path / "plot.svg")
        assert "<svg" in (tmp_path / "plot.svg").read_text() and picture._repr_png_().startswith(b"\x89PNG")
        result.save(tmp_path / "records.json")
        held = read([tmp_path / "records.json"]).records
        assert [one["setting"] for one in held] == [one["setting"] for one in json.loads(json.dumps(result.records))]


def test_evaluate_scores_what_the_task_scores(scores):
    settings = [None, ("tome", {"flops": 0.6}), ("random", {"flops": 0.6})]
    options = Options(num_samples=100, batch_size=50, workers=0)
    again = evaluate("reference-vit", "fashion-mnist", settings, options)
    assert [one["metrics"] for one in scores.records] == [one["metrics"] for one in again]
    assert [one["correct"] for one in scores.records] == [one["correct"] for one in again]
    frame = scores.to_pandas().set_index("method")
    assert frame.loc["tome", "value"] == scores.records[1]["metrics"]["top1"] and frame.loc["tome", "n"] == 100


def test_a_mapping_is_taken_by_name_and_the_model_is_left_as_it_was():
    model, images = zoo.build(TOWER).model.train(), zoo.images(TOWER)
    by_name = vtok.benchmark(model, "tome:r=8", {"pixel_values": images}, **QUICK).results[0]
    alone = vtok.benchmark(model, vtok.ToMe(r=8), images, **QUICK).results[0]
    assert by_name.gmacs == alone.gmacs and by_name.tokens == alone.tokens and by_name.batch_size == len(images)
    assert model.training and not vtok.info(model).patched


def test_prompts_are_timed_with_what_a_processor_makes(tmp_path):
    name = next(iter(vlm_zoo.EXAMPLES))
    model, inputs = vlm_zoo.build(name), vlm_zoo.inputs(name)
    result = vtok.benchmark(model, ["todre:keep=0.25", "uniform:keep=0.25"], inputs, new_tokens=2, **QUICK)
    frame = result.to_pandas()
    assert list(frame["method"]) == ["todre", "uniform"]
    assert list(frame["prefill_ms_patched"]) == [one.prefill_ms["patched"] for one in result.results]
    result.plot(tmp_path / "speed.png")
    with pytest.raises(vtok.ConfigError, match="reads prompts: pass what its processor returns"):
        vtok.benchmark(model, "todre", inputs["pixel_values"])
    with pytest.raises(vtok.ConfigError, match=r"task gqa makes prompts: pass processor=AutoProcessor"):
        vtok.evaluate(model, "gqa", "todre", data="hub")


def test_compiled_steps_of_prompts(monkeypatch):
    """As `vtok bench --compile`, which was once refused here alone."""
    monkeypatch.setattr(direct, "Compiler", lambda mode: Compiler(mode, backend="eager"))
    name = next(iter(vlm_zoo.EXAMPLES))
    (found,) = vtok.benchmark(
        vlm_zoo.build(name), "uniform:keep=0.25", vlm_zoo.inputs(name), new_tokens=3, compile="default", **QUICK
    ).results
    assert found.compiled["patched"]["graphs"] == 1 and found.compiled["patched"]["again"] == 0


def test_a_dual_encoder_is_given_its_processor():
    from vtok.eval.models.reference import load_reference_clip

    encoder = load_reference_clip()
    pair = (encoder.preprocess, encoder.tokenizer)
    options = {"num_samples": 20, "batch_size": 20, "workers": 0}
    ours = vtok.evaluate(encoder.net, "zeroshot", "tome", data="reference-pictures", processor=pair, **options)
    named = vtok.evaluate("reference-clip", "zeroshot", "tome", **options)
    assert [one["correct"] for one in ours.records] == [one["correct"] for one in named.records]
    with pytest.raises(vtok.ConfigError, match=r"pass processor=AutoProcessor.*or for open_clip processor=\(preprocess"):
        vtok.evaluate(encoder.net, "zeroshot", "tome", data="reference-pictures")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: vtok.benchmark(m, "tom", x), "unknown method 'tom'; did you mean 'tome'?"),
        (lambda m, x: vtok.benchmark(m, [], x), "nothing to measure"),
        (lambda m, x: vtok.benchmark(m, 3, x), r"methods are a name, a config such as vtok.ToMe\(r=8\), or a list"),
        (lambda m, x: vtok.benchmark(m, "tome", x[0]), r"images are a tensor \[B, C, H, W\].*got Tensor of shape \[3, "),
        (lambda m, x: vtok.benchmark(m, "tome", {"a": 1}), "with pixel_values.*got dict with a"),
        (lambda m, x: vtok.benchmark(m, "tome", x, pairs=2), "an interval from 2 pairs"),
        (lambda m, x: vtok.evaluate(m, "imagenet", "tome"), "pass data=..., the folder"),
        (lambda m, x: vtok.evaluate(m, "imagnet", "tome"), "unknown task 'imagnet'; did you mean 'imagenet'"),
        (lambda m, x: vtok.evaluate(m, "imagenet", "tome", data="x", batchsize=3), "did you mean 'batch_size'"),
        (lambda m, x: vtok.evaluate(m, "vqa", "todre", data="x"), "asks vision-language models; VisionTransformer is none"),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_tried(call, words):
    with pytest.raises(vtok.VtokError, match=words):
        call(zoo.build(NAME), zoo.images(NAME))


def test_a_dual_encoder_without_texts_is_refused():
    from transformers import CLIPModel
    from transformers.models.clip import CLIPConfig

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**tiny, "vocab_size": 99}, vision_config=vision)).eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(vtok.ConfigError, match="reads texts, too"):
        vtok.benchmark(model, "tome:r=4", pixels)
    whole = vtok.benchmark(model, "tome:r=4", {"input_ids": ids, "pixel_values": pixels}, **QUICK)
    assert whole.results[0].batch_size == 2 and whole.results[0].tokens["in"] == 17


def test_the_arguments_are_those_that_are_described():
    public, own = inspect.signature(vtok.benchmark).parameters, inspect.signature(benchmark).parameters
    timing = set(inspect.signature(measure).parameters) | {"new_tokens"}
    assert {name for name in public if name not in own} <= timing
    documented = inspect.getdoc(vtok.benchmark) + inspect.getdoc(vtok.evaluate)
    assert all(f"{name}: " in documented for f in (vtok.benchmark, vtok.evaluate) for name in inspect.signature(f).parameters)


def test_a_misspelt_model_that_brings_its_data_is_told_by_its_name():
    with pytest.raises(vtok.ConfigError, match=r"needs data.*; of reference-vit, if that was meant, they come with vtok"):
        vtok.evaluate("refernce-vit", "imagenet", ["tome"])
    with pytest.raises(vtok.ConfigError, match=r"needs data: .* of task gqa$"):
        vtok.evaluate("reference-llava", "gqa", ["todre"])
