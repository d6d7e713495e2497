"""Made by `python -m vtok.eval.signatures`; for editors and type checkers alone, nothing imports it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

from torch import nn

from vtok.reports.prompt import PromptPlan
from vtok.reports.results import PlanReport
from vtok.targets.resolve import Method, Size

MethodName = Literal[
    "atp",
    "ats",
    "cdpruner",
    "correlation",
    "dart",
    "divprune",
    "downsample",
    "evs",
    "fastervlm",
    "fastv",
    "fastvid",
    "hired",
    "holov",
    "pitome",
    "pixel_dedup",
    "prumerge",
    "pyramiddrop",
    "random",
    "sparsevlm",
    "todre",
    "tome",
    "uniform",
    "vidcom2",
    "visionzip",
    "vispruner",
    "zero_tprune",
]

@overload
def patch(
    model: nn.Module,
    method: Literal["atp"],
    *,
    weights: str | None = None,
    layers: tuple[int, ...] | None = None,
    target_tokens: float | None = None,
    min_tokens: int = 1,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with atp; its knobs: help(vtok.ATP)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["ats"],
    *,
    num_tokens: int | Sequence[int] | None = None,
    keep: float | None = None,
    layers: Iterable[int] | None = None,
    mode: str = 'drop',
    score: str = 'sum_attention',
    query: str = 'cls',
    parity: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with ats; its knobs: help(vtok.ATS)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["cdpruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    relevance: str | None = None,
    sign: int | None = None,
    theta: float | None = None,
    clip: str | None = None,
    tokenizer: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with cdpruner; its knobs: help(vtok.CDPruner)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["correlation"],
    *,
    alpha: float | None = None,
    target_keep: float | None = None,
    beta: float = 0.03,
    low_layer: int | None = None,
    deep_layer: int | None = None,
    sampling: str = 'multinomial',
    seed: int = 0,
    aggregation: str = 'nearest',
    k: int = 32,
    iqr_factor: float = 1.5,
    min_tokens: int = 1,
    joint: bool = False,
    overview: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with correlation; its knobs: help(vtok.Correlation)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["dart"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    visual_pivots: int = 4,
    text_pivots: int = 4,
    order: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with dart; its knobs: help(vtok.DART)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["divprune"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with divprune; its knobs: help(vtok.DivPrune)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["downsample"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    mode: str = 'avg',
    shape: str = 'rectangle',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with downsample; its knobs: help(vtok.Downsample)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["evs"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with evs; its knobs: help(vtok.EVS)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["fastervlm"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with fastervlm; its knobs: help(vtok.FasterVLM)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["fastv"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with fastv; its knobs: help(vtok.FastV)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["fastvid"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    every: int = 4,
    anchor_weight: float = 0.6,
    salience: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with fastvid; its knobs: help(vtok.FastVID)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["hired"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    alpha: float = 0.5,
    first_layer: int = 0,
    late_layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with hired; its knobs: help(vtok.HiRED)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["holov"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    runs: int = 16,
    variant: str = 'code',
    alpha: float = 0.09,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with holov; its knobs: help(vtok.HoloV)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["pitome"],
    *,
    ratio: Any = None,
    r: Any = None,
    margin: Any = None,
    alpha: float = 1.0,
    metric: str | None = None,
    protect: str | None = None,
    prop_attn: bool | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with pitome; its knobs: help(vtok.PiToMe)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["pixel_dedup"],
    *,
    threshold: float = 0.0,
    compare: str = 'neighbours',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with pixel_dedup; its knobs: help(vtok.PixelDedup)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["prumerge"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    plus: bool = False,
    neighbours: int = 32,
    iqr_factor: float = 1.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with prumerge; its knobs: help(vtok.PruMerge)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["pyramiddrop"],
    *,
    preset: str | None = None,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    layers: Sequence[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with pyramiddrop; its knobs: help(vtok.PyramidDrop)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["random"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with random; its knobs: help(vtok.RandomDrop)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["sparsevlm"],
    *,
    preset: str | None = None,
    keep: Sequence[float] | None = None,
    keep_tokens: Sequence[int] | int | None = None,
    layers: Sequence[int] | None = None,
    recycle: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with sparsevlm; its knobs: help(vtok.SparseVLM)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["todre"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    selector: str = 'max_sum',
    pivot: str | int | None = None,
    seed: int = 0,
    cls_layer: int | None = None,
    single_head: bool = False,
    probe: float | Sequence[float] | None = 0.875,
    tau: float = 0.1,
    criterion: str = 'both',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with todre; its knobs: help(vtok.ToDRE)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["tome"] = "tome",
    *,
    r: Any = None,
    prop_attn: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with tome; its knobs: help(vtok.ToMe)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["uniform"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with uniform; its knobs: help(vtok.UniformGrid)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["vidcom2"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with vidcom2; its knobs: help(vtok.VidCom2)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["visionzip"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    class_token: bool | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with visionzip; its knobs: help(vtok.VisionZip)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["vispruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    important: float = 0.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with vispruner; its knobs: help(vtok.VisPruner)."""

@overload
def patch(
    model: nn.Module,
    method: Literal["zero_tprune"],
    *,
    layers: Any = None,
    retain: Any = None,
    r: Any = None,
    iters: Any = None,
    tau: float = 1.0,
    cls_init: str = 'sqrt',
    head_filter: Any = (0.01, 0.7),
    partition: str = 'seq_u',
    metric: str = 'cos',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> nn.Module:
    """`vtok.patch` with zero_tprune; its knobs: help(vtok.ZeroTPrune)."""

@overload
def patch(
    model: nn.Module,
    method: MethodName | Method = "tome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
    **params: Any
) -> nn.Module:
    """Makes a model shorten its token sequence from now on, in place. An earlier patch is removed first.

    Args:
        model: a model that holds one or more supported vision towers, or a supported vision-language model, whose prompts are
            shortened by visual tokens, `generate()` and all; weights and state_dict stay as they are. Methods for vision
            encoders act in the tower of a vision-language model: `vtok.supports(model)` says whether its prompts get shorter.
        method: a method's name; a config object; a list of these (they must reduce in different blocks); or the path of a file,
            or of a folder, that `save_config` wrote. Default: ToMe at its own default (see
            `vtok.eval.models.dinov2` for why).
        flops: a budget instead of a knob: the share of the model's FLOPs to leave, the reduction's own included, in (0, 1]. Of
            a vision-language model: of tower, connector and prefill of a stated prompt.
        input_size: (channels, height, width) for which a budget is solved and counts are checked; default: the model's own.
        calibration: images, as the tower takes them (a mapping: by name), for methods whose token counts depend on the image.
            For a vision-language model: inputs as the processor returns them, or a list of these, on which a method finds a
            number that it has no default for (`correlation`), and on which a budget is solved instead of a stated prompt where
            counts depend on images or text; they are run now.
        trace: keep a map from original to reduced tokens of the vision tower, for `unmerge` and overlays.
        positions: of a vision-language model's tokens behind dropped ones: "original", or "compact", numbered anew. Default:
            those of the program that a method's `preset="official"` stands for, else "original". An LLM that counts columns
            itself (attention within chunks, or to blocks) gets them numbered anew always.
        prompt: that a budget is solved for on a vision-language model: a `vtok.Prompt`, or a mapping of its fields such as
            {"images": 1, "text_tokens": 64}.
        **params: parameters of the method, if it was given by name.

    Returns:
        The same model. Where fewer tokens leave its vision tower, `get_image_features` still returns a row for each that there
        were; rows of those that are gone hold 2**-10 throughout, by which they are known and left out wherever features go.

    Raises:
        UnknownNameError: no such method or parameter.
        ConfigError: a value that makes no sense for this model, or a budget that cannot be met.
        UnsupportedModelError: nothing in the model can be patched, or not with this method; the model is left as it was.
    """

@overload
def patched(
    model: nn.Module,
    method: Literal["atp"],
    *,
    weights: str | None = None,
    layers: tuple[int, ...] | None = None,
    target_tokens: float | None = None,
    min_tokens: int = 1,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with atp; its knobs: help(vtok.ATP)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["ats"],
    *,
    num_tokens: int | Sequence[int] | None = None,
    keep: float | None = None,
    layers: Iterable[int] | None = None,
    mode: str = 'drop',
    score: str = 'sum_attention',
    query: str = 'cls',
    parity: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with ats; its knobs: help(vtok.ATS)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["cdpruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    relevance: str | None = None,
    sign: int | None = None,
    theta: float | None = None,
    clip: str | None = None,
    tokenizer: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with cdpruner; its knobs: help(vtok.CDPruner)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["correlation"],
    *,
    alpha: float | None = None,
    target_keep: float | None = None,
    beta: float = 0.03,
    low_layer: int | None = None,
    deep_layer: int | None = None,
    sampling: str = 'multinomial',
    seed: int = 0,
    aggregation: str = 'nearest',
    k: int = 32,
    iqr_factor: float = 1.5,
    min_tokens: int = 1,
    joint: bool = False,
    overview: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with correlation; its knobs: help(vtok.Correlation)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["dart"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    visual_pivots: int = 4,
    text_pivots: int = 4,
    order: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with dart; its knobs: help(vtok.DART)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["divprune"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with divprune; its knobs: help(vtok.DivPrune)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["downsample"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    mode: str = 'avg',
    shape: str = 'rectangle',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with downsample; its knobs: help(vtok.Downsample)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["evs"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with evs; its knobs: help(vtok.EVS)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["fastervlm"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with fastervlm; its knobs: help(vtok.FasterVLM)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["fastv"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with fastv; its knobs: help(vtok.FastV)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["fastvid"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    every: int = 4,
    anchor_weight: float = 0.6,
    salience: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with fastvid; its knobs: help(vtok.FastVID)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["hired"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    alpha: float = 0.5,
    first_layer: int = 0,
    late_layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with hired; its knobs: help(vtok.HiRED)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["holov"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    runs: int = 16,
    variant: str = 'code',
    alpha: float = 0.09,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with holov; its knobs: help(vtok.HoloV)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["pitome"],
    *,
    ratio: Any = None,
    r: Any = None,
    margin: Any = None,
    alpha: float = 1.0,
    metric: str | None = None,
    protect: str | None = None,
    prop_attn: bool | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with pitome; its knobs: help(vtok.PiToMe)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["pixel_dedup"],
    *,
    threshold: float = 0.0,
    compare: str = 'neighbours',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with pixel_dedup; its knobs: help(vtok.PixelDedup)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["prumerge"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    plus: bool = False,
    neighbours: int = 32,
    iqr_factor: float = 1.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with prumerge; its knobs: help(vtok.PruMerge)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["pyramiddrop"],
    *,
    preset: str | None = None,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    layers: Sequence[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with pyramiddrop; its knobs: help(vtok.PyramidDrop)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["random"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with random; its knobs: help(vtok.RandomDrop)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["sparsevlm"],
    *,
    preset: str | None = None,
    keep: Sequence[float] | None = None,
    keep_tokens: Sequence[int] | int | None = None,
    layers: Sequence[int] | None = None,
    recycle: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with sparsevlm; its knobs: help(vtok.SparseVLM)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["todre"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    selector: str = 'max_sum',
    pivot: str | int | None = None,
    seed: int = 0,
    cls_layer: int | None = None,
    single_head: bool = False,
    probe: float | Sequence[float] | None = 0.875,
    tau: float = 0.1,
    criterion: str = 'both',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with todre; its knobs: help(vtok.ToDRE)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["tome"] = "tome",
    *,
    r: Any = None,
    prop_attn: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with tome; its knobs: help(vtok.ToMe)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["uniform"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with uniform; its knobs: help(vtok.UniformGrid)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["vidcom2"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with vidcom2; its knobs: help(vtok.VidCom2)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["visionzip"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    class_token: bool | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with visionzip; its knobs: help(vtok.VisionZip)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["vispruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    important: float = 0.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with vispruner; its knobs: help(vtok.VisPruner)."""

@overload
def patched(
    model: nn.Module,
    method: Literal["zero_tprune"],
    *,
    layers: Any = None,
    retain: Any = None,
    r: Any = None,
    iters: Any = None,
    tau: float = 1.0,
    cls_init: str = 'sqrt',
    head_filter: Any = (0.01, 0.7),
    partition: str = 'seq_u',
    metric: str = 'cos',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
) -> AbstractContextManager[nn.Module]:
    """`vtok.patched` with zero_tprune; its knobs: help(vtok.ZeroTPrune)."""

@overload
def patched(
    model: nn.Module,
    method: MethodName | Method = "tome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    trace: bool = False,
    positions: str | None = None,
    prompt: Any = None,
    **params: Any
) -> AbstractContextManager[nn.Module]:
    """`with vtok.patched(model, "tome", r=8): ...`; at the end, whatever happens inside, the model is as it was before:
    unpatched, or with the patch that it had.
    """

@overload
def plan(
    model: nn.Module,
    method: Literal["atp"],
    *,
    weights: str | None = None,
    layers: tuple[int, ...] | None = None,
    target_tokens: float | None = None,
    min_tokens: int = 1,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with atp; its knobs: help(vtok.ATP)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["ats"],
    *,
    num_tokens: int | Sequence[int] | None = None,
    keep: float | None = None,
    layers: Iterable[int] | None = None,
    mode: str = 'drop',
    score: str = 'sum_attention',
    query: str = 'cls',
    parity: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with ats; its knobs: help(vtok.ATS)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["cdpruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    relevance: str | None = None,
    sign: int | None = None,
    theta: float | None = None,
    clip: str | None = None,
    tokenizer: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with cdpruner; its knobs: help(vtok.CDPruner)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["correlation"],
    *,
    alpha: float | None = None,
    target_keep: float | None = None,
    beta: float = 0.03,
    low_layer: int | None = None,
    deep_layer: int | None = None,
    sampling: str = 'multinomial',
    seed: int = 0,
    aggregation: str = 'nearest',
    k: int = 32,
    iqr_factor: float = 1.5,
    min_tokens: int = 1,
    joint: bool = False,
    overview: bool = False,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with correlation; its knobs: help(vtok.Correlation)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["dart"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    visual_pivots: int = 4,
    text_pivots: int = 4,
    order: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with dart; its knobs: help(vtok.DART)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["divprune"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with divprune; its knobs: help(vtok.DivPrune)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["downsample"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    mode: str = 'avg',
    shape: str = 'rectangle',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with downsample; its knobs: help(vtok.Downsample)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["evs"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with evs; its knobs: help(vtok.EVS)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["fastervlm"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with fastervlm; its knobs: help(vtok.FasterVLM)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["fastv"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    layer: int = 2,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with fastv; its knobs: help(vtok.FastV)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["fastvid"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    every: int = 4,
    anchor_weight: float = 0.6,
    salience: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with fastvid; its knobs: help(vtok.FastVID)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["hired"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    alpha: float = 0.5,
    first_layer: int = 0,
    late_layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with hired; its knobs: help(vtok.HiRED)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["holov"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    runs: int = 16,
    variant: str = 'code',
    alpha: float = 0.09,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with holov; its knobs: help(vtok.HoloV)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["pitome"],
    *,
    ratio: Any = None,
    r: Any = None,
    margin: Any = None,
    alpha: float = 1.0,
    metric: str | None = None,
    protect: str | None = None,
    prop_attn: bool | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with pitome; its knobs: help(vtok.PiToMe)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["pixel_dedup"],
    *,
    threshold: float = 0.0,
    compare: str = 'neighbours',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with pixel_dedup; its knobs: help(vtok.PixelDedup)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["prumerge"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    plus: bool = False,
    neighbours: int = 32,
    iqr_factor: float = 1.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with prumerge; its knobs: help(vtok.PruMerge)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["pyramiddrop"],
    *,
    preset: str | None = None,
    keep: Sequence[float] = (0.5, 0.25, 0.125),
    layers: Sequence[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with pyramiddrop; its knobs: help(vtok.PyramidDrop)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["random"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with random; its knobs: help(vtok.RandomDrop)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["sparsevlm"],
    *,
    preset: str | None = None,
    keep: Sequence[float] | None = None,
    keep_tokens: Sequence[int] | int | None = None,
    layers: Sequence[int] | None = None,
    recycle: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with sparsevlm; its knobs: help(vtok.SparseVLM)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["todre"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    selector: str = 'max_sum',
    pivot: str | int | None = None,
    seed: int = 0,
    cls_layer: int | None = None,
    single_head: bool = False,
    probe: float | Sequence[float] | None = 0.875,
    tau: float = 0.1,
    criterion: str = 'both',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with todre; its knobs: help(vtok.ToDRE)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["tome"] = "tome",
    *,
    r: Any = None,
    prop_attn: bool = True,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with tome; its knobs: help(vtok.ToMe)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["uniform"],
    *,
    keep: float = 0.925,
    layers: Iterable[int] | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with uniform; its knobs: help(vtok.UniformGrid)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["vidcom2"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with vidcom2; its knobs: help(vtok.VidCom2)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["visionzip"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    class_token: bool | None = None,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with visionzip; its knobs: help(vtok.VisionZip)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["vispruner"],
    *,
    keep: float | None = None,
    keep_tokens: int | None = None,
    preset: str | None = None,
    important: float = 0.5,
    layer: int | None = None,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with vispruner; its knobs: help(vtok.VisPruner)."""

@overload
def plan(
    model: nn.Module,
    method: Literal["zero_tprune"],
    *,
    layers: Any = None,
    retain: Any = None,
    r: Any = None,
    iters: Any = None,
    tau: float = 1.0,
    cls_init: str = 'sqrt',
    head_filter: Any = (0.01, 0.7),
    partition: str = 'seq_u',
    metric: str = 'cos',
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
) -> PlanReport | PromptPlan:
    """`vtok.plan` with zero_tprune; its knobs: help(vtok.ZeroTPrune)."""

@overload
def plan(
    model: nn.Module,
    method: MethodName | Method = "tome",
    *,
    flops: float | None = None,
    input_size: Size | None = None,
    calibration: Any = None,
    prompt: Any = None,
    batch_size: int | None = None,
    **params: Any
) -> PlanReport | PromptPlan:
    """What a method would do, before anything runs: tokens and MACs per block and the speed-up they imply.

    No forward pass is needed. For methods whose counts depend on the image the numbers are upper bounds, and say so, unless
    `calibration` images are given, which are run once. Arguments and errors are those of `patch`; the model is not changed.
    Of a model with several towers it describes the first.

    With `batch_size` an encoder's passes are timed, too, unpatched and patched, on the device that it is on, for about a second
    (in six rounds where these take longer). The report then foresees the speed-up at that batch (`forecast`, with a 95 %
    interval) and says in a sentence where none is to be expected, what the time goes into, and what may help. Images are random
    unless `calibration` ones are given.

    For a vision-language model it states tokens and MACs of tower, connector and every decoder layer, KV-cache bytes, and the
    speed-up of the prefill that follows, for a prompt (`vtok.Prompt`, or a mapping of its fields). What depends on the words or
    the images is an upper bound, and called so, unless `calibration` inputs are given and no prompt: then it is their mean.
    """
