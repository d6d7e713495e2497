"""Patched encoders as ONNX files, for onnxruntime, OpenVINO and whatever else reads them.

    vtok.patch(model, "tome", r=13)
    vtok.export.onnx(model, images, "vit.onnx")

The file computes what the patched model computes: the reduction is part of the graph, with fixed numbers of tokens and a free
batch. A method whose number of tokens depends on the image has no such graph and is refused. Needs `vtok[onnx]`.

Which methods and runtimes, and how fast: assets/docs/quickstart/export.md in the repository.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vtok._version import __version__
from vtok.core.prompt import VLMInfo
from vtok.core.tracker import TokenTracker
from vtok.errors import ConfigError, MissingExtraError, StateError, UnsupportedModelError, VtokError, brief, shown
from vtok.targets import find_targets
from vtok.targets.encoder import EncoderTarget
from vtok.targets.lifecycle import call
from vtok.targets.resolve import run_of
from vtok.writing import put, reason, writable

OPSET = 20
_ROOM = {torch.float16: 3e-2}  # else 1e-3: what rounding may change, as a share of the largest output


@dataclass(frozen=True)
class OnnxFile:
    """What was written. `str()` says it in a line.

    Attributes:
        path: of the file; weights of over 2 GB stand beside it, in `NAME.data`.
        inputs: name -> shape, a word where it is free.
        outputs: names, in order.
        opset: of the graph.
        difference: largest difference of onnxruntime's outputs to the model's, as a share of the largest output, over the batch
            sizes in `checked`; `None` if the file was not run.
        checked: batch sizes that were run.
    """

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    opset: int
    difference: float | None
    checked: tuple[int, ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
        run = "not run"
        if self.difference is not None:
            sizes = " and ".join(map(str, self.checked))
            run = f"onnxruntime differs from the model by {self.difference:.1e} of the largest output (batches of {sizes})"
        return f"{self.path}: {shapes} -> {', '.join(self.outputs)}, opset {self.opset}; {run}"


def onnx(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    dynamic_batch: bool = True,
    opset: int = OPSET,
    check: bool = True,
) -> OnnxFile:
    """Writes a vision encoder, patched or not, as an ONNX file, and runs the file once against the model.

    Args:
        model: in eval mode, a vision encoder of timm, open_clip or transformers, or what holds it.
        inputs: an example: images [B, C, H, W], or a mapping from names of arguments to tensors. Height and width are those of
            the file; a free batch needs two images or more.
        path: of the file. What stands there is replaced once the new file is whole and was checked.
        dynamic_batch: whether the file takes batches of any size; else those of the example.
        opset: version of ONNX's operators, 18 or newer.
        check: whether onnxruntime runs the file on the example, and on its first image where the batch is free.

    Returns:
        What was written.

    Raises:
        UnsupportedModelError: a method whose number of tokens depends on the image; a vision-language model; an operator that
            ONNX has not.
        StateError: the model is in training mode, or the file computes something else than the model: it is not kept.
        ConfigError: an unusable example or path.
        MissingExtraError: onnxscript, or for the check onnxruntime, is not installed.
    """
    args, kwargs, batch = _example(inputs)
    _check(model, batch, dynamic_batch)
    target = Path(path)
    writable(target)
    if not isinstance(opset, int) or opset < 18:
        raise ConfigError(f"opset is a whole number, 18 or newer (torch exports no older one), got {shown(opset)}")
    if check and any(t.dtype == torch.bfloat16 for t in (*args, *kwargs.values())):
        raise UnsupportedModelError("onnxruntime's operators for CPUs take no bfloat16; export in float32 or float16")
    translations = _translations()
    free = {0: torch.export.Dim("batch", min=1)} if dynamic_batch else None
    with torch.no_grad():
        _try(model, inputs)  # what is made on the first pass is made outside of the graph
        try:
            with warnings.catch_warnings(), _quiet("onnxscript"):
                warnings.simplefilter("ignore")
                program: Any = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamo=True,
                    dynamic_shapes=None if free is None else dict.fromkeys(kwargs, free) or tuple(free for _ in args),
                    opset_version=opset,
                    custom_translation_table=translations,
                    verbose=False,
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise _told(model, error) from error
    program.model.metadata_props.update({"vtok": __version__, "methods": _methods(model)})
    opened = tuple(kwargs.values()) or args
    examples = [opened] + ([tuple(t[:1] for t in opened)] if dynamic_batch else [])
    with TemporaryDirectory(prefix=".vtok-", dir=target.parent) as folder:
        scratch = Path(folder) / target.name
        try:
            program.save(scratch)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {reason(error)}") from error
        difference = max(_difference(model, scratch, inputs, example) for example in examples) if check else None
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
            put(file, target.parent / file.name)
    return OnnxFile(
        target,
        {one.name: tuple(d if isinstance(d, int) else str(d) for d in one.shape) for one in program.model.graph.inputs},
        tuple(one.name for one in program.model.graph.outputs),
        opset,
        difference,
        tuple(len(example[0]) for example in examples) if check else (),
    )


def _try(model: nn.Module, inputs: Any) -> None:
    """Runs the model once.

    Raises:
        ConfigError: it does not run on this example.
    """
    try:
        call(model, inputs)
    except VtokError:
        raise
    except Exception as error:  # whatever a model does with inputs that it is not made for
        raise ConfigError(
            f"{type(model).__name__} does not run on this example ({type(error).__name__}: {brief(error)}); pass what the "
            "model takes, in its size and type"
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A library's logger tells errors alone: it warns of every sort that it does not fold into a constant."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _told(model: nn.Module, error: BaseException) -> VtokError:
    """Why a model cannot be exported: our own refusal if one is behind torch's error, else what torch says."""
    while error.__cause__ is not None and not isinstance(error, VtokError):
        error = error.__cause__
    if isinstance(error, VtokError):
        return error
    return UnsupportedModelError(f"{type(model).__name__} cannot be exported: {type(error).__name__}: {brief(error)}")


def _example(inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor], int]:
    """(by position, by name, batch size) of an example.

    Raises:
        ConfigError: it holds no tensors, or tensors of several batch sizes.
    """
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if kwargs else (inputs,)
    values = [*args, *kwargs.values()]
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        found = ", ".join(type(value).__name__ for value in values)
        raise ConfigError(f"an example is images [B, C, H, W], or a mapping from names to tensors, got {found}")
    sizes = {len(value) for value in values}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigError(f"all tensors of an example are of one batch, found batches of {sorted(sizes)}")
    return args, kwargs, sizes.pop()


def _check(model: nn.Module, batch: int, dynamic_batch: bool) -> None:
    """Raises unless a model has a graph of fixed numbers of tokens."""
    targets = find_targets(model)
    if any(isinstance(target.info, VLMInfo) for target in targets):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a vision-language model, which vtok.export does not write; export its vision tower, or "
            "serve it (vtok.serving)"
        )
    if any(module.training for module in model.modules()):
        raise StateError("the model, or a part of it, is in training mode; call model.eval() before it is exported")
    if dynamic_batch and batch < 2:
        raise ConfigError("a graph with a free batch is made from an example of two images or more, got one")
    for run in _runs(model):
        for _, reducer in run.patch.steps.values():
            if reducer.dynamic:
                raise UnsupportedModelError(f"a file has fixed numbers of tokens, but {reducer.dynamic}")


def _methods(model: nn.Module) -> str:
    """Settings of what is patched, for whoever finds the file."""
    return "; ".join(str(config.to_dict()) for run in _runs(model) for config in run.patch.configs)


def _runs(model: nn.Module) -> list[TokenTracker]:
    """Those of all patched towers."""
    found = (run_of(target.tower.module) for target in find_targets(model) if isinstance(target, EncoderTarget))
    return [run for run in found if run is not None]


def _translations() -> dict[Any, Any]:
    """Operators that torch cannot write as ONNX by itself -> how they are written.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    try:
        from onnxscript import opset20
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx") from error
    op: Any = opset20

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: of equal values ONNX puts that of the lower index first, which is what stable means."""
        return op.TopK(self, op.Constant(value_ints=[int(self.shape[dim])]), axis=dim, largest=int(descending), sorted=1)

    def searchsorted(
        sorted_sequence: Any,
        self: Any,
        out_int32: bool = False,
        right: bool = False,
        side: str | None = None,
        sorter: Any = None,
    ) -> Any:
        """How many of the sorted values lie below each value."""
        ends = op.Unsqueeze(sorted_sequence, op.Constant(value_ints=[-2]))
        values = op.Unsqueeze(self, op.Constant(value_ints=[-1]))
        below = op.LessOrEqual(ends, values) if right or side == "right" else op.Less(ends, values)
        return op.ReduceSum(op.Cast(below, to=7), op.Constant(value_ints=[-1]), keepdims=0)  # 7: int64

    def plain_sort(self: Any, dim: int = -1, descending: bool = False) -> Any:
        return sort(self, True, dim, descending)

    aten = torch.ops.aten
    return {aten.sort.stable: sort, aten.sort.default: plain_sort, aten.searchsorted.Tensor: searchsorted}


def _difference(model: nn.Module, path: Path, inputs: Any, example: tuple[Tensor, ...]) -> float:
    """Largest difference of the file's outputs to the model's, as a share of the largest.

    Raises:
        StateError: it is more than rounding.
        MissingExtraError: onnxruntime is not installed.
    """
    named = dict(zip(inputs, example)) if isinstance(inputs, Mapping) else example[0]
    with torch.no_grad():
        wanted = [t for t in torch.utils._pytree.tree_leaves(call(model, named)) if isinstance(t, Tensor)]
    if not all(t.isfinite().all() for t in wanted):
        raise StateError("the model gives no numbers on this example (NaN or infinite): nothing to compare a file with")
    try:
        opened = session(path)
        arrays = [t.detach().cpu().numpy() for t in example]
        found = opened.run(None, {one.name: array for one, array in zip(opened.get_inputs(), arrays)})
    except (VtokError, KeyboardInterrupt):
        raise
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        raise UnsupportedModelError(f"onnxruntime cannot run the file, which was not kept: {brief(error)}") from error
    room, shares = _ROOM.get(example[0].dtype, 1e-3), [0.0]
    for mine, theirs in zip(wanted, found):
        gap = (torch.from_numpy(theirs) - mine.cpu()).abs().max() / mine.abs().max().clamp_min(1e-6).cpu()
        shares.append(gap.item())
    if len(wanted) != len(found) or not all(share <= room for share in shares):  # a NaN is no rounding either
        worst = next((share for share in shares if not share <= room), 0.0)
        raise StateError(
            f"the exported graph gives {len(found)} outputs that differ from the model's {len(wanted)} by {worst:.1e} of the "
            f"largest (at most {room:.0e} is rounding); the file was not kept"
        )
    return max(shares)


def session(path: Path, threads: int = 0) -> Any:
    """A file opened in onnxruntime on the CPU; 0 threads = as many as it takes by itself.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
