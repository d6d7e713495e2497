"""Visual question answering: answers against a plain loop, records against sums written here, resuming, bad input."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from helpers_vqa import ANATOMY, PICTURES, picture, questions, save_tiny, tiny_llava, words, write_lines, write_vqav2
from typer.testing import CliRunner

import vtok
from vtok.eval.common.records import Records, correctness
from vtok.eval.models.vlm import load_vlm
from vtok.eval.runs import loader as runs
from vtok.eval.tasks import TASKS
from vtok.eval.tasks.vqa import pipeline as vqa_pipeline
from vtok.eval.tasks.vqa.evaluate import VQAOptions, evaluate
from vtok.eval.tasks.vqa.metrics import soft_accuracy
from vtok.eval.tasks.vqa.records import Scored, blind_scores, groups_of, time_fields
from vtok.eval.tasks.vqa.sources.files import ONE_WORD, read_results
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.targets.vlm.resolve import POSITIONS

VISUAL = ANATOMY.visual_tokens
SETTINGS = [None, ("uniform", {"keep": 0.5}), ("random", {"keep": 0.25})]


def options(**extra):
    return VQAOptions(**{"batch_size": 4, "max_new_tokens": 3, "device": "cpu", **extra})


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="module")
def evaluated(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate(llava, questions(), SETTINGS, options(output=str(out)))


def plain_answer(llava, question, method=None, **params):
    """One question, as a user would ask it."""
    inputs = llava.processor(images=picture(question.image), text=f"<image> {question.text}", return_tensors="pt")
    if method is not None:
        inputs = vtok.prune_inputs(llava.net, dict(inputs), method, **params)
    with torch.no_grad():
        made = llava.net.generate(**inputs, max_new_tokens=3, do_sample=False)
    return llava.processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def lines_of(out, record):
    lines = [line for line in Records(out / "samples.jsonl").load() if line["key"].startswith(record["key"])]
    return sorted(lines, key=lambda line: line["doc_id"])


def test_answers_are_those_of_a_plain_loop(llava, evaluated):
    out, records = evaluated
    asked = questions().questions
    for record, (method, params) in zip(records, [(None, {}), *SETTINGS[1:]]):
        said = [line["prediction"] for line in lines_of(out, record)]
        assert said == [plain_answer(llava, q, method, **params) for q in asked], record["title"]
    assert len({line["prediction"] for line in lines_of(out, records[0])}) > 4
    assert not vtok.info(llava.net).patched and POSITIONS[0] == "original"


def test_one_by_one_is_the_same_as_in_batches(llava, evaluated):
    _, records = evaluated
    alone = evaluate(llava, questions(), SETTINGS, options(batch_size=1))
    for one, other in zip(records, alone):
        for name in ("metrics", "groups", "tokens", "kv_bytes", "gmacs", "blind", "n", "method", "params"):
            assert one[name] == (pytest.approx(other[name]) if name == "gmacs" else other[name]), name


def test_a_sample_says_what_was_asked_said_and_kept(evaluated):
    out, records = evaluated
    base, halved = (lines_of(out, record) for record in records[:2])
    for i, (q, line) in enumerate(zip(questions().questions, halved)):
        assert (line["doc_id"], line["question"], line["target"]) == (i, q.text, q.target)
        assert line["baseline_prediction"] == base[i]["prediction"]
        assert line["score"] == soft_accuracy(line["prediction"], q.answers)
        assert line["kept_tokens"] == [VISUAL // 2] * ANATOMY.text_depth and line["visual_tokens"] == VISUAL
    assert len(Records(out / "samples.jsonl").load()) == len(SETTINGS) * 12
    assert [r["key"] for r in Records(out / "results.jsonl").load()] == [r["key"] for r in records]
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_metrics_are_paired_and_clustered_by_image(evaluated):
    out, (base, halved, _) = evaluated
    asked = questions().questions
    before, after = (np.array([line["prediction"] for line in lines_of(out, r)]) for r in (base, halved))
    metrics = halved["metrics"]
    assert metrics["agreement"] == pytest.approx((before == after).mean())
    right = [np.array([said == q.target for said, q in zip(who, asked)], float) for who in (before, after)]
    assert metrics["exact_match"] == pytest.approx(right[1].mean())
    assert metrics["exact_match_difference"] == pytest.approx((right[1] - right[0]).mean())
    assert np.array_equal(correctness(halved), right[1])
    same = (before == after).astype(float)
    residual = np.array([sum(same[i] - same.mean() for i in range(12) if i % PICTURES == p) for p in range(PICTURES)])
    error = np.sqrt((residual**2).sum() * PICTURES / (PICTURES - 1)) / 12
    assert metrics["agreement_stderr"] == pytest.approx(error)
    assert (metrics["loyalty"], metrics["loyalty_stderr"]) == (metrics["agreement"], metrics["agreement_stderr"]), (
        "its name in 0.1"
    )
    assert "agreement" not in base["metrics"] and (base["n"], base["n_images"]) == (12, PICTURES)
    low, high = metrics["exact_match_difference_ci"]
    assert low <= metrics["exact_match_difference"] <= high


def test_differences_of_made_up_answers():
    data = questions(8)
    targets = [q.target for q in data.questions]
    right, half = Scored(data, targets), Scored(data, [t if i % 2 else "?" for i, t in enumerate(targets)])
    found = half.metrics(right)
    assert (found["exact_match"], found["exact_match_difference"], found["agreement"]) == (0.5, -0.5, 0.5)
    assert right.metrics(None)["soft_accuracy_official"] == 1 and "agreement" not in right.metrics(None)
    rows = groups_of(data)["kind"]["open"]
    assert half.metrics(right, rows)["exact_match"] == 0.5 and int(rows.sum()) == 4
    assert blind_scores(data).tolist() == [0, 1, 0, 0] * 2


def test_keys_and_values_are_as_many_bytes_as_the_cache_holds(llava):
    """One row, so that nothing is padding."""
    question = questions().questions[0]
    inputs = llava.inputs([picture(question.image)], [question.text])
    for keep in (1.0, 0.25):
        with vtok.patched(llava.net, "uniform", keep=keep):
            found = vqa_pipeline.answer(llava, llava.net, inputs, 1)
            with torch.no_grad():
                cache = llava.net(**inputs, use_cache=True).past_key_values
            (prompt,) = vtok.info(llava.net).prompts
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if prompt.estimate is not None:
            assert found.macs == (prompt.estimate.macs, prompt.estimate.base_macs, prompt.estimate.reduction_macs)
            assert prompt.estimate.kv_bytes == held
        assert found.kv_bytes.tolist() == [held] and found.kept.tolist() == [[int(VISUAL * keep)] * ANATOMY.text_depth]


def test_tokens_between_layers_are_counted(llava):
    from vlm_zoo import Columns

    inputs = llava.inputs([picture(0), picture(1)], ["is there a circle?", "what color is the shape?"])
    with vtok.patched(llava.net, Columns(((2, 2), (3, 0)))):
        found = vqa_pipeline.answer(llava, llava.net, inputs, 1)
    assert found.visual.tolist() == [VISUAL, VISUAL]
    assert found.kept.tolist() == [[VISUAL, VISUAL, VISUAL // 2, 0]] * 2


def test_times_are_paired_within_batches():
    def line(batch, ttft, base, cold=False):
        return {
            "batch": batch,
            "cold": cold,
            "ttft_ms": ttft,
            "base_ttft_ms": base,
            "decode_ms_per_token": None,
            "base_decode_ms_per_token": 2.0,
        }

    lines = [line(0, 100, 100, True), line(4, 1, 2), line(4, 1, 2), line(8, 2, 8), line(12, 1, 3)]
    found = time_fields(lines, True)
    assert found["ttft_ms"] == {"patched": 1, "base": 3} and found["speedup"] == 3
    assert found["speedup_ci"] is None and found["pairs"] == 3  # too few for an interval
    assert found["decode_ms_per_token"] == {"patched": None, "base": 2}
    assert "speedup" not in time_fields(lines, False)
    assert time_fields(lines[:1], True)["speedup"] == 1  # the only batch there is


def test_records_time_the_first_token_and_each_further_one(evaluated):
    _, records = evaluated
    assert all(r["ttft_ms"]["patched"] > 0 and r["decode_ms_per_token"]["base"] > 0 for r in records)
    assert "speedup" not in records[0] and records[1]["speedup"] > 0
    assert records[1]["kv_bytes"]["patched"] < records[1]["kv_bytes"]["base"] == records[0]["kv_bytes"]["patched"]
    gmacs = records[1]["gmacs"]
    assert records[1]["implied_speedup"] == pytest.approx(gmacs["base"] / gmacs["model"]) and gmacs["base"] > gmacs["model"]
    assert records[0]["gmacs"]["model"] == records[1]["gmacs"]["base"] and "implied_speedup" not in records[0]
    assert records[1]["achieved"] == records[1]["speedup"] / records[1]["implied_speedup"]
    assert records[2]["tokens"] == {"in": 16.0, "out": 4.0, "mean_per_layer": [4.0] * 4}


def test_baselines_keep_as_many_tokens(llava):
    from vlm_zoo import Columns

    records = evaluate(llava, questions(4), [None, Columns(((2, 2), (3, 0)))], options(baselines=True))
    share = (VISUAL * 2 + VISUAL / 2) / 4 / VISUAL
    assert [(r["method"], r["params"].get("keep")) for r in records[2:]] == [("random", share), ("uniform", share)]
    assert [sum(r["tokens"]["mean_per_layer"]) / 4 for r in records[1:]] == [VISUAL * share] * 3
    for name, other in (("random", "uniform"), ("uniform", "random")):
        records = evaluate(llava, questions(4), [None, (name, {"keep": 0.5})], options(baselines=True))
        assert [record["method"] for record in records] == ["unpatched", name, other]
        assert records[1]["tokens"]["out"] == records[2]["tokens"]["out"]
    both = [None, ("random", {"keep": 0.5}), ("uniform", {"keep": 0.5})]
    assert len(evaluate(llava, questions(4), both, options(baselines=True))) == 3, "each is the other's baseline already"
    with pytest.warns(DeprecationWarning, match="`floors` is called `baselines`"):
        assert options(floors=True).baselines


def test_vqav2_files(llava, tmp_path):
    root = write_vqav2(tmp_path)
    data = open_vqa(root)
    assert (len(data.questions), data.prompt, data.questions[0].target) == (8, ONE_WORD, "blue")
    assert set(groups_of(data)["kind"]) == {"other", "yes/no"}
    assert data.read(3).size == (16, 16) and np.array_equal(np.asarray(data.read(3)), np.asarray(picture(3)))
    records = evaluate(llava, root, SETTINGS[:2], options(output=str(tmp_path / "out"), prompt=""))
    assert records[0]["n"] == 8 and records[0]["blind"] is None
    answers = read_results(next((tmp_path / "out").glob("answers_1-uniform-keep-0.5-*.json")))
    assert list(answers) == [100 + i for i in range(8)]
    # answers of another program are scored beside: people agree on eight of ten
    targets = {q.doc_id: q.target for q in data.questions}
    (tmp_path / "theirs.json").write_text(json.dumps([{"question_id": n, "answer": a} for n, a in targets.items()]))
    theirs = evaluate(llava, root, [None], options(results=str(tmp_path / "theirs.json")))[-1]
    assert theirs["title"] == "theirs" and theirs["metrics"]["soft_accuracy"] == theirs["metrics"]["exact_match"] == 1
    assert theirs["metrics"]["exact_match_difference"] > 0 and theirs["n"] == 8


def test_the_command_line(folder, tmp_path):
    from vtok.eval.cli.program import app

    def run(*args):
        result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return words(result.stdout)

    data = write_lines(tmp_path / "data")
    common = ["eval", "vqa", "--model", folder, "--data", data, "-b", 4, "--max-new-tokens", 2]
    methods, out = ["-M", "uniform:keep=0.5", "-M", "random:keep=0.25,seed=2"], tmp_path / "out"
    text = run(*common, *methods, "--output", out, "--num-samples", 6)
    for word in (
        "6 questions about 3 images",
        "uniform(keep=0.5)",
        "agreement",
        "kind yes/no, 5 questions",
        "TTFT",
        "implied",
        "±",
    ):
        assert word in text, text
    assert len(Records(out / "results.jsonl").load()) == 3
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{backend: transformers, name: '{folder}'}}\nmethod: {{name: uniform, keep: 0.5}}\ntask: vqa\nbatch_size: 4\n"
        "published: {soft_accuracy: 76.7, base_soft_accuracy: 78.5, source: a paper}\n"
    )
    text = run("run", path, "--data", data, "-j", 0, "-o", tmp_path / "out")
    for word in ("76.7 of 78.5", "-1.800", "soft_accuracy", "a paper"):
        assert word in text, text


def test_settings_on_the_command_line():
    assert runs.parse_setting("uniform:keep=0.5") == ("uniform", {"keep": 0.5})
    assert runs.parse_setting("tome") == ("tome", {})
    both = runs.parse_setting("pitome:ratio=0.9+uniform:keep=1.0e+0")
    assert both == [vtok.PiToMe(ratio=0.9), vtok.UniformGrid(keep=1.0)]
    assert [c.name for c in runs.parse_setting("tome+uniform")] == ["tome", "uniform"]
    with pytest.raises(vtok.VtokError, match="unknown method 'unifrm'; did you mean 'uniform'"):
        runs.parse_setting("tome+unifrm")


def _results(tmp_path, content):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, p: evaluate(v, questions(4), []), "at least one setting"),
        (lambda v, p: evaluate(v, questions(4), [None], options(batch_size=0)), "batch_size must be at least 1, got 0"),
        (lambda v, p: evaluate(v, questions(4), [None], options(model_dtype="int4")), "bfloat16, float16, got 'int4'"),
        (lambda v, p: evaluate(v, questions(4), ["atp"]), "atp needs modules that were trained for this LlavaModel"),
        (lambda v, p: evaluate(v, questions(4), ["unifrm"]), "did you mean 'uniform'"),
        (lambda v, p: evaluate(str(p), questions(4)), "transformers cannot load"),
        (lambda v, p: load_vlm("no/such-model"), "transformers cannot load no/such-model as a vision-language model"),
        (lambda v, p: evaluate(v, questions(4), [None], options(results=_results(p, [{"question_id": 0, "answer": "x"}]))),
         "has no answer to 3 of 4 questions, the first: 1"),
        (lambda v, p: evaluate(v, questions(4), [None], options(results=_results(p, [{"answer": "x"}]))),
         "entry 0 has no 'question_id'; expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(call, message, llava, tmp_path):
    with pytest.raises(vtok.VtokError, match=message):
        call(llava, tmp_path)


def test_a_processor_of_another_model(llava):
    from dataclasses import replace

    from vtok.eval.models.reference_vlm import make_processor
    from vtok.eval.models.vlm import VisionLanguageModel

    other = VisionLanguageModel(llava.net, make_processor(replace(ANATOMY, patch_size=8)), "mixed")
    with pytest.raises(vtok.ConfigError) as caught:
        evaluate(other, questions(4), [None, ("uniform", {"keep": 0.5})], options())
    text = str(caught.value)
    assert "processor and model of mixed disagree" in text and "hold 16 image tokens" in text and "makes 64 features" in text


def test_a_patched_model_is_refused(llava):
    with vtok.patched(llava.net, "uniform", keep=0.5), pytest.raises(vtok.ConfigError, match="pass it unpatched"):
        evaluate(llava, questions(4), [None])


def test_the_task_is_registered():
    assert TASKS.get("vqa") is evaluate
