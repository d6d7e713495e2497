"""Runs in several real processes: the same numbers, and an end that says why."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers_processes import ACCELERATE, TORCHRUN, finished, member, start, wait_for

from vtok.eval.tasks.vqa.evaluate import VQAOptions, evaluate

TODRE = ("todre", {"keep": 0.3})
QUESTIONS, BATCH = 17, 2  # nine batches, the last one shorter: neither 2 nor 3 processes divide the questions
ASK = ("eval", "vqa", "-m", "reference-llava", "--data", "easy-vqa", "--num-samples", str(QUESTIONS), "-b", str(BATCH))
TIMES = {"pairs", "ttft_ms", "decode_ms_per_token", "throughput", "speedup", "speedup_ci", "achieved"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    """Records of the same evaluation in this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate("reference-llava", "easy-vqa", [None, TODRE], VQAOptions(num_samples=QUESTIONS, batch_size=BATCH))
    finally:
        torch.set_num_threads(threads)


def assert_same(records: list[dict], expected: list[dict], processes: int) -> None:
    assert len(records) == len(expected) == 2
    for record, other in zip(records, expected):
        assert {k: v for k, v in record.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
        assert record["n"] == QUESTIONS
        rate = record["throughput"]
        assert rate["processes"] == processes == len(rate["per_process"])
        assert min(rate["per_process"]) > 0
        assert rate["total"] <= sum(rate["per_process"]) * (1 + 1e-9)


def ask(processes: int, out: Path, how: tuple[str, ...] = TORCHRUN, **environment: str):
    return start(processes, *ASK, "-M", "todre:keep=0.3", "--output", str(out), how=how, **environment)


@pytest.mark.slow  # a minute: three launches of two processes
def test_a_killed_process_ends_the_run_and_the_next_one_goes_on(tmp_path, expected):
    child = ask(2, tmp_path)
    victim = member(child, 1)
    samples = tmp_path / "samples.jsonl"
    wait_for(lambda: len(lines(samples)) >= 4, child)
    victim.send_signal(signal.SIGKILL)
    code, _, err = finished(child, 60)
    assert code != 0
    assert f"vtok: process 1 of 2 (pid {victim.pid} on " in err
    assert "died; the run ends here" in err
    before = lines(samples)
    assert 4 <= len(before) < 2 * QUESTIONS
    assert not (tmp_path / "results.jsonl").exists()

    code, out, err = finished(ask(3, tmp_path, ACCELERATE))
    assert code == 0, err
    after = lines(samples)
    assert after[: len(before)] == before  # nothing was asked again
    assert len({line["key"] for line in after}) == len(after) == 2 * QUESTIONS
    assert {line["rank"] for line in after[len(before) :]} == {0, 1, 2}
    assert_same(lines(tmp_path / "results.jsonl"), expected, 3)
    assert out.count("17 questions about") == 1  # the main process alone prints
    assert "samples/s in 3 processes (" in out


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "how"), [(1, TORCHRUN), (2, ACCELERATE), (2, TORCHRUN), (3, ACCELERATE)])
def test_answers_are_the_same_in_any_number_of_processes(tmp_path, expected, processes, how):
    code, _, err = finished(ask(processes, tmp_path, how))
    assert code == 0, err
    assert_same(lines(tmp_path / "results.jsonl"), expected, processes)


@pytest.mark.slow
def test_two_machines(tmp_path, expected):
    """Two launches that meet at an address; the second writes to a folder of its own, as another machine would to its disk."""
    children = []
    meet = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", "29611")
    for rank, name in enumerate(("first", "second")):
        children.append(ask(2, tmp_path / name, ("torch.distributed.run", *meet, "--node_rank", str(rank))))
    (code, out, err), (other, silent, second_err) = map(finished, children)
    assert (code, other) == (0, 0), err + second_err
    assert_same(lines(tmp_path / "first" / "results.jsonl"), expected, 4)
    assert "17 questions about" in out
    assert "questions" not in silent
    assert {line["rank"] for line in lines(tmp_path / "first" / "samples.jsonl")} == {0, 1, 2, 3}
    assert {line["rank"] for line in lines(tmp_path / "second" / "samples.jsonl")} == {2, 3}
    assert not (tmp_path / "second" / "results.jsonl").exists()


@pytest.mark.slow
def test_the_main_process_may_be_the_one_that_is_killed(tmp_path):
    child = ask(3, tmp_path, ACCELERATE)
    victim = member(child, 0)
    wait_for(lambda: len(lines(tmp_path / "samples.jsonl")) >= 4, child)
    victim.send_signal(signal.SIGKILL)
    code, _, err = finished(child, 60)
    assert code != 0
    assert err.count("vtok: process 0 of 3 (pid ") == 1
    assert err.count("vtok: ") == 1


@pytest.mark.slow
def test_a_process_that_stops_answering_ends_the_run(tmp_path):
    child = ask(2, tmp_path, VTOK_PROCESS_TIMEOUT="15")
    wait_for(lambda: len(lines(tmp_path / "samples.jsonl")) >= 4, child)
    stopped = member(child, 1)
    stopped.send_signal(signal.SIGSTOP)
    code, _, err = finished(child, 150)
    assert code != 0
    assert "vtok: process 0 of 2" in err
    assert "a process of this run died, was stopped or does not answer" in err


@pytest.mark.slow
def test_an_error_in_all_processes_is_said_once(tmp_path):
    code, _, err = finished(start(3, "eval", "vqa", "-m", "reference-llava", "--data", "nothing-here"))
    assert code != 0
    assert err.count("vtok: ") == 1
    assert "nothing-here" in err
    code, _, err = finished(start(2, "demo", "--out", os.fspath(tmp_path)))
    assert code != 0
    assert err.count("vtok demo does not share its work among processes, but 2 were started") == 1
