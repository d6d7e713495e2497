"""lmms-eval itself with the bundled LLaVA: answers, tokens and costs are those of vtok's own evaluation."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_lmms import Harness, counts, said
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from transformers import LlavaForConditionalGeneration

import vtok
from vtok.errors import ConfigError, UnknownNameError, UnsupportedModelError
from vtok.eval.common.records import Records
from vtok.eval.lmms import MODELS
from vtok.eval.lmms.task import CHAT_TEMPLATE, TASK, write_model, write_task
from vtok.eval.models.reference_vlm import save_folder
from vtok.eval.models.vlm import load_vlm
from vtok.eval.tasks.vqa.evaluate import VQAOptions, evaluate
from vtok.eval.tasks.vqa.sources.opening import open_vqa

pytestmark = pytest.mark.lmms
COUNT, VISUAL, DEPTH = 24, 256, 8
METHODS = {
    "none": None,
    "todre,keep=0.1": ("todre", {"keep": 0.1}),
    "random,keep=0.004": ("random", {"keep": 0.004}),
    "uniform,keep=0.004": ("uniform", {"keep": 0.004}),
}


@pytest.fixture(scope="module")
def data():
    return open_vqa("easy-vqa").take(COUNT)


@pytest.fixture(scope="module")
def home(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("llava")
    write_model(folder / "model")
    write_task(folder / "task", data)
    return folder


@pytest.fixture(scope="module")
def harness(home):
    return Harness(home / "task")


@pytest.fixture(scope="module")
def own(home, data):
    """method -> (record, samples) of vtok's evaluation."""
    options = VQAOptions(batch_size=1, device="cpu", output=str(home / "own"))
    records = evaluate(load_vlm(str(home / "model")), data, list(METHODS.values()), options)
    lines = Records(home / "own" / "samples.jsonl").load()
    return {
        name: (record, sorted((x for x in lines if x["key"].startswith(record["key"])), key=lambda x: x["doc_id"]))
        for name, record in zip(METHODS, records)
    }


def arguments(home, method):
    return f"pretrained={home / 'model'},method={method}"


def test_the_models_are_found_with_both_kinds_of_classes():
    for name in MODELS:
        assert name in MODEL_REGISTRY_V2.list_model_names()
        assert not get_model(name).is_simple and get_model(name, force_simple=True).is_simple


@pytest.mark.parametrize("method", METHODS)
def test_answers_and_tokens_are_those_of_vtoks_own_evaluation(method, home, harness, own):
    record, lines = own[method]
    found, samples = harness.run("vtok_llava_hf", arguments(home, method))
    assert said(samples) == [line["prediction"] for line in lines]
    assert found["results"][TASK]["exact_match,none"] == pytest.approx(record["metrics"]["exact_match"], abs=1e-12)
    for count, line in zip(counts(samples), lines):
        assert count["visual_tokens"] == line["visual_tokens"] == VISUAL
        assert count["kept_tokens"] == line["kept_tokens"] and len(line["kept_tokens"]) == DEPTH
        assert count["kv_bytes"] == line["kv_bytes"]
        assert (count["gmacs"] is None) == (method == "none") == (line["macs"] is None)
        if line["macs"] is not None:
            assert count["gmacs"] == pytest.approx({name: value / 1e9 for name, value in line["macs"].items()})
        assert count["output_tokens"] == 2 and count["batch_size"] == 1 and "error" not in count
        assert 0 < count["ttft_ms"] < count["elapsed_ms"]
    sums = found["throughput"]
    assert sums["avg_visual_tokens"] == VISUAL and sums["avg_failed"] == 0
    assert sums["total_gen_tokens"] == 2 * COUNT  # counted once, although the harness's class logs them too
    kept = [sum(line["kept_tokens"]) / DEPTH for line in lines]
    assert sums["avg_kept_tokens"] == pytest.approx(sum(kept) / COUNT)
    assert 0 < sums["avg_ttft_ms"] / 1000 * COUNT < 2 * sums["total_elapsed_time"]


def test_a_template_that_begins_a_prompt_begins_it_once(home, harness, tmp_path):
    """The same prompts whether the template or the tokenizer writes the first token; not one more if both would."""
    model = load_vlm(str(home / "model"))
    model.processor.chat_template = model.processor.tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    save_folder(tmp_path / "model", model.net, model.processor)
    _, plain = harness.run("vtok_llava_hf", arguments(home, "none"))
    _, begun = harness.run("vtok_llava_hf", arguments(tmp_path, "none"))
    assert said(begun) == said(plain)
    assert [count["input_tokens"] for count in counts(begun)] == [count["input_tokens"] for count in counts(plain)]


def test_kept_tokens_are_as_planned_and_change_answers(own):
    planned = {"none": VISUAL, "todre,keep=0.1": math.ceil(0.1 * VISUAL), "random,keep=0.004": 1, "uniform,keep=0.004": 1}
    for name, (_, lines) in own.items():
        assert {tuple(line["kept_tokens"]) for line in lines} == {(planned[name],) * DEPTH}
    answers = {name: tuple(line["prediction"] for line in lines) for name, (_, lines) in own.items()}
    assert answers["todre,keep=0.1"] != answers["none"], "methods that say the same cannot be told apart"


def test_prompts_as_text(home, harness, own):
    """`--force_simple`: the harness logs no times of this class, so all of them are vtok's."""
    found, samples = harness.run("vtok_llava_hf", arguments(home, "todre,keep=0.1"), force_simple=True)
    assert found["config"]["model_backend"].endswith("LlavaHfSimple (simple)")
    assert said(samples) == [line["prediction"] for line in own["todre,keep=0.1"][1]]
    assert [c["kept_tokens"] for c in counts(samples)] == [line["kept_tokens"] for line in own["todre,keep=0.1"][1]]
    sums = found["throughput"]
    assert sums["total_gen_tokens"] == 2 * COUNT and sums["avg_kept_tokens"] == 26
    elapsed = sum(c["elapsed_ms"] for c in counts(samples)) / 1000
    assert sums["total_elapsed_time"] == pytest.approx(elapsed) and sums["avg_speed"] == pytest.approx(2 * COUNT / elapsed)


def test_a_budget_and_a_saved_patch(home, harness, tmp_path):
    net = load_vlm(str(home / "model")).net
    vtok.patch(net, "uniform", flops=0.5, prompt={"images": 1, "text_tokens": 8})
    vtok.save_config(net, tmp_path / "patch.json")
    budget = "uniform,flops=0.5,prompt={images: 1, text_tokens: 8}"
    results = [harness.run("vtok_llava_hf", arguments(home, m), limit=4)[1] for m in (budget, str(tmp_path / "patch.json"))]
    assert said(results[0]) == said(results[1])
    kept = [[c["kept_tokens"] for c in counts(samples)] for samples in results]
    assert kept[0] == kept[1] and 0 < kept[0][0][0] < VISUAL
    spent = [c["gmacs"]["model"] + c["gmacs"]["pruner"] for c in counts(results[0])]
    assert all(
        share == pytest.approx(0.5, abs=0.03) for share in (s / c["gmacs"]["base"] for s, c in zip(spent, counts(results[0])))
    )


def test_several_answers_to_a_question_keep_their_counts_apart(home, harness, own):
    _, samples = harness.run("vtok_llava_hf", arguments(home, "todre,keep=0.1"), limit=3, repeats=2)
    assert said(samples) == [line["prediction"] for line in own["todre,keep=0.1"][1][:3]]
    assert [c["kept_tokens"] for c in counts(samples)] == [[26] * DEPTH] * 3


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("todr", UnknownNameError, "did you mean 'todre'"),
        ("todre,kep=0.1", UnknownNameError, "'kep'; did you mean 'keep'"),
        ("todre,keep=7", ConfigError, "keep"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(method, error, message, tmp_path, harness):
    with pytest.raises(error, match=message):
        harness.run("vtok_llava_hf", f"pretrained={tmp_path / 'nowhere'},method={method}")


def test_a_method_that_cannot_work_on_the_model(home, harness):
    with pytest.raises(UnsupportedModelError, match="never crops"):
        harness.run("vtok_llava_hf", arguments(home, "correlation,alpha=0.5"))


def test_batches_are_refused_where_lmms_eval_has_none(tmp_path, harness):
    with pytest.raises(ConfigError, match=r"--batch_size is 1, got 2; `vtok eval vqa`"):
        harness.run("vtok_llava_hf", f"pretrained={tmp_path / 'nowhere'},method=none", batch_size=2)


def _failing(monkeypatch, at, error):
    """The model's `generate` fails at prompt number `at`."""
    real, calls = LlavaForConditionalGeneration.generate, []

    def generate(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)


def test_a_failure_in_between_is_counted_and_named(home, harness, monkeypatch):
    _failing(monkeypatch, 3, torch.OutOfMemoryError("no memory left"))
    found, samples = harness.run("vtok_llava_hf", arguments(home, "todre,keep=0.1"), limit=5)
    failed = [c for c in counts(samples) if "error" in c]
    assert failed == [{"error": "OutOfMemoryError: no memory left"}]
    assert said(samples).count("") == 1 and said(samples)[counts(samples).index(failed[0])] == ""
    assert found["throughput"]["avg_failed"] == 1 and found["throughput"]["avg_kept_tokens"] == 26


@pytest.mark.parametrize(("at", "error"), [(1, RuntimeError("broken")), (3, ConfigError("broken"))])
def test_a_run_that_cannot_work_stops(at, error, home, harness, monkeypatch):
    """lmms-eval would go on with empty answers to every question."""
    _failing(monkeypatch, at, error)
    with pytest.raises(type(error), match="broken"):
        harness.run("vtok_llava_hf", arguments(home, "todre,keep=0.1"), limit=5)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(folder, data): LLaVA-NeXT, which cuts pages into crops, whose tokens `correlation` chooses among."""
    folder, data = tmp_path_factory.mktemp("next"), open_vqa("easy-vqa-pages").take(6)
    write_model(folder / "model", "reference-llava-next")
    write_task(folder / "task", data, 4)
    return folder, data


def calibrated(pages, rows):
    """(alpha, answers, tokens kept in the last layer): what vtok says with a number found on some of the questions."""
    folder, data = pages
    own = load_vlm(str(folder / "model"))
    inputs = [dict(own.inputs([data.read(q.image)], [q.text])) for q in data.questions]
    vtok.patch(own.net, "correlation", calibration=[inputs[row] for row in rows])
    answers, kept = [], []
    for batch in inputs:
        with torch.inference_mode():
            made = own.net.generate(**batch, max_new_tokens=4, do_sample=False)
        answers += own.texts(made[:, batch["input_ids"].shape[1] :])
        kept.append(vtok.info(own.net).prompts[0].rows[-1].tokens_out[0])
    return vtok.info(own.net).prompts[0].configs[0].alpha, answers, kept


def test_numbers_are_found_on_the_first_questions(pages, tmp_path):
    harness = Harness(pages[0] / "task")
    found, samples = harness.run("vtok_llava_hf", arguments(pages[0], "correlation,calibration=3"))
    _, answers, kept = calibrated(pages, [0, 1, 2])
    assert said(samples) == answers
    assert [c["kept_tokens"][-1] for c in counts(samples)] == kept
    assert all(c["kept_tokens"][-1] < c["visual_tokens"] for c in counts(samples))
    assert found["throughput"]["total_gen_tokens"] == 2 * 6  # the calibration's prompts have no answers
    with pytest.raises(ConfigError, match="calibration=16"):
        harness.run("vtok_llava_hf", f"pretrained={tmp_path / 'nowhere'},method=correlation")


def test_two_processes_share_the_questions_and_the_number_found(pages, tmp_path):
    """Each has every other question; the number comes from those of the first process."""
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "lmms_eval"]
    lines, _ = called(command, pages[0], "correlation,calibration=1,device_map=cpu", tmp_path)
    alpha, answers, kept = calibrated(pages, [0])
    other, _, differently = calibrated(pages, [1])
    assert alpha != other and kept != differently, "the second process's own number would be noticed"
    assert [line["filtered_resps"].strip() for line in lines] == answers
    assert [c["kept_tokens"][-1] for line in lines for c in line["token_counts"]] == kept


def called(command, folder, method, output):
    """(samples in the order of the questions, results) of a command line; its text is printed."""
    command = [*command, "--model", "vtok_llava_hf", "--tasks", TASK, "--batch_size", "1", "--device", "cpu", "--log_samples"]
    command += ["--model_args", arguments(folder, method), "--include_path", str(folder / "task"), "--output_path", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    [samples], [results] = output.rglob(f"*_samples_{TASK}.jsonl"), output.rglob("*_results.json")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"]), json.loads(results.read_text())


def test_the_command_line(home, own, tmp_path, capsys):
    lines, written = called([str(Path(sys.executable).parent / "lmms-eval")], home, "todre,keep=0.1", tmp_path)
    assert [line["filtered_resps"].strip() for line in lines] == [x["prediction"] for x in own["todre,keep=0.1"][1]]
    assert [c["kept_tokens"] for line in lines for c in line["token_counts"]] == [[26] * DEPTH] * COUNT
    assert written["throughput"]["avg_kept_tokens"] == 26 and written["config"]["model"] == "vtok_llava_hf"
    text = capsys.readouterr().out
    assert "todre(keep=0.1" in text and "avg_kept_tokens" in text
