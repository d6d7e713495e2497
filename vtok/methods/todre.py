"""ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance (Li et al., arXiv:2505.18757v2, 2025). Stage 1
keeps visual tokens that are unlike each other, before the language model; stage 2 drops the rest of them late in the language
model, prompt by prompt, once the text has stopped looking at them.

No code of the authors could be found: everything here was written from the paper's equations, and where they are silent the
reading is ours and said to be. Which token stage 1 starts from is in `todre_pivot`.

Every image chooses its own tokens, every prompt makes its own decision: nothing depends on the batch. The tokens of one image
are one pool, thumbnail and crops of a high-resolution image together; so are the frames of a video, one after the other.

Shapes: B images or prompts, n visual tokens, d feature width, H query heads, Hk key heads, N tokens of the prompt, D head dim.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.errors import ConfigError, unknown
from vtok.ops.causal import causal_mass
from vtok.ops.diversity import greedy_diverse

CRITERIA = ("both", "text_to_visual")
DEFAULT_TAU = 0.1
DEFAULT_PROBE = 7 / 8


# Stage 1: how many, and which.
def kept_tokens(n: int, keep: float | None = None, keep_tokens: int | None = None) -> int:
    """k, tokens that an image of n keeps: max(1, round(n keep)), or `keep_tokens` where it has as many.

    The paper states counts for whole images (288 or 720 of 2880, 10 % or 25 %); how a share is rounded is our reading.
    """
    if keep_tokens is not None:
        return min(n, keep_tokens)
    return n if keep is None else min(n, max(1, round(n * keep)))


def max_sum_select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Greedy max-sum diversification (eqs. 4 to 7, algorithm 1): next comes the token least similar to the sum of those taken.

    Two near-identical outliers are both taken: nothing here protects against duplicates (`k_center_select` does). Similarities
    are cosines in at least fp32; in half precision the order changes. Of equal sums the lowest token number wins.

    Args:
        features: [B, n, d], after the connector, as the language model reads them.
        k: tokens to keep, the pivot included: one number, or one per image ([B]). Tensors cost one host synchronisation,
            numbers none.
        pivot: [B] int64 (or one number for all), the token that each image starts from; a valid one.
        valid: [B, n] bool, False = padding, which is never chosen; `None` = all real.

    Returns:
        [B, k] int64 in order of choice, the pivot first; the largest k where they differ. -1 fills up images that keep fewer
        or have fewer valid tokens. Sort it before rotary positions are attached.

    Raises:
        ConfigError: shapes do not fit, k is not in 1 .. n, or pivot is a number outside the image.
    """
    return _select(features, k, pivot, valid, "sum")


def k_center_select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None = None
) -> Tensor:
    """Farthest-point traversal (greedy k-center): next comes the token whose nearest taken one is farthest, by cosine.

    The abstract of the paper's first version names k-center, its second defines max-sum; the two keep different tokens. With
    another first token it is also the loop of DivPrune (Alvar et al., CVPR 2025). Arguments, result and errors as in
    `max_sum_select`.
    """
    return _select(features, k, pivot, valid, "max")


SELECTORS = {"max_sum": max_sum_select, "k_center": k_center_select}


def _select(
    features: Tensor, k: int | Sequence[int] | Tensor, pivot: int | Tensor, valid: Tensor | None, criterion: str
) -> Tensor:
    if features.ndim != 3 or not features.is_floating_point():
        raise ConfigError(f"features must be floating [B, n, d], got {features.dtype} {list(features.shape)}")
    batch, n, _ = features.shape
    if valid is not None and (valid.shape != (batch, n) or valid.dtype != torch.bool):
        raise ConfigError(f"valid must be bool [{batch}, {n}], got {valid.dtype} {list(valid.shape)}")
    most, counts = _counts(k, batch, n, features.device)
    if not isinstance(pivot, Tensor):
        if not 0 <= operator.index(pivot) < n:
            raise ConfigError(f"pivot={pivot} is no token of an image of {n}; pass 0 to {n - 1}")
        pivot = torch.full((batch,), operator.index(pivot), device=features.device)
    if pivot.shape != (batch,) or pivot.dtype != torch.int64:
        raise ConfigError(f"pivot must be int64 [{batch}], one per image; got {pivot.dtype} {list(pivot.shape)}")
    order, _ = greedy_diverse(features, most, pivot, valid, criterion)
    if counts is None:
        return order
    return order.masked_fill(torch.arange(most, device=order.device) >= counts[:, None], -1)


def _counts(k: int | Sequence[int] | Tensor, batch: int, n: int, device: torch.device) -> tuple[int, Tensor | None]:
    """The largest count, and the count of every image ([B]; `None` = the same for all)."""
    values = k.tolist() if isinstance(k, Tensor) else k
    try:
        counts = [operator.index(c) for c in values] if isinstance(values, Sequence) else [operator.index(values)] * batch
    except TypeError:
        raise ConfigError(f"k counts tokens: a whole number, or one per image; got {k!r}") from None
    if len(counts) != batch:
        raise ConfigError(f"k lists {len(counts)} counts for {batch} images; pass one number, or one per image")
    least, most = min(counts, default=1), max(counts, default=1)
    if not 1 <= least <= most <= n:
        raise ConfigError(f"k must be 1 to {n}, the number of tokens; got {most if most > n else least}")
    return most, None if least == most else torch.tensor(counts, device=device)


# Stage 2: does the text still look?
class Layout(NamedTuple):
    """What the tokens of a batch of prompts are; what is real, but neither visual nor text, is system prompt.

    Attributes:
        visual: [B, N] bool, V.
        text: [B, N] bool, T, the user's text.
        real: [B, N] bool, False = padding, on either side; `None` = all real.
    """

    visual: Tensor
    text: Tensor
    real: Tensor | None = None

    @classmethod
    def from_codes(cls, codes: Tensor) -> Layout:
        """From one number a token ([B, N]): -1 padding, 0 system prompt, 1 visual, 2 the user's text."""
        return cls(codes == 1, codes == 2, codes >= 0)

    @classmethod
    def from_visual(cls, visual: Tensor, real: Tensor | None = None, user: Tensor | None = None) -> Layout:
        """Our reading of which text is the user's: whatever follows the first visual token (in a chat template that includes
        the assistant's header), and `user` text ([B, N] bool) before it. The rest is system prompt.
        """
        text = visual.cumsum(-1) > 0
        text = (text if user is None else text | user) & ~visual
        return cls(visual, text if real is None else text & real, real)


def relevance(q: Tensor, k: Tensor, scale: float, layout: Layout | Tensor) -> tuple[Tensor, Tensor]:
    """How much text and visual tokens of each prompt look at each other in one decoder layer (eq. 8).

    Attention probabilities A are averaged over heads. text_to_visual is the sum of A over text queries and visual keys, divided
    by that over text queries and all keys: as rows sum to 1, the mean share of its attention that a text token gives to visual
    ones. visual_to_text likewise; it is exactly 0 where all text follows the visual tokens, as the mask is causal. Only rows
    that can be other than 0 are computed, some at a time; their number costs the one host synchronisation.

    Tokens see all real tokens up to themselves. Sliding windows and images that look ahead within themselves are not modelled.

    Args:
        q: [B, H, N, D] after rotation.
        k: [B, Hk, N, D] after rotation; H / Hk consecutive queries share a key.
        scale: factor on the logits.
        layout: which tokens are what; or codes [B, N] as in `Layout.from_codes`.

    Returns:
        (text_to_visual [B], visual_to_text [B]) in [0, 1], in at least fp32; 0 where there are no such queries.

    Raises:
        ConfigError: shapes do not fit.
    """
    visual, text, real = Layout.from_codes(layout) if isinstance(layout, Tensor) else layout
    batch, heads, n, _ = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:] or heads % k.shape[1]:
        raise ConfigError(f"k must be [B, Hk, N, D] with Hk dividing {heads}, q is {list(q.shape)}; got {list(k.shape)}")
    for name, mask in (("visual", visual), ("text", text), ("real", real)):
        if mask is not None and (mask.shape != (batch, n) or mask.dtype != torch.bool):
            raise ConfigError(f"layout.{name} must be bool [{batch}, {n}], got {mask.dtype} {list(mask.shape)}")
    real = torch.ones_like(visual) if real is None else real
    visual, text = visual & real, text & real
    asking = torch.stack([text & (visual.cumsum(-1) > 0), visual & (text.cumsum(-1) > 0)])  # rows with such keys before them
    widths = asking.sum(-1).amax(-1).tolist() if batch else [0, 0]  # the one host synchronisation
    q, k = q.detach(), k.detach()
    ratios = [
        causal_mass(q, k, scale, queries, width, keys, real) / everyone.sum(-1).clamp_min(1)
        for queries, width, keys, everyone in zip(asking, widths, (visual, text), (text, visual))
    ]
    return ratios[0], ratios[1]


def drops_visual(
    text_to_visual: Tensor, visual_to_text: Tensor, layout: Layout | Tensor, tau: float = DEFAULT_TAU, criterion: str = "both"
) -> Tensor:
    """Which prompts lose all their visual tokens: those whose ratios are below tau (section 4.2).

    At half depth ratios are below the default already and dropping ruins accuracy (the paper's ablation): it is the depth that
    protects, not tau. A prompt without text, where the ratio is 0 / 0, keeps its visual tokens; that is our reading.

    Args:
        text_to_visual: [B], see `relevance`.
        visual_to_text: [B].
        layout: the one the ratios were computed with.
        tau: threshold; 0.1 in the paper, 0.03 to 0.15 in its ablation; 0 never drops.
        criterion: `"both"` ratios (the paper), or `"text_to_visual"` alone, which differs only where text precedes the image.

    Returns:
        [B] bool.

    Raises:
        UnknownNameError: no such criterion.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    visual, text, real = Layout.from_codes(layout) if isinstance(layout, Tensor) else layout
    if real is not None:
        visual, text = visual & real, text & real
    below = text_to_visual < tau
    if criterion == "both":
        below = below & (visual_to_text < tau)
    return below & visual.any(-1) & text.any(-1)


def probe_layers(probe: float | Sequence[float] | None, depth: int) -> tuple[int, ...]:
    """0-based decoder layers after which relevance is judged: visual tokens are gone from the next layer on.

    The paper's 7L/8 is read as "once 7L/8 layers have run": layer floor(7L/8) - 1 (27 of 32). It gives neither the first number
    nor the rounding. With several layers the first that passes drops; a prompt that has dropped has nothing left to drop.

    Args:
        probe: shares of the depth in (0, 1] (floats), 0-based layers (ints; negative ones count from the end), one or a list;
            `None` = no second stage.
        depth: L, decoder layers.

    Returns:
        Ascending, without repetition.

    Raises:
        ConfigError: a share outside (0, 1] or before the first layer, or a layer that does not exist.
    """
    if probe is None:
        return ()
    given = probe if isinstance(probe, Sequence) and not isinstance(probe, str) else (probe,)
    return tuple(sorted({_probe_layer(one, depth) for one in given}))


def _probe_layer(one: float, depth: int) -> int:
    if isinstance(one, bool) or not isinstance(one, (int, float)):
        raise ConfigError(f"probe takes shares of the depth such as 0.875, or layer numbers; got {one!r}")
    if isinstance(one, int):
        layer = one + depth if one < 0 else one
    elif 0 < one <= 1:
        layer = math.floor(one * depth + 1e-9) - 1  # 0.29 of 100 layers is 28.999.. in floating point and means 29
    else:
        raise ConfigError(f"probe as a share of the depth lies in (0, 1], got {one!r}; a layer number is a whole number")
    if not 0 <= layer < depth:
        raise ConfigError(f"probe={one!r} names no layer of a decoder of {depth}")
    return layer
