"""Measuring from Python what the program `vtok` measures: `vtok.benchmark` for speed, `vtok.evaluate` for accuracy.

    result = vtok.benchmark(model, ["tome", "pitome:ratio=0.95"], images)
    print(result)  # a table; notebooks show it by itself

The work is done by `vtok.eval`, which is imported when one of them is called and needs the extra `vtok[eval]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from vtok.errors import MissingExtraError

if TYPE_CHECKING:
    import torch
    from torch import nn

_HOME = "vtok.eval.direct"  # by name: what a call needs is imported when it is made


class Results(Protocol):
    """What `benchmark` and `evaluate` return; printed, or shown by a notebook, it is a table.

    Attributes:
        records: plain values, one mapping a setting: what `vtok bench --json` and `vtok run` write.
    """

    records: list[dict[str, Any]]

    def to_pandas(self) -> Any:
        """A pandas frame with one row a setting."""

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """A matplotlib figure, which notebooks show; with a path it is written there, too (.png, .pdf, .svg)."""

    def markdown(self) -> str:
        """The table as GitHub Markdown."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes the records as JSON, of which `vtok report` makes a page."""

    def _repr_html_(self) -> str: ...


def benchmark(
    model: nn.Module,
    methods: Any,
    inputs: torch.Tensor | Mapping[str, Any],
    *,
    pairs: int = 20,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    memory: bool | None = None,
    profile: bool = True,
    new_tokens: int = 16,
    compile: str | None = None,  # torch's name
    beside: Mapping[str, Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Results:
    """Times patched models against the unpatched one, interleaved in one run, beside what their MACs imply: `vtok bench`.

    Args:
        model: unpatched; left as it is. A vision encoder of timm, open_clip or transformers, or a vision-language model, of
            which prefill, first token and decoding are timed.
        methods: one of these or a list of them: a name as the command line writes it ("tome", "tome:r=13", "pitome:flops=0.6",
            "pitome+todre:keep=0.1" for two together), a config (`vtok.ToMe(r=13)`), a pair (name, parameters), a list of
            configs that are patched together, or the path of a saved patch.
        inputs: one batch: images [B, C, H, W], or what the model's processor returns, taken by name. Of vision-language models
            always the latter. For methods that keep more of difficult images it should hold real ones.
        pairs: timed batches of every model, 20 or more for a result to quote, 5 at least.
        dtype: "fp32", "bf16", "fp16" or a torch type; `None` = the model's own.
        device: `None` = the model's own.
        threads: of torch's CPU operators; `None` = as set. Set back afterwards.
        memory: whether to measure peak memory of encoders, on a CPU in a process of its own for every setting, some seconds
            each; `None` = on GPUs alone.
        profile: whether to measure the share of the reduction step of encoders, with torch's profiler.
        new_tokens: of every answer of a vision-language model, 2 at least.
        compile: mode of `torch.compile` for all models, "default" for instance; of vision-language models the steps of answers,
            over static caches, are compiled, the prefill is not. `None` = not compiled.
        beside: other programs' models of an encoder, timed in the same rounds: name of the row -> a model that shares no module
            with `model`, or a function that is given a copy of it, weights and all, and returns it changed. Their MACs are
            counted in one pass.
        name: of the model, for tables; `None` = found out.
        seed: of the bootstrap.
        progress: whether to show a bar, where there is a terminal or a notebook.

    Returns:
        Speed-ups with 95 % intervals, MACs, tokens and what else was measured; see `Results`.

    Raises:
        ConfigError: too few pairs, an unknown type, a patched model, no method, inputs of another form.
        UnknownNameError: no such method or parameter.
        UnsupportedModelError: a method does not work on the model.
        MissingExtraError: `vtok[eval]` is not installed.
    """
    return _home().benchmark(
        model,
        methods,
        inputs,
        pairs=pairs,
        dtype=dtype,
        device=device,
        threads=threads,
        memory=memory,
        profile=profile,
        new_tokens=new_tokens,
        compile=compile,
        beside=beside,
        name=name,
        seed=seed,
        progress=progress,
    )


def evaluate(
    model: str | nn.Module,
    task: str,
    methods: Any = (),
    *,
    data: str | os.PathLike | None = None,
    processor: Any = None,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Scores patched models and the unpatched one on the same samples of a standard task: `vtok eval`.

    Args:
        model: unpatched; left as it is. Or a name as `vtok eval` takes it: of timm or open_clip, a name or folder of Hugging
            Face, or one that comes with vtok ("reference-vit", "reference-clip", "reference-llava" ...).
        task: "imagenet" (a folder of images, one sub-folder a class), "zeroshot" or "retrieval" (dual encoders), "vqa", "gqa",
            "pope", "textvqa" ... (vision-language models); `vtok.eval.tasks.TASKS` has all names.
        methods: as for `benchmark`; nothing = the unpatched model alone.
        data: folder, file or name of the task's data; what comes with vtok for its own models needs none.
        processor: of a model that is not given by name, where the task needs one: what `AutoProcessor.from_pretrained` returns,
            or for open_clip the pair (preprocess, tokenizer).
        progress: whether to show a bar, where there is a terminal or a notebook.
        **options: of the task, such as batch_size, num_samples, device, workers: the flags of `vtok eval`.

    Returns:
        Scores with standard errors, paired differences to the unpatched model, tokens, MACs and speed; see `Results`.

    Raises:
        ConfigError: no data, or data, options and model that do not fit together.
        UnknownNameError: no such task, option, method or parameter.
        UnsupportedModelError: a method does not work on the model, or the task not with such models.
        MissingExtraError: `vtok[eval]`, or the library of the model, is not installed.
    """
    return _home().evaluate(model, task, methods, data=data, processor=processor, progress=progress, **options)


def _home() -> Any:
    try:
        return import_module(_HOME)
    except ImportError as error:
        if isinstance(error, MissingExtraError) or (error.name or "").split(".")[0] == "vtok":
            raise
        raise MissingExtraError(error.name or "a dependency", "eval") from error
