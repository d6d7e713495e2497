"""Where the decoder of the LLaVA-NeXT of pages should look at first: what is printed in each patch, and a loss on attention.

Shapes: B pages, n = 36 patches a view, C = 144 patches of the crops in the order of the page, P = 192 visual tokens, D
channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.eval.models.pages.compose import INK_NAMES, PATCH, SIZE, Word
from vtok.eval.models.pages.model import SIDE
from vtok.eval.models.pages.print import NAMES
from vtok.eval.models.pages.questions import WORDS, word_over
from vtok.eval.models.reference_vlm import EOS, SPECIAL
from vtok.eval.training.patch_words import UNCLEAR, attention_scores, missed
from vtok.eval.training.turns import IGNORED, Turns

FIRST, SECOND, HEADS = 1, 3, 2  # decoder layers that are told where to look, and how many of their heads for one thing
_PART = 5  # pixels of a word, in both directions, that a patch must show
_GRID = SIZE // PATCH


def _word(text: str) -> int:
    return len(SPECIAL) + WORDS.index(text)


NOTHING = _word("nothing")
NAME_WORDS, INK_WORDS = [_word(name) for name in NAMES], [_word(ink) for ink in INK_NAMES]
UNDER, OVER = _word("under"), _word("over")


class Places(NamedTuple):
    """What is printed where, [C] or [B, C] int64 each: words for the name and for the ink of what a patch shows, and for the
    name of what stands above that; `NOTHING` where nothing is, `UNCLEAR` where too little of a word is seen.
    """

    names: Tensor
    inks: Tensor
    above: Tensor


def places_of(words: tuple[Word, ...]) -> Places:
    """What the patches of one page show."""
    names, inks, above = (torch.full((_GRID, _GRID), NOTHING) for _ in range(3))
    start = torch.arange(_GRID) * PATCH
    for word in words:
        left, top, width, height = word.box
        across, down = (
            (torch.clamp(start + PATCH, max=low + size) - torch.clamp(start, min=low)).clamp(min=0)
            for low, size in ((left, width), (top, height))
        )
        touched = (down[:, None] > 0) & (across > 0)
        seen = (down[:, None] >= _PART) & (across >= _PART)
        over = word_over(words, word)
        upper = NOTHING if over is None else NAME_WORDS[over.name]
        for found, said in ((names, NAME_WORDS[word.name]), (inks, INK_WORDS[word.ink]), (above, upper)):
            found[touched & (found == NOTHING)] = UNCLEAR
            found[seen] = said
    return Places(names.flatten(), inks.flatten(), above.flatten())


def join(crops: Tensor) -> Tensor:
    """Four crops side by side: [B, 4, n, D] -> [B, lines, patches of a line, D]."""
    return crops.unflatten(2, (SIDE, SIDE)).unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def lay_out(views: Tensor, newline: Tensor) -> tuple[Tensor, Tensor]:
    """The visual tokens of a prompt [B, P, D], and those of the crops among them [B, C, D].

    views [B, V, n, D], of the whole page first; newline [D], the end of a line.
    """
    crops = join(views[:, 1:])
    ends = newline.to(crops.dtype).expand(*crops.shape[:2], 1, -1)
    return torch.cat((views[:, 0], torch.cat((crops, ends), 2).flatten(1, 2)), 1), crops.flatten(1, 2)


def columns_of_crops() -> Tensor:
    """[C]: where in a sequence, which begins with its own token, the patches of the crops are."""
    line = torch.arange(_GRID)
    return (1 + SIDE**2 + line[:, None] * (_GRID + 1) + line).flatten()


def looking_loss(model: Any, states: Any, positions: Tensor, turns: Turns, places: Places) -> Tensor:
    """How little some heads of two decoder layers attend to the patches that matter, mean negative log of their shares.

    In the first layer, a patch should attend to the word above its own, and the word that a question ends with to its patches;
    in the second, that word should attend to what it asks for: the patches of the answer, or, for what stands over it, its own,
    which know by then what is above them. `states`: what enters every decoder layer; positions [B, 1 + P + T].
    """
    ids, targets = turns.ids, turns.targets
    asks = (targets != IGNORED) & (targets != EOS)
    over = asks & (torch.roll(ids, 1, 1) == OVER)
    answers = torch.where(torch.isin(targets, torch.tensor(NAME_WORDS)) & ~over, targets, ids)
    crops = columns_of_crops()
    prefix = positions.shape[1] - ids.shape[1]
    scores = {number: attention_scores(model, number, states[number], positions) for number in (FIRST, SECOND)}
    loss = missed(scores[FIRST][:, :HEADS, prefix:][..., crops], _shown(ids, places), asks)
    loss = loss + missed(scores[SECOND][:, :HEADS, prefix:][..., crops], _shown(answers, places), asks)
    earlier = torch.ones(len(crops), len(crops), dtype=torch.bool).tril()
    among = scores[FIRST][:, HEADS:, crops][..., crops].masked_fill(~earlier, -torch.inf)
    upper = (places.above[:, :, None] == places.names[:, None]) & earlier & (places.above >= len(SPECIAL))[:, :, None]
    upper = upper & (places.above != NOTHING)[:, :, None]
    return loss + missed(among, upper, torch.ones_like(places.above, dtype=torch.bool))


def _shown(words: Tensor, places: Places) -> Tensor:
    """[B, T, C]: which patches show what a word of the text [B, T] names, by name or by ink."""
    return (words[:, :, None] == places.names[:, None]) | (words[:, :, None] == places.inks[:, None])
