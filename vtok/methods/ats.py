"""ATS: Adaptive Token Sampling for Efficient Vision Transformers (Fayyaz et al., ECCV 2022). Each image keeps the tokens that
samples of its own score distribution hit: easy images keep few. Dropped tokens still serve as keys and values of their block.

The paper's text was not at hand; the default follows descriptions of it (mid-point samples of the plain CDF), `parity=True` the
authors' code (adaptivetokensampling/ATS at 9271257).

Shapes: B batch, H heads, N tokens, P prefix tokens, d head dim, K sample points, M tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.config import MethodConfig, ModelInfo, Reducer, block_indices, fraction, require_cls, require_softmax
from vtok.errors import ConfigError
from vtok.ops.rows import rows_where, with_prefix
from vtok.ops.sampling import endpoint_samples, midpoint_samples
from vtok.reduction import Plan
from vtok.state import AttentionView, Place, Site, TokenState, at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_KEEP = 0.55  # 108 of the 196 patches of a ViT at 224 px


@dataclass(frozen=True)
class ATS(MethodConfig):
    """Config of ATS.

    Attributes:
        num_tokens: sample points per block (paper: K), an upper bound on the patches that survive; whole number >= 1.
        keep: the same as a share of the model's patches ((0, 1]; default 0.55, which is K = 108 at 196 patches); 1.0 is an
            exact no-op. Give one of the two.
        layers: 0-based blocks that sample (default: from a quarter of the depth on; blocks 3 to 11 of 12, as in the paper).
        mode: `"drop"` cuts the batch to its longest image (one host synchronisation a block), `"mask"` always leaves
            min(K, patches) rows (static shapes, for compilation). Both give the same result.
        score: `"sum_attention"`, heads' attention summed and multiplied by the norm of the whole value row (authors' code),
            or `"per_head"`, attention times value norm summed over heads (as other implementations read the paper).
        query: whose attention counts: `"cls"`, or `"mean"`, the mean over all queries (builds the N x N matrix; a
            substitute for models without a class token, not in the paper).
        parity: sample exactly as the authors' code does: as many points as the image has patches, stretched CDF. There
            K cannot be set, at least one token is lost per block, and what an image keeps depends on its batch.
    """

    name: ClassVar[str] = "ats"

    num_tokens: int | None = None
    keep: float | None = None
    layers: Iterable[int] | None = None
    mode: str = "drop"
    score: str = "sum_attention"
    query: str = "cls"
    parity: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens is not None and self.keep is not None:
            raise ConfigError(f"give num_tokens or keep, not both (got {self.num_tokens} and {self.keep})")
        if self.parity and (self.num_tokens is not None or self.keep is not None):
            raise ConfigError("parity=True samples as many points as there are patches; num_tokens and keep cannot be set")
        if self.keep is not None:
            fraction(self.keep, "keep")
        k = self.num_tokens
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ConfigError(f"num_tokens must be a whole number >= 1, got {k!r}")
        for name, allowed in (("mode", ("drop", "mask")), ("score", ("sum_attention", "per_head")), ("query", ("cls", "mean"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def knob(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens}

    def ladder(self, info: ModelInfo) -> Sequence[Self]:
        steps = [self.replace(num_tokens=k, keep=None) for k in range(info.num_patches - 1, 0, -1)]
        return [self.replace(num_tokens=None, keep=1.0), *steps]

    def build(self, info: ModelInfo) -> ATSReducer:
        if self.query == "cls":
            require_cls(info, "ats", 'pass query="mean" to use the mean attention that a token receives instead')
        require_softmax(info, "ats")
        keep = DEFAULT_KEEP if self.keep is None and self.num_tokens is None and not self.parity else self.keep
        points = self.num_tokens if keep is None else max(1, round(keep * info.num_patches))
        if self.num_tokens is not None and self.num_tokens > info.num_patches:
            raise ConfigError(f"num_tokens={self.num_tokens}, but {info.name} has only {info.num_patches} patches")
        layers = block_indices(self.layers, range(info.depth // 4, info.depth), info.depth)
        return ATSReducer(
            None if self.parity else points,
            () if keep == 1.0 else layers,
            self.mode == "drop",
            self.score == "per_head",
            self.query == "cls",
            info.num_heads * info.head_dim,
            info.num_heads,
        )


def significance_scores(cls_attn: Tensor, v: Tensor, per_head: bool = False) -> Tensor:
    """How much of the class token's output each token makes up: S_j = (sum_h A_h[0, j]) |v_j| / sum, j >= 1.

    Args:
        cls_attn: [B, H, N], attention of the class token to every token.
        v: [B, H, N, d].
        per_head: sum_h A_h[0, j] |v_hj| instead.

    Returns:
        [B, N-1], sums to 1, in at least fp32 (all zero where every score is zero).
    """
    cls_attn, v = at_least_fp32(cls_attn), at_least_fp32(v)
    score = (cls_attn * v.norm(dim=-1)).sum(1) if per_head else cls_attn.sum(1) * v.square().sum((1, 3)).sqrt()
    score = score[:, 1:]
    total = score.sum(-1, keepdim=True)
    return score / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class ATSReducer(Reducer):
    """ATS with K sample points in some blocks; `points=None` samples as the authors' code does."""

    points: int | None
    layers: tuple[int, ...]
    drop: bool
    per_head: bool
    from_cls: bool
    width: int
    num_heads: int
    needs: ClassVar[frozenset[str]] = frozenset("qkv")
    ragged: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_PRE, i) for i in self.layers)

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        p = state.num_prefix
        score = self.scores(state, view)
        valid = None if state.keep is None else state.keep[:, p:]
        if self.points is None:
            order, hit = endpoint_samples(score, state.length - p)
            kept, real = self._rows(hit, state.length - p)
            kept = order.gather(1, kept)
        else:
            hit = midpoint_samples(score, self.points, valid)
            kept, real = self._rows(hit, min(self.points, score.shape[1]))
        if real is not None:
            real = torch.cat([real.new_ones(len(real), p), real], 1)
        return Plan(with_prefix(kept, p), valid=real)

    def scores(self, state: TokenState, view: AttentionView) -> Tensor:
        """[B, N-P]: significance of every patch; 0 for padding, which the bias of the view hides."""
        p = state.num_prefix
        attn = view.probs(slice(0, 1))[:, :, 0] if self.from_cls else view.received(state.keep)
        assert view.v is not None
        v = view.v
        if v.shape[1] != attn.shape[1]:  # grouped-query attention
            v = v.repeat_interleave(attn.shape[1] // v.shape[1], 1)
        first = max(p - 1, 0)  # other prefix tokens are never scored: the last of them stands in for the class token
        attn, v = attn[:, :, first:], v[:, :, first:]
        if p == 0:
            attn, v = torch.nn.functional.pad(attn, (1, 0)), torch.nn.functional.pad(v, (0, 0, 1, 0))
        return significance_scores(attn, v, self.per_head)

    def _rows(self, hit: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """Positions of the hits [B, M], and which of them are real (`None` = all)."""
        if not self.drop:
            return rows_where(hit, most)
        fewest, longest = (int(c) for c in torch.stack(hit.sum(-1).aminmax()).tolist())  # the one host synchronisation
        rows, real = rows_where(hit, longest)
        return rows, None if fewest == longest else real

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n if self.points is None else min(n, num_prefix + self.points)

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        if self.from_cls:
            return n * self.width
        # Padding, which the first site cannot have, turns the plain mean over queries into a product with weights.
        padded = at.index != self.layers[0]
        return n * n * (self.width + (self.num_heads if padded else 0))
