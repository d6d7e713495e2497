"""Finding the threshold of correlation-guided compression on a few pages of one's own: the paper's value is not published.

Shapes: V views, n tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError
from vtok.methods.correlation.scores import TokenScores, select_tokens

DEFAULT_TARGET = 0.66


def crop_scores(
    pages: Sequence[tuple[TokenScores, Tensor]], numbers: Sequence[Tensor] | None = None
) -> tuple[TokenScores, Tensor]:
    """What `calibrate_alpha` needs of several pages: the scores of their crops, and the numbers of these views.

    Args:
        pages: scores of a page's views and which of them [V] show the whole page (`Layout.is_global`).
        numbers: [V] int64 of every entry of `pages`, as `select_tokens` gets them; `None` = 0 .. V-1.

    Returns:
        (scores of all crops, padded to the longest; [V'] int64, number of each within its page).
    """
    most = max((scores.low.shape[1] for scores, _ in pages), default=0)
    parts, places = [], []
    for i, (scores, whole) in enumerate(pages):
        valid = torch.ones_like(scores.outlier) if scores.valid is None else scores.valid
        parts.append([F.pad(part, (0, most - part.shape[1]))[~whole] for part in (*scores[:3], valid)])
        places.append((torch.arange(len(whole), device=whole.device) if numbers is None else numbers[i])[~whole])
    if not parts:
        raise ConfigError("nothing to calibrate on: no pages were given")
    return TokenScores(*(torch.cat(part) for part in zip(*parts))), torch.cat(places)


class Calibration(NamedTuple):
    """A threshold and what it gave on the views it was chosen on.

    Attributes:
        alpha: for `select_tokens`.
        share: tokens kept of all tokens, in (0, 1].
    """

    alpha: float
    share: float


def calibrate_alpha(
    scores: TokenScores,
    target: float = DEFAULT_TARGET,
    sampling: str = "multinomial",
    seed: int = 0,
    view: Tensor | None = None,
    min_tokens: int = 1,
    multiple: int = 1,
) -> Calibration:
    """The alpha at which the cropped views of a few pages keep a share of their tokens, outliers included. Ours.

    The number kept never falls as alpha rises, and changes at the tokens' critical values alone: those are searched. The
    default is our interpretation of published summaries (about two thirds of the tokens kept on average), no number of the
    paper.

    Args:
        scores: of the cropped views, without those of whole pages (`crop_scores`).
        target: tokens kept of all tokens ((0, 1]).
        sampling, seed, view, min_tokens, multiple: as `select_tokens` will be called.

    Returns:
        The alpha of nearest share, half way between two critical values. Outliers and `min_tokens` may keep more than asked;
        tokens of equal critical value go together.

    Raises:
        ConfigError: target out of range, or no token to count.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"target is a share of tokens in (0, 1], got {target}")
    critical, valid = scores.critical, scores.valid
    values = (critical if valid is None else critical[valid]).unique().double().tolist()
    if not values:
        raise ConfigError("nothing to calibrate on: the views hold no token; pass the scores of a few cropped pages")
    total = critical.numel() if valid is None else int(valid.sum())
    ends = [-1.0, *values, 1.0]
    alphas = [(low + high) / 2 for low, high in pairwise(ends)]

    def share(alpha: float) -> float:
        return int(select_tokens(scores, alpha, sampling, seed, view, min_tokens, multiple).sum()) / total

    below, above = 0, len(alphas) - 1
    while below < above:  # the first that reaches the target
        middle = (below + above) // 2
        below, above = (below, middle) if share(alphas[middle]) >= target else (middle + 1, above)
    tried = [Calibration(alpha, share(alpha)) for alpha in alphas[max(0, above - 1) : above + 1]]
    return min(tried, key=lambda found: abs(found.share - target))
