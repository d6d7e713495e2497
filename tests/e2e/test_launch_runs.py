"""Run files in several real processes: every record but its times is that of one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers_processes import ACCELERATE, TORCHRUN, finished, member, start, wait_for

from vtok.eval.runs import loader as runs
from vtok.eval.runs import runner

TIMES = {"started", "seconds", "samples_per_sec", "step_time_ms", "throughput", "processes", "speedup", "speedup_ci"}
TIMES |= {"achieved", "achieved_ci", "pairs", "spread", "verdict", "ttft_ms", "decode_ms_per_token"}
IMAGES = {
    "model": {"backend": "reference", "name": "reference-vit"},
    "methods": [{"name": "tome", "r": 13}, {"name": "ats", "flops": 0.6}],
    "task": "imagenet",
    "num_samples": 61,  # eight batches of 8, the last one shorter: neither 2 nor 3 processes divide them
    "batch_size": 8,
}
CLIP = {
    "model": {"backend": "reference", "name": "reference-clip"},
    "method": {"name": "pitome", "ratio": 0.9},
    "tasks": ["zeroshot", "retrieval"],
    "num_samples": 23,
    "batch_size": 5,
}
ASKED = {
    "model": {"backend": "reference", "name": "reference-llava"},
    "method": {"name": "todre", "keep": 0.3},
    "task": "vqa",
    "num_samples": 19,
    "batch_size": 2,
}
# a method that cannot work on the model is left out in all processes alike
MIXED = {**IMAGES, "methods": [{"name": "tome", "r": 13}, {"name": "todre"}], "num_samples": 21}


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def records(folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def same(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMES}


def run(processes: int, config: Path, out: Path, how: tuple[str, ...] = TORCHRUN):
    return start(processes, "run", str(config), "-j", "0", "-o", str(out), how=how)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "processes", "how"),
    [
        (IMAGES, 1, TORCHRUN),
        (IMAGES, 2, TORCHRUN),
        (IMAGES, 3, ACCELERATE),
        (CLIP, 3, TORCHRUN),
        (ASKED, 2, ACCELERATE),
        (MIXED, 5, TORCHRUN),
    ],
    ids=["images-1", "images-2", "images-3", "clip-3", "questions-2", "more-than-batches"],
)
def test_records_are_those_of_one_process(tmp_path, one_thread, content, processes, how):
    config = write(tmp_path / "some.yaml", content)
    expected = runner.run(runs.load(str(config)), tmp_path / "alone", workers=0)
    code, out, err = finished(run(processes, config, tmp_path / "together", how), 500)
    assert code == (2 if expected.left_out else 0) or (code and expected.left_out), err
    found = {record["key"]: record for record in records(tmp_path / "together")}
    assert list(found) == [record["key"] for record in expected.records]
    for record in expected.records:
        other = found[record["key"]]
        assert same(other) == same(record)
        assert other["throughput"]["processes"] == processes == len(other["throughput"]["per_process"])
    assert ("samples/s in" in out) == (processes > 1)
    assert all(name in out for name in expected.left_out)


@pytest.mark.slow
def test_what_was_finished_before_a_process_was_killed_is_not_run_again(tmp_path):
    config = write(tmp_path / "some.yaml", IMAGES)
    child = run(2, config, tmp_path / "out")
    victim = member(child, 1)
    wait_for(lambda: records(tmp_path / "out"), child, 300)
    victim.send_signal(signal.SIGKILL)
    code, _, err = finished(child, 60)
    assert code != 0
    assert f"vtok: process 1 of 2 (pid {victim.pid} on " in err
    before = records(tmp_path / "out")
    assert 1 <= len(before) < 3
    code, _, err = finished(run(2, config, tmp_path / "out"), 500)
    assert code == 0, err
    assert f"{len(before)} of 3 configurations are in" in err
    after = records(tmp_path / "out")
    assert after[: len(before)] == before
    assert len({record["key"] for record in after}) == len(after) == 3
