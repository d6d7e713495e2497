"""Sweeps that are killed at any moment, and sweeps that are started twice at once."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import yaml

from vtok.eval.common.records import Records
from vtok.eval.runs import loader as runs
from vtok.eval.runs import runner

CONTENT = {
    "model": {"backend": "reference", "name": "reference-vit"},
    "methods": [{"name": name} for name in ("random", "tome", "uniform")],
    "task": "imagenet",
    "num_samples": 2,
    "batch_size": 1,
    "sweep": {"flops": [0.8, 0.5]},
}
CONFIGURATIONS = 1 + 3 * 2

# A process that has imported everything starts the sweep in children: two at once, then again and again, and kills them.
KILLER = """
import os, random, signal, sys, time, timm, torch
from pathlib import Path
torch.set_num_threads(1)
from vtok.eval.runs import loader as runs, runner
from vtok.eval.common.records import Records
from vtok.eval.tasks import TASKS
from vtok.eval.cli import main
TASKS.get("imagenet")
path, out, kills, chance = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), random.Random(0)

def sweep(folder):
    child = os.fork()
    if child == 0:
        runner.run(runs.load(path), folder)
        os._exit(0)
    return child

def program(folder, said):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = ["vtok", "sweep", path, "-o", str(folder)]
        try:
            main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        finally:
            sys.stdout.flush()
        os._exit(0)
    return child

both = [program(out / "both", out / f"said-{i}") for i in range(2)]
assert [os.waitpid(child, 0)[1] for child in both] == [0, 0], [(out / f"said-{i}").read_text() for i in range(2)]

start = time.perf_counter()
assert os.waitpid(sweep(out / "whole"), 0)[1] == 0
whole, folder = time.perf_counter() - start, 0
for _ in range(kills):
    file = out / str(folder) / "results.jsonl"
    before = file.read_bytes() if file.is_file() else b""
    child = sweep(out / str(folder))
    time.sleep(chance.random() * whole / 2)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    after = file.read_bytes() if file.is_file() else b""
    assert after.startswith(before), "something that was there is gone"
    if status == 0:  # it had finished: the next one starts afresh
        folder += 1
print(folder, flush=True)
for number in range(folder + 1):
    assert os.waitpid(sweep(out / str(number)), 0)[1] == 0
"""


def _written(tmp_path):
    path = tmp_path / "kills.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return path


def _strict(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Records(folder / "results.jsonl").load()


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sweeps_killed_at_random_moments_resume(tmp_path, kills):
    """Whatever the moment: finished configurations stay, none is run again, and the end equals an uninterrupted run.

    Two programs that are started at once share the work.
    """
    path = _written(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, path, tmp_path, str(kills)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    straight = {record["key"]: record for record in _strict(tmp_path / "whole")}
    assert list(straight) == [job.key for group in runner.jobs_of(runs.load(str(path))) for job in group]
    assert len(straight) == CONFIGURATIONS
    for number in range(int(done.stdout) + 1):
        lines = (tmp_path / str(number) / "results.jsonl").read_bytes().splitlines()
        whole = [json.loads(line) for line in lines if line.endswith(b"}")]
        assert len(lines) - len(whole) <= kills  # half a line a kill at most
        resumed = {record["key"]: record for record in whole}
        assert len(whole) == CONFIGURATIONS, "a finished configuration was run again"
        assert set(resumed) == set(straight)
        for key, record in straight.items():
            for name in ("config", "gmacs", "params", "setting", "n", "primary"):
                assert resumed[key][name] == record[name], (record["setting"], name)
            if record["method"] != "random":
                assert resumed[key]["correct"] == record["correct"]
                assert resumed[key]["metrics"] == record["metrics"]
    _check_that_both_worked(tmp_path)


def _check_that_both_worked(tmp_path):
    records = _strict(tmp_path / "both")
    assert len(records) == len({record["key"] for record in records}) == CONFIGURATIONS
    for i in range(2):  # each shows everything
        said = (tmp_path / f"said-{i}").read_text()
        assert all(record["setting"] in said for record in records)
    assert len((tmp_path / "both" / "sweep.csv").read_text().splitlines()) == 1 + CONFIGURATIONS
