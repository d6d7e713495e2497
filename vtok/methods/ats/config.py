"""ATS: Adaptive Token Sampling for Efficient Vision Transformers (Fayyaz et al., ECCV 2022). Each image keeps the tokens that
samples of its own score distribution hit: easy images keep few. Dropped tokens still serve as keys and values of their block.

The paper's text was not at hand; the default follows descriptions of it (mid-point samples of the plain CDF), `parity=True` the
authors' code (adaptivetokensampling/ATS at 9271257).

Shapes: B batch, H heads, N tokens, P prefix tokens, d head dim, K sample points, M tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtok.capabilities import Info
from vtok.config import (
    MethodConfig,
    ModelInfo,
    Reducer,
    block_indices,
    block_numbers,
    flag,
    fraction,
    require_cls,
    require_softmax,
)
from vtok.core.reduction import Plan
from vtok.core.search_space import Blocks, Point, Space
from vtok.core.tokens import AttentionView, Place, Site, TokenState, at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.methods.ats.sampling import endpoint_samples, midpoint_samples
from vtok.ops.rows import rows_where, with_prefix
from vtok.ops.selection import kept_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_KEEP = 0.55  # 108 of the 196 patches of a ViT at 224 px


@dataclass(frozen=True)
class ATS(MethodConfig):
    """Config of ATS.

    Attributes:
        num_tokens: sample points per block (paper: K), an upper bound on the patches that survive; whole number >= 1, or a list
            with one for every block that samples, in their order. The paper stops at the number of patches; more points sample
            finer and so keep more: our interpretation.
        keep: the same as a share of the patches of the input size that the model is patched for ((0, 1]; default 0.55, which is
            K = 108 at 196 patches), rounded to whole tokens, halves to the even number; 1.0 is an exact no-op. Give one of the
            two.
        layers: 0-based blocks that sample (default: from a quarter of the depth on; blocks 3 to 11 of 12, as in the paper).
        mode: `"drop"` cuts the batch to its longest image (one host synchronisation a block); attention is padded and masked,
            other layers see real tokens alone, except in training, under torch.compile and with rotary positions. `"mask"`
            always leaves min(K, patches) rows (static shapes, for compilation). Both give the same result.
        score: `"sum_attention"`, heads' attention summed and multiplied by the norm of the whole value row (authors' code),
            or `"per_head"`, attention times value norm summed over heads (as other implementations read the paper).
        query: whose attention counts: `"cls"`, or `"mean"`, the mean over all queries (builds the N x N matrix; a
            substitute for models without a class token, not in the paper).
        parity: do exactly as the authors' code does: as many points as the image has patches, stretched CDF, and in every block
            their softmax, which builds the N x N matrix. There K cannot be set, at least one token is lost per sampling block,
            and what an image keeps depends on its batch. For comparing with that code.
    """

    name: ClassVar[str] = "ats"
    set_by_budget: ClassVar[tuple[str, ...]] = ("num_tokens", "keep")

    num_tokens: int | Sequence[int] | None = None
    keep: float | None = None
    layers: Iterable[int] | None = None
    mode: str = "drop"
    score: str = "sum_attention"
    query: str = "cls"
    parity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens is not None and self.keep is not None:
            raise ConfigError(f"give num_tokens or keep, not both (got {self.num_tokens} and {self.keep})")
        if self.parity and (self.num_tokens is not None or self.keep is not None):
            raise ConfigError("parity=True samples as many points as there are patches; num_tokens and keep cannot be set")
        if self.keep is None and self.num_tokens is None and not self.parity:
            object.__setattr__(self, "keep", DEFAULT_KEEP)
        if self.keep is not None:
            fraction(self.keep, "keep")
        if isinstance(self.num_tokens, list):
            object.__setattr__(self, "num_tokens", tuple(self.num_tokens))
        for k in self.num_tokens if isinstance(self.num_tokens, tuple) else (self.num_tokens,):
            if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
                raise ConfigError(f"num_tokens must be a whole number >= 1, got {shown(k)}")
        for name, allowed in (("mode", ("drop", "mask")), ("score", ("sum_attention", "per_head")), ("query", ("cls", "mean"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        if self.layers is not None:
            object.__setattr__(self, "layers", block_numbers(self.layers))
        flag(self.parity, "parity")

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        return ({"query": "mean"},)

    def budget_candidates(self, info: ModelInfo) -> Sequence[Self]:
        return self._candidates(info, 4)

    def _candidates(self, info: ModelInfo, per_octave: int) -> Sequence[Self]:
        """Settings with K up to 128 per patch: where attention is peaked, one per patch already drops most of them."""
        n = info.num_patches
        finer = [round(n * 2 ** (step / per_octave)) for step in range(7 * per_octave, 0, -1)]
        points = [*finer, *range(n, 0, -1)]
        return [self.replace(num_tokens=None, keep=1.0), *(self.replace(num_tokens=k, keep=None) for k in points)]

    def search_space(self, info: ModelInfo) -> Space:
        return {} if self.layers is not None else {"layers": Blocks(tuple(range(info.depth)))}

    def candidates_at(self, info: ModelInfo, point: Point) -> Sequence[Self]:
        return self.replace(layers=point["layers"])._candidates(info, 16)

    def blocks(self, info: ModelInfo) -> tuple[int, ...]:
        return block_indices(self.layers, range(info.depth // 4, info.depth), info.depth)

    def resolved(self, info: ModelInfo) -> Self:
        return self.replace(layers=self.blocks(info))

    def build(self, info: ModelInfo) -> ATSReducer:
        if self.query == "cls":
            require_cls(info, "ats", 'pass query="mean" to use the mean attention that a token receives instead')
        require_softmax(info, "ats")
        points, layers = self.num_tokens or info.num_patches, () if self.keep == 1.0 else self.blocks(info)
        if self.keep is not None:
            points = kept_tokens(info.num_patches, self.keep)
        if not isinstance(points, int) and len(points) != len(layers):
            raise ConfigError(f"num_tokens has {len(points)} numbers for {len(layers)} layers {layers}")
        kind = ParityReducer if self.parity else ATSReducer
        return kind(
            (points,) * len(layers) if isinstance(points, int) else tuple(points),
            layers,
            self.mode == "drop",
            self.score == "per_head",
            self.query == "cls",
            info.num_heads * info.head_dim * info.parts,
            info.num_heads,
            info.depth,
        )


def patch_scores(attn: Tensor, v: Tensor, per_head: bool = False) -> Tensor:
    """Attention that a token receives times the length of what it has to say, as a share of all tokens given.

    Args:
        attn: [B, H, n].
        v: [B, H, n, d].
        per_head: multiply head by head, then sum; otherwise sum attention over heads first.

    Returns:
        [B, n], sums to 1, in at least fp32 (all zero where every score is zero).
    """
    attn, v = at_least_fp32(attn), at_least_fp32(v)
    score = (attn * v.norm(dim=-1)).sum(1) if per_head else attn.sum(1) * v.square().sum((1, 3)).sqrt()
    total = score.sum(-1, keepdim=True)
    return score / torch.where(total > 0, total, 1)


def significance_scores(cls_attn: Tensor, v: Tensor, per_head: bool = False) -> Tensor:
    """How much of the class token's output each token makes up: S_j = (sum_h A_h[0, j]) |v_j| / sum, j >= 1.

    Args:
        cls_attn: [B, H, N], attention of the class token (token 0) to every token.
        v: [B, H, N, d].
        per_head: sum_h A_h[0, j] |v_hj| instead.

    Returns:
        [B, N-1], sums to 1, in at least fp32.
    """
    return patch_scores(cls_attn[:, :, 1:], v[:, :, 1:], per_head)


@dataclass(frozen=True)
class ATSReducer(Reducer):
    """ATS with K sample points in some blocks, one number for each of them."""

    points: tuple[int, ...]
    layers: tuple[int, ...]
    drop: bool
    per_head: bool
    from_cls: bool
    width: int
    num_heads: int
    depth: int
    needs: ClassVar[frozenset[str]] = frozenset("qkv")
    ragged: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @property
    def dynamic(self) -> str:
        why = "ats keeps as many tokens as the images ask for; mode='mask' keeps the most it may keep, padded"
        return why if self.drop else ""

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_PRE, i) for i in self.layers)

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        p = state.num_prefix
        attn = view.probs(first=1)[:, :, 0] if self.from_cls else view.received(state.keep)
        assert view.v is not None
        v = view.v
        if v.shape[1] != attn.shape[1]:  # grouped-query attention
            v = v.repeat_interleave(attn.shape[1] // v.shape[1], 1)
        score = patch_scores(attn[:, :, p:], v[:, :, p:], self.per_head)  # padding has none: the bias of the view hides it
        points = self._points(at)
        hit = midpoint_samples(score, points, None if state.keep is None else state.keep[:, p:])
        return self._plan(*self._rows(hit, min(points, score.shape[1])), p)

    def _points(self, at: Site) -> int:
        return self.points[self.layers.index(at.index)]

    def _plan(self, kept: Tensor, real: Tensor | None, counts: Sequence[int] | None, num_prefix: int) -> Plan:
        """The plan that keeps these patches [B, M], of which only `real` ones are no padding."""
        if real is not None:
            real = torch.cat([real.new_ones(real.shape[0], num_prefix), real], 1)
        told = None if real is None or counts is None else tuple(num_prefix + count for count in counts)
        return Plan(with_prefix(kept, num_prefix), valid=real, counts=told)

    def _rows(self, hit: Tensor, most: int) -> tuple[Tensor, Tensor | None, Sequence[int] | None]:
        """Positions of the hits [B, M]; which of them are real (`None` = all); how many of each image (`None` = not asked)."""
        if not self.drop or not len(hit):
            return *rows_where(hit, most), None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # two numbers for the host, however many images
            fewest, longest = (int(c) for c in torch.stack(hit.sum(-1).aminmax()).tolist())
            rows, real = rows_where(hit, longest)
            return rows, None if fewest == longest else real, None
        if len(hit) == 1:  # as many rows as hits: asking where they are says how many there are
            return hit[0].nonzero().view(1, -1), None, None
        counts = hit.sum(-1).tolist()  # the one host synchronisation
        rows, real = rows_where(hit, max(counts))
        return rows, None if min(counts) == max(counts) else real, counts

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return min(n, num_prefix + self._points(at))

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        if self.from_cls:
            return n * self.width
        # Padding, which the first site cannot have, turns the plain mean over queries into a product with weights.
        padded = at.index != self.layers[0]
        return n * n * (self.width + (self.num_heads if padded else 0))


EPSILON = 1e-6


def authors_softmax(logits: Tensor, keep: Tensor | None) -> Tensor:
    """The masked softmax of the authors' code (after DynamicViT): a little mass goes to every token, padding attends to itself.

    Args:
        logits: [B, H, N, N], padding not masked.
        keep: [B, N] bool, False = padding; `None` = all real.

    Returns:
        [B, H, N, N]; rows sum to nearly 1.
    """
    n = logits.shape[-1]
    mass = (logits - logits.amax(-1, keepdim=True)).exp()
    if keep is not None:
        mass = mass * (keep[:, None, None] | torch.eye(n, dtype=torch.bool, device=keep.device))
    return (mass + EPSILON / n) / (mass.sum(-1, keepdim=True) + EPSILON)


@dataclass(frozen=True)
class ParityReducer(ATSReducer):
    """ATS as its authors' code runs it, for comparing with it: their samples, and in every block their softmax."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_PRE, i) for i in range(self.depth))

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        if at.index not in self.layers:
            return None
        p, points = state.num_prefix, state.length - state.num_prefix
        attn, v = self._attention(state, view)
        order, hit = endpoint_samples(patch_scores(attn[:, :, 0, p:], v[:, :, p:], self.per_head), points)
        kept, real, counts = self._rows(hit, points)
        return self._plan(order.gather(1, kept), real, counts, p)

    def attention(self, state: TokenState, view: AttentionView, rows: Tensor | None) -> Tensor:
        attn, v = self._attention(state, view)
        if rows is not None:
            attn = attn.gather(2, rows[:, None, :, None].expand(-1, attn.shape[1], -1, attn.shape[3]))
        return (attn @ v).to(view.v.dtype if view.v is not None else v.dtype)

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return super().count(at, n, num_prefix) if at.index in self.layers else n

    def _attention(self, state: TokenState, view: AttentionView) -> tuple[Tensor, Tensor]:
        """(probabilities [B, H, N, N], values [B, H, N, d]); padding has queries, keys and values of zero."""
        assert view.q is not None
        assert view.k_rot is not None
        assert view.v is not None
        q, k, v = (at_least_fp32(t) for t in (view.q, view.k_rot, view.v))
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if state.keep is not None:
            q, k, v = (t * state.keep[:, None, :, None] for t in (q, k, v))
        logits = (q * view.scale) @ k.transpose(-2, -1)
        if view.bias is not None:  # a bias of the model's own; what masks padding is left to the softmax
            bias = view.bias if state.keep is None else view.bias.masked_fill(~state.keep[:, None, None], 0)
            logits = logits + bias.to(logits.dtype)
        return authors_softmax(logits, state.keep), v

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        return n * n * self.width
