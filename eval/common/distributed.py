"""One evaluation in several processes, on one machine or more: who works on what, and how the parts come together.

How it is started, what it promises and how it ends: "Several processes or machines" of assets/docs/evaluate.md. Results are
exchanged with gloo on GPUs too, because that reports a lost peer, where nccl would wait.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar

from vtok.errors import ConfigError, MissingExtraError, VtokError

TIMEOUT = "VTOK_PROCESS_TIMEOUT"
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate reads them
_ERROR = "error"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class ProcessError(VtokError, RuntimeError):
    """Processes of one run that cannot go on together."""


class Peer(NamedTuple):
    """Where a process of the run lives."""

    host: str
    pid: int


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. The default is a run in one process, which needs no accelerate."""

    rank: int = 0  # number of this process, 0 = main
    world: int = 1  # number of processes
    local_rank: int = 0  # number of this process on its machine
    peers: tuple[Peer, ...] = ()  # all processes by rank; empty for one
    group: Any = None  # in which results are exchanged; `None` for one process

    def owns(self, batch: int) -> bool:
        """Whether this process works on the batch with that number."""
        return batch % self.world == self.rank

    def rows(self, total: int, batch_size: int) -> list[int]:
        """Numbers of the samples of this process's batches.

        Cut into batches of the same size they are the batches of the whole: only the last one of all can be shorter, and it is
        the last of its process.
        """
        return [row for row in range(total) if self.owns(row // batch_size)]

    def gather(self, own: Mapping[K, T], expected: Iterable[K]) -> dict[K, T]:
        """Results of all processes by number or name, each exactly once, in the order of `expected`, the same in every process.
        Raises `ProcessError`: one is missing, comes from two processes or was not expected; or a process is lost."""
        found: dict[K, T] = {}
        for rank, part in enumerate(self.all(dict(own))):
            for key, value in part.items():
                if key in found:
                    raise ProcessError(f"the result {key!r} came twice, the second time from process {rank} of {self.world}")
                found[key] = value
        order = list(expected)
        missing, others = [key for key in order if key not in found], found.keys() - set(order)
        if missing or others:
            raise ProcessError(
                f"of {len(order)} results {len(missing)} are missing after {self.world} processes had finished "
                f"(first: {missing[:1]}), {len(others)} were not expected (one: {list(others)[:1]})"
            )
        return {key: found[key] for key in order}

    def all(self, value: T, kind: str = "value") -> list[T]:
        """The value of every process, by rank; the `kind` of the exchange must be the same in all of them. Raises
        `ProcessError`: a process is lost, or is at another point of the program."""
        if self.group is None:
            return [value]
        import torch

        found: list[Any] = [None] * self.world
        try:
            torch.distributed.all_gather_object(found, (kind, value), group=self.group)
        except RuntimeError as error:
            time.sleep(0.5)  # until the system knows that a process is gone
            raise ProcessError(f"{self.lost()} ({str(error).splitlines()[0]})") from error
        if any(other != kind for other, _ in found):
            failed = [f"process {rank} failed: {value}" for rank, (other, value) in enumerate(found) if other == _ERROR]
            raise ProcessError("; ".join(failed) or f"the processes are at different points: {[other for other, _ in found]}")
        return [value for _, value in found]

    def agree(self, value: T) -> T:
        """The main process's value, in every process: for what depends on files that another process may have changed."""
        return self.all(value)[0]

    def share_error(self, error: Exception) -> None:
        """Returns if all processes have met an error, so that they can go on together. Raises `ProcessError`: some have not; in
        these the next exchange raises, too."""
        self.all(str(error), _ERROR)

    def check_same(self, what: str, value: Any) -> None:
        """Raises `ConfigError` unless the value is the same in every process; the message names the process and both values."""
        values = self.all(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(
                    f"process {rank} on {self.peers[rank].host} has another {what} than process 0 on {self.peers[0].host}: "
                    f"{other} instead of {values[0]}; every machine needs the same files and versions"
                )

    def lost(self) -> str:
        """A sentence that names the processes of this machine that are gone, or says that it was none of these."""
        host = socket.gethostname()
        gone = [rank for rank, peer in enumerate(self.peers) if peer.host == host and not _alive(peer.pid)]
        if gone:
            names = [f"process {rank} of {self.world} (pid {self.peers[rank].pid} on {host})" for rank in gone]
            return f"{' and '.join(names)} died"
        others = sorted({peer.host for peer in self.peers if peer.host != host})
        return f"a process {'on ' + ' or '.join(others) if others else 'of this run'} died, was stopped or does not answer"

    def device(self, asked: str | None = None) -> str | None:
        """Where this process computes: on a GPU of its own, if there is one and no other device was asked for; `None` = CPU."""
        if asked not in (None, "cuda"):
            return asked
        import torch

        if not torch.cuda.is_available() or (asked is None and _cpu_only()):
            return asked
        return "cuda" if self.world == 1 else f"cuda:{self.local_rank % torch.cuda.device_count()}"


def world_size() -> int:
    """How many processes were started for this run, read from what launchers set; nothing is set up."""
    return max([1, *(int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdigit())])


def is_main() -> bool:
    """Whether this process prints and writes records; nothing is set up."""
    return world_size() == 1 or next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def timeout() -> float:
    """Seconds that a process waits for another one. Raises `ConfigError`: the environment says something else than a number
    above 0."""
    text = os.environ.get(TIMEOUT, "3600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT} must be a number of seconds above 0, got {text!r}")
    return seconds


@cache
def current() -> Processes:
    """The processes of this run; the first call connects them, which all of them must do.

    Raises:
        MissingExtraError: several processes were started, and accelerate is not installed.
        ProcessError: they do not find each other.
    """
    if world_size() == 1:
        return Processes()
    import torch

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "distributed") from error
    limit = timedelta(seconds=timeout())
    try:
        if torch.cuda.is_available() and not _cpu_only():
            state = PartialState(timeout=limit)  # nccl, and the process's own GPU
            group: Any = torch.distributed.new_group(backend="gloo", timeout=limit)
        else:
            state = PartialState(cpu=True, backend="gloo", timeout=limit)
            group = torch.distributed.group.WORLD
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the {world_size()} processes of this run do not find each other: {error}") from error
    alone = Processes(state.process_index, state.num_processes, state.local_process_index, group=group)
    peers = alone.all(Peer(socket.gethostname(), os.getpid()))
    return Processes(alone.rank, alone.world, alone.local_rank, tuple(peers), group)


def leave() -> None:
    """Disconnects the processes, if they were connected, once all of them have come here."""
    if current.cache_info().currsize and current().group is not None:
        import torch

        current().all(None, "end")
        torch.distributed.destroy_process_group()


def _cpu_only() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
