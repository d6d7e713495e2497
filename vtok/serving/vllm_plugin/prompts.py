"""Prompts with a placeholder for every visual token that stays, as lists of tokens. No engine is needed here.

Where text stands between the tokens of an image (names of its tiles) and tokens of all of it compete, the image alone says how
many stay in front of each word. The text between then has placeholders too, and comes with the features, as the LLM embeds it:
its place among them is known once they are.

Shapes: n placeholders of an image, m tokens of a piece of it that is pruned by itself, k that stay; L tokens from the first
placeholder of an image to its last, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vtok.errors import StateError


def shortened(full: Sequence[int], visual: Sequence[bool], piece: int, kept: int) -> list[int]:
    """What stands for an image, with fewer placeholders; text around and between them stays.

    Args:
        full: all tokens that stand for the image.
        visual: of each, whether it is a placeholder; n are.
        piece: m. Neighbours among the placeholders are pieces of this size, one behind the other.
        kept: k, of each piece.

    Raises:
        StateError: pieces do not fit between the text.
    """
    out: list[int] = []
    first = 0
    for here, run in groupby(visual):
        length = len(list(run))
        pieces, rest = divmod(length, piece)
        if here and rest:
            raise StateError(f"{length} placeholders of an image stand together, which are no pieces of {piece}")
        out += full[first : first + (kept * pieces if here else length)]
        first += length
    return out


def joined(full: Sequence[int], visual: Sequence[bool], kept: int) -> list[int]:
    """What stands for an image, all from its first placeholder to its last one row of placeholders: as many as stay, and one
    for every word between.

    Args:
        full: all tokens that stand for the image.
        visual: of each, whether it is a placeholder.
        kept: how many of these stay.
    """
    inner = between(full, visual)
    first = list(visual).index(True)
    words = len(inner) - sum(visual)
    return [*full[:first], *[full[first]] * (kept + words), *full[first + len(inner) :]]


def between(full: Sequence[int], visual: Sequence[bool]) -> list[int]:
    """[L]: the tokens from the first placeholder to the last."""
    marks = list(visual)
    return list(full[marks.index(True) : len(marks) - marks[::-1].index(True)])


def woven(words: Tensor, visual: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Words and visual tokens that stay, in the order of the prompt.

    Args:
        words: [L, C], of all from the first placeholder to the last; what stands at placeholders does not matter.
        visual: [L] bool, placeholders.
        rows: [k] int64, which of the placeholders stay.
        tokens: [k, C], what stands there then.

    Returns:
        [L - n + k, C].
    """
    places = visual.nonzero()[:, 0][rows]
    stays = ~visual
    stays[places] = True
    return torch.index_copy(words, 0, places, tokens.to(words.dtype))[stays]
