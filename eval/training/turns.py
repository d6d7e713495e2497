"""Several questions about one image in one sequence, each as if it were alone.

A question with its answer is a turn. It sees the image and itself, and its positions start behind the image, so the model
computes what it would compute for that question alone, and no answer leaks into another turn.

Shapes: B sequences, P visual tokens each, T text tokens each, turns included.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.eval.models.reference_vlm import BOS, EOS, PAD
from vtok.eval.tasks.vqa.data import blind_answers
from vtok.writing import write

IGNORED = -100
Turn = tuple[list[int], int]  # tokens of a question, token of its answer


class Turns(NamedTuple):
    """Text of B sequences, T tokens each.

    ids [B, T]; targets [B, T] the token that follows, `IGNORED` where there is nothing to learn; turn [B, T] number of the turn
    from 1 (0 = padding); place [B, T] position within the turn.
    """

    ids: Tensor
    targets: Tensor
    turn: Tensor
    place: Tensor

    @property
    def wanted(self) -> Tensor:
        """The targets to learn, in row-major order."""
        return self.targets[self.targets != IGNORED]


def pack(turns: Sequence[Sequence[Turn]]) -> Turns:
    """Sequences out of their turns, padded on the right."""
    length = max(sum(len(question) + 1 for question, _ in sequence) for sequence in turns)
    ids, targets, number, place = (torch.full((len(turns), length), fill) for fill in (PAD, IGNORED, 0, 0))
    for row, sequence in enumerate(turns):
        start = 0
        for n, (question, answer) in enumerate(sequence, start=1):
            stop = start + len(question) + 1
            ids[row, start:stop] = torch.tensor([*question, answer])
            targets[row, stop - 2 : stop] = torch.tensor([answer, EOS])
            number[row, start:stop] = n
            place[row, start:stop] = torch.arange(stop - start)
            start = stop
    return Turns(ids, targets, number, place)


def draw_turns(by_kind: Sequence[Sequence[Turn]], count: int, weights: Sequence[int]) -> list[Turn]:
    """`count` random questions about an image at most, kinds drawn by weight, none twice; `by_kind`: all about it."""
    shares = [round(count * weight / sum(weights)) for weight in weights]
    return [turn for turns, share in zip(by_kind, shares) for turn in some_of(turns, share)]


def some_of(turns: Sequence[Turn], count: int) -> list[Turn]:
    """Up to `count` of them at random, none twice."""
    return [turns[i] for i in torch.randperm(len(turns))[:count].tolist()]


def turn_maker(tokenizer: Any) -> Callable[[str, str], Turn]:
    """(question, answer of one word) -> tokens; each text is read once."""
    encode = cache(partial(tokenizer.encode, add_special_tokens=False))
    return lambda question, answer: (encode(question), encode(answer)[0])


def as_turns(turn_of: Callable[[str, str], Turn], asked: Mapping[str, Sequence[tuple[str, str]]]) -> list[list[Turn]]:
    """Questions and answers as tokens, kind by kind."""
    return [[turn_of(*one) for one in own] for own in asked.values()]


def turns_about(questions: Any, tokenizer: Any) -> list[list[Turn]]:
    """All questions about each picture; `questions` has `texts`, `answers`, `rows` and `pictures`."""
    made, turns = turn_maker(tokenizer), [list[Turn]() for _ in questions.pictures]
    for text, answer, row in zip(questions.texts, questions.answers, questions.rows.tolist()):
        turns[row].append(made(text, answer))
    return turns


def turn_mask(turn: Tensor, prefix: int, hidden: Tensor | None = None) -> Tensor:
    """What may see what, [B, 1, prefix + T, prefix + T] bool: all is causal, and a turn sees the prefix and itself alone.

    `prefix`: tokens in front of the text, the first one included; `hidden` [B, prefix - 1] bool: visual tokens that nothing
    sees but they themselves, as if they had been dropped.
    """
    batch, length = turn.shape
    number = torch.cat((turn.new_full((batch, prefix), -1), turn), 1)  # -1 = seen by all that follow
    same = (number[:, None, :] == -1) | (number[:, :, None] == number[:, None, :])
    allowed = same & torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
    if hidden is not None:
        allowed[:, :, 1:prefix] &= ~hidden[:, None] | torch.eye(prefix + length, dtype=torch.bool)[:, 1:prefix]
    return allowed[:, None]


def answer_logits(model: Any, visual: Tensor, turns: Turns) -> Tensor:
    """Logits `[number of targets, vocabulary]` at the positions of `turns` with something to learn, in row-major order."""
    return logits_and_states(model, visual, turns, False)[0]


def logits_and_states(
    model: Any, visual: Tensor, turns: Turns, states: bool = True, hidden: Tensor | None = None
) -> tuple[Tensor, Any, Tensor]:
    """(`answer_logits`; what enters every decoder layer, [B, 1 + P + T, D] each; positions [B, 1 + P + T]).

    `hidden` [B, P] bool: visual tokens that are as good as dropped, see `turn_mask`.
    """
    batch, count, _ = visual.shape
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), BOS))
    x = torch.cat((start, visual.to(start.dtype), embed(turns.ids)), 1)
    prefix = 1 + count
    positions = torch.cat((torch.arange(prefix).expand(batch, -1), prefix + turns.place), 1)
    allowed = turn_mask(turns.turn, prefix, hidden)
    mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
    out = model.model.language_model(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=states
    )
    logits = model.lm_head(out.last_hidden_state[:, prefix:][turns.targets != IGNORED])
    return logits, out.hidden_states, positions


def hits(model: Any, visual: Tensor, turns: Turns) -> Tensor:
    """Which of the answers have the highest logit, [number of turns] bool in row-major order."""
    return (answer_logits(model, visual, turns).argmax(-1) == turns.wanted)[turns.wanted != EOS]


def share_right(turns: Sequence[Sequence[Turn]], model: Any, visual_of: Callable[[Tensor], Tensor], batch_size: int) -> float:
    """Share of all questions answered rightly, all about a picture in one sequence.

    `turns`: picture by picture; `model` in eval mode; `visual_of`: numbers of pictures [B] -> their visual tokens [B, P, D].
    """
    batches = torch.arange(len(turns)).split(batch_size)
    with torch.inference_mode():
        right = [hits(model, visual_of(rows), pack([turns[row] for row in rows])) for rows in batches]
    return int(sum(part.sum() for part in right)) / sum(map(len, turns))


def answered(
    model: Any,
    asked: Sequence[Sequence[Sequence[Turn]]],
    visual_of: Callable[[Tensor], Tensor],
    kinds: Sequence[str],
    each: int,
    batch_size: int = 20,
) -> str:
    """Share of right answers by kind of question, in a line.

    `model` in eval mode; `asked`: image -> kind -> turns, `each` of these at most are drawn; `visual_of`: as above; `kinds`:
    names.
    """
    right, count = [0] * len(kinds), [0] * len(kinds)
    torch.manual_seed(0)
    for rows in torch.arange(len(asked)).split(batch_size):
        visual = visual_of(rows)
        for kind in range(len(kinds)):
            own = [some_of(asked[row][kind], each) for row in rows]
            keep = [i for i, turns in enumerate(own) if turns]
            found = hits(model, visual[keep], pack([own[i] for i in keep]))
            right[kind] += int(found.sum())
            count[kind] += len(found)
    shares = [100 * r / n for r, n in zip(right, count)]
    parts = ", ".join(f"{kind} {share:.1f}" for kind, share in zip(kinds, shares))
    return f"held-out questions: {sum(shares) / len(shares):.2f} % ({parts})"


def write_blind_answers(path: Path, count: int, shown: Callable[[int], Any], about: Callable[..., Any], seed: int = 0) -> None:
    """Writes the most frequent answer to every text of training, which asks about what `count` pictures show."""
    asked = (about(shown(number), random.Random(f"{seed} {number}")) for number in range(count))
    pairs = [pair for by_kind in asked for own in by_kind.values() for pair in own]
    write(path, json.dumps(dict(sorted(blind_answers(*zip(*pairs)).items())), indent=0) + "\n")
