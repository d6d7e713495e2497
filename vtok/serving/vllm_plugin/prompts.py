"""Prompts with a placeholder for every visual token that stays, as lists of tokens. No engine is needed here.

Shapes: n placeholders of an image, m tokens of a piece of it that is pruned by itself, k that stay of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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
