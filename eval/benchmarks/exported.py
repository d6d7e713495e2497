"""Speed of exported files, patched against unpatched, in the runtime that reads them: `vtok bench --runtime onnxruntime`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vtok import export
from vtok.errors import MissingExtraError
from vtok.eval.benchmarks.result import Result
from vtok.eval.benchmarks.throughput import (
    PAIRS,
    WARMUP,
    baseline_check,
    checked_settings,
    compare,
    described_run,
    interleave,
)
from vtok.eval.common.settings import (
    backend,
    evaluating,
    method_name,
    model_name,
    pass_cost,
    resolved_params,
    to_device,
    weight_sharing_copy,
)

Session = Callable[[Any], Any]


def measure_exported(
    model: nn.Module,
    images: Tensor,
    settings: Sequence[Any],
    *,
    runtime: str,
    pairs: int = PAIRS,
    threads: int | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Exports a model unpatched and patched, checks every file, and times them in turn; CPU, float32.

    Args:
        model: unpatched; left as it is.
        images: one batch [B, C, H, W], which is also the batch of the files.
        settings: each a `Setting`, a method, or (method, parameters).
        runtime: one of `RUNTIMES`.
        pairs: timed batches of every file.
        threads: of the runtime; `None` = torch's.
        name: of the model, for the records.
        seed: of the bootstrap.
        progress: called with (rounds done, rounds).

    Returns:
        One result a setting, in order; `kernel` names the runtime.

    Raises:
        ConfigError: too few pairs, no setting.
        UnsupportedModelError: a method does not work on the model or cannot be exported.
        MissingExtraError: the runtime is not installed.
    """
    chosen = checked_settings(settings, pairs)
    open_file, count = RUNTIMES[runtime], threads or torch.get_num_threads()
    images = images.float().cpu()
    size = (images.shape[1], images.shape[2], images.shape[3])
    with evaluating(model), TemporaryDirectory() as folder, torch.inference_mode():
        base = to_device(model, torch.float32, "cpu")
        patched = [setting.apply(weight_sharing_copy(base), size) for setting in chosen]
        sessions = []
        for number, one in enumerate((base, *patched)):
            file = export.onnx(one, images, Path(folder) / f"{number}.onnx", dynamic_batch=False)
            sessions.append(open_file(file.path, count))
        costs = [pass_cost(one, size) for one in patched]
        array = images.numpy()
        for session in sessions:
            for _ in range(WARMUP):
                session(array)
        times, plain = interleave(sessions, pairs, lambda session: session(array), images.device, progress)
    common = described_run(images, len(images), pairs, seed)
    common["versions"][runtime] = version(runtime)
    common |= {
        "model": name or model_name(model),
        "backend": backend(model),
        "img_size": size[2],
        "threads": count,
        "baseline_check": baseline_check(times[0], plain),
        "kernel": {"base": runtime, "patched": runtime},
        "peak_memory_mb": None,
        "reduction_share": None,
    }
    return [
        Result(
            method=method_name(patched[i]),
            setting=chosen[i].title,
            params=resolved_params(patched[i]),
            **costs[i].fields(),
            **compare(times[0], times[i + 1], costs[i].implied_speedup, len(images), seed),
            **common,
        )
        for i in range(len(chosen))
    ]


def onnxruntime(path: Path, threads: int) -> Session:
    """The file in onnxruntime, on the CPU."""
    session = export.session(path, threads)
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def openvino(path: Path, threads: int) -> Session:
    """The file in OpenVINO, on the CPU, in float32 as the others."""
    try:
        import openvino as ov
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(path), "CPU", options)
    return lambda array: list(compiled([array]).values())


RUNTIMES: dict[str, Callable[[Path, int], Session]] = {"onnxruntime": onnxruntime, "openvino": openvino}
