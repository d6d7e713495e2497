"""Recall at k over a gallery, where equal captions are positives of each other.

Shapes: I images, T texts, Q queries, G gallery entries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 512  # queries compared at a time: COCO's 25,000 x 5,000 scores would be half a gigabyte at once


def text_groups(texts: Sequence[str], equal_captions: bool = True) -> Tensor:
    """[T] int64: the same number for texts that are equal (white space aside), or a number of its own for each."""
    if not equal_captions:
        return torch.arange(len(texts))
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(" ".join(text.split()), len(known)) for text in texts], dtype=torch.int64)


class Positives:
    """Which texts belong to which images: text t and image i match if i owns t (`owner`, [T]) or one equal to t (`group`)."""

    def __init__(self, owner: Tensor, group: Tensor, images: int):
        self.group = group
        self.member = torch.zeros(images, int(group.max()) + 1 if len(group) else 0, dtype=torch.bool)  # [I, groups]
        self.member[owner, group] = True

    def of_texts(self, rows: slice) -> Tensor:
        """[texts of `rows`, I] bool."""
        return self.member[:, self.group[rows]].T

    def of_images(self, rows: slice) -> Tensor:
        """[images of `rows`, T] bool."""
        return self.member[rows][:, self.group]


def first_ranks(queries: Tensor, gallery: Tensor, positives: Callable[[slice], Tensor]) -> Tensor:
    """Wrong answers before the first right one, [Q] int64; G without a right one. Recall at k is the share below k.

    A wrong answer that scores the same as the best right one stands before it: a model that gives every pair the same score
    finds nothing, whatever order a sort would leave ties in. Without ties this is what a sort gives.

    Args:
        queries: [Q, D].
        gallery: [G, D].
        positives: rows of queries -> [rows, G] bool.
    """
    found = []
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores, right = queries[rows] @ gallery.T, positives(rows)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        before = ((scores >= best) & ~right).sum(1)
        found.append(torch.where(right.any(1), before, len(gallery)))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
