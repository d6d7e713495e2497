"""`vtok.benchmark` and `vtok.evaluate`: what `vtok bench` and `vtok eval` do, for models that a program holds.

The arguments are described where users find them, in `vtok.measuring`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config import MethodConfig
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.prefill import measure_prompts
from vtok.eval.benchmarks.throughput import measure
from vtok.eval.common import terminal
from vtok.eval.common.settings import Setting, evaluating, pixels_of, to_device
from vtok.eval.measured import Benchmark, Evaluation
from vtok.eval.models.clip import DualEncoder, hugging_face_encoder
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.runs.loader import parse_setting
from vtok.eval.runs.models import model_kinds, options_class
from vtok.eval.runs.names import check_methods
from vtok.eval.runs.schema import BUNDLED_DATA, REFERENCE
from vtok.eval.tasks import TASKS
from vtok.targets import vlm_targets
from vtok.targets.resolve import require_module


def benchmark(
    model: nn.Module,
    methods: Any,
    inputs: Tensor | Mapping[str, Any],
    *,
    memory: bool | None = None,
    profile: bool = True,
    new_tokens: int = 16,
    compile: str | None = None,
    beside: Mapping[str, Any] | None = None,
    progress: bool = True,
    **timing: Any,
) -> Benchmark:
    """See `vtok.benchmark`; `timing` holds what `measure` and `measure_prompts` have in common."""
    require_module(model)
    settings = settings_of(methods)
    how = None if compile is None else Compiler(compile)
    with _bar("timing, in rounds", progress, timing.get("pairs")) as advance:
        common = {**timing, "progress": advance}
        if beside is not None and not isinstance(beside, Mapping):
            raise ConfigError(f"beside maps names to models or functions that change a copy of the model, got {shown(beside)}")
        if vlm_targets(model):
            if beside:
                raise ConfigError(
                    "beside is for vision encoders; answers of vision-language models are timed by vtok's methods alone"
                )
            if not isinstance(inputs, Mapping):
                raise ConfigError(
                    f"{type(model).__name__} reads prompts: pass what its processor returns for images and texts, got "
                    f"{type(inputs).__name__}"
                )
            return Benchmark(measure_prompts(model, inputs, settings, new_tokens=new_tokens, compiler=how, **common))
        if how is not None and isinstance(inputs, Mapping):
            raise ConfigError("with compile, pass the images as a tensor [B, C, H, W]")
        pixels = pixels_of(inputs)
        if isinstance(inputs, Tensor) and next(iter(inspect.signature(model.forward).parameters), "") == "input_ids":
            raise ConfigError(
                f"{type(model).__name__} reads texts, too: pass what its processor returns for images and texts, or measure "
                "its image tower alone"
            )
        where = torch.device(timing.get("device") or next(model.parameters()).device)
        peaks = where.type == "cuda" if memory is None else memory
        images = pixels if isinstance(inputs, Tensor) else inputs
        return Benchmark(measure(model, images, settings, memory=peaks, profile=profile, compiler=how, beside=beside, **common))


def evaluate(
    model: str | nn.Module,
    task: str,
    methods: Any = (),
    *,
    data: str | os.PathLike | None = None,
    processor: Any = None,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """See `vtok.evaluate`."""
    run = TASKS.get(task)
    settings = settings_of(methods)
    named = model if isinstance(model, str) else None
    if named == REFERENCE:  # its short name, of the command line
        model = named = "reference-vit"
    brought = BUNDLED_DATA.get(named or "", {}).get(task)
    if data is None and brought is None:
        near = difflib.get_close_matches(named or "", BUNDLED_DATA, n=1, cutoff=0.7)
        hint = f"; of {near[0]}, if that was meant, they come with vtok" if near and near[0] != named else ""
        raise ConfigError(f"evaluate needs data: pass data=..., the folder, file or name of the data of task {task}{hint}")
    kind = options_class(task)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in names:
            raise unknown(f"option of task {task}", name, names)
    if data is None and "workers" in names:  # what comes with vtok is in memory
        options.setdefault("workers", 0)
    wanted = kind(**options)
    if isinstance(model, str):
        return Evaluation(_run(run, model, data or brought, settings, wanted, task, progress))
    with evaluating(model):
        return Evaluation(_run(run, held(model, task, processor), data, settings, wanted, task, progress))


def _run(run: Any, model: Any, data: Any, settings: list[Setting], options: Any, what: str, progress: bool) -> Any:
    with _bar(what, progress) as advance:
        return run(model, data, [Setting(), *settings], options, advance)


def settings_of(methods: Any) -> list[Setting]:
    """Methods as a user names them, one or several.

    Raises:
        ConfigError: something that is no method.
        UnknownNameError: no such method or parameter.
    """
    single = isinstance(methods, (str, os.PathLike, MethodConfig)) or (
        isinstance(methods, tuple) and len(methods) == 2 and isinstance(methods[1], Mapping)
    )
    if not single and not isinstance(methods, (list, tuple)):
        raise ConfigError(f"methods are a name, a config such as vtok.ToMe(r=8), or a list of these, got {shown(methods)}")
    return [_setting(one) for one in ([methods] if single else methods)]


def _setting(method: Any) -> Setting:
    found = Setting.of(parse_setting(method) if isinstance(method, str) else method)
    if isinstance(found.method, str):  # what is not there is said before anything runs
        check_methods([found.method])
    return found


def held(model: nn.Module, task: str, processor: Any) -> Any:
    """A module in eval mode as a task takes it: with its processor where it needs one.

    Raises:
        ConfigError: the processor is missing or of another kind.
        UnsupportedModelError: the task is not for such models.
    """
    kinds, name = model_kinds(task), getattr(model, "name_or_path", "") or type(model).__name__
    if any(issubclass(kind, VisionLanguageModel) for kind in kinds):
        if not vlm_targets(model):
            raise UnsupportedModelError(
                f"task {task} asks vision-language models; {type(model).__name__} is none that vtok knows"
            )
        if getattr(processor, "tokenizer", None) is None:
            raise ConfigError(
                f"task {task} makes prompts: pass processor=AutoProcessor.from_pretrained(...), that of the model, "
                f"got {shown(processor)}"
            )
        return VisionLanguageModel(model, processor, name)
    if any(issubclass(kind, DualEncoder) for kind in kinds):
        return _dual_encoder(to_device(model, torch.float32), task, processor, name)
    if nn.Module in kinds:
        return model
    raise ConfigError(f"task {task} takes models by name; pass a name")


def _dual_encoder(model: nn.Module, task: str, processor: Any, name: str) -> DualEncoder:
    if isinstance(processor, (tuple, list)) and len(processor) == 2 and all(callable(part) for part in processor):
        preprocess, tokenizer = processor
        if not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
            raise UnsupportedModelError(f"task {task} needs encode_image and encode_text, which {type(model).__name__} lacks")
        return DualEncoder(model, preprocess, tokenizer, name)
    pictures, words = (getattr(processor, part, None) for part in ("image_processor", "tokenizer"))
    if pictures is None or words is None:
        raise ConfigError(
            f"task {task} reads images and texts: pass processor=AutoProcessor.from_pretrained(...), that of the model, or for "
            f"open_clip processor=(preprocess, tokenizer), got {shown(processor)}"
        )
    return hugging_face_encoder(model, pictures, words, name)


@contextmanager
def _bar(what: str, wanted: bool, total: int | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """What is told how much is done: a bar, where somebody sees it; `None` elsewhere."""
    console = terminal.errors()
    if not wanted or not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        yield None
        return
    with terminal.bar(what, total, console) as advance:
        yield advance
