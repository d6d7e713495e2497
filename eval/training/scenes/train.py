"""Trains the reference LLaVA of scenes: `python -m vtok.eval.training.scenes --export assets`. Resumes wherever it stopped.

The encoder is frozen: what it says of the training scenes is computed once and kept in the cache folder. First the connector
learns to turn a patch into the words for what lies there, name and colour, in the language model's own embedding; then
connector and language model learn to answer questions, many about a scene in one sequence (see `vtok.eval.training.turns`).

Shapes: B scenes, P = 256 visual tokens, W = 384 channels of the encoder, D of the language model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.asked import Asked
from vtok.eval.models.data import cache_dir
from vtok.eval.models.dinov2 import normalise
from vtok.eval.models.dinov2.model import WIDTH
from vtok.eval.models.reference_vlm import EOS, SPECIAL, save_weights
from vtok.eval.models.scenes.album import NAMES
from vtok.eval.models.scenes.compose import COLOUR_NAMES, PATCH, SIZE, Thing, draw_scene
from vtok.eval.models.scenes.model import TOWER, TRAINED, ReferenceScenes, load_tower, make_scenes_processor
from vtok.eval.models.scenes.questions import BLIND, KINDS, WORDS, questions_about
from vtok.eval.training.loop import Every, Stage, StageRun, epoch_rows, load_checkpoint, parser, save_atomically
from vtok.eval.training.patch_words import attention_scores, missed, named, naming_loss
from vtok.eval.training.turns import (
    IGNORED,
    Turn,
    Turns,
    answered,
    as_turns,
    draw_turns,
    logits_and_states,
    pack,
    write_blind_answers,
)
from vtok.writing import write

SIDE = SIZE // PATCH
VALIDATION = range(500_000, 500_160)  # scenes of the test pictures that the test does not ask about
_SPREAD = 0.04  # standard deviation of the language model's first weights
_GUIDED, _HEADS = (1, 3), 2  # decoder layers that are told where to look at first, and how many of their heads
NOTHING = len(SPECIAL) + WORDS.index("zero")  # the word for a patch without a plate
NAME_WORDS = [len(SPECIAL) + WORDS.index(name) for name in NAMES]
COLOUR_WORDS = [len(SPECIAL) + WORDS.index(name) for name in COLOUR_NAMES]
EVERY = Every(20, 50, 250)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        scenes: training scenes, numbers 0, 1, ...
        align: the connector alone learns what lies in each patch.
        answer: connector and language model learn to answer.
        align_batch_size: scenes a step of the first stage.
        batch_size: scenes a step of the second.
        turns: questions of a scene a step.
        weights: of the kinds of questions, in the order of `KINDS`.
        naming: weight of the connector's own loss while questions are learned.
        guided: steps at first in which two layers are told where to look for what a question names; without them the model is
            slow to find that the answer is in the picture.
        warmup: share of a stage's steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        model: the model that comes out.
        seed: of initialisation, order and choice of questions.
    """

    scenes: int = 7008
    align: Stage = field(default_factory=lambda: Stage(PATCH, 4, 2e-3, 0.1))
    answer: Stage = field(default_factory=lambda: Stage(PATCH, 3, 1e-3, 0.02))
    align_batch_size: int = 16
    batch_size: int = 8
    turns: int = 18
    weights: tuple[int, ...] = (3, 3, 2, 3)
    naming: float = 0.1
    guided: int = 600
    warmup: float = 0.03
    weight_decay: float = 0.05
    model: ReferenceScenes = field(default_factory=ReferenceScenes)
    seed: int = 0


def features_of(split: str, numbers: range, depth: int, batch_size: int = 16) -> tuple[np.ndarray, list[tuple[Thing, ...]]]:
    """What the encoder says of some scenes, [count, P, W] fp16 on disk, and what the scenes show.

    Computed in bfloat16, once: a second call goes on where the first was stopped.
    """
    folder = cache_dir() / "train" / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    count, name = len(numbers), f"{split}-{numbers.start}-{len(numbers)}-{depth}"
    path, done_path = folder / f"{name}.npy", folder / f"{name}.done"
    done = int(done_path.read_text()) if done_path.is_file() else 0
    kept = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float16, (count, SIDE**2, WIDTH))
    encoder = load_tower(depth).bfloat16() if done < count else None
    for start in range(done, count, batch_size):
        stop = min(count, start + batch_size)
        images = [draw_scene(split, number).image for number in numbers[start:stop]]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        assert encoder is not None
        with torch.inference_mode():
            seen = encoder(normalise(pixels).bfloat16(), output_hidden_states=True).hidden_states[-1]
        kept[start:stop] = seen[:, 1:].half().numpy()
        write(done_path, str(stop))
        if start // batch_size % 20 == 0:
            print(f"encoded {stop} of {count} scenes of {split}", flush=True)
    known = folder / f"{name}.json"
    if not known.is_file():
        scenes = [[(t.name, t.colour, t.box, t.cell) for t in draw_scene(split, number).things] for number in numbers]
        write(known, json.dumps(scenes))
    read = json.loads(known.read_text(encoding="utf-8"))
    return kept, [tuple(Thing(n, c, (x, y, s), (i, j)) for n, c, (x, y, s), (i, j) in scene) for scene in read]


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
        self.features, scenes = features_of(split, numbers, depth)
        encode = cache(partial(make_scenes_processor().tokenizer.encode, add_special_tokens=False))
        self.patches = torch.stack([patch_words(things) for things in scenes]).to(torch.int16)
        self.turns: list[list[list[Turn]]] = []
        for number, things in zip(numbers, scenes):
            self.turns.append(as_turns(encode, questions_about(things, random.Random(f"{seed} {number}"))))

    def visual(self, rows: Tensor) -> Tensor:
        """[B, P, W] fp32."""
        return torch.from_numpy(self.features[rows.numpy()]).float()


def told(words: Tensor) -> list[tuple[Tensor, list[int]]]:
    """What the connector is to say of each patch, see `naming_loss`: words [B, 2, P] of `patch_words`."""
    return [(words[:, 0].long(), NAME_WORDS), (words[:, 1].long(), COLOUR_WORDS)]


def looking_loss(model: Any, states: Any, positions: Tensor, turns: Turns, words: Tensor) -> Tensor:
    """How little the name or colour that a question ends with attends to patches, in some heads of two decoder layers.

    In the first of them it should attend to what it names, in the second to what the answer names, if that is a thing.

    Args:
        model: of D channels.
        states: what enters every decoder layer.
        positions: of the tokens, [B, 1 + P + T].
        turns: the text.
        words: [B, 2, P] of `patch_words`.
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
    model = recipe.model.build()
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # words that patches can be told apart by
    for name, weight in model.model.language_model.layers.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(weight, std=_SPREAD)
    model.model.vision_tower = nn.Identity()
    return model


def train(recipe: Recipe, checkpoint: Path, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe.

    Returns:
        The trained model without its tower (fp32, eval mode).
    """
    depth = recipe.model.tower_depth
    lessons = Lessons("train", range(recipe.scenes), depth, recipe.seed)
    held_out = Lessons("test", VALIDATION, depth, recipe.seed)
    saved = load_checkpoint(checkpoint)
    model = build(recipe).train()
    mean, std = _moments(lessons)

    sized = (replace(recipe, batch_size=recipe.align_batch_size), recipe)

    def connect(rows: Tensor, source: Lessons) -> Tensor:
        return model.model.multi_modal_projector((source.visual(rows) - mean) / std)

    def loss_of(number: int, step: int) -> Tensor:
        rows = epoch_rows(sized[number], number, step, recipe.scenes)
        with torch.autocast("cpu", torch.bfloat16):
            visual = connect(rows, lessons)
            naming = naming_loss(model, visual, told(lessons.patches[rows]), NOTHING)
            if number == 0:
                return naming
            turns = pack([draw_turns(lessons.turns[row], recipe.turns, recipe.weights) for row in rows.tolist()])
            logits, states, positions = logits_and_states(model, visual, turns, step < recipe.guided)
            if step < recipe.guided:
                naming = naming + looking_loss(model, states, positions, turns, lessons.patches[rows])
        return F.cross_entropy(logits.float(), turns.targets[turns.targets != IGNORED]) + recipe.naming * naming

    def test(number: int) -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            if number == 0:
                visual = connect(torch.arange(len(held_out.turns)), held_out).float()
                name, colour = named(model, visual, told(held_out.patches), NOTHING)
                said = f"held-out patches: name {name:.1f} %, colour {colour:.1f} %"
            else:
                said = answered(model, held_out.turns, lambda rows: connect(rows, held_out), KINDS, 4)
            print(f"  {said}", flush=True)
        model.train()

    for number, stage in enumerate((recipe.align, recipe.answer)):
        if saved is not None and saved["stage"] > number:
            continue
        total = round(stage.epochs * (recipe.scenes // sized[number].batch_size))
        run = StageRun(model, stage, number, total, sized[number], checkpoint, every)
        run.run(partial(loss_of, number), saved, partial(test, number))
        save_atomically(model.state_dict(), checkpoint.with_name(f"{checkpoint.stem}_stage{number}.pt"))
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


def asked_in_training(scenes: int, seed: int = 0) -> Iterator[dict[str, list[Asked]]]:
    """All questions about the first training scenes, with their answers, scene by scene and kind by kind."""
    for number in range(scenes):
        yield questions_about(draw_scene("train", number).things, random.Random(f"{seed} {number}"))


def main() -> None:
    """Command line."""
    args = parser((__doc__ or "").splitlines()[0], "scenes.pt", "model and answers").parse_args()
    model = train(Recipe(), args.checkpoint)
    if args.export is not None:
        save_weights(args.export / TRAINED, model, without=TOWER)
        write_blind_answers(args.export / BLIND, asked_in_training(Recipe().scenes))


if __name__ == "__main__":
    main()
