"""Files are written whole or not at all, and never over what they are made from."""

import errno
import os
import re
import threading
from pathlib import Path

import pytest
from helpers_errors import message_of

from vtok import writing
from vtok.errors import ConfigError
from vtok.eval.common.records import Records
from vtok.writing import apart, replacing, writable, write, write_beside

ROOT = Path(__file__).resolve().parents[2]


def _full(monkeypatch):
    """From now on no byte reaches the disk for good."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_is_written_and_written_again(tmp_path):
    path = tmp_path / "new" / "a.txt"
    assert write(path, "é\n") == path
    assert path.read_bytes() == "é\n".encode()
    path.chmod(0o640)
    write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("good")
    _full(monkeypatch)
    said = message_of(ConfigError, write, path, "x" * 1000)
    assert said == f"{path} cannot be written: No space left on device"
    assert path.read_text() == "good"
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    def half():
        with replacing(tmp_path / "a.png") as scratch:
            scratch.write_bytes(b"half")
            assert scratch.suffix == ".png"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_pipes_and_devices_are_given_the_bytes(tmp_path):
    write("/dev/null", "gone")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "cannot be written" in message_of(ConfigError, write, pipe, "nobody reads")
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    for _ in range(200):
        try:
            write(pipe, "somebody reads")
            break
        except ConfigError:  # the reader has not opened its end yet
            threading.Event().wait(0.01)
    reader.join(10)
    assert got == [b"somebody reads"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("call", [lambda p: write(p, "x"), writable])
def test_what_cannot_be_written_is_said(tmp_path, call):
    (tmp_path / "file").write_text("x")
    assert message_of(ConfigError, call, tmp_path) == f"{tmp_path} cannot be written: it is a folder"
    assert "cannot be written" in message_of(ConfigError, call, tmp_path / "file" / "below")
    assert "cannot be written" in message_of(ConfigError, call, tmp_path / ("x" * 300))
    assert "cannot be written" in message_of(ConfigError, call, tmp_path / "a\0b")
    assert (tmp_path / "file").read_text() == "x"


def test_asking_changes_nothing(tmp_path):
    (tmp_path / "there").write_text("x")
    assert writable(tmp_path / "there").read_text() == "x"
    assert not writable(tmp_path / "not").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


def test_an_output_is_no_input_under_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = tmp_path / "r.jsonl"
    real.write_text("{}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "soft").symlink_to(real)
    os.link(real, tmp_path / "hard")
    for name in ("r.jsonl", "./r.jsonl", "sub/../r.jsonl", "soft", "hard", str(real)):
        assert "would be written over" in message_of(ConfigError, apart, [name], [real])
    apart(["other", "sub/r.jsonl", "/dev/null"], [real, "no file at all", "tome:r=8", "sub", "/dev/null", "a\0b"])


def test_records_of_a_full_disk_are_as_they_were(tmp_path, monkeypatch):
    records = Records(tmp_path / "results.jsonl")
    records.append({"key": "a"})
    before = records.path.read_bytes()
    _full(monkeypatch)
    said = message_of(ConfigError, records.append, {"key": "b", "much": "x" * 100})
    assert "No space left on device; what it held is still there" in said
    assert records.path.read_bytes() == before


def test_nothing_else_writes_files():
    """One function decides how a file comes into being; lines that write otherwise are named here with their reason."""
    allowed = {
        "eval/common/launch.py": 'open(os.devnull, "w")',
        "eval/benchmarks/memory.py": "/proc/self/clear_refs",
        "eval/common/records.py": "ab+",  # lines are added, whole ones
        "eval/runs/runner.py": '"ab"',  # looks whether lines can be added
        "eval/report/plots.py": "savefig(held",  # a picture of a notebook, in memory
    }
    writes = re.compile(
        r"\.write_(text|bytes)\(|\bopen\([^)]*[\"'](w|a|x)b?\+?[\"']|savefig\((?!buffer)|save_file\(|os\.replace\("
    )
    for home in ("vtok", "patches", "eval"):
        for path in sorted((ROOT / home).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if path.name == "writing.py":
                continue
            for line in path.read_text().splitlines():
                if writes.search(line) and not re.search(r"replacing\(|savefig\(scratch|said\"\)", line):
                    assert allowed.get(name, "nothing") in line, f"{name}: {line.strip()}"
    assert writing.write is write


def test_results_stand_beside_those_of_earlier_runs(tmp_path):
    first = write_beside(tmp_path / "r.json", "1")
    assert write_beside(tmp_path / "r.json", "1") == first == tmp_path / "r.json"
    assert write_beside(tmp_path / "r.json", "2") == tmp_path / "r-2.json" == write_beside(tmp_path / "r.json", "2")
    assert write_beside(tmp_path / "r.json", "3") == tmp_path / "r-3.json"
    assert [path.read_text() for path in sorted(tmp_path.glob("*"))] == ["2", "3", "1"]
