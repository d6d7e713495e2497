"""Runs from a file to their records: one shape whatever the task, what is repeated, what is left out, what is written."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

import vtok
from vtok.eval.common.records import Records, correctness, difference
from vtok.eval.common.settings import Setting
from vtok.eval.models.reference import load_reference_images
from vtok.eval.report import plots
from vtok.eval.report.frame import CSV, frame, front_of, total_gmacs
from vtok.eval.report.sections import findings, sections
from vtok.eval.report.summary import table
from vtok.eval.report.tables import write_csv
from vtok.eval.runs import loader as runs
from vtok.eval.runs import models as runs_models
from vtok.eval.runs import runner
from vtok.eval.runs.loader import points

FIELDS = {
    *("key", "config", "task", "model", "backend", "method", "setting", "params", "budget", "dataset", "n", "metrics"),
    *("primary", "percent", "tokens", "gmacs", "implied_speedup", "samples_per_sec", "kernel", "dtype", "device", "threads"),
    *("device_name", "batch_size", "seed", "versions", "started", "seconds"),
}
PATCHED = {"speedup", "speedup_ci", "achieved", "achieved_ci"}
VIT = {
    "model": {"backend": "reference", "name": "reference-vit"},
    "methods": [{"name": "tome", "r": 8}, {"name": "random", "flops": 0.7}],
    "task": "imagenet",
    "num_samples": 12,
    "batch_size": 4,
}


def load(tmp_path, content, **changes):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return runs.load(str(path))


def check_shape(records):
    for record in records:
        assert set(record) >= FIELDS, FIELDS - set(record)
        json.dumps(record, allow_nan=False)
        first = record["primary"]
        assert 0 <= record["metrics"][first] <= (100 if record["percent"] else 1)
        if record["method"] == "unpatched":
            assert difference(record) == (None, None, None) and "speedup" not in record
            assert set(record["samples_per_sec"]) == set(record["kernel"]) == {"base"}
            continue
        assert set(record) >= PATCHED, PATCHED - set(record)
        change, error, low_high = difference(record)
        base = next(r for r in records if r["method"] == "unpatched" and r["task"] == record["task"])
        assert change == pytest.approx(record["metrics"][first] - base["metrics"][first])
        assert low_high is None if record["n"] < 5 else low_high[0] < change < low_high[1]
        assert error is None or low_high is None or low_high[1] - low_high[0] > 0
        assert record["achieved"] == pytest.approx(record["speedup"] / record["implied_speedup"])
        low_high = record["speedup_ci"]
        assert low_high is None if record["pairs"] < 5 else low_high[0] <= record["speedup"] <= low_high[1]
        assert set(record["samples_per_sec"]) == set(record["kernel"]) == {"base", "patched"}
        assert record["tokens"]["out"] < record["tokens"]["in"]
        assert record["gmacs"]["model"] < record["gmacs"]["base"] == pytest.approx(base["gmacs"]["model"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    out = tmp_path_factory.mktemp("vit")
    return out, load(out, VIT), runner.run(load(out, VIT), out / "results")


def test_records_of_images(vit):
    out, _, outcome = vit
    records = outcome.records
    assert [r["setting"] for r in records] == ["unpatched", "tome(r=8)", "random(flops=0.7)"]
    check_shape(records)
    assert [r["budget"] for r in records] == [None, None, 0.7]
    assert Records(out / "results" / "results.jsonl").load() == records
    for record in records:
        assert correctness(record).mean() * 100 == pytest.approx(record["metrics"]["top1"])
        assert "x12" in record["kernel"]["base"] and not record["kernel"]["base"].startswith("-")
    gap = correctness(records[1]).astype(float) - correctness(records[0])
    assert records[1]["metrics"]["difference"] == pytest.approx(100 * gap.mean())


def test_a_record_repeats_itself(vit, tmp_path):
    """Its `config` is a run file; run alone it is the same configuration, with the same results."""
    _, _, outcome = vit
    again = runner.run(load(tmp_path, outcome.records[2]["config"]), tmp_path / "out").records
    assert [r["key"] for r in again] == [outcome.records[i]["key"] for i in (0, 2)]
    for name in ("metrics", "correct", "gmacs", "tokens", "params", "config"):
        assert again[0][name] == outcome.records[0][name], name
    assert again[1]["params"] == outcome.records[2]["params"] and again[1]["gmacs"] == outcome.records[2]["gmacs"]


def test_a_second_start_runs_what_is_missing(vit, monkeypatch):
    out, config, outcome = vit
    file = out / "results" / "results.jsonl"
    before = file.read_bytes()

    def refuse(*_):
        raise AssertionError("everything is there: no model is needed")

    monkeypatch.setattr(runs_models, "load_for", refuse)
    second = runner.run(config, out / "results")
    assert second.records == outcome.records and second.resumed == 3
    assert file.read_bytes() == before


def test_a_damaged_line_is_reported_and_run_again(vit, tmp_path):
    out, config, outcome = vit
    lines = (out / "results" / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([lines[0], lines[1][:100], lines[2]]) + "\n")
    console = Console(width=200, record=True, file=io.StringIO())
    second = runner.run(config, tmp_path, console=console)
    text = console.export_text()
    assert "results.jsonl:2: damaged line skipped" in text and "2 of 3 configurations are in" in text
    assert [r["key"] for r in second.records] == [r["key"] for r in outcome.records]
    assert second.records[1]["correct"] == outcome.records[1]["correct"]
    assert (tmp_path / "results.jsonl").read_text().splitlines()[1] == lines[1][:100]  # nothing is rewritten


def test_what_does_not_work_is_left_out_and_the_rest_runs(tmp_path):
    methods = [{"name": "todre"}, {"name": "tome", "flops": 0.01}, {"name": "uniform"}]
    outcome = runner.run(load(tmp_path, VIT, methods=methods, num_samples=4), tmp_path / "out")
    assert [r["method"] for r in outcome.records] == ["unpatched", "uniform"]
    assert "is a vision encoder" in outcome.left_out["imagenet, todre"]
    assert "cannot bring VisionTransformer down to flops=0.01" in outcome.left_out["imagenet, tome(flops=0.01)"]
    assert outcome.unmet == {"imagenet, tome(flops=0.01)"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"backend": "timm", "name": "deit_tiny_patch16_224"}},
            "names no data; pass --data FOLDER (for task imagenet)",
        ),
        ({"options": {"recal_k": 3}}, "unknown key 'options.recal_k'"),
        ({"options": {"batch_size": 3}}, "unknown key 'options.batch_size'"),
        ({"data": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_what_cannot_run_is_named(tmp_path, changes, words):
    with pytest.raises(vtok.VtokError) as caught:
        runner.run(load(tmp_path, VIT, **changes), tmp_path / "out")
    assert words in str(caught.value)


def test_results_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(vtok.ConfigError, match="results cannot be written to"):
        runner.run(load(tmp_path, VIT), tmp_path / "file")


def test_records_of_dual_encoders(tmp_path):
    pytest.importorskip("open_clip")
    config = load(
        tmp_path,
        {
            "model": {"backend": "reference", "name": "reference-clip"},
            "method": {"name": "pitome", "flops": 0.6},
            "tasks": ["zeroshot", "retrieval"],
            "num_samples": 8,
            "batch_size": 4,
            "options": {"recall_k": [1, 2]},
        },
    )
    records = runner.run(config, tmp_path / "out").records
    assert [(r["task"], r["method"]) for r in records] == [
        (task, method) for task in ("zeroshot", "retrieval") for method in ("unpatched", "pitome")
    ]
    check_shape(records)
    assert [r["primary"] for r in records] == ["acc1", "acc1", *["text_retrieval_recall@1"] * 2]
    for record in records:
        assert correctness(record).mean() == pytest.approx(record["metrics"][record["primary"]])
    assert "image_retrieval_recall@2_difference_ci" in records[3]["metrics"]


def test_records_of_questions(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from helpers_vqa import tiny_llava

    monkeypatch.setattr(runs_models, "load_vlm", lambda name: tiny_llava())
    config = load(
        tmp_path,
        {
            "model": {"backend": "reference", "name": "reference-llava"},
            "methods": [
                {"name": "todre", "flops": 0.75},
                [{"name": "pitome", "ratio": 0.9}, {"name": "uniform", "keep": 0.5}],
            ],
            "task": "vqa",
            "num_samples": 12,
            "batch_size": 4,
            "options": {"max_new_tokens": 2},
        },
    )
    records = runner.run(config, tmp_path / "out").records
    check_shape(records)
    assert [r["method"] for r in records] == ["unpatched", "todre", "pitome + uniform"]
    assert records[1]["setting"] == "todre(flops=0.75)"
    # solved for the prompts of the data, not for a default one
    cost = records[1]["gmacs"]
    assert (cost["model"] + cost["pruner"]) / cost["base"] == pytest.approx(0.75, abs=0.02)
    assert all("x" in r["kernel"]["base"] for r in records)
    assert (tmp_path / "out" / "vqa" / "reference-llava" / "samples.jsonl").is_file()


def test_points_of_a_sweep(tmp_path):
    methods = [{"name": "tome"}, {"name": "uniform", "keep": 0.5, "flops": None}, [{"name": "pitome", "flops": None}]]
    config = load(tmp_path, VIT, methods=methods, sweep={"flops": [0.8, 0.6], "batch_size": [2, 4]})
    found = points(config)
    assert [(p.settings[0].params["flops"], p.batch_size) for p in found] == [(0.8, 2), (0.8, 4), (0.6, 2), (0.6, 4)]
    assert all(p.settings[1:] == config.settings[1:] and not p.sweep for p in found)
    groups = runner.jobs_of(config)  # one a batch size: unpatched, two budgets, and what no budget changes once
    assert [[job.setting.title for job in group] for group in groups] == [
        ["unpatched", "tome(flops=0.8)", "uniform(keep=0.5)", "pitome", "tome(flops=0.6)"]
    ] * 2
    grid = load(tmp_path, VIT, methods=None, method={"name": "tome", "r": 1}, sweep={"method.r": [2, [3, 1]], "seed": [0, 1]})
    assert [(p.method.r.to_plain(), p.seed) for p in points(grid)] == [(2, 0), (2, 1), ([3, 1], 0), ([3, 1], 1)]
    assert [p.settings[0].params for p in points(load(tmp_path, VIT, methods=[{"name": "tome"}], sweep=[0.5]))] == [
        {"flops": 0.5}
    ]
    assert points(load(tmp_path, VIT)) == [load(tmp_path, VIT)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sweep": {"flops": [2]}},
            "some.yaml: sweep point flops=2: methods.0.flops must be a share of the model's FLOPs in (0, 1]",
        ),
        ({"sweep": {"methods.0.rr": [2]}}, "sweep point methods.0.rr=2: methods.0: unknown parameter of tome 'rr'"),
        ({"sweep": {"methods.7.r": [2]}}, "methods is a list of 2; say which by a number from 0"),
        ({"sweep": {"dtype": ["fp8"]}}, "dtype must be one of fp32, bf16, fp16"),
        (
            {"sweep": {"flops": [0.5]}, "methods": [[{"name": "tome"}, {"name": "random"}]]},
            "say flops: null in each of several",
        ),
        ({"sweep": {"flops": [0.5]}}, "methods.0: flops sets r of tome"),
    ],
)
def test_points_that_make_no_sense(tmp_path, changes, words):
    with pytest.raises(vtok.VtokError) as caught:
        points(load(tmp_path, VIT, **changes))
    assert words in str(caught.value)


def test_what_is_derived(vit, tmp_path):
    _, _, outcome = vit
    records = outcome.records
    (section,) = sections(records)
    write_csv(frame([section])[list(CSV)], tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert next(iter(rows[0])) == "model"
    assert {row["setting"] for row in rows} == {r["setting"] for r in records} and rows[0]["setting"] == "unpatched"
    for row in rows:
        record = next(r for r in records if r["key"] == row["key"])
        assert float(row["gmacs"]) == record["gmacs"]["model"]
        assert float(row["value"]) == record["metrics"]["top1"]
        assert row["speedup"] == str(record.get("speedup", ""))
    plots.plot([section], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(section))
    text = console.export_text()
    for word in ("reference-vit on fashion-mnist, 12 samples", "tome(r=8)", "achieved", "±"):
        assert word in text


def _point(key, gmacs, value, method="tome", **extra):
    metrics = {"acc": value, "acc_stderr": math.nan}
    common = {"task": "t", "model": "m", "dataset": "d", "primary": "acc", "percent": False}
    return {"key": key, "gmacs": {"model": gmacs, "pruner": 0.1}, "metrics": metrics, "method": method, **common, **extra}


def test_the_pareto_front():
    """b costs more than a and is no better; d is equal to c in both and stays; e has no known cost."""
    found = [_point("a", 1, 0.5), _point("b", 2, 0.5), _point("c", 3, 0.9), _point("d", 3, 0.9), _point("e", 1, 0.6)]
    del found[4]["gmacs"]
    dear = _point("f", 0.95, 0.55)
    dear["gmacs"]["pruner"] = 9.0  # the reduction counts
    for records in (found, [*found, dear]):
        (section,) = sections(records)
        front = front_of(section.rows, total_gmacs, True)
        assert {section.rows[i].record["key"] for i in front} == {"a", "c", "d"}
        assert set(frame([section]).query("pareto")["key"]) == {"a", "c", "d"}


def test_sections_do_not_mix_what_cannot_be_compared():
    records = [_point("a", 1, 0.5), _point("u", 2, 0.5, "unpatched"), _point("b", 1, 0.5, dtype="bfloat16")]
    records += [_point("c", 1, 0.5, seed=3), _point("d", 1, 0.5, seed=4)]
    found = sections(records)
    assert [[row.record["key"] for row in section.rows] for section in found] == [["u", "a"], ["b"], ["c"], ["d"]]
    assert [section.title for section in found] == ["m on d", "m on d (bfloat16)", "m on d (seed 3)", "m on d (seed 4)"]


def test_keys_follow_what_decides_a_result(tmp_path):
    first = {job.setting.title: job.key for group in runner.jobs_of(load(tmp_path, VIT)) for job in group}
    assert len(set(first.values())) == 3
    for changes in (
        {"seed": 1},
        {"batch_size": 2},
        {"dtype": "bf16"},
        {"num_samples": 11},
        {"data": "x"},
        {"options": {"gp": "avg"}},
    ):
        other = {job.key for group in runner.jobs_of(load(tmp_path, VIT, **changes)) for job in group}
        assert not other & set(first.values()), changes
    for changes in ({"output": "elsewhere"}, {"published": {"top1": 1, "source": "x"}}, {"calibration": "y"}):
        other = {job.setting.title: job.key for group in runner.jobs_of(load(tmp_path, VIT, **changes)) for job in group}
        assert other["tome(r=8)"] == first["tome(r=8)"], changes
    assert Setting("tome", {"flops": 0.5, "prompt": {"images": 1}}).title == "tome(flops=0.5)"


def test_keys_follow_what_the_data_hold(tmp_path):
    def keys(**changes):
        config = load(tmp_path, VIT, data=str(tmp_path / "data"), output=str(tmp_path / "data" / "results"), **changes)
        return {job.setting.title: job.key for group in runner.jobs_of(config) for job in group}

    picture, names = tmp_path / "data" / "a" / "1.png", tmp_path / "names.txt"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"one")
    names.write_text("a")
    first = keys()
    for name in ("results/results.jsonl", ".ipynb_checkpoints/1.png", ".DS_Store"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"x")
    assert keys() == first
    picture.write_bytes(b"other")
    second = keys()
    assert not set(second.values()) & set(first.values())
    with_names = keys(options={"class_map": str(names)})
    names.write_text("ab")
    assert not set(keys(options={"class_map": str(names)}).values()) & set(with_names.values())
    calibrated = keys(calibration=str(names))
    names.write_text("abc")
    again = keys(calibration=str(names))
    assert again["tome(r=8)"] == calibrated["tome(r=8)"] and again["random(flops=0.7)"] != calibrated["random(flops=0.7)"]


def test_other_data_under_the_same_path_are_measured_again(tmp_path):
    def folder(offset):
        for name in range(2):
            (tmp_path / "data" / f"{name}").mkdir(parents=True, exist_ok=True)
            for i in range(2):
                Image.fromarray(images[offset + 2 * name + i, 0].numpy()).save(tmp_path / "data" / f"{name}" / f"{i}.png")

    images, _ = load_reference_images("test")
    (tmp_path / "classes.txt").write_text("0\n1\n")
    options = {"class_map": str(tmp_path / "classes.txt")}
    config = load(tmp_path, VIT, data=str(tmp_path / "data"), methods=[{"name": "tome", "r": 8}], options=options)
    told, out = io.StringIO(), tmp_path / "results"
    folder(0)
    assert runner.run(config, out, workers=0).resumed == 0 and runner.run(config, out, workers=0).resumed == 2
    folder(40)
    outcome = runner.run(config, out, workers=0, console=Console(file=told, width=400))
    assert outcome.resumed == 0 and len(Records(out / "results.jsonl").load()) == 4
    assert "2 configurations in" in told.getvalue() and "were measured on other data or weights" in told.getvalue()


def test_a_speed_up_from_a_few_pairs_is_no_verdict():
    def timed(name, speed, pairs):
        return _point(name, 1, 0.5, name, speedup=speed, speedup_ci=[speed - 0.01, speed + 0.01], pairs=pairs)

    (section,) = sections([timed("tome", 0.8, 1), timed("ats", 0.9, 12), timed("pitome", 1.5, 12)])
    words = [one.words for one in findings(section)]
    assert "Slower than unpatched: ats." in words
    assert "Timed in too few pairs to tell how fast they are: tome." in words


def test_data_on_the_command_line_is_that_of_every_point_of_a_sweep():
    config = runner.with_data(runs.load("sweep_reference_vit"), Path("/elsewhere"))
    assert config.sweep and {point.data["imagenet"] for point in points(config)} == {"/elsewhere"}
