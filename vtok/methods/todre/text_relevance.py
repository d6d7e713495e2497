"""ToDRE's stage 2: whether text and image still look at each other, and where that is asked (arXiv:2505.18757v2, section 4.2).

Shapes: B prompts, H query heads, Hk key heads, N tokens of the prompt, R query rows, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.core.prompt import LayerAttention, Layout
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, shown, unknown
from vtok.ops.rows import rows_where

CRITERIA = ("both", "text_to_visual")
DEFAULT_TAU = 0.1
DEFAULT_PROBE = 7 / 8
_ROWS_AT_ONCE = 64  # query rows whose attention is held at a time


def kinds(layout: Layout | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(visual, text, real), each [B, N] bool: V and T of the paper, and what is no padding.

    Args:
        layout: one number a token ([B, N]): -1 padding, 0 system prompt, 1 visual, 2 the user's text. Or a layout, which knows
            no roles: the user's text is then whatever follows the first visual token (in a chat template that includes the
            assistant's header), the rest is system prompt. That is our interpretation.
    """
    if isinstance(layout, Layout):
        return layout.visual & layout.real, layout.after_image, layout.real
    return layout == 1, layout == 2, layout >= 0


def relevance(q: Tensor, k: Tensor, scale: float, layout: Layout | Tensor) -> tuple[Tensor, Tensor]:
    """How much text and visual tokens of each prompt look at each other in one decoder layer (eq. 8).

    Attention probabilities A are averaged over heads. text_to_visual is the sum of A over text queries and visual keys, divided
    by that over text queries and all keys: as rows sum to 1, the mean share of its attention that a text token gives to visual
    ones. visual_to_text likewise; it is exactly 0 where all text follows the visual tokens, as the mask is causal.

    Here tokens see all real tokens up to themselves; for windows, and images that look ahead, see `layer_relevance`.

    Args:
        q: [B, H, N, D] after rotation.
        k: [B, Hk, N, D] after rotation; H / Hk consecutive queries share a key.
        scale: factor on the logits.
        layout: which tokens are what, see `kinds`.

    Returns:
        (text_to_visual [B], visual_to_text [B]) in [0, 1], in at least fp32; 0 where there are no such queries.

    Raises:
        ConfigError: shapes do not fit.
    """
    visual, text, real = kinds(layout)
    batch, heads, n, _ = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:] or heads % k.shape[1]:
        raise ConfigError(f"k must be [B, Hk, N, D] with Hk dividing {heads}, q is {list(q.shape)}; got {list(k.shape)}")
    if visual.shape != (batch, n):
        raise ConfigError(f"layout must describe tokens [{batch}, {n}], got {list(visual.shape)}")
    forth, back = layer_relevance(causal_attention(q.detach(), k.detach(), scale, real), visual, text)
    dtype = at_least_fp32(q[:0]).dtype
    return forth.to(dtype), back.to(dtype)


def causal_attention(q: Tensor, k: Tensor, scale: float, real: Tensor) -> LayerAttention:
    """Attention of a layer with a plain causal mask, from its queries [B, H, N, D] and keys [B, Hk, N, D], rotated.

    Args:
        q: queries.
        k: keys.
        scale: factor on the logits.
        real: [B, N] bool, False = padding, which nobody but itself sees.
    """
    _, heads, n, width = q.shape
    column = torch.arange(n, device=q.device)

    def project(rows: Tensor | None) -> Tensor:
        return k if rows is None else q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))

    def bias(rows: Tensor) -> Tensor:
        here = rows[..., None]
        seen = ((column < here) & real[:, None]) | (column == here)
        off = torch.finfo(torch.float32).min
        return torch.zeros(seen.shape, device=q.device).masked_fill(~seen, off)[:, None]

    return LayerAttention(0, scale, project, bias)


def layer_relevance(attention: LayerAttention, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """`relevance` under the layer's own mask: windows, padding, images that look ahead within themselves.

    Only rows that can be other than 0 are computed, some at a time: text rows, and visual ones where their mask shows them
    text. How many there are costs two host synchronisations.

    Args:
        attention: of the layer.
        visual: [B, N] bool, V.
        text: [B, N] bool, T.

    Returns:
        (text_to_visual [B], visual_to_text [B]), as `relevance`.
    """
    if not len(visual):
        return torch.zeros(0, device=visual.device), torch.zeros(0, device=visual.device)
    pairs = ((text, visual), (visual, text))
    widths = torch.stack([text, visual]).sum(-1).amax(-1).tolist()
    asking = [_seeing(attention, queries, width, keys) for (queries, keys), width in zip(pairs, widths)]
    widths = torch.stack(asking).sum(-1).amax(-1).tolist()
    forth, back = (
        _mass(attention, rows, width, keys) / queries.sum(-1).clamp_min(1)
        for rows, width, (queries, keys) in zip(asking, widths, pairs)
    )
    return forth, back


def _seeing(attention: LayerAttention, queries: Tensor, width: int, keys: Tensor) -> Tensor:
    """[B, N] bool: those of the (at most `width`) queries whose mask shows them one of the keys."""
    found = torch.zeros_like(queries, dtype=torch.int64)
    rows, chosen = rows_where(queries, width)
    for part, real in zip(rows.split(_ROWS_AT_ONCE, 1), chosen.split(_ROWS_AT_ONCE, 1)):
        bias = attention.bias(part)[:, 0]  # [B, r, N]
        sees = ((bias > torch.finfo(bias.dtype).min / 2) & keys[:, None]).any(-1) & real
        found = found.scatter_add(1, part, sees.long())
    return found > 0


def _mass(attention: LayerAttention, queries: Tensor, width: int, keys: Tensor) -> Tensor:
    """[B]: attention that the (at most `width`) queries pay to the keys, averaged over heads and summed over queries."""
    total = torch.zeros(len(keys), device=keys.device)
    if not width:
        return total
    rows, chosen = rows_where(queries, width)
    for part, real in zip(rows.split(_ROWS_AT_ONCE, 1), chosen.split(_ROWS_AT_ONCE, 1)):
        probs = attention.probs(part)
        mass = (probs @ keys.to(probs.dtype)[:, None, :, None]).squeeze(3).mean(1)  # [B, r]
        total = total + (mass * real).sum(-1)
    return total


def drops_visual(
    text_to_visual: Tensor, visual_to_text: Tensor, layout: Layout | Tensor, tau: float = DEFAULT_TAU, criterion: str = "both"
) -> Tensor:
    """Which prompts lose all their visual tokens: those whose ratios are below tau (section 4.2).

    At half depth ratios are below the default already and dropping ruins accuracy (the paper's ablation): it is the depth that
    protects, not tau. A prompt without text, where the ratio is 0 / 0, keeps its visual tokens; that is our interpretation.

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
    visual, text, _ = kinds(layout)
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


def check_probe(probe: Any) -> None:
    """Raises unless `probe` holds shares of the depth or numbers of layers, whatever the depth is.

    Raises:
        ConfigError: it does not.
    """
    for one in probe if isinstance(probe, Sequence) and not isinstance(probe, str) else (probe,):
        if isinstance(one, bool) or not isinstance(one, (int, float)):
            raise ConfigError(f"probe takes shares of the depth such as 0.875, or layer numbers; got {shown(one)}")
        if isinstance(one, float) and not 0 < one <= 1:
            raise ConfigError(
                f"probe as a share of the depth lies in (0, 1], got {shown(one)}; a layer number is a whole number"
            )


def _probe_layer(one: float, depth: int) -> int:
    check_probe(one)
    named = one + depth if one < 0 else int(one)
    shared = math.floor(one * depth + 1e-9) - 1  # 0.29 of 100 layers is 28.999.. in floating point and means 29
    layer = int(named) if isinstance(one, int) else shared
    if not 0 <= layer < depth:
        raise ConfigError(f"probe={shown(one)} names no layer of a decoder of {depth}")
    return layer
