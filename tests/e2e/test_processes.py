"""How work is dealt out to processes and put together again, without starting any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtok.errors import ConfigError
from vtok.eval.common import distributed as processes
from vtok.eval.common import launch
from vtok.eval.common.distributed import Peer, ProcessError, Processes, is_main, timeout, world_size
from vtok.eval.common.timing import Step, throughput
from vtok.eval.report.summary import throughput_line


@dataclass(frozen=True)
class Among(Processes):
    """A process whose exchange brings these values of the others."""

    others: tuple[Any, ...] = ()

    def all(self, value: Any) -> list[Any]:
        return [value, *self.others]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR", "ACCELERATE_USE_CPU", processes.TIMEOUT)
    for name in names:
        monkeypatch.delenv(name, raising=False)


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 9))
def test_shards_are_the_batches_of_one_process_dealt_out_in_turn(total, size, world):
    whole = [list(range(total))[i : i + size] for i in range(0, total, size)]
    for rank in range(world):
        rows = Processes(rank, world).rows(total, size)
        assert [rows[i : i + size] for i in range(0, len(rows), size)] == whole[rank::world]


def test_gathered_results_are_in_the_order_of_the_data():
    among = Among(0, 3, others=({1: "b", 4: "e"}, {2: "c"}))
    assert list(among.gather({3: "d", 0: "a"}, range(5)).items()) == list(enumerate("abcde"))
    assert Processes().gather({1: "b", 0: "a"}, range(2)) == {0: "a", 1: "b"}


def test_a_result_that_comes_twice_or_not_at_all_is_an_error():
    with pytest.raises(ProcessError, match="result 1 came twice, the second time from process 1 of 2"):
        Among(0, 2, others=({1: "b"},)).gather({0: "a", 1: "b"}, range(2))
    with pytest.raises(ProcessError, match=r"of 4 results 1 are missing .*first: \[2\].*0 were not expected"):
        Among(0, 2, others=({1: "b"},)).gather({0: "a", 3: "d"}, range(4))
    with pytest.raises(ProcessError, match=r"1 were not expected \(one: \[7\]\)"):
        Among(0, 2, others=({7: "b"},)).gather({0: "a"}, range(1))


def test_other_data_on_another_machine_is_named():
    among = Among(0, 2, peers=(Peer("here", 1), Peer("there", 2)), others=("b",))
    with pytest.raises(
        ConfigError, match="process 1 on there has another list of images than process 0 on here: b instead of a"
    ):
        among.check_same("list of images", "a")
    Among(0, 2, others=("a",)).check_same("list of images", "a")


def test_a_lost_process_is_named_if_it_lived_here(monkeypatch):
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(processes, "_alive", lambda pid: pid != 11)
    assert Processes(0, 2, peers=(Peer("here", 10), Peer("here", 11))).lost() == "process 1 of 2 (pid 11 on here) died"
    elsewhere = Processes(0, 2, peers=(Peer("here", 10), Peer("there", 11)))
    assert elsewhere.lost() == "a process on there died, was stopped or does not answer"


@pytest.mark.parametrize(
    ("world", "local", "gpus", "asked", "expected"),
    [
        (1, 0, 0, None, None),
        (1, 0, 2, None, "cuda"),
        (4, 1, 2, None, "cuda:1"),
        (4, 3, 2, "cuda", "cuda:1"),
        (4, 1, 2, "cpu", "cpu"),
        (4, 1, 2, "cuda:0", "cuda:0"),
        (4, 1, 0, None, None),
    ],
)
def test_every_process_has_a_gpu_of_its_own(monkeypatch, world, local, gpus, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert Processes(local, world, local).device(asked) == expected


def test_cpu_launches_leave_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert Processes(1, 2, 1).device() is None


def test_what_launchers_set_is_read(monkeypatch):
    assert (world_size(), is_main()) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert (world_size(), is_main()) == (3, False)
    monkeypatch.setenv("RANK", "0")
    assert is_main()


def test_timeouts(monkeypatch):
    assert timeout() == 3600
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv(processes.TIMEOUT, text)
        with pytest.raises(ConfigError, match=f"VTOK_PROCESS_TIMEOUT must be a number of seconds above 0, got '{text}'"):
            timeout()


def test_commands_that_do_not_share_work_refuse_several_processes(monkeypatch):
    launch.check_command("demo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_command("run")
    with pytest.raises(ConfigError, match="vtok demo does not share its work among processes, but 2 were started"):
        launch.check_command("demo")


def test_a_launcher_that_starts_one_process_instead_of_several_is_refused_with_advice(monkeypatch):
    launch.check_launcher()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    launch.check_launcher()  # --num_processes 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"started one process, though several .* torchrun --nproc_per_node N"):
        launch.check_launcher()
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_launcher()


def test_throughput_of_each_process_and_of_all():
    steps = [Step(0, 8, 9.0, True, 0), Step(1, 8, 9.0, True, 1), Step(2, 8, 2.0, False, 0), Step(3, 8, 4.0, False, 1)]
    record = {"throughput": throughput(steps, 3)}
    assert record["throughput"] == {"processes": 3, "per_process": [4.0, 2.0, None], "total": 4.0}
    assert throughput_line("tome", record) == "tome: 4.0 samples/s in 3 processes (4.0, 2.0, -)"
    alone = {"throughput": throughput([Step(0, 8, 4.0, True)], 1)}
    assert alone["throughput"] == {"processes": 1, "per_process": [2.0], "total": 2.0}
    assert throughput_line("tome", alone) is throughput_line("tome", {}) is None
    assert throughput([], 2) == {"processes": 2, "per_process": [None, None], "total": None}
