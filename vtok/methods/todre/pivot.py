"""Where ToDRE's stage 1 starts: the pivot token of every image (arXiv:2505.18757v2, section 4.1, eq. 3).

Shapes: B images, H heads, N tokens of the vision tower, P prefix tokens, n visual tokens, d feature width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtok.core.tokens import AttentionView, at_least_fp32
from vtok.errors import ConfigError, shown, unknown
from vtok.ops.hashing import splitmix

PIVOTS = ("cls", "center", "farthest", "random")


def cls_attention(view: AttentionView, num_prefix: int = 1, single_head: bool = False) -> Tensor:
    """Attention of the class token (token 0) to the patches (eq. 3).

    The equation has one head. Our reading for an encoder of many: its own softmax, prefix included, averaged over heads.

    Args:
        view: queries and keys of the block that the features come from. The paper says "last layer", which may mean this one
            or the tower's last; it changes the pivot only.
        num_prefix: P, tokens in front of the patches.
        single_head: read the equation by the letter: the heads side by side as one of width d, softmax over the patches alone.
            Biases are left out. The two readings may choose different pivots.

    Returns:
        [B, N - P], in at least fp32.
    """
    if not single_head:
        return view.probs(first=1)[:, :, 0, num_prefix:].mean(1)
    assert view.q is not None
    assert view.k_rot is not None
    q, k = at_least_fp32(view.q[:, :, 0]), at_least_fp32(view.k_rot[:, :, num_prefix:])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.einsum("bhd,bhnd->bn", q, k) * (view.scale / math.sqrt(q.shape[1]))).softmax(-1)


def choose_pivot(
    rule: str | int | None,
    features: Tensor,
    valid: Tensor | None = None,
    cls_attn: Tensor | None = None,
    start: int = 0,
    seed: int = 0,
) -> Tensor:
    """The token that each image starts from (section 4.1).

    Args:
        rule: `"cls"`, the token that the class token attends to most; `"center"` or `"farthest"`, nearest to or farthest from
            the mean feature (squared L2 of raw features: the paper names no metric); `"random"`, by a hash of seed and token
            number; a token number; `None` = `"cls"` with class attention, else `"center"`. The paper takes a random token
            where there is no class token; `"center"`, which it ablates, is ours because it repeats.
        features: [B, n, d].
        valid: [B, n] bool, False = padding, which is never chosen; `None` = all real.
        cls_attn: [B, t] or [B, frames, t], class attention of t consecutive tokens: all of them; the thumbnail's, for an image
            in crops; or those of every frame, of which the highest anywhere wins.
        start: token number of the first of these t (where the thumbnail stands).
        seed: for `"random"`.

    Returns:
        [B] int64; of equals the lowest token number (0 where nothing is valid).

    Raises:
        UnknownNameError: no such rule.
        ConfigError: no class attention for `"cls"`, more of it than tokens, or a token number outside the image.
    """
    batch, n, _ = features.shape
    real = torch.ones(batch, n, dtype=torch.bool, device=features.device) if valid is None else valid
    if rule is None:
        rule = "center" if cls_attn is None else "cls"
    if not isinstance(rule, str):
        if isinstance(rule, bool) or not isinstance(rule, int) or not 0 <= rule < n:
            raise ConfigError(f"pivot={shown(rule)} is no token of an image of {n}; pass 0 to {n - 1}")
        return torch.full((batch,), rule, device=features.device)
    if rule not in PIVOTS:
        raise unknown("pivot", rule, PIVOTS)
    if rule == "cls":
        if cls_attn is None:
            raise ConfigError('pivot="cls" needs the attention of a class token; pass pivot="center" for towers without')
        score = at_least_fp32(cls_attn.flatten(1))
        stop = start + score.shape[1]
        if not 0 <= start < stop <= n:
            raise ConfigError(f"class attention covers tokens {start} to {stop - 1}, the image has {n}")
        return start + score.masked_fill(~real[:, start:stop], float("-inf")).argmax(1)
    if rule == "random":
        rank = splitmix(torch.arange(n, device=features.device), seed)
        return torch.where(real, rank, torch.iinfo(torch.int64).max).argmin(1)
    x, count = at_least_fp32(features.detach()), real.sum(1).clamp_min(1)
    mean = x.masked_fill(~real[..., None], 0).sum(1, keepdim=True) / count[:, None, None]
    distance = (x - mean).square().sum(-1)
    return (-distance if rule == "farthest" else distance).masked_fill(~real, float("inf")).argmin(1)
