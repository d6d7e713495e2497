"""Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph (Wang, Dedhia, Jha, CVPR 2024). At the end of
some blocks: one vote ranks the tokens (I'), near duplicates among the less important half go (S), many votes on the remaining
graph keep the best (I). Tokens are dropped, not merged.

The paper's text was not at hand: equations follow a detailed reading note and the authors' earlier code; what is our
interpretation (scale of the head filter, keys concatenated over heads, which half gets the odd token, rows normalised again
after S) is said where it is done.

Shapes: B batch, N tokens, P prefix tokens, n patches, d head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtok.capabilities import Info
from vtok.config import MethodConfig, ModelInfo, Reducer, block_indices, block_numbers, fraction, require_cls, require_softmax
from vtok.core.reduction import Plan
from vtok.core.search_space import Blocks, BudgetCandidates, Dimension, Point, Real, Space, Weights
from vtok.core.tokens import AttentionView, Place, Site, TokenState
from vtok.errors import ConfigError, shown
from vtok.methods.zero_tprune.duplicates import METRICS, PARTITIONS, most_similar, split_halves
from vtok.methods.zero_tprune.graph import importance
from vtok.ops.room import check_room
from vtok.ops.rows import rows_where, with_prefix

# A schedule for DeiT-S that meets the 3.08 GFLOPs of the paper's ablation table (0-based blocks of 12; 196 patches). The paper
# prints none: this one is a recollection that fits the budget, not a quotation.
_BLOCKS, _RETAIN, _SIMILAR, _DEPTH, _PATCHES = (0, 2, 5, 8, 10), (1.0, 0.9, 0.8, 0.7, 1.0), 10, 12, 196
_STRONGEST = 2.5  # a search goes down to exp(-2.5) = 8 % of the patches in every pruning layer


@dataclass(frozen=True)
class ZeroTPrune(MethodConfig):
    """Config of Zero-TPrune. Lists hold one value per entry of `layers`.

    Attributes:
        layers: 0-based blocks at whose end tokens are pruned (default: 0, 2, 5, 8, 10 of 12, scaled to the depth).
        retain: share of the patches that the I-stage keeps ((0, 1], number or list; default 1, .9, .8, .7, 1), rounded down as
            in the authors' code, at least one.
        r: near duplicates that the S-stage prunes (tokens, number or list; default 10 per 196 patches).
        iters: votes of the I-stage (number or list; default, from the paper: 30 in the first three blocks, 1 in the last
            three, 5 between).
        tau: temperature of the attention that is ranked (paper: 1; the authors' earlier code: 0.5).
        cls_init: `"sqrt"`, the class token starts with sqrt(N) votes, or `"uniform"` (the paper's "-uni"; the choice for
            models without a class token).
        head_filter: (low, high) bounds on a head's variance, `None` = no filter (paper: [0.01, 0.7], scale not stated).
        partition: which tokens the S-stage may prune: `"seq_u"`, the less important half (paper's choice), `"seq_i"`, the more
            important one, `"alternate"` odd ranks, or `"random"`.
        metric: similarity of keys: `"cos"` (paper's choice), `"dot"`, `"manhattan"`, `"euclidean"`, `"minkowski3"` to `5`,
            `"chebyshev"`.

    Every pruning layer holds two H x N x N maps of each image; where they do not fit, it is refused.

    On the reference DINOv2 (`vtok.eval.models.dinov2`) the choice is worth no more than tokens drawn at random at the same
    places, and a few large steps cost more than small ones in every block. The S-stage is as good as chance; the I-stage is
    worse: it keeps what attracts attention and drops whole backgrounds, and the head filter at its scale here adds to that. The
    other sign, dropping what attracts attention, is far worse still.
    """

    name: ClassVar[str] = "zero_tprune"

    layers: Any = None
    retain: Any = None
    r: Any = None
    iters: Any = None
    tau: float = 1.0
    cls_init: str = "sqrt"
    head_filter: Any = (0.01, 0.7)
    partition: str = "seq_u"
    metric: str = "cos"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "retain", "r", "iters", "head_filter"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.layers is not None:
            object.__setattr__(self, "layers", block_numbers(self.layers))
        for value in _each(self.retain):
            fraction(value, "retain")
        for name in ("r", "iters"):
            for value in _each(getattr(self, name)):
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise ConfigError(f"{name} takes whole numbers >= 0, got {shown(value)}")
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not self.tau > 0:
            raise ConfigError(f"tau must be a number > 0, got {shown(self.tau)}")
        for name, allowed in (("cls_init", ("sqrt", "uniform")), ("partition", PARTITIONS), ("metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        if self.head_filter is not None and not _is_range(self.head_filter):
            raise ConfigError(f"head_filter is (low, high) or None, got {shown(self.head_filter)}")

    def advice(self) -> str:
        return "on a pretrained DINOv2 it chose no better than tokens drawn at random at its places, and lost to random pruning"

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        return ({"cls_init": "uniform"},)

    def knob(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layers", "retain", "r")}

    def budget_candidates(self, info: ModelInfo) -> Sequence[ZeroTPrune]:
        full, steps = self.resolved(info), self._steps(info)

        def at(strength: float) -> ZeroTPrune:
            retain = tuple(s.retain**strength for s in steps)  # as if the schedule ran `strength` times
            return full.replace(retain=retain, r=tuple(min(round(strength * s.r), info.num_patches // 2) for s in steps))

        return [at(percent / 100) for percent in range(1001)]

    def search_space(self, info: ModelInfo) -> Space:
        """Where to prune (not at the end of the last block, where nothing is saved), how these layers share the work (as the
        default schedule does, more or less), and how much of it the S-stage does."""
        steps = self._steps(info)
        work = [-math.log(step.retain * (1 - step.r / (info.num_patches + 1))) + 1e-3 for step in steps]
        usual = tuple(_between([step.block for step in steps], work, block) for block in range(info.depth))
        space: dict[str, Dimension] = {"weights": Weights(info.depth, False, usual), "similar": Real(0, 0.6)}
        if self.layers is None:
            places = tuple(range(max(1, info.depth - 1)))
            space["layers"] = Blocks(places, 2, max(2, info.depth // 2), tuple(step.block for step in steps))
        return space

    def candidates_at(self, info: ModelInfo, point: Point) -> Sequence[ZeroTPrune]:
        layers, similar = point.get("layers", self.layers), point["similar"]
        weights = [point["weights"][layer] for layer in layers]

        def at(strength: float) -> ZeroTPrune:
            left, retain, r = info.num_patches, [], []
            for weight in weights:  # S takes its share of what is to go, then I the rest
                r.append(min(round(left * -math.expm1(-strength * weight * similar)), left // 2))
                retain.append(round(max(math.exp(-strength * weight * (1 - similar)), 1e-3), 4))
                left = Step(0, retain[-1], r[-1], 1).counts(left)[1]
            return self.replace(layers=layers, retain=retain, r=r)

        return BudgetCandidates(at, _STRONGEST / min(weights))

    def resolved(self, info: ModelInfo) -> ZeroTPrune:
        steps = self._steps(info)
        return self.replace(
            layers=tuple(s.block for s in steps),
            retain=tuple(s.retain for s in steps),
            r=tuple(s.r for s in steps),
            iters=tuple(s.iters for s in steps),
        )

    def _steps(self, info: ModelInfo) -> tuple[Step, ...]:
        """The schedule for this model, sorted by block."""
        layers, retain, r = self.layers, self.retain, self.r
        if layers is None:
            scaled = {round((b + 0.5) / _DEPTH * info.depth - 0.5): share for b, share in zip(_BLOCKS, _RETAIN)}
            layers, default_retain = tuple(scaled), tuple(scaled.values())
        else:
            if retain is None:
                raise ConfigError("layers is given without retain: say which share each of them keeps")
            block_indices(layers, (), info.depth)
            layers, default_retain = tuple(i + info.depth if i < 0 else i for i in layers), ()
        if len(set(layers)) != len(layers):
            raise ConfigError(f"layers names a block twice: {layers}")
        r = round(_SIMILAR * info.num_patches / _PATCHES) if r is None else r
        shares = _spread(default_retain if retain is None else retain, layers, "retain")
        counts, votes = _spread(r, layers, "r"), _spread(self.iters, layers, "iters")
        steps = [
            Step(block, float(share), count, _default_votes(block, info.depth) if vote is None else vote)
            for block, share, count, vote in zip(layers, shares, counts, votes)
        ]
        return tuple(sorted(steps, key=lambda step: step.block))

    def build(self, info: ModelInfo) -> ZeroTPruneReducer:
        if self.cls_init == "sqrt":
            require_cls(info, "zero_tprune", 'pass cls_init="uniform" to start all tokens alike')
        require_softmax(info, "zero_tprune")
        steps = self._steps(info)
        for step in steps:
            if step.r > info.num_patches // 2 and not info.varies:
                raise ConfigError(
                    f"r={step.r} in block {step.block}: {info.name} has {info.num_patches} patches, of which the S-stage "
                    f"can prune at most {info.num_patches // 2}"
                )
        return ZeroTPruneReducer(
            steps,
            self.tau,
            self.cls_init == "sqrt",
            self.head_filter,
            self.partition,
            self.metric,
            info.num_heads,
            info.num_kv_heads,
            info.head_dim,
            info.parts,
        )


def _between(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """The value at a place between others, on a line; in front of the first and behind the last: theirs."""
    for (a, low), (b, high) in itertools.pairwise(zip(places, values)):
        if a <= place <= b:
            return low + (high - low) * (place - a) / (b - a)
    return values[0] if place < places[0] else values[-1]


def _is_range(value: Any) -> bool:
    """Whether a value is (low, high)."""
    numbers = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    return numbers and value[0] <= value[1]


def _each(value: Any) -> tuple:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _spread(value: Any, layers: Sequence[int], name: str) -> tuple:
    if not isinstance(value, tuple):
        return (value,) * len(layers)
    if len(value) != len(layers):
        raise ConfigError(f"{name} has {len(value)} values for {len(layers)} layers {tuple(layers)}")
    return value


def _default_votes(block: int, depth: int) -> int:
    return 30 if block < 3 else 1 if block >= depth - 3 else 5


@dataclass(frozen=True)
class Step:
    """What happens at the end of one block: S prunes `r` patches, I keeps `retain` of the rest after `iters` votes."""

    block: int
    retain: float
    r: int
    iters: int

    def counts(self, n: int) -> tuple[int, int]:
        """(pruned by S, kept by I) out of n patches; the I-stage rounds down and keeps at least one."""
        similar = min(self.r, n // 2)
        return similar, min(n - similar, max(1, int((n - similar) * self.retain)))


def prune_plan(
    attn: Tensor,
    keys: Tensor,
    num_prefix: int,
    step: Step,
    boost_cls: bool = True,
    head_filter: tuple[float, float] | None = (0.01, 0.7),
    partition: str = "seq_u",
    metric: str = "cos",
) -> Plan:
    """One pruning layer: I' ranks by one vote, S prunes near duplicates, I keeps the best of the graph that is left.

    Args:
        attn: [B, H, N, N] probabilities, in at least fp32.
        keys: [B, Hk, N, d].
        num_prefix: P.
        step: how much goes, and after how many votes.
        boost_cls, head_filter: see `importance`.
        partition: see `split_halves`.
        metric: see `similarity`.

    Returns:
        Plan with the prefix, then the kept patches in raster order.
    """
    p, batch, n = num_prefix, attn.shape[0], attn.shape[-1] - num_prefix
    similar, kept = step.counts(n)
    alive = None
    if similar:
        score = importance(attn, 1, p, boost_cls, head_filter)[:, p:]
        a, b = split_halves(score, partition, seed=step.block)
        features = keys.transpose(1, 2).flatten(2)[:, p:]  # all heads side by side
        pruned = most_similar(features, a, b, similar, metric)
        alive = attn.new_ones(batch, p + n, dtype=torch.bool).scatter(1, pruned + p, False)
        if kept == n - similar:
            return Plan(with_prefix(rows_where(alive[:, p:], kept)[0], p))
    score = importance(attn, step.iters, p, boost_cls, head_filter, alive)[:, p:]
    if alive is not None:
        score = score.masked_fill(~alive[:, p:], float("-inf"))
    rows = score.argsort(dim=-1, descending=True, stable=True)[:, :kept].sort(-1).values
    return Plan(with_prefix(rows, p))


@dataclass(frozen=True)
class ZeroTPruneReducer(Reducer):
    """Zero-TPrune with a schedule for one model."""

    steps: tuple[Step, ...]
    tau: float
    boost_cls: bool
    head_filter: tuple[float, float] | None
    partition: str
    metric: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parts: int = 1
    needs: ClassVar[frozenset[str]] = frozenset("qk")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_END, s.block) for s in self.steps if s.r > 0 or s.retain < 1)

    def step(self, at: Site) -> Step:
        return next(s for s in self.steps if s.block == at.index)

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        step = self.step(at)
        patches = x.shape[1] - state.num_prefix
        if step.counts(patches)[1] == patches:
            return None
        assert view.k is not None
        if not torch.compiler.is_compiling():  # which knows no sizes that a device may lack room for
            check_room(
                2 * 4 * len(x) * self.num_heads * x.shape[1] ** 2,  # logits and probabilities, in fp32
                x.device,
                "zero_tprune reads the attention of every token to every other one in every head; use smaller batches or "
                "images, or tome, pitome or ats, which need no such map",
            )
        attn = view.probs(tau=self.tau)
        return prune_plan(
            attn,
            view.k,
            state.num_prefix,
            step,
            boost_cls=self.boost_cls,
            head_filter=self.head_filter,
            partition=self.partition,
            metric=self.metric,
        )

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return num_prefix + self.step(at).counts(n - num_prefix)[1]

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        step = self.step(at)
        patches = n - num_prefix
        similar, kept = step.counts(patches)
        if kept == patches:
            return 0
        votes = (1 if similar else 0) + (step.iters + (1 if similar else 0) if kept < patches - similar else 0)
        half = patches // 2
        products = half * (patches - half) * self.head_dim * self.num_kv_heads if similar else 0
        return self.num_heads * n * n * (self.head_dim * self.parts + votes) + products
