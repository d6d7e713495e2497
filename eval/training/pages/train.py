"""Trains the reference LLaVA-NeXT of pages: `python -m vtok.eval.training.pages --export assets`. Resumes wherever it stopped.

First tower and connector learn to read (`vtok.eval.training.pages.reading`). Then the tower is frozen, and connector and
language model learn to answer questions, many about a page in one sequence (`vtok.eval.training.turns`). At first, decoder
layers are told where to look (`vtok.eval.training.pages.looking`). Last they learn to do without what holds no print: ends of
lines, blank patches and the page at half its size are hidden at random, as methods drop them.

Shapes: B pages, V = 5 views of n = 36 patches each, the whole page first; W channels of the tower.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.asked import Asked
from vtok.eval.models.pages.compose import PATCH, draw_page
from vtok.eval.models.pages.model import SIDE, TRAINED, ReferencePrint, make_print_processor
from vtok.eval.models.pages.questions import BLIND, KINDS, questions_about
from vtok.eval.models.reference_vlm import save_weights
from vtok.eval.training.loop import Every, Stage, StageRun, epoch_rows, load_checkpoint, parser, save_atomically
from vtok.eval.training.pages.looking import NOTHING, Places, join, lay_out, looking_loss
from vtok.eval.training.pages.reading import ClassHead, pixels_of, reading_loss, seen, stacked, told, views
from vtok.eval.training.patch_words import named, naming_loss
from vtok.eval.training.turns import IGNORED, Turn, answered, as_turns, draw_turns, logits_and_states, pack, write_blind_answers

VALIDATION = {
    "train": range(900_000, 900_060),
    "test": range(500_000, 500_100),
}  # split -> pages that the test does not ask about
_LINES = 2 * SIDE  # of patches of the crops
_SPREAD = 0.05  # standard deviation of the language model's first weights
EVERY = Every(20, 50, 200)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        pages: training pages, numbers 0, 1, ...
        read: tower and connector learn what is printed in each patch; an epoch is `pages` full pages, all of them new.
        answer: connector and language model learn to answer.
        shorten: the same with prompts that lack some of what holds no print.
        read_batch_size: pages a step of the first stage.
        batch_size: pages a step of the others.
        turns: questions of a page a step.
        weights: of the kinds of questions, in the order of `KINDS`.
        naming: weight of the connector's own loss while questions are learned.
        looking: weight of the loss on where to look.
        guided: steps at first that have it.
        warmup: share of a stage's steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        model: the model that comes out.
        seed: of initialisation, order and choice of questions.
    """

    pages: int = 4096
    read: Stage = field(default_factory=lambda: Stage(PATCH, 2, 1e-3, 0.03))
    answer: Stage = field(default_factory=lambda: Stage(PATCH, 2, 1.5e-3, 0.02))
    shorten: Stage = field(default_factory=lambda: Stage(PATCH, 0.5, 5e-4, 0.02))
    read_batch_size: int = 8
    batch_size: int = 8
    turns: int = 16
    weights: tuple[int, ...] = (2, 2, 2, 3, 3)
    naming: float = 0.1
    looking: float = 0.2
    guided: int = 700
    warmup: float = 0.04
    weight_decay: float = 0.05
    model: ReferencePrint = field(default_factory=ReferencePrint)
    seed: int = 0


class Lessons:
    """Pages as the tower sees them, with their questions as tokens."""

    def __init__(self, model: Any, split: str, numbers: range, seed: int, batch_size: int = 32):
        encode = cache(partial(make_print_processor().tokenizer.encode, add_special_tokens=False))
        self.turns: list[list[list[Turn]]] = []
        features, places = [], []
        for start in range(0, len(numbers), batch_size):
            pages = [draw_page(split, number) for number in numbers[start : start + batch_size]]
            with torch.inference_mode():
                features.append(seen(model, views(pixels_of(pages)))[:, :, 1:].half())
            places.append(Places(*(part.to(torch.int16) for part in stacked(pages))))
            for number, page in zip(numbers[start:], pages):
                self.turns.append(as_turns(encode, questions_about(page.words, random.Random(f"{seed} {number}"))))
        self.features, self.places = torch.cat(features), Places(*(torch.cat(parts) for parts in zip(*places)))

    def visual(self, rows: Tensor) -> Tensor:
        """[B, V, n, W] fp32."""
        return self.features[rows].float()

    def of(self, rows: Tensor) -> Places:
        """What is printed on some of the pages."""
        return Places(*(values[rows].long() for values in self.places))


def build(recipe: Recipe) -> Any:
    """A freshly initialised model."""
    torch.manual_seed(recipe.seed)
    model = recipe.model.build()
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # words that patches can be told apart by
    for name, weight in model.model.language_model.layers.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(weight, std=_SPREAD)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    return model


def train(recipe: Recipe, checkpoint: Path, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe.

    Returns:
        The trained model (fp32, eval mode).
    """
    model, head = build(recipe).train(), ClassHead(recipe.model.width)
    saved = load_checkpoint(checkpoint)
    if saved is None or saved["stage"] == 0:
        _learn_to_read(model, head, recipe, checkpoint, saved, every)
        saved = None
    else:
        model.load_state_dict(torch.load(_stage_file(checkpoint), weights_only=True))
    model.model.vision_tower.requires_grad_(False)
    lessons = Lessons(model, "train", range(recipe.pages), recipe.seed)
    held_out = {split: Lessons(model, split, numbers, recipe.seed) for split, numbers in VALIDATION.items()}

    def connect(rows: Tensor, source: Lessons) -> tuple[Tensor, Tensor]:
        return lay_out(model.model.multi_modal_projector(source.visual(rows)), model.model.image_newline)

    def tokens_of(rows: Tensor, source: Lessons) -> Tensor:
        return connect(rows, source)[0]

    def loss_of(step: int, number: int = 1) -> Tensor:
        rows = epoch_rows(recipe, number, step, recipe.pages)
        places, guided = lessons.of(rows), number == 1 and step < recipe.guided
        visual, crops = connect(rows, lessons)
        turns = pack([draw_turns(lessons.turns[row], recipe.turns, recipe.weights) for row in rows.tolist()])
        hidden = None if number == 1 else without_print(places)
        logits, states, positions = logits_and_states(model, visual, turns, guided, hidden)
        loss = F.cross_entropy(logits, turns.targets[turns.targets != IGNORED])
        loss = loss + recipe.naming * naming_loss(model, crops, told(places), NOTHING)
        return loss + recipe.looking * looking_loss(model, states, positions, turns, places) if guided else loss

    def test() -> None:
        model.eval()
        with torch.inference_mode():
            for split, source in held_out.items():
                print(f"  {split}: {answered(model, source.turns, partial(tokens_of, source=source), KINDS, 3)}", flush=True)
        model.train()

    first = 1 if saved is None else saved["stage"]
    if first == 2 and saved is not None:
        model.load_state_dict(saved["model"])
    for number, stage in enumerate((recipe.answer, recipe.shorten), 1):
        if number >= first:
            total = round(stage.epochs * (recipe.pages // recipe.batch_size))
            run = StageRun(model, stage, number, total, recipe, checkpoint, every)
            run.run(partial(loss_of, number=number), saved, test)
    return model.eval()


def without_print(places: Places) -> Tensor:
    """[B, P] bool: tokens to hide, at random: ends of lines, blank patches of the crops and patches of the whole page.

    Of every kind a share that is drawn for each page, of the ends of lines all at every other page.
    """
    batch = len(places.names)
    blank = (places.names == NOTHING).unflatten(1, (_LINES, -1))
    share = torch.rand(batch, 3)
    share[:, 0] = torch.where(torch.rand(batch) < 0.5, 1.0, share[:, 0])
    ends = torch.rand(batch, _LINES, 1) < share[:, :1, None]
    patches = blank & (torch.rand(blank.shape) < share[:, 1, None, None])
    overview = torch.rand(batch, SIDE * SIDE) < share[:, 2:]
    return torch.cat((overview, torch.cat((patches, ends), 2).flatten(1)), 1)


def _stage_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}_read.pt")


def _learn_to_read(model: Any, head: ClassHead, recipe: Recipe, checkpoint: Path, saved: Any, every: Every) -> None:
    """The first stage; what it made is kept in a file of its own."""
    sized = replace(recipe, batch_size=recipe.read_batch_size)
    parts = nn.ModuleDict(
        {
            "tower": model.model.vision_tower,
            "connector": model.model.multi_modal_projector,
            "words": model.get_input_embeddings(),
            "head": head,
        }
    )
    checked = {split: [draw_page(split, number) for number in numbers] for split, numbers in VALIDATION.items()}

    def loss_of(step: int) -> Tensor:
        return reading_loss(model, head, range(step * sized.batch_size, (step + 1) * sized.batch_size))

    def test() -> None:
        for split, pages in checked.items():
            with torch.inference_mode():
                found = seen(model, views(pixels_of(pages))[:, 1:])[:, :, 1:]
                crops = join(model.model.multi_modal_projector(found)).flatten(1, 2)
                name, ink = named(model, crops, told(stacked(pages)), NOTHING)
            print(f"  {split}: held-out patches: name {name:.1f} %, ink {ink:.1f} %", flush=True)

    total = round(recipe.read.epochs * (recipe.pages // sized.batch_size))
    StageRun(parts, recipe.read, 0, total, sized, checkpoint, every).run(loss_of, saved, test)
    save_atomically(model.state_dict(), _stage_file(checkpoint))


def asked_in_training(pages: int, seed: int = 0) -> Iterator[dict[str, list[Asked]]]:
    """All questions about the first training pages, with their answers, page by page and kind by kind."""
    for number in range(pages):
        yield questions_about(draw_page("train", number).words, random.Random(f"{seed} {number}"))


def main() -> None:
    """Command line."""
    args = parser((__doc__ or "").splitlines()[0], "pages.pt", "model and answers").parse_args()
    model = train(Recipe(), args.checkpoint)
    if args.export is not None:
        save_weights(args.export / TRAINED, model)
        write_blind_answers(args.export / BLIND, asked_in_training(Recipe().pages))


if __name__ == "__main__":
    main()
