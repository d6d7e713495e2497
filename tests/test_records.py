"""Results survive kills, damage and company."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest

from vtok.eval.common.records import Records, key_of

WRITER = """
import sys, time
from vtok.eval.common.records import Records
records, who = Records(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    records.append({"key": f"{who}-{i}", "payload": "x" * 20000})
"""

# A comparison on a tiny model: what the demo does, without its assets.
RUNNER = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from timm.models.vision_transformer import VisionTransformer
from vtok.eval.demo.compare import Comparison, Data, cases
from vtok.eval.common.records import Records
torch.manual_seed(0)
model = VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=4, num_classes=10).eval()
g = torch.Generator().manual_seed(1)
data = Data("noise", torch.randn(60, 3, 32, 32, generator=g), torch.randint(10, (60,), generator=g), torch.randn(8, 3, 32, 32))
comparison = Comparison(model, "tiny", data, Records(sys.argv[1]), batch_size=20)
todo = cases(["tome", "pitome", "random", "uniform"], [0.8, 0.6])
print("pending", len(comparison.pending(todo)), flush=True)
for case in comparison.pending(todo):
    comparison.run(case)
    print("finished", comparison.key(case), flush=True)
"""


def _spawn(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_append_and_load(tmp_path):
    records = Records(tmp_path / "deep" / "results.jsonl")
    assert records.load() == []
    records.append({"key": "a", "n": 1})
    records.append({"key": "b", "n": 2})
    records.append({"key": "a", "n": 3})
    assert [r["n"] for r in records.load()] == [1, 2, 3]
    assert records.by_key()["a"]["n"] == 3
    assert key_of({"x": 1, "y": [2]}) == key_of({"y": [2], "x": 1}) != key_of({"x": 1, "y": [3]})


def test_damaged_lines_are_reported_and_skipped(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"key": "a"}\n{"key": "b", "tor\n\xff\xfe\n[1]\n{"key": "c"}')
    records = Records(path)
    with pytest.warns(UserWarning, match="results.jsonl:") as caught:
        assert [r["key"] for r in records.load()] == ["a", "c"]
    assert sorted(str(w.message).split("jsonl:")[1][0] for w in caught) == ["2", "3", "4"]


def test_half_a_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"key": "a"}\n{"key": "b", "metr')
    records = Records(path)
    records.append({"key": "c"})
    with pytest.warns(UserWarning, match=":2: damaged line"):
        assert [r["key"] for r in records.load()] == ["a", "c"]


def test_two_writers_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [_spawn(WRITER, path, who, 40) for who in "ab"]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {r["key"] for r in Records(path).load()} == {f"{who}-{i}" for who in "ab" for i in range(40)}


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    writer = _spawn(WRITER, path, "a", 100000)
    assert writer.stdout.readline() == "ready\n"
    time.sleep(0.4)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    lines = path.read_bytes().split(b"\n")
    assert len(lines) > 3
    assert all(json.loads(line)["key"] for line in lines[:-1])


def test_killed_runs_resume_and_lose_nothing_finished(tmp_path):
    """kill -9 at random moments; what was reported as finished stays, and the end equals an uninterrupted run."""
    path, finished, chance = tmp_path / "results.jsonl", set(), random.Random(0)
    for _ in range(3):
        run = _spawn(RUNNER, path)
        pending = int(run.stdout.readline().split()[1])
        assert pending == 9 - len(Records(path).by_key())
        for _ in range(chance.randrange(1, 3)):
            line = run.stdout.readline()
            if line:
                finished.add(line.split()[1])
        time.sleep(chance.random() * 0.2)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert finished <= set(Records(path).by_key())
    last = _spawn(RUNNER, path)
    assert int(last.stdout.readline().split()[1]) < 9, "nothing was resumed"
    assert last.wait(timeout=120) == 0
    whole = _spawn(RUNNER, tmp_path / "whole.jsonl")
    assert whole.wait(timeout=120) == 0
    resumed, straight = Records(path).by_key(), Records(tmp_path / "whole.jsonl").by_key()
    assert set(resumed) == set(straight)
    assert len(resumed) == 9
    for key, record in straight.items():
        for field in ("metrics", "gmacs", "tokens", "params", "correct"):
            assert resumed[key][field] == record[field], (record["method"], field)
    assert len(Records(path).load()) == 9, "a finished configuration was run again"
    os.remove(path)
