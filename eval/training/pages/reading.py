"""The first lesson of the LLaVA-NeXT of pages: its tower and connector learn to read.

Every patch of a crop becomes the words for what is printed there, name and ink, in the language model's own embedding. The
class token says which names and inks its view shows, so that its attention is for print. Pages of this lesson are full of
words.

Shapes: B pages, V = 5 views of n = 36 patches each, the whole page first; C = 144 patches of the crops, D channels of the
language model, W of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.pages.compose import Page, draw_page
from vtok.eval.models.pages.model import MEAN, SIDE, STD, VIEW
from vtok.eval.training.pages.looking import INK_WORDS, NAME_WORDS, NOTHING, Places, join, places_of
from vtok.eval.training.patch_words import naming_loss

FULL = 10_000_000  # numbers of the pages of this lesson begin here


def views(pages: Tensor) -> Tensor:
    """Pages [B, 3, 168, 168] uint8 -> what the processor makes of them, [B, V, 3, 84, 84]: the page, then its quarters."""
    small = F.interpolate(pages, size=(VIEW,) * 2, mode="bicubic", antialias=True, align_corners=False)
    crops = pages.unflatten(3, (2, VIEW)).unflatten(2, (2, VIEW)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat((small[:, None], crops), 1).float().div(255).sub(MEAN).div(STD)


def pixels_of(pages: Sequence[Page]) -> Tensor:
    """[B, 3, 168, 168] uint8."""
    return torch.stack([torch.from_numpy(np.array(page.image)).permute(2, 0, 1) for page in pages])


def stacked(pages: Sequence[Page]) -> Places:
    """What the patches of some pages show."""
    return Places(*(torch.stack(found) for found in zip(*(places_of(page.words) for page in pages))))


class ClassHead(nn.Module):
    """Which names and inks a view shows, told from the class token; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.shown = nn.Linear(width, len(NAME_WORDS) + len(INK_WORDS))

    def loss(self, classes: Tensor, places: Places) -> Tensor:
        """Binary cross entropy for every crop: classes [B, 4, W]."""
        known = torch.tensor([*NAME_WORDS, *INK_WORDS])
        crops = [words.unflatten(1, (2, SIDE, 2, SIDE)).transpose(2, 3).flatten(3).flatten(1, 2) for words in places[:2]]
        there = (torch.cat(crops, -1)[..., None] == known).any(2)  # [B, 4, names and inks]
        return F.binary_cross_entropy_with_logits(self.shown(classes), there.float())


def seen(model: Any, shown: Tensor) -> Tensor:
    """What the tower says of views [B, v, 3, 84, 84], class tokens first: [B, v, 1 + n, W]."""
    last = model.model.vision_tower(shown.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
    return last.unflatten(0, shown.shape[:2])


def told(places: Places) -> list[tuple[Tensor, list[int]]]:
    """What connector and words are to say of each patch, see `naming_loss`."""
    return [(places.names, NAME_WORDS), (places.inks, INK_WORDS)]


def reading_loss(model: Any, head: ClassHead, numbers: Sequence[int]) -> Tensor:
    """Of tower, connector and words on full pages."""
    pages = [draw_page("train", FULL + number, full=True) for number in numbers]
    found, places = seen(model, views(pixels_of(pages))[:, 1:]), stacked(pages)
    crops = join(model.model.multi_modal_projector(found[:, :, 1:])).flatten(1, 2)
    return naming_loss(model, crops, told(places), NOTHING) + head.loss(found[:, :, 0], places)
