"""Peak memory of a forward pass, in a process of its own for every setting: one process could only tell the largest."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.common.settings import Setting, pixels_of, weight_sharing_copy
from vtok.targets.lifecycle import call

_CHILD = "from vtok.eval.benchmarks.memory import child; child()"
_PASSES = 2
_MB = 2**20
Inputs = Tensor | Mapping[str, Any]


def peak_memory(model: nn.Module, images: Inputs, settings: Sequence[Setting]) -> list[float]:
    """Runs each setting and reports how much memory the process holds at its peak, weights and libraries included.

    On the CPU a child process loads the model, forgets what loading took, and runs the passes. On CUDA this process runs them
    and torch's allocator is asked, so libraries do not count there.

    Args:
        model: unpatched, on the device and in the type to be measured.
        images: what the model takes, on the same device: a batch, or a mapping that holds one.

    Returns:
        Peak in MB (2^20 bytes), one a setting.

    Raises:
        ConfigError: the model cannot be sent to another process, or that process failed.
    """
    if pixels_of(images).device.type == "cuda":
        return [_cuda_peak(model, images, setting) for setting in settings]
    with tempfile.TemporaryDirectory(prefix="vtok-") as folder:
        path = Path(folder) / "model.pt"
        try:
            torch.save((model, images, list(settings), torch.get_num_threads()), path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"peak memory is measured in another process, and this {type(model).__name__} cannot be sent there ({error}); "
                "define its class in a module that can be imported, or leave memory out"
            ) from error
        return [_child_peak(path, i) for i in range(len(settings))]


def _cuda_peak(model: nn.Module, images: Inputs, setting: Setting) -> float:
    patched, device = setting.apply(weight_sharing_copy(model), _size(images)), pixels_of(images).device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    _run(patched, images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / _MB


def _child_peak(path: Path, index: int) -> float:
    where = os.pathsep.join(p or os.getcwd() for p in sys.path)  # an uninstalled checkout works too
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(index)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": where},
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}, killed for lack of memory?"]
        raise ConfigError(f"the process that measures peak memory failed: {last[0]}; leave memory out to do without")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """What the child process runs: `path index` are its arguments; prints the peak in MB."""
    path, index = sys.argv[1:3]
    model, images, settings, threads = torch.load(path, weights_only=False)  # our own file, written a moment ago
    torch.set_num_threads(threads)
    settings[int(index)].apply(model, _size(images))
    _forget_peak()
    _run(model, images)
    print(json.dumps(_peak_bytes() / _MB))


def _run(model: nn.Module, images: Inputs) -> None:
    with torch.inference_mode():
        for _ in range(_PASSES):
            call(model, images)


def _size(images: Inputs) -> tuple[int, int, int]:
    channels, height, width = pixels_of(images).shape[1:]
    return channels, height, width


def _forget_peak() -> None:
    """Linux: starts the high-water mark anew, from what is resident now. Elsewhere loading counts."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """High-water mark of this process's memory."""
    try:
        # Not getrusage: there a child starts with the peak of the process that started it.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
