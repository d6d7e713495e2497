"""Results survive kills, damage and company."""

import json
import signal
import subprocess
import sys
import time
import warnings

import pytest

from vtok.eval.common.records import Records, bits, correctness, difference, finite, key_of

WRITER = """
import sys, time
from vtok.eval.common.records import Records
records, who = Records(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    records.append({"key": f"{who}-{i}", "payload": "x" * 20000})
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


def test_what_helpers_read_off_a_record():
    hits = [True, False, True] * 7
    record = {
        "correct": bits(hits),
        "n": 21,
        "primary": "f1",
        "metrics": {"f1": 0.5, "difference": 9.0, "difference_ci": [1, 2]},
    }
    assert correctness(record).tolist() == hits
    assert difference(record) == (9.0, None, [1, 2])
    record["metrics"] |= {"f1_difference": -0.1, "f1_difference_stderr": 0.01}
    assert difference(record) == (-0.1, 0.01, None)
    assert finite({"a": [float("nan"), 1.0, (float("inf"),)], "b": "x"}) == {"a": [None, 1.0, [None]], "b": "x"}
