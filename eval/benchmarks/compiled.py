"""Models that are compiled, or exported to files, before they are timed: `vtok bench --compile` and `--runtime`.

Of torch.compile is told how long it took, how many graphs it made, and whether anything was compiled again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vtok import export
from vtok.errors import ConfigError, MissingExtraError, unknown
from vtok.eval.benchmarks.result import Result
from vtok.eval.benchmarks.throughput import measure, synchronise

Session = Callable[[Any], Any]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # reduce-overhead takes CUDA graphs
_AGAIN = 3  # calls that must compile nothing


@dataclass(frozen=True)
class Compiler:
    """How models are compiled.

    Attributes:
        mode: one of `MODES`.
        dynamic: whether one graph serves batches of every size; `None` = torch decides when a second size is seen.
        backend: of torch.compile.
    """

    mode: str = "default"
    dynamic: bool | None = None
    backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of torch.compile", self.mode, MODES)

    def __call__(self, model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
        """(the compiled model, what it took, see `watched`).

        Args:
            model: in eval mode.
            images: the batch that will be timed.
        """
        run: Any = torch.compile(model, dynamic=self.dynamic, backend=self.backend, mode=self._mode)

        def once() -> None:
            run(images)
            synchronise(images.device)

        took = self.watched(once)
        if self.dynamic:
            known = _counted()[0]
            with torch.inference_mode(images.is_inference()):  # tensors of the same kind as the batch
                batches = torch.cat([images, images[:1]]), torch.cat([images, images])
            for batch in batches:
                run(batch)
            took["other_batches"] = _counted()[0] - known
        return run, took

    @property
    def _mode(self) -> str | None:
        return self.mode if self.backend == "inductor" else None  # other backends have none

    def decoding(self) -> dict[str, Any]:
        """Keywords of generate() under which it compiles its steps: a static cache, and how; the prefill is not compiled.

        Raises:
            ConfigError: `dynamic`, which says nothing to steps of one token.
        """
        from transformers import CompileConfig

        if self.dynamic:
            raise ConfigError("--dynamic is for batches of images; steps of generate() have the shape of their cache")
        config: Any = CompileConfig(
            backend=self.backend,
            mode=self._mode,  # type: ignore[arg-type]  # torch takes None, transformers' annotation does not say so
            fullgraph=False,
            dynamic=False,
        )
        config._compile_all_devices = True  # transformers compiles on accelerators by itself, on the CPU when told so
        return {"cache_implementation": "static", "compile_config": config}

    def watched(self, once: Callable[[], Any]) -> dict[str, Any]:
        """What the first call of something that compiles took; later ones are to compile nothing.

        Returns:
            `seconds` of the first call; `graphs` that it made and `breaks` between them; `again`, graphs that later calls on
            the same batch made; `other_batches`, graphs that two other batch sizes made under `dynamic`, else `None` (torch
            ties a batch as large as another dimension, say 3, to it: then there is one).
        """
        start, before = time.perf_counter(), _counted()
        once()
        seconds, first = time.perf_counter() - start, _counted()
        for _ in range(_AGAIN):
            once()
        graphs, breaks = (after - earlier for after, earlier in zip(first, before))
        took = {"seconds": seconds, "graphs": graphs, "breaks": breaks, "again": _counted()[0] - first[0]}
        return {"mode": self.mode, "dynamic": self.dynamic, **took, "other_batches": None}


def _counted() -> tuple[int, int]:
    """(graphs, breaks) of this process so far."""
    counters: Any = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


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
