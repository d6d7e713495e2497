"""The `vtok` program as one of several processes: who speaks, how the run ends when a process dies, how CPU launches start.

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
    """Raises if several processes would each do all of a command.

    Raises:
        ConfigError: they would.
    """
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


def asked_for() -> list[str] | None:
    """torchrun's arguments for the processes that `accelerate launch --cpu` was asked for but did not start; `None` = none.

    accelerate starts several CPU processes only under MPI: with `--cpu --num_processes 3` alone it runs one, which finds a
    port for talking to others in its environment, and the number on the command line of its parent.

    Raises:
        ConfigError: several were asked for, but their number cannot be found.
    """
    if world_size() > 1 or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" or "MASTER_PORT" not in os.environ:
        return None
    if "LOCAL_RANK" in os.environ:  # a launcher is at work already
        return None
    try:
        wanted = _parent_arguments()
    except Exception as error:  # psutil, accelerate's parser, its files: whatever they raise, the advice is the same
        raise ConfigError(
            "accelerate launch --cpu started one process, though several were asked for; write --multi_gpu instead of --cpu, "
            f"which starts CPU processes too where there is no GPU, or use torchrun --nproc_per_node N ({error})"
        ) from error
    machines = wanted["num_machines"] or 1
    here = max(1, (wanted["num_processes"] or machines) // machines)
    if machines > 1:
        place = ["--nnodes", str(machines), "--node_rank", str(wanted["machine_rank"] or 0)]
        place += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    else:
        place = ["--standalone"] if wanted["main_process_port"] is None else ["--master_port", os.environ["MASTER_PORT"]]
    return ["--nproc_per_node", str(here), *place] if machines * here > 1 else None


def start(arguments: list[str]) -> NoReturn:
    """Starts this program as often as torchrun is told to, waits, and ends with 0 if all of them did.

    What failed has been said by the process itself, without torchrun's traceback.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args([*arguments, "-m", "vtok.eval", *sys.argv[1:]]))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 1)
    sys.exit(0)


def _parent_arguments() -> dict[str, Any]:
    """What the `accelerate launch` that started this process was given, by command line or file."""
    import psutil
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    words = psutil.Process(os.getppid()).cmdline()
    for i, word in enumerate(words):
        name = os.path.basename(word)
        if (name == "accelerate" and words[i + 1 : i + 2] == ["launch"]) or name == "accelerate_cli.py":
            given = words[i + 2 :]
            break
        if name in ("accelerate-launch", "accelerate.commands.launch", "launch.py"):
            given = words[i + 1 :]
            break
    else:
        raise ValueError(f"its command line is not one of accelerate's: {' '.join(words)}")
    args = launch_command_parser().parse_args(given)
    names = ("num_processes", "num_machines", "machine_rank", "main_process_port")
    found = {name: getattr(args, name) for name in names}
    if args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu):
        defaults = load_config_from_file(args.config_file)
        found = {name: getattr(defaults, name, None) if value is None else value for name, value in found.items()}
    return found


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
