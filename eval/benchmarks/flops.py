"""Counting what a forward pass really multiplies, with torch's own counter: the check on every closed form in vtok.

One MAC (multiply-accumulate) is two FLOPs. Counted are matrix products, convolutions and attention; norms, softmax, activations
and additions are not, as in torch's counter and in `vtok.plan`. Quantised kernels are unknown to the counter: plan those.

Shapes: B batch, H heads, N queries, M keys, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vtok.eval.common.settings import pixels_of
from vtok.patches.block import Link, ReducingBlock
from vtok.targets import vlm_targets
from vtok.targets.lifecycle import call

Shape = Sequence[int]
_REDUCTION = "reduction"
FEATURES = -1  # the choice among image features, where other places are numbered by decoder layer


@dataclass(frozen=True)
class MacCount:
    """MACs of one forward pass, per image (what images share is divided among them).

    Attributes:
        model: everything but the reduction.
        reduction: vtok's own products, made while it decides which tokens go and moves them.
        by_block: the reduction's, block -> MACs, for blocks of all patched towers in module order.
        images: batch size of the pass.
    """

    model: float
    reduction: float
    by_block: dict[int, float]
    images: int

    @property
    def total(self) -> float:
        """Model and reduction."""
        return self.model + self.reduction

    @property
    def gmacs(self) -> float:
        return self.total / 1e9

    @property
    def gflops(self) -> float:
        """1 MAC = 2 FLOPs."""
        return 2 * self.gmacs

    def __str__(self) -> str:
        model, own = self.model / 1e9, self.reduction / 1e9
        return (
            f"{self.gmacs:.3f} GMACs = {self.gflops:.3f} GFLOPs (2x) per image: model {model:.3f} GMACs = {2 * model:.3f} "
            f"GFLOPs, reduction {own:.3f} GMACs = {2 * own:.3f} GFLOPs"
        )


def attention_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Fused attention, dense: q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]. A mask changes nothing."""
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[-2] * (width + v[-1])


def _native_attention_flops(q: Shape, k: Shape, v: Shape, width: int, heads: int, *_: Any, **__: Any) -> int:
    """`nn.MultiheadAttention`'s inference kernel on [B, N, C]: four projections and attention."""
    batch, rows, _c = q
    return 2 * batch * rows * width * (4 * width + 2 * rows)


def _native_layer_flops(x: Shape, width: int, heads: int, *args: Any, **__: Any) -> int:
    """`nn.TransformerEncoderLayer`'s: the same and an MLP, whose two weights are the fourth and second last matrices."""
    matrices = [a for a in args if isinstance(a, torch.Size) and len(a) == 2]
    mlp = sum(prod(shape) for shape in matrices[2:4])  # after the q/k/v and the output projection
    return _native_attention_flops(x, x, x, width, heads) + 2 * x[0] * x[1] * mlp


def _matrix_vector_flops(matrix: Shape, vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _distance_flops(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Pairwise distances, counted as if they were products: a [.., N, D], b [.., M, D]."""
    return 2 * prod(a) * b[-2]


def formulas() -> dict[Any, Callable[..., int]]:
    """Operators that torch's counter leaves out (as zero!) in some or all versions. For `custom_mapping`: nothing is registered
    for the whole process."""
    aten = torch.ops.aten
    known: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
        "_scaled_dot_product_flash_attention": attention_flops,
        "_scaled_dot_product_efficient_attention": attention_flops,
        "_scaled_dot_product_cudnn_attention": attention_flops,
        "_scaled_dot_product_fused_attention_overrideable": attention_flops,
        "_native_multi_head_attention": _native_attention_flops,
        "_transformer_encoder_layer_fwd": _native_layer_flops,
        "mv": _matrix_vector_flops,
        "dot": _matrix_vector_flops,
        "_cdist_forward": _distance_flops,
    }
    return {getattr(aten, name): formula for name, formula in known.items() if hasattr(aten, name)}


class _Attribution:
    """Stands in for torch's ModuleTracker, which puts hooks on every module of the process, other threads' included, and fails
    without gradients on views of parameters. `parents` are the names that the counter books an operator under."""

    def __init__(self) -> None:
        self.parents = {"Global"}

    def __enter__(self) -> _Attribution:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    @contextmanager
    def under(self, *names: str) -> Iterator[None]:
        before = self.parents
        self.parents = before | set(names)
        try:
            yield
        finally:
            self.parents = before


def links(model: nn.Module) -> list[Link]:
    """What vtok stored on the patched blocks of a model, in module order."""
    return [module._vtok for module in model.modules() if isinstance(module, ReducingBlock)]


@contextmanager
def watched_reduction(model: nn.Module, around: Callable[[Link], Any]) -> Iterator[None]:
    """Runs the reduction step of every patched block inside the context that `around` makes of the block's `Link`, each time
    that it decides or moves tokens.
    """
    steps = [(link, name) for link in links(model) if link.site is not None for name in ("decide", "move")]

    def wrap(link: Link, step: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:
            with around(link):
                return step(*args)

        return inside

    try:
        for link, name in steps:
            link.__dict__[name] = wrap(link, getattr(link, name))
        yield
    finally:
        for link, name in steps:
            link.__dict__.pop(name, None)


class _Watched:
    """Stands in for a reducer of a vision-language model and runs what decides inside a context."""

    def __init__(self, reducer: Any, around: Callable[[], Any]):
        self._reducer, self._around = reducer, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def features(self, *args: Any) -> Any:
        with self._around():
            plan = self._reducer.features(*args)
        make = None if plan is None else plan.remake
        if make is None:
            return plan

        def remake(x: Tensor) -> Tensor:  # what kept rows become is worked out later
            with self._around():
                return make(x)

        return plan._replace(remake=remake)

    def keep(self, *args: Any) -> Any:
        with self._around():
            return self._reducer.keep(*args)


@contextmanager
def watched_prompt(model: nn.Module, around: Callable[[int], Any]) -> Iterator[None]:
    """Runs what decides about visual tokens, before and inside the LLM, inside the context that `around` makes of the decoder
    layer; `FEATURES` stands for the choice among image features.
    """

    pruners = [pruner for target in vlm_targets(model) if (pruner := target.installed()) is not None]
    before = [(pruner.features, pruner.layers) for pruner in pruners]

    def watch(reducer: Any, layer: int) -> Any:
        return _Watched(reducer, lambda: around(layer))

    try:
        for pruner in pruners:
            pruner.features = pruner.features and watch(pruner.features, FEATURES)
            pruner.layers = {layer: (site, watch(reducer, layer)) for layer, (site, reducer) in pruner.layers.items()}
        yield
    finally:
        for pruner, (features, layers) in zip(pruners, before):
            pruner.features, pruner.layers = features, layers


def count_prompt_macs(model: nn.Module, inputs: Mapping[str, Any]) -> MacCount:
    """Counts one forward pass of a vision-language model, patched or not, that reads prompts; its head runs at the last
    position alone.

    Args:
        model: with its language head; it runs in the mode that it is in, without gradients.
        inputs: what the processor returned, or those of a later pass.

    Returns:
        MACs per row of the batch (`images` counts rows); `by_block` has decoder layers, and `FEATURES`.
    """
    attribution = _Attribution()

    def around(layer: int) -> Any:
        return attribution.under(_REDUCTION, f"{_REDUCTION}.{layer}")

    with watched_reduction(model, lambda _: attribution.under(_REDUCTION)), watched_prompt(model, around):
        return _counted(attribution, lambda: model(**inputs, logits_to_keep=1), len(inputs["input_ids"]))


def count_macs(model: nn.Module, images: Tensor | Mapping[str, Any]) -> MacCount:
    """Counts one forward pass: MACs per image, the model's and the reduction's apart.

    Args:
        model: patched or not; it runs in the mode (train or eval) that it is in, without gradients.
        images: [B, 3, H, W], or whatever `model(images)` takes; the first axis is the batch. Or a mapping that holds images: by
            name.
    """
    attribution, numbers = _Attribution(), {id(link): i for i, link in enumerate(links(model))}

    def around(link: Link) -> Any:
        return attribution.under(_REDUCTION, f"{_REDUCTION}.{numbers[id(link)]}")

    batch = len(pixels_of(images)) if isinstance(images, Mapping) else len(images)
    with watched_reduction(model, around):
        return _counted(attribution, lambda: call(model, images), batch)


def _counted(attribution: _Attribution, forward: Callable[[], Any], rows: int) -> MacCount:
    """MACs per row of a pass; those under a name of `_REDUCTION` are its own."""
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    tracker: Any = attribution
    counter.mod_tracker = tracker
    with torch.no_grad(), counter:
        forward()
    macs = {name: sum(by_op.values()) / 2 for name, by_op in counter.get_flop_counts().items()}
    own, prefix = macs.get(_REDUCTION, 0.0), f"{_REDUCTION}."
    by_block = {int(name.removeprefix(prefix)): count / rows for name, count in macs.items() if name.startswith(prefix)}
    return MacCount((macs.get("Global", 0.0) - own) / rows, own / rows, by_block, rows)
