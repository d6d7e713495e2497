"""Patches that are told by words, in the language model's own embedding, and where decoder layers look for them.

What connectors learn first in the trainings on scenes and on pages. Shapes: B images, P patches, D channels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.training.turns import IGNORED

UNCLEAR = -1  # instead of a word: nothing is to be learned there


def spread_out(model: Any, std: float) -> Any:
    """A fresh model in which words can be told apart by patches, and with larger weights in the language model."""
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    for name, weight in model.model.language_model.layers.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(weight, std=std)
    return model


def naming_loss(model: Any, visual: Tensor, told: Sequence[tuple[Tensor, Sequence[int]]], nothing: int) -> Tensor:
    """Cross entropy of the words at each patch.

    visual [B, P, D] as the language model takes them; `told`: (right words [B, P], the words that there are to choose from),
    one for every thing that a patch shows; `nothing`: the word for a patch that shows nothing, which may always be chosen.
    """
    table = model.get_input_embeddings().weight
    loss = torch.zeros(())
    for words, known in told:
        choice = torch.tensor([nothing, *known])
        label = torch.full((len(table),), 0)
        label[choice] = torch.arange(len(choice))
        logits = (visual @ table[choice].to(visual.dtype).T).float()
        wanted = torch.where(words == UNCLEAR, IGNORED, label[words.clamp(min=0)])
        loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return loss


def named(model: Any, visual: Tensor, told: Sequence[tuple[Tensor, Sequence[int]]], nothing: int) -> list[float]:
    """Shares of the patches that show something whose word comes out first, in percent; arguments as above."""
    table = model.get_input_embeddings().weight
    said = []
    for words, known in told:
        best = torch.tensor(known)[(visual @ table[known].float().T).argmax(-1)]
        there = (words != nothing) & (words != UNCLEAR)
        said.append(100 * (best == words)[there].float().mean().item())
    return said


def attention_scores(
    model: Any,
    number: int,
    states: Tensor,
    positions: Tensor,
    heads: slice = slice(None),
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """[B, heads, rows, columns] of a decoder layer of a Llama before the softmax, not masked; `states` is what enters it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    language = model.model.language_model
    layer = language.layers[number]
    x = layer.input_layernorm(states)
    query, key = (
        proj(x).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)[:, heads]
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *language.rotary_emb(x, positions))
    return (query[:, :, rows] @ key[:, :, columns].transpose(-1, -2)).float() * layer.self_attn.head_dim**-0.5


def missed(scores: Tensor, right: Tensor, asked: Tensor) -> Tensor:
    """Mean negative log of the share of attention that goes to the right places.

    scores [B, heads, T, P]; right [B, T, P] bool; asked [B, T] bool, what counts, as far as there is a right place.
    """
    told = (asked & right.any(-1))[:, None].expand(-1, scores.shape[1], -1)
    share = scores.log_softmax(-1).masked_fill(~right[:, None], -torch.inf).logsumexp(-1)
    return -share[told].mean()
