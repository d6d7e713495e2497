"""Malformed run files and results; see `malformed`."""

import json
import warnings

import pytest
import yaml
from malformed import (
    ACCEPTED,
    JUNK,
    MOST,
    REFUSED,
    RUN,
    TEXTS,
    bomb,
    failures,
    mutations,
    outcome,
    pipe,
    record,
    some,
    told,
)

from vtok.eval.common.records import Records
from vtok.eval.report.html import ReportOptions, write_report
from vtok.eval.runs import loader as runs
from vtok.eval.runs import models as runs_models


def _read_run(path):
    """Everything that a run does before it loads its model."""
    config = runs.load(str(path))
    runs_models.check_options(config)
    runs_models.task_options(config, config.tasks[0], False, 0, None)
    from vtok.eval.runs.loader import points

    points(config)
    return config


def test_run_files(tmp_path):
    path = tmp_path / "run.yaml"

    def load(text):
        path.write_bytes(text)
        return _read_run(path)

    def dump(value):
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")

    calls = []
    short = {name: value for name, value in JUNK.items() if not name.startswith("long")}  # reading YAML is slow
    long = [(name, {**RUN, "seed": JUNK[name]}) for name in JUNK if name.startswith("long")]
    for what, value in [*some(mutations(RUN, short), 2 * MOST), *long]:
        try:
            text = dump(value)
        except yaml.YAMLError:
            continue
        calls.append((f"run: {what}", lambda t=text: load(t)))
    calls += [(f"run: {what}", lambda t=text: load(t), (REFUSED,)) for what, text in TEXTS.items()]
    whole = {key: value for key, value in RUN.items() if key not in ("seed", "sweep", "options", "data")}
    for key in ("seed", "options", "sweep", "data", "table", "nonsense"):
        text = dump({k: v for k, v in whole.items() if k != key}).decode() + bomb(key)
        calls.append((f"run: a bomb under {key}", lambda t=text: load(t.encode()), (REFUSED,)))
    calls += [
        (f"run: {key} twice", lambda k=key: load(dump(RUN) + dump({k: RUN[k]})), (REFUSED,))
        for key in ("method", "task", "seed")
    ]
    calls.append(("run: a pipe", lambda: runs.load(str(pipe(tmp_path / "pipe.yaml"))), (REFUSED,)))
    calls.append(("run: a folder", lambda: runs.load(str(tmp_path / "x.yaml" / "y")), (REFUSED,)))
    path.write_bytes(dump(RUN))
    for what in (
        "a",
        "a.b.c=1",
        "method.r=[",
        "method.r=&a [*a]",
        "methods.0=1",
        "seed.x=1",
        "=1",
        ".=1",
        "sweep.flops=[.nan]",
    ):
        calls.append((f"run: --set {what}", lambda w=what: runs.load(str(path), [w])))
    found = failures(calls)
    assert not found, told(found)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": "x"}, {"std": [0, 0, 0]}, {"interpolation": "nope"}, {"crop_pct": -1}, {"crop_pct": float("nan")},
        {"crop_mode": "nope"}, {"img_size": 0}, {"in_chans": -1}, {"input_size": [3, 0, 32]}, {"mean": [float("nan")] * 3},
        {"crop_border_pixels": -4}, {"num_classes": -1}, {"channels_last": "yes"}, {"amp": 3}, {"class_map": 5},
        {"model_kwargs": [1]}, {"device": 7}, {"use_ema": None}, {"gp": 3},
    ],
)  # fmt: skip
def test_options_of_a_run_that_mean_nothing(tmp_path, options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "options": options}))
    what, detail = outcome(lambda: _read_run(path))
    assert what == REFUSED, detail
    assert next(iter(options)) in detail


@pytest.mark.parametrize(
    "given", [{"dtype": ""}, {"seed": -1}, {"seed": 2**63}, {"batch_size": 0}, {"sweep": {"seed": [0, -1]}}]
)
def test_values_of_a_run_that_mean_nothing(tmp_path, given):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **given}))
    what, detail = outcome(lambda: _read_run(path))
    assert what == REFUSED, detail


def test_damaged_lines_never_cost_the_good_ones(tmp_path):
    good = [json.dumps({"key": f"good {i}", "value": i}).encode() for i in range(3)]
    for what, text in TEXTS.items():
        path = tmp_path / f"{what}.jsonl"
        lines = [good[0], *text.split(b"\n"), good[1], b'{"key": [1]}', b'{"key": null}', b"[]", b"3", good[2]]
        path.write_bytes(b"\n".join(lines) + b"\n")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            records = Records(path)
            kept = [record["value"] for record in records.load() if "value" in record]
            assert kept == [0, 1, 2], what
            records.append({"key": "new", "value": 3})
            assert records.by_key()["new"]["value"] == 3
        assert path.read_bytes().startswith(b"\n".join(lines)), f"{what}: the file was changed"


def test_reports_of_damaged_results(tmp_path):
    path = tmp_path / "results.jsonl"
    base = {**record(), "key": "u", "method": "unpatched", "setting": "unpatched"}

    def page(*lines):
        path.write_bytes(b"\n".join(lines) + b"\n")
        write_report([path], tmp_path / "page.html", ReportOptions())

    calls = []
    for what, value in some(mutations(record())):
        lines = [json.dumps(one).encode() for one in (base, value)]
        calls.append((f"report: {what}", lambda own=lines: page(*own), (ACCEPTED,)))
    calls += [
        (f"report: {w}", lambda t=t: page(json.dumps(base).encode(), *t.split(b"\n")), (ACCEPTED,)) for w, t in TEXTS.items()
    ]
    calls += [(f"report: {w} alone", lambda t=t: page(t)) for w, t in TEXTS.items()]
    calls.append(("report: a pipe", lambda: write_report([pipe(tmp_path / "pipe.jsonl")], tmp_path / "p.html"), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


def test_there_are_enough_of_them():
    assert len(list(mutations(RUN))) > 100
