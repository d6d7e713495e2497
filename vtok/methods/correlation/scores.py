"""Token-level correlation-guided compression (Zhang et al., arXiv 2407.14439) for models that crop a page into views: which
patches of a view stay. Patch-patch similarity at a low block says how many (information density), the class token's attention
there says which, and its outliers at a deep block are added. The view of the whole page is left alone.

The authors published no code and the paper's text was not at hand; the steps follow its figure, its abstract and reviews of it.
Our interpretation, each an assumption: keys compared with all heads side by side, a token does not count itself, `>` in both
thresholds, attention averaged over heads after the softmax (`cls_attention(joint=True)` is the alternative), 1.5 interquartile
ranges with linear percentiles, drawing without replacement, at least one token a view. Ours alone, where the paper has nothing:
`topk`, merged tokens (`group_scores`), encoders without a class token (`received_attention`), `calibrate_alpha`.

Shapes: V views, n patches of each, H heads, d head width, P prefix tokens, G merged tokens. `valid` [V, n] bool: False =
padding, which is compared with nothing, counted nowhere and never kept; `None` = all real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, shown
from vtok.ops.hashing import uniforms
from vtok.ops.matching import unit
from vtok.ops.selection import largest, upper_outliers, weighted_draw

SAMPLINGS = ("multinomial", "topk")
_ENTRIES = 1 << 25  # similarities held at once: 128 MB in fp32


# Information density (low block).
def redundant_tokens(keys: Tensor, alpha: float, beta: float, valid: Tensor | None = None) -> Tensor:
    """Tokens of a repeated pattern: more than `beta` others are more similar to them than `alpha`.

    The density of a view is its share of other tokens; their number is how many it samples.

    Args:
        keys: [V, H, n, d] keys of the patches at a low block.
        alpha: threshold on the cosine (paper: alpha; [-1, 1]; its value is not published).
        beta: how many similar tokens are fine (paper: beta; value not published): a number of tokens, or, between 0 and 1, a
            share of the view's patches (0.03 is a start: 31 of 1024).
        valid: see the module.

    Returns:
        [V, n] bool.

    Raises:
        ConfigError: alpha or beta out of range, or keys of another shape.
    """
    counts = similar_counts(keys, alpha, valid)
    limit = _limit(beta, keys.shape[2] if valid is None else valid.sum(-1, keepdim=True))
    return counts > limit


def similar_counts(keys: Tensor, alpha: float, valid: Tensor | None = None) -> Tensor:
    """How many other tokens of its view are more similar to a token than `alpha`: keys [V, H, n, d] -> [V, n] int64."""
    check_alpha(alpha)
    counts = torch.cat([(cosine > alpha).sum(-1) for _, cosine in _others(keys, valid)])
    return counts if valid is None else counts * valid


def critical_alpha(keys: Tensor, beta: float, valid: Tensor | None = None) -> Tensor:
    """The alpha from which on a token is no longer redundant: its similarity to the (beta + 1)-th most similar other token.

    `redundant_tokens(keys, alpha, beta)` is `critical_alpha(keys, beta) > alpha`; unlike that mask it can be calibrated,
    interpolated and pooled over merged tokens.

    Args:
        keys, beta, valid: see `redundant_tokens`.

    Returns:
        [V, n], in at least fp32; -1, where no alpha makes a token redundant.
    """
    n = keys.shape[2]
    most = min(_limit(beta, n), n - 1)
    rank = None if valid is None else _limit(beta, valid.sum(-1))
    found = []
    for views, cosine in _others(keys, valid):
        ranked = cosine.topk(most + 1).values  # the token itself and padding come last
        if isinstance(rank, Tensor):
            found.append(ranked.gather(-1, rank[views].clamp_max(most)[:, None, None].expand(-1, n, 1))[..., 0])
        else:
            found.append(ranked[..., -1])
    critical = torch.cat(found).clamp_min(-1)
    return critical if valid is None else critical.masked_fill(~valid, -1)


def head_metric(keys: Tensor) -> Tensor:
    """Keys of all heads side by side, as tokens are compared: [V, H, n, d] -> [V, n, H d]."""
    if keys.ndim != 4:
        raise ConfigError(f"keys are [views, heads, patches, head width], got {list(keys.shape)}")
    return keys.transpose(1, 2).flatten(2)


def cosines(metric: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines [v, n, n] of the tokens of a few views at a time, and which; metric [V, n, D]."""
    metric = unit(metric.detach())  # a choice has no gradient
    step = max(1, _ENTRIES // max(1, metric.shape[1]) ** 2)
    for start in range(0, max(1, len(metric)), step):
        views = slice(start, start + step)
        yield views, (metric[views] @ metric[views].transpose(-1, -2)).clamp_(-1, 1)


def _others(keys: Tensor, valid: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of keys; -inf to itself and to padding."""
    for views, cosine in cosines(head_metric(keys)):
        cosine.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
        if valid is not None:
            cosine.masked_fill_(~valid[views, None], float("-inf"))
        yield views, cosine


def check_alpha(alpha: float) -> None:
    """Raises unless alpha is a cosine."""
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not -1 <= alpha <= 1:
        raise ConfigError(f"alpha is a cosine in [-1, 1], got {shown(alpha)}")


def check_beta(beta: float) -> None:
    """Raises unless beta is a number or a share of tokens."""
    if not isinstance(beta, (int, float)) or isinstance(beta, bool) or not 0 <= beta < float("inf"):
        raise ConfigError(f"beta is a number of tokens >= 0, or a share of them between 0 and 1, got {shown(beta)}")


@overload
def _limit(beta: float, patches: int) -> int: ...
@overload
def _limit(beta: float, patches: Tensor) -> int | Tensor: ...
def _limit(beta: float, patches: int | Tensor) -> int | Tensor:
    """How many similar tokens a token may have, out of so many patches."""
    check_beta(beta)
    if not 0 < beta < 1:
        return int(beta)
    return (beta * patches.double()).round().long() if isinstance(patches, Tensor) else round(beta * patches)


# Which tokens stay.
class TokenScores(NamedTuple):
    """What the choice looks at.

    Attributes:
        critical: [V, n] from `critical_alpha`.
        low: [V, n] attention received at the low block; local tokens are drawn in proportion to it.
        outlier: [V, n] bool, tokens of outstanding attention at the deep block; they stay.
        valid: [V, n] bool or `None`, see the module.
    """

    critical: Tensor
    low: Tensor
    outlier: Tensor
    valid: Tensor | None = None


def score_tokens(
    keys: Tensor, low: Tensor, deep: Tensor, beta: float, valid: Tensor | None = None, factor: float = 1.5
) -> TokenScores:
    """Scores of patches.

    Args:
        keys: [V, H, n, d] at the low block.
        low, deep: [V, n] attention received at the low and at the deep block.
        beta: see `redundant_tokens`.
        valid: see the module.
        factor: interquartile ranges above the third quartile at which an outlier begins.
    """
    return TokenScores(critical_alpha(keys, beta, valid), low, upper_outliers(at_least_fp32(deep), factor, valid), valid)


def group_scores(scores: TokenScores, groups: Tensor) -> TokenScores:
    """Scores of merged tokens, for connectors that merge patches (pixel shuffle, H-Reducer). Ours.

    A merged token is redundant if all its patches are, scores their sum, and is an outlier if one of them is.

    Args:
        scores: of n patches.
        groups: [G, s] int64, patches of every merged token.
    """
    critical, low, outlier, valid = scores
    if valid is not None:
        critical, low, outlier = critical.masked_fill(~valid, 1e3), low.masked_fill(~valid, 0), outlier & valid
    critical = critical[:, groups].amin(-1)
    if valid is not None:
        valid = valid[:, groups].any(-1)
        critical = critical.masked_fill(~valid, -1)
    return TokenScores(critical, low[:, groups].sum(-1), outlier[:, groups].any(-1), valid)


def select_tokens(
    scores: TokenScores,
    alpha: float,
    sampling: str = "multinomial",
    seed: int = 0,
    view: Tensor | None = None,
    min_tokens: int = 1,
    multiple: int = 1,
) -> Tensor:
    """Local tokens, as many as are not redundant, and all outliers.

    Args:
        scores: of the tokens.
        alpha: see `redundant_tokens`.
        sampling: `"multinomial"` draws local tokens without replacement in proportion to `low` (the paper samples);
            `"topk"` takes the largest.
        seed: of the draw. What is drawn for a view depends on seed, number of the view and its scores alone.
        view: [V] int64, number of each view within its image; `None` = 0 .. V-1, one image.
        min_tokens: a view keeps at least so many; the most probable ones are added.
        multiple: the number kept is rounded up to a multiple of this, likewise, as far as there are tokens.

    Returns:
        [V, n] bool.

    Raises:
        ConfigError: alpha out of range, unknown sampling, or `min_tokens` or `multiple` below 1.
    """
    check_alpha(alpha)
    if sampling not in SAMPLINGS:
        raise ConfigError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {shown(sampling)}")
    if min_tokens < 1 or multiple < 1:
        raise ConfigError(f"min_tokens and multiple start at 1, got {min_tokens} and {multiple}")
    critical, low, outlier, valid = scores
    low = at_least_fp32(low)
    if valid is not None:
        low, outlier = low.masked_fill(~valid, 0), outlier & valid
    p = low / low.sum(-1, keepdim=True).clamp_min(torch.finfo(low.dtype).tiny)
    informative = critical <= alpha
    count = (informative if valid is None else informative & valid).sum(-1)
    if sampling == "topk":
        local = largest(p, count, valid)
    else:
        view = torch.arange(len(p), device=p.device) if view is None else view
        position = (view[:, None] << 32) + torch.arange(p.shape[1], device=p.device)
        local = weighted_draw(p, count, uniforms(position, seed, p.dtype), valid)
    kept = local | outlier
    wanted = kept.sum(-1).clamp_min(min_tokens).add(multiple - 1).div(multiple, rounding_mode="floor") * multiple
    return largest(p.masked_fill(kept, float("inf")), wanted, valid)
