"""The `vtok` program as one of several processes that torchrun or accelerate started: who speaks, how a run ends early.

Every process may fail, but a run fails with one message a machine. The process that claims a file in the launcher's temporary
folder says what happened; the others end without a word. A process that was killed cannot speak: the launcher (torchrun, inside
`accelerate launch`) then asks the others to end, and the first of them says which one is missing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vtok.errors import ConfigError, VtokError
from vtok.eval.common.distributed import current, is_main, leave, world_size

SHARDED = ("configs", "eval", "methods", "run", "sweep")  # commands that several processes may run together
ENDED = 128 + signal.SIGTERM  # exit code of a process that was asked to end
PATIENCE = 20.0  # seconds that a process waits for another one to say what happened


def check_command(name: str | None) -> None:
    """Raises `ConfigError` if several processes would each do all of a command."""
    if name is not None and world_size() > 1 and name not in SHARDED:
        raise ConfigError(
            f"vtok {name} does not share its work among processes, but {world_size()} were started; start it without a launcher"
        )


def run_member(program: Callable[[], Any]) -> NoReturn:
    """Runs the program as one of several processes and ends this process.

    Nothing but the main process prints; an error of any process is printed once.
    """
    stderr = sys.stderr
    signal.signal(signal.SIGTERM, _asked_to_end(stderr, os.getpid()))
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open as long as the process lives
    try:
        code = _exit_code(program)
        leave()
    except VtokError as error:
        _speak(stderr, f"vtok: {_who()}: {error}")
        code = 2
    except Exception:  # the last line of defence: whatever failed is printed once and ends the run
        _speak(stderr, f"{traceback.format_exc()}vtok: {_who()} failed with the error above")
        code = 1
    for stream in (sys.stdout, stderr):
        stream.flush()
    os._exit(code)  # a process that failed must not wait for others in some destructor


def check_launcher() -> None:
    """Raises `ConfigError` if a launcher was asked for several processes and started this one alone.

    accelerate starts several processes on CPUs only under MPI: with `--num_processes 3` it runs one, which finds a port for
    talking to others in its environment.
    """
    alone = world_size() == 1 and "LOCAL_RANK" not in os.environ
    if alone and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch started one process, though several were asked for, as it does on CPUs; start them with "
            "torchrun --nproc_per_node N -m vtok.eval ..."
        )


def _exit_code(program: Callable[[], Any]) -> int:
    try:
        program()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _who() -> str:
    rank = int(os.environ.get("RANK", "0"))
    return f"process {rank} of {world_size()} on {socket.gethostname()}"


def _asked_to_end(stderr: Any, pid: int) -> Callable[[int, Any], None]:
    """Handler of SIGTERM."""

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == pid:  # not a worker that reads images and has inherited the handler
            lost = current().lost() if current.cache_info().currsize else "a process of this run died, or the run was stopped"
            _speak(stderr, f"vtok: {lost}; the run ends here. What was finished is kept: start it again to go on")
        os._exit(ENDED)

    return handle


def _speak(stderr: Any, message: str) -> None:
    """Prints a message if no other process of this machine has printed one; else waits until it has."""
    file = _claims()
    try:
        if file is not None:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and file is not None and not file.read_text():
            time.sleep(0.05)  # alive until then: who is missing is who died
        return
    print(f"\n{message}", file=stderr, flush=True)
    if file is not None:
        file.write_text("said")


def _claims() -> Path | None:
    """A file in the folder that torchrun makes for this run on this machine; `None` under other launchers."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if not errors else Path(errors).parent.parent / "vtok-ended"
