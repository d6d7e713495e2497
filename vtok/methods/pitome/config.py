"""PiToMe: Accelerating Transformers with Spectrum-Preserving Token Merging (Tran et al., NeurIPS 2024). Tokens are ranked by
the energy of the cluster they sit in; of the most redundant 2k, every second merges into its best match, the rest is protected.

Shapes: B batch, T tokens without prefix, d metric width, k merged tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.capabilities import Info
from vtok.config import MethodConfig, ModelInfo, Reducer, Schedule, flag, fraction
from vtok.core.reduction import Plan
from vtok.core.search_space import BudgetCandidates, Point, Space, Weights
from vtok.core.tokens import AttentionView, Place, Site, TokenState, row_blocks
from vtok.errors import ConfigError, shown
from vtok.methods.pitome.presets import BSM, HIDDEN, METRICS, PAPER, PRESETS, PROTECT, SORTED_BSM
from vtok.methods.tome import check_merge_count
from vtok.ops.matching import best_partner, bipartite_sides, bipartite_soft_matching, unit
from vtok.ops.rows import prefix_rows, take_rows

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_RATIO = 0.925


@dataclass(frozen=True)
class PiToMe(MethodConfig):
    """Config of PiToMe. The default is the paper's algorithm in every block.

    Attributes:
        ratio: share of the patches that each block keeps (paper: r; (0, 1], a number or one per block; default 0.925; authors
            sweep 0.9 to 0.975). As in the authors' code, the number that merges is rounded down. 1.0 is an exact no-op. No
            block merges more than half of its patches.
        r: number of patches that each block removes, instead of `ratio` (a number, one per block, or `(r, inflect)`).
        margin: similarity above which two tokens count as close (paper: m; [-1, 1], a number or one per block; default: the
            paper's 0.9 - 0.9 i / L for block i of L).
        alpha: how strongly tokens below the margin count (paper: alpha; default 1.0).
        metric: what is compared: `"keys"`, averaged over heads (default), or `"hidden"`, the hidden states about to merge.
        protect: which blocks protect isolated tokens and merge among those of highest energy alone: `"all"` (default, the
            paper), `"late"`, the second half, or `"none"`. The others run ToMe's matching on tokens sorted by energy, as the
            authors' first half does on DeiT.
        prop_attn: proportional attention (default: on, as in the paper; presets: as in the authors' code, off).
        preset: margins, matching, metric, place and attention of the authors' last commit, for comparing with that code. In
            block i of L (0-based), between attention and MLP unless said otherwise, all without proportional attention:

            - `"official_deit"`: m = 0.75 - 0.75 i / L, keys; the first half of the blocks (rounded up) runs ToMe's matching on
              tokens sorted by energy, which protects none.
            - `"official_mae"`: the same margins and metric, but it is the other half that runs ToMe's matching.
            - `"official_clip"`: m = 0.95 - 0.95 i / L, hidden states.
            - `"official_blip"`: m = 0.9 - 0.9 i / L, hidden states; every block reduces, as under `forward_features`, which
              retrieval calls. (Their `forward` spares the last block; taking all blocks is our interpretation.)
            - `"official_llava"`, CLIP inside LLaVA: m = 0.9 - 0.9 i / L, hidden states, after the MLP, plain means that ignore
              sizes; the first 13 blocks run plain ToMe matching with the share taken of all tokens, CLS included. Their 13 is
              written for a tower of 24 blocks and is kept at any depth.

    On the reference DINOv2 (`vtok.eval.models.dinov2`) the matching decides: where early blocks protect, they merge tokens of
    high energy that are not alike, and on photographs features end no closer to the unpatched ones than under random tokens.
    `protect="late"` or `"none"` come close to ToMe; without proportional attention none of them does.

    The paper's energy keeps cos itself above the margin and leaves a token's own cosine out; the authors' code, which is
    followed here, subtracts the margin and leaves it in. That shifts energies, the second part alike for all tokens.
    """

    name: ClassVar[str] = "pitome"
    merges: ClassVar[bool] = True
    set_by_budget: ClassVar[tuple[str, ...]] = ("ratio", "r")

    ratio: Any = None
    r: Any = None
    margin: Any = None
    alpha: float = 1.0
    metric: str | None = None
    protect: str | None = None
    prop_attn: bool | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.r is not None:
            raise ConfigError(f"give ratio or r, not both (got ratio={self.ratio}, r={self.r})")
        if self.preset is not None and (not isinstance(self.preset, str) or self.preset not in PRESETS):
            raise ConfigError(f"unknown preset {shown(self.preset)}; known: {', '.join(PRESETS)}")
        for name, what in (("margin", "margins"), ("metric", "metric"), ("protect", "matching")):
            if self.preset is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"preset {shown(self.preset)} fixes the {what}; drop {name}={getattr(self, name)} or the preset"
                )
        if self.ratio is None and self.r is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        for name, integer in (("ratio", False), ("r", True), ("margin", False)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Schedule.of(value, name, integer))
        if self.ratio is not None:
            for value in self.ratio.values:
                fraction(value, "ratio")
        if self.r is not None and self.r.kind != "linear" and any(value < 0 for value in self.r.values):
            raise ConfigError(f"r counts tokens to remove and cannot be negative, got {self.r}")
        if self.margin is not None and not all(-1 <= value <= 1 for value in self.margin.values):
            raise ConfigError(f"margin is a cosine in [-1, 1], got {shown(self.margin.to_plain())}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha must be a number >= 0, got {shown(self.alpha)}")
        if self.metric is not None and self.metric not in METRICS:
            raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {shown(self.metric)}")
        if self.protect is not None and not (isinstance(self.protect, str) and self.protect in PROTECT):
            raise ConfigError(f"protect must be one of {', '.join(PROTECT)}, got {shown(self.protect)}")
        if self.prop_attn is not None:
            flag(self.prop_attn, "prop_attn")
        if self.prop_attn and self.preset is not None and not PRESETS[self.preset].use_size:
            raise ConfigError(
                f"preset {shown(self.preset)} ignores sizes, so prop_attn=True would see none; drop prop_attn or the preset"
            )

    def advice(self) -> str:
        if self.preset is not None or self.protect not in (None, "all"):
            return ""
        return (
            "with the paper's matching in every block the features of a pretrained DINOv2 moved as far on photographs as under "
            'random tokens; protect="late" kept them close'
        )

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        return ({"prop_attn": False},)

    def budget_candidates(self, info: ModelInfo) -> Sequence[Self]:
        return [self.replace(ratio=1 - step / 1000, r=None) for step in range(501)]

    def search_space(self, info: ModelInfo) -> Space:
        return {"weights": Weights(info.depth)}

    def candidates_at(self, info: ModelInfo, point: Point) -> Sequence[Self]:
        weights = point["weights"]

        def ratios(strength: float) -> list[float]:
            return [round(max(0.5, math.exp(-strength * weight)), 4) for weight in weights]

        end = math.log(2) / min(weight for weight in weights if weight)  # every block that does not rest merges half
        return BudgetCandidates(lambda strength: self.replace(ratio=ratios(strength), r=None), end)

    def build(self, info: ModelInfo) -> PiToMeReducer:
        depth, preset = info.depth, PAPER if self.preset is None else PRESETS[self.preset]
        ratio = r = None
        if self.ratio is not None:
            ratio = self.ratio.resolve(depth, "ratio", pad=1.0)
        else:
            r = tuple(int(v) for v in self.r.resolve(depth, "r", pad=0))
            check_merge_count(r, info)
        margin = tuple(preset.margin - preset.margin * i / depth for i in range(depth))
        if self.margin is not None:
            margin = self.margin.resolve(depth, "margin", pad=0.0)
        if self.protect is not None:
            preset = dataclasses.replace(preset, first=PROTECT[self.protect][0], rest=PROTECT[self.protect][1])
        hidden = (self.metric or preset.metric) == HIDDEN
        return PiToMeReducer(
            ratio=ratio,
            r=r,
            margin=margin,
            alpha=self.alpha,
            matching=preset.matching(depth),
            place=preset.place,
            hidden=hidden,
            metric_width=info.width if hidden else info.head_dim,
            use_size=preset.use_size,
            prop_attn=preset.prop_attn if self.prop_attn is None else self.prop_attn,
        )


def merge_count(t: int, ratio: float, num_prefix: int = 0) -> int:
    """k = floor(T - T ratio) in double precision (`int(T * (1 - ratio))` differs), at most half of the patches.

    T may count `num_prefix` tokens that are no patches.
    """
    return min(math.floor(t - t * ratio), (t - num_prefix) // 2)


def energy_score(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """How large a cluster of similar tokens each token sits in: E_i = mean_j ELU_alpha(cos(v_i, v_j) - m).

    One T x T matrix is built, of many tokens a block of its rows at a time.

    Args:
        metric: [B, T, d].
        margin: m.
        alpha: scale of the negative part.

    Returns:
        [B, T], in at least fp32.
    """
    return _energy(unit(metric), margin, alpha)


def _energy(m: Tensor, margin: float, alpha: float) -> Tensor:
    other, energies = m.transpose(-1, -2), []
    for rows in row_blocks(m, m.shape[-2]):
        x = (rows @ other).sub_(margin)
        above = x.relu().sum(-1)
        below = x.clamp_max_(0).exp_().sum(-1) - x.shape[-1]  # several times as fast as torch's ELU, which is scalar on CPUs
        energies.append((above + alpha * below) / x.shape[-1])
    return energies[0] if len(energies) == 1 else torch.cat(energies, -1)


def energy_plan(metric: Tensor, k: int, margin: float, alpha: float, num_prefix: int) -> Plan | None:
    """The paper's matching: of the 2k tokens of highest energy, ranks 0, 2, .. merge into their best match among 1, 3, ..

    Args:
        metric: [B, N, d], prefix included.
        k: tokens to remove, at most half of the patches.
        margin: m.
        alpha: of the energy.
        num_prefix: P.

    Returns:
        Plan with the order prefix, protected tokens by falling energy, destinations; `None` if k is 0.
    """
    if k <= 0:
        return None
    m = unit(metric[:, num_prefix:])
    rank = _energy(m, margin, alpha).sort(dim=-1, descending=True, stable=True).indices
    pairs = take_rows(m, rank[:, : 2 * k])
    _, partner = best_partner(pairs[:, ::2], pairs[:, 1::2])
    rows = rank + num_prefix
    protected = rows[:, 2 * k :]
    keep = torch.cat([prefix_rows(rows.shape[0], num_prefix, rows), protected, rows[:, 1 : 2 * k : 2]], 1)
    return Plan(keep, rows[:, : 2 * k : 2], partner + (num_prefix + protected.shape[1]))


def sorted_bsm_plan(metric: Tensor, k: int, margin: float, alpha: float, num_prefix: int) -> Plan | None:
    """The authors' variant in half of the blocks: even energy ranks against odd ones over all tokens, then ToMe's choice of
    the k most similar pairs; no token is protected. Order: prefix, unmerged even ranks by falling similarity, odd ranks."""
    if k <= 0:
        return None
    m = unit(metric[:, num_prefix:])
    rank = _energy(m, margin, alpha).sort(dim=-1, descending=True, stable=True).indices
    ranked, rows = take_rows(m, rank), rank + num_prefix
    score, partner = best_partner(ranked[:, ::2], ranked[:, 1::2])
    order = score.sort(dim=-1, descending=True, stable=True).indices
    a, b = rows[:, ::2].gather(1, order), rows[:, 1::2]
    rest = a[:, k:]
    keep = torch.cat([prefix_rows(rows.shape[0], num_prefix, rows), rest, b], 1)
    return Plan(keep, a[:, :k], partner.gather(1, order[:, :k]) + (num_prefix + rest.shape[1]))


@dataclass(frozen=True)
class PiToMeReducer(Reducer):
    """PiToMe with a ratio or count, a margin and a kind of matching for every block."""

    ratio: tuple[float, ...] | None
    r: tuple[int, ...] | None
    margin: tuple[float, ...]
    alpha: float
    matching: tuple[str, ...]
    place: Place
    hidden: bool
    metric_width: int
    use_size: bool
    prop_attn: bool

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.hidden else frozenset("k")

    @property
    def sizes(self) -> bool:
        return self.use_size

    @property
    def sites(self) -> tuple[Site, ...]:
        idle = [ratio == 1.0 for ratio in self.ratio] if self.ratio is not None else [r <= 0 for r in self.r or ()]
        return tuple(Site(self.place, i) for i, nothing in enumerate(idle) if not nothing)

    def merged(self, i: int, n: int, num_prefix: int) -> int:
        """Tokens that block i merges when n (prefix included) arrive."""
        if self.ratio is None:
            return max(0, min((self.r or ())[i], (n - num_prefix) // 2))
        if self.matching[i] == BSM:
            return merge_count(n, self.ratio[i], num_prefix)
        return merge_count(n - num_prefix, self.ratio[i])

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        metric = x if self.hidden else view.key_metric()
        plan = self._match(metric, at.index, state.num_prefix)
        return plan if plan is None or self.use_size else plan._replace(use_size=False)

    def _match(self, metric: Tensor, i: int, num_prefix: int) -> Plan | None:
        k = self.merged(i, metric.shape[1], num_prefix)
        if self.matching[i] == BSM:
            found = bipartite_soft_matching(metric, k, num_prefix)
            return None if found is None else Plan(*found)
        make = sorted_bsm_plan if self.matching[i] == SORTED_BSM else energy_plan
        return make(metric, k, self.margin[i], self.alpha, num_prefix)

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n - self.merged(at.index, n, num_prefix)

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        i, t, k = at.index, n - num_prefix, self.merged(at.index, n, num_prefix)
        if k == 0:
            return 0
        if self.matching[i] == BSM:
            a, b = bipartite_sides(n, num_prefix)
            return a * b * self.metric_width
        pairs = ((t + 1) // 2) * (t // 2) if self.matching[i] == SORTED_BSM else k * k
        return (t * t + pairs) * self.metric_width
