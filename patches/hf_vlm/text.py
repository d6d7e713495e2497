"""The text of prompts, for methods that choose among image features by what is asked about the images.

Shapes: B rows, L columns of the prompt, T text tokens of a row at most, D width of the LLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.core.prompt import PromptText
from vtok.errors import StateError
from vtok.ops.rows import rows_where


class PromptTexts:
    """Embeddings of the text behind the first visual token of every row; of all text where there is none behind it.

    Args:
        model: the one without language head.
        kwargs: of the call.
        tokens: modality -> id of its placeholder.

    Raises:
        StateError: the call has no token ids.
    """

    def __init__(self, model: Any, kwargs: Mapping[str, Any], tokens: Mapping[str, int]):
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise StateError("a method chooses visual tokens by the text of the prompt, which needs input_ids; found none")
        self.tokens = tokens
        self.ids, visual = ids, torch.zeros_like(ids, dtype=torch.bool)
        for token in tokens.values():
            visual = visual | (ids == token)
        two = isinstance(mask, Tensor) and mask.ndim == 2
        text = ~visual & mask.bool().to(ids.device) if two and isinstance(mask, Tensor) else ~visual
        behind = text & (visual.cumsum(1) > 0)
        chosen = torch.where(behind.any(1, keepdim=True), behind, text)
        columns, self.real = rows_where(chosen, max(1, int(chosen.sum(1).max())))
        words = ids.gather(1, columns).masked_fill(~self.real, 0)  # a placeholder may lie outside the table of embeddings
        self.words, self.embeds = words, model.get_input_embeddings()(words).detach()

    def of(self, modality: str, counts: Sequence[int], numbers: Sequence[int], device: torch.device) -> PromptText | None:
        """For some of the images of a modality; `None` if placeholders and features differ in number, which the model says
        better.

        Args:
            modality: "image" or "video".
            counts: features of every image, in the order of the placeholders.
            numbers: which images.
            device: where it is wanted.
        """
        row = torch.eq(self.ids, self.tokens[modality]).nonzero()[:, 0]
        first = [0, *itertools.accumulate(counts)]
        if first[-1] != len(row):
            return None
        rows = row[torch.tensor([first[i] for i in numbers], device=row.device)]
        return PromptText(self.embeds[rows].to(device), self.real[rows].to(device), self.words[rows].to(device))
