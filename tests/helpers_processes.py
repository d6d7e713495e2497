"""Real runs in several processes, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--main_process_port", "0")


def start(processes: int, *arguments: str, how: tuple[str, ...] = TORCHRUN, **environment: str) -> subprocess.Popen[str]:
    """Starts `vtok ARGUMENTS` through a launcher in so many processes of one thread each."""
    number = ("--num_processes" if how == ACCELERATE else "--nproc_per_node", str(processes))
    return spawn([sys.executable, "-m", *how, *number, "-m", "vtok.eval", *arguments], **environment)


def alone(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts `vtok ARGUMENTS` without a launcher."""
    return spawn([sys.executable, "-m", "vtok.eval", *arguments], **environment)


def spawn(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A child with pipes, one thread, and this checkout's vtok."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)


def finished(child: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """(exit code, standard output, standard error), and no process left behind."""
    family = family_of(child)
    try:
        out, err = child.communicate(timeout=seconds)
    finally:
        family += family_of(child)
        for process in family:
            if process.is_running():
                process.kill()
    return child.returncode, out, err


def family_of(child: subprocess.Popen[str]) -> list[psutil.Process]:
    """A child and everything that it started."""
    try:
        process = psutil.Process(child.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def member(child: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process with that rank, as soon as it is there."""

    def found() -> psutil.Process | None:
        for process in family_of(child):
            try:
                if process.environ().get("RANK") == str(rank) and "vtok.eval" in " ".join(process.cmdline()):
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    return wait_for(found, child)


def wait_for(what: Callable[[], Any], child: subprocess.Popen[str], seconds: float = 120) -> Any:
    """The first true result of a question that is asked again and again while the child runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = what()
        if result:
            return result
        assert child.poll() is None, f"ended with {child.returncode}: {child.communicate()}"
        time.sleep(0.05)
    raise AssertionError(f"nothing after {seconds} s")
