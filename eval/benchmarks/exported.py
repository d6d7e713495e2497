"""Speed of exported files, patched against unpatched, in the runtime that reads them: `vtok bench --runtime onnxruntime`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vtok import export
from vtok.errors import MissingExtraError
from vtok.eval.benchmarks.result import Result
from vtok.eval.benchmarks.throughput import measure

Session = Callable[[Any], Any]


def measure_exported(
    model: nn.Module, images: Tensor, settings: Sequence[Any], *, runtime: str, threads: int | None = None, **timing: Any
) -> list[Result]:
    """Exports a model unpatched and patched, checks every file, and times them in turn; CPU, float32.

    Args:
        model: unpatched; left as it is.
        images: one batch [B, C, H, W], which is also the batch of the files.
        settings: each a `Setting`, a method, or (method, parameters).
        runtime: one of `RUNTIMES`.
        threads: of the runtime; `None` = torch's.
        **timing: `pairs`, `name`, `seed` and `progress`, as for `vtok.eval.benchmarks.throughput.measure`.

    Returns:
        One result a setting, in order; `kernel` names the runtime.

    Raises:
        ConfigError: too few pairs, no setting.
        UnsupportedModelError: a method does not work on the model or cannot be exported.
        MissingExtraError: the runtime is not installed.
    """
    count = threads or torch.get_num_threads()
    with TemporaryDirectory() as folder:

        def opened(one: nn.Module, batch: Tensor) -> tuple[Session, dict[str, Any]]:
            file = export.onnx(one, batch, Path(folder) / f"{id(one)}.onnx", dynamic_batch=False)
            session = RUNTIMES[runtime](file.path, count)
            return lambda tensor: session(tensor.numpy()), {}

        images = images.float().cpu()
        common: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "threads": count, "memory": False, "profile": False}
        found = measure(model, images, settings, compiler=opened, **common, **timing)
    kernel = {"base": runtime, "patched": runtime}
    return [replace(r, compiled=None, kernel=kernel, versions={**r.versions, runtime: version(runtime)}) for r in found]


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
