"""`vtok bench` on vision-language models: what is timed, what is reported, what is left behind."""

import json

import pytest
import torch
from typer.testing import CliRunner
from vlm_zoo import build, inputs

import vtok
from vtok.eval.benchmarks import result
from vtok.eval.benchmarks.flops import count_prompt_macs
from vtok.eval.benchmarks.prefill import Times, compare, measure_prompts, selection_seconds
from vtok.eval.models import architectures as prompts
from vtok.eval.models.architectures import ARCHITECTURES, sample_prompts
from vtok.targets import vlm_targets


@pytest.fixture(scope="module")
def measured():
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    settings = [("uniform", {"keep": 0.5}), vtok.RandomDrop(keep=0.25)]
    seen = []
    found = measure_prompts(
        model, values, settings, pairs=5, new_tokens=3, name="tiny", progress=lambda *n: seen.append(n), threads=1
    )
    return model, values, found, seen


def test_results_are_complete(measured):
    model, values, found, seen = measured
    assert [r.setting for r in found] == ["uniform(keep=0.5)", "random(keep=0.25)"]
    assert seen == [(i + 1, 5) for i in range(5)]
    assert not vtok.info(model).patched
    vtok.patch(model, "uniform", keep=0.5)
    with torch.no_grad():
        model(**values)
    estimate = vtok.info(model).prompts[0].estimate
    vtok.unpatch(model)
    first = found[0]
    assert first.gmacs["base"] == estimate.base_macs / 1e9 and first.gmacs["model"] == estimate.macs / 1e9
    assert first.implied_speedup == estimate.implied_speedup
    assert first.kv_mb == {"base": estimate.base_kv_bytes / 1e6, "patched": estimate.kv_bytes / 1e6}
    assert first.visual_tokens == {"in": 24.0, "per_layer": [12.0] * 4}
    assert first.text_tokens == 12.5
    assert (first.batch_size, first.pairs, first.threads, first.new_tokens) == (2, 5, 1, 3)
    for r in found:
        assert r.achieved == pytest.approx(r.speedup / r.implied_speedup)
        assert r.speedup_ci[0] <= r.speedup <= r.speedup_ci[1]
        assert r.decode_ratio_ci[0] <= r.decode_ratio <= r.decode_ratio_ci[1]
        assert r.selection_ms > 0 and r.selection_share == pytest.approx(r.selection_ms / r.prefill_ms["base"])
        assert all(value > 0 for value in (*r.prefill_ms.values(), *r.first_token_ms.values(), *r.decode_ms.values()))
        assert r.first_token_ms["base"] > r.decode_ms["base"]


def test_json_and_markdown(measured):
    *_, found, _ = measured
    assert result.from_json(result.to_json(found)) == found
    text = result.markdown(found)
    lines = text.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == len(result.PromptResult.columns)  # one less: nothing was compiled
    assert "| uniform(keep=0.5) | 24 -> 12 |" in lines[2]
    assert "tiny, 24 visual and 12 other tokens, batch 2, float32" in text
    assert "the vision tower is part of prefill" in text and "- uniform(keep=0.5): " in text
    assert len(result.table(found).rows) == 2


def test_layers_where_tokens_leave_are_listed():
    assert result._layers({"in": 576.0, "per_layer": [58.0, 58.0, 0.0]}) == "576 -> 58, 0 from layer 2"


def test_times_become_ratios_pair_by_pair():
    base = Times([2.0, 4.0, 6.0, 4.0, 4.0], [3.0, 5.0, 7.0, 5.0, 5.0], [0.5] * 5)
    patched = Times([1.0, 2.0, 3.0, 2.0, 2.0], [2.0, 3.0, 4.0, 3.0, 3.0], [0.25] * 5)
    found = compare(base, patched, implied=2.5)
    assert found["speedup"] == 2 and found["achieved"] == pytest.approx(0.8)
    assert found["decode_ratio"] == 2 and found["decode_ratio_ci"] == [2, 2]
    assert found["prefill_ms"] == {"base": 4000, "patched": 2000}
    assert found["first_token_ms"] == {"base": 5000, "patched": 3000}
    assert "faster than unpatched (2.00x)" in found["verdict"]


def test_selection_is_timed_where_it_happens(monkeypatch):
    model, values = vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5), inputs("LLaVA-1.5")
    short = selection_seconds(model, values)
    (target,) = vlm_targets(model)

    reducer = type(target.installed().features)
    chosen = reducer.features

    def slow(self, images):
        import time

        time.sleep(0.05)
        return chosen(self, images)

    monkeypatch.setattr(reducer, "features", slow)
    assert selection_seconds(model, values) >= 0.05 > short


def test_what_cannot_be_measured_is_refused():
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    with pytest.raises(vtok.ConfigError, match="name at least one method"):
        measure_prompts(model, values, [])
    with pytest.raises(vtok.ConfigError, match="5 at least"):
        measure_prompts(model, values, ["random"], pairs=2)
    with pytest.raises(vtok.ConfigError, match="new_tokens must be 2 or more"):
        measure_prompts(model, values, ["random"], new_tokens=1)
    with pytest.raises(vtok.ConfigError, match="unknown dtype"):
        measure_prompts(model, values, ["random"], dtype="fp8")
    with pytest.raises(vtok.ConfigError, match="pass it unpatched"):
        measure_prompts(vtok.patch(model, "random", keep=0.5), values, ["random"])
    vtok.unpatch(model)
    with pytest.raises(vtok.UnsupportedModelError, match="no vision-language model with a language head"):
        measure_prompts(model.model, values, ["random"])
    with pytest.raises(vtok.ConfigError, match="text_tokens must be 5 or more, got 4"):
        sample_prompts(model, 1, vtok.Prompt(images=3, text_tokens=4))
    with pytest.raises(vtok.UnsupportedModelError, match="make inputs with its processor"):
        sample_prompts(build("Gemma3"), 1)


@pytest.mark.parametrize(
    ("name", "size"), [("LLaVA-1.5", None), ("LLaVA-NeXT", None), ("LLaVA-NeXT", (3, 14, 32)), ("Qwen2.5-VL", (3, 16, 32))]
)
def test_prompts_of_noise_hold_what_is_stated(name, size):
    model = build(name)
    prompt = vtok.Prompt(images=2, text_tokens=7, input_size=size)
    values = sample_prompts(model, 2, prompt)
    plan = vtok.plan(model, "uniform", keep=0.5, prompt=prompt)
    counted = count_prompt_macs(model, values)
    assert values["input_ids"].shape == (2, plan.image.tokens * 2 + 7)
    assert plan.estimate.base_macs == pytest.approx(counted.model, rel=1e-3)  # rotary tables of older transformers
    again = sample_prompts(model, 2, prompt)
    assert all(torch.equal(values[key], again[key]) for key in values)


def test_words_of_noise_are_no_image_tokens_whatever_their_number():
    model = build("LLaVA-1.5")
    model.config.image_token_id = 3  # as tokenizers of a few words have it
    ids = sample_prompts(model, 8, vtok.Prompt(text_tokens=64))["input_ids"]
    assert bool(((ids == 3).sum(1) == ids.shape[1] - 64).all())


def test_the_scaled_llava_has_the_shares_of_the_real_one():
    plan = vtok.plan(prompts.build("llava-1.5-scaled", meta=True), "uniform", keep=0.1, prompt={"text_tokens": 64})
    e = plan.estimate
    assert plan.image.tokens == 576
    assert 8 * e.base_macs >= 20e9
    assert 0.03 < e.base_vision.macs / e.base_macs < 0.06  # 4 % in LLaVA-1.5 7B
    assert 4 < e.implied_speedup < 6


@pytest.fixture
def tiny_architecture(monkeypatch):
    kind, config = ARCHITECTURES["llava-1.5-scaled"]
    vision = {**config["vision_config"], "image_size": 28, "hidden_size": 48, "num_hidden_layers": 2}
    text = {**config["text_config"], "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(ARCHITECTURES, "tiny-llava", (kind, {**config, "vision_config": vision, "text_config": text}))


def test_commands(tiny_architecture, tmp_path):
    from vtok.eval.cli.program import app

    def run(*args):
        found = CliRunner().invoke(app, [str(a) for a in args])
        assert found.exit_code == 0, (found.output, found.exception)
        return found.output

    text = run("plan", "transformers:tiny-llava", "uniform:keep=0.5", "--images", 2, "--text-tokens", 9)
    assert "2 images of 3 x 28 x 28 (4 visual tokens each) and 9 other tokens" in text
    text = run("plan", "transformers:tiny-llava", "tome:r=1+random:keep=0.5")
    assert "tome(r=1" in text and "tower block 0 mid" in text and " + random(keep=0.5" in text
    bench = ["bench", "transformers:tiny-llava", "uniform:keep=0.5", "-b", 2, "--pairs", 5, "--new-tokens", 2]
    text = run(*bench, "--text-tokens", 5, "--threads", 1, "--markdown", "--json", tmp_path / "bench.json")
    assert "| uniform(keep=0.5) | 4 -> 2 |" in text
    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert row["model"] == "transformers:tiny-llava" and row["text_tokens"] == 5
    failed = CliRunner().invoke(app, ["bench", "transformers:tiny-llava", "uniform", "--pretrained"])
    assert failed.exit_code != 0 and "random weights and a size of its own" in str(failed.exception)
