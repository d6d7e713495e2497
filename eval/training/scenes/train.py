"""Trains the reference LLaVA of scenes: `python -m vtok.eval.training.scenes --export assets`. Resumes wherever it stopped.

The encoder is frozen: what it says of the training scenes is computed once and kept in the cache folder. First the connector
learns to turn a patch into the words for what lies there, name and colour, in the language model's own embedding; then
connector and language model learn to answer questions, many about a scene in one sequence (see `vtok.eval.training.turns`).

Shapes: B scenes, P = 256 visual tokens, W = 384 channels of the encoder, D of the language model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.assets import save_weights
from vtok.eval.models.data import cache_dir, stack_pixels
from vtok.eval.models.dinov2 import normalise
from vtok.eval.models.dinov2.model import WIDTH
from vtok.eval.models.reference_vlm import EOS, SPECIAL
from vtok.eval.models.scenes.album import NAMES
from vtok.eval.models.scenes.compose import COLOUR_NAMES, PATCH, SIZE, Thing, draw_scene
from vtok.eval.models.scenes.model import TOWER, TRAINED, ReferenceScenes, load_tower, make_scenes_processor
from vtok.eval.models.scenes.questions import BLIND, KINDS, WORDS, questions_about
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser, save_atomically, stage_file
from vtok.eval.training.patch_words import attention_scores, missed, named, naming_loss, spread_out
from vtok.eval.training.turns import (
    IGNORED,
    Turns,
    answered,
    as_turns,
    draw_turns,
    logits_and_states,
    pack,
    turn_maker,
    write_blind_answers,
)
from vtok.writing import write

SIDE = SIZE // PATCH
VALIDATION = range(500_000, 500_160)  # scenes of the test pictures that the test does not ask about
_GUIDED, _HEADS = (1, 3), 2  # decoder layers that are told where to look at first, and how many of their heads
NOTHING = len(SPECIAL) + WORDS.index("zero")  # the word for a patch without a plate
NAME_WORDS = [len(SPECIAL) + WORDS.index(name) for name in NAMES]
COLOUR_WORDS = [len(SPECIAL) + WORDS.index(name) for name in COLOUR_NAMES]
EVERY = Every(20, 50, 250)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    scenes: int = 7008  # training scenes, numbers 0, 1, ...
    # the connector alone learns what lies in each patch
    align: Stage = field(default_factory=lambda: Stage(PATCH, 4, 2e-3, 0.1))
    answer: Stage = field(default_factory=lambda: Stage(PATCH, 3, 1e-3, 0.02))  # connector and language model learn to answer
    align_batch_size: int = 16  # scenes a step of the first stage
    batch_size: int = 8  # scenes a step of the second
    turns: int = 18  # questions of a scene a step
    weights: tuple[int, ...] = (3, 3, 2, 3)  # of the kinds of questions, in the order of `KINDS`
    naming: float = 0.1  # weight of the connector's own loss while questions are learned
    # steps at first in which two layers are told where to look for what a question names; without them the model is slow to
    # find that the answer is in the picture
    guided: int = 600
    warmup: float = 0.03
    model: ReferenceScenes = field(default_factory=ReferenceScenes)  # the model that comes out


def features_of(split: str, numbers: range, depth: int, batch_size: int = 16) -> np.ndarray:
    """What the encoder says of some scenes, [count, P, W] fp16 on disk.

    Computed in bfloat16, once: a second call goes on where the first was stopped.
    """
    count, path = len(numbers), cache_dir() / "train" / "scenes" / f"{split}-{numbers.start}-{len(numbers)}-{depth}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = int(path.with_suffix(".done").read_text()) if path.with_suffix(".done").is_file() else 0
    kept = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, (count, SIDE**2, WIDTH))
    encoder = load_tower(depth).bfloat16() if done < count else None
    for start in range(done, count, batch_size):
        stop = min(count, start + batch_size)
        pixels = stack_pixels([draw_scene(split, number).image for number in numbers[start:stop]])
        assert encoder is not None
        with torch.inference_mode():
            seen = encoder(normalise(pixels).bfloat16(), output_hidden_states=True).hidden_states[-1]
        kept[start:stop] = seen[:, 1:].half().numpy()
        write(path.with_suffix(".done"), str(stop))
        if start // batch_size % 20 == 0:
            print(f"encoded {stop} of {count} scenes of {split}", flush=True)
    return kept


def patch_words(things: tuple[Thing, ...]) -> Tensor:
    """[2, P] int64: the words for name and colour of what covers the middle of each patch, `NOTHING` where no plate does."""
    words = torch.full((2, SIDE, SIDE), NOTHING)
    middle = torch.arange(SIDE) * PATCH + PATCH // 2
    for thing in things:
        left, top, side = thing.box
        rows = ((middle >= top) & (middle < top + side)).nonzero().flatten()
        columns = ((middle >= left) & (middle < left + side)).nonzero().flatten()
        for place, word in enumerate((NAME_WORDS[thing.name], COLOUR_WORDS[thing.colour])):
            words[place, rows[:, None], columns] = word
    return words.flatten(1)


class Lessons:
    """Scenes as the encoder saw them, with their questions as tokens."""

    def __init__(self, split: str, numbers: range, depth: int, seed: int):
        self.features = features_of(split, numbers, depth)
        scenes = [draw_scene(split, number).things for number in numbers]
        self.patches = torch.stack([patch_words(things) for things in scenes]).to(torch.int16)
        turn_of = turn_maker(make_scenes_processor().tokenizer)
        asked = [questions_about(things, random.Random(f"{seed} {number}")) for number, things in zip(numbers, scenes)]
        self.turns = [as_turns(turn_of, one) for one in asked]

    def visual(self, rows: Tensor) -> Tensor:
        """[B, P, W] fp32."""
        return torch.from_numpy(self.features[rows.numpy()]).float()


def told(words: Tensor) -> list[tuple[Tensor, list[int]]]:
    """What the connector is to say of each patch, see `naming_loss`: words [B, 2, P] of `patch_words`."""
    return [(words[:, 0].long(), NAME_WORDS), (words[:, 1].long(), COLOUR_WORDS)]


def looking_loss(model: Any, states: Any, positions: Tensor, turns: Turns, words: Tensor) -> Tensor:
    """How little the name or colour that a question ends with attends to patches, in some heads of two decoder layers.

    In the first of them it should attend to what it names, in the second to what the answer names, if that is a thing.
    `states`: what enters every decoder layer; positions [B, 1 + P + T]; words [B, 2, P] of `patch_words`.
    """
    prefix, words = 1 + words.shape[-1], words.long()
    asks = (turns.targets != IGNORED) & (turns.targets != EOS)
    answers = torch.where(torch.isin(turns.targets, torch.tensor(NAME_WORDS)), turns.targets, turns.ids)
    part = {"heads": slice(_HEADS), "rows": slice(prefix, None), "columns": slice(1, prefix)}
    loss = states[0].new_zeros(())
    for number, sought in zip(_GUIDED, (turns.ids, answers)):
        right = (sought[:, :, None, None] == words[:, None]).any(2)  # [B, T, P]
        loss = loss + missed(attention_scores(model, number, states[number], positions, **part), right, asks)
    return loss


def build(recipe: Recipe) -> Any:
    """Freshly initialised connector and language model, without a tower."""
    torch.manual_seed(recipe.seed)
    model = spread_out(recipe.model.build(), 0.04)
    model.model.vision_tower = nn.Identity()
    return model


def train(recipe: Recipe, checkpoint: Path, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model without its tower, fp32, in eval mode."""
    depth = recipe.model.depth
    lessons = Lessons("train", range(recipe.scenes), depth, recipe.seed)
    held_out = Lessons("test", VALIDATION, depth, recipe.seed)
    training, model = Training(recipe, checkpoint, every), build(recipe)
    mean, std = _moments(lessons)
    sizes = (recipe.align_batch_size, recipe.batch_size)

    def connect(rows: Tensor, source: Lessons) -> Tensor:
        return model.model.multi_modal_projector((source.visual(rows) - mean) / std)

    def loss_of(number: int, step: int) -> Tensor:
        rows = training.epoch_rows(number, step, recipe.scenes, sizes[number])
        with torch.autocast("cpu", torch.bfloat16):
            visual = connect(rows, lessons)
            naming = naming_loss(model, visual, told(lessons.patches[rows]), NOTHING)
            if number == 0:
                return naming
            turns = pack([draw_turns(lessons.turns[row], recipe.turns, recipe.weights) for row in rows])
            logits, states, positions = logits_and_states(model, visual, turns, step < recipe.guided)
            if step < recipe.guided:
                naming = naming + looking_loss(model, states, positions, turns, lessons.patches[rows])
        return F.cross_entropy(logits.float(), turns.wanted) + recipe.naming * naming

    def test(number: int) -> str:
        with torch.autocast("cpu", torch.bfloat16):
            if number:
                return answered(model, held_out.turns, lambda rows: connect(rows, held_out), KINDS, 4)
            visual = connect(torch.arange(len(held_out.turns)), held_out).float()
            name, colour = named(model, visual, told(held_out.patches), NOTHING)
            return f"held-out patches: name {name:.1f} %, colour {colour:.1f} %"

    for number, (stage, size) in enumerate(zip((recipe.align, recipe.answer), sizes)):
        if training.run(number, stage, model, recipe.scenes // size, size, loss_of, test):
            save_atomically(model.state_dict(), stage_file(checkpoint, number))
    with torch.no_grad():
        first = model.model.multi_modal_projector.linear_1
        first.weight /= std
        first.bias -= first.weight @ mean
    return model.eval()


def _moments(lessons: Lessons) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel, [W] each."""
    rows = torch.arange(0, len(lessons.turns), max(1, len(lessons.turns) // 200))
    sample = lessons.visual(rows).flatten(0, 1)
    return sample.mean(0), sample.std(0)


def main() -> None:
    """Command line."""
    args = parser(__doc__, "scenes.pt", "model and answers").parse_args()
    model = train(Recipe(), args.checkpoint)
    if args.export is not None:
        save_weights(args.export / TRAINED, model, without=TOWER)
        write_blind_answers(args.export / BLIND, Recipe().scenes, lambda n: draw_scene("train", n).things, questions_about)


if __name__ == "__main__":
    main()
