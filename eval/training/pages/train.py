"""Trains the reference LLaVA-NeXT of pages: `python -m vtok.eval.training.pages --export assets`. Resumes wherever it stopped.

First tower and connector learn to read, from pages full of words: every patch of a crop becomes the words for what is printed
there, name and ink, in the language model's own embedding, and the class token says which names and inks its view shows, so
that its attention is for print. Then the tower is frozen, and connector and language model learn to answer questions, many
about a page in one sequence (`vtok.eval.training.turns`). At first, decoder layers are told where to look
(`vtok.eval.training.pages.looking`). Last they learn to do without what holds no print: ends of lines, blank patches and the
page at half its size are hidden at random, as methods drop them.

Shapes: B pages, V = 5 views of n = 36 patches each, the whole page first; W channels of the tower.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.assets import save_weights
from vtok.eval.models.data import stack_pixels
from vtok.eval.models.pages.compose import PATCH, Page, draw_page
from vtok.eval.models.pages.model import MEAN, SIDE, STD, TRAINED, ReferencePrint, make_print_processor
from vtok.eval.models.pages.questions import BLIND, KINDS, questions_about
from vtok.eval.models.reference_next import page_and_quarters
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser, save_atomically
from vtok.eval.training.pages.looking import INK_WORDS, NAME_WORDS, NOTHING, Places, join, lay_out, looking_loss, places_of
from vtok.eval.training.patch_words import named, naming_loss, spread_out
from vtok.eval.training.turns import answered, as_turns, draw_turns, logits_and_states, pack, turn_maker, write_blind_answers

VALIDATION = {
    "train": range(900_000, 900_060),
    "test": range(500_000, 500_100),
}  # split -> pages that the test does not ask about
_LINES = 2 * SIDE  # of patches of the crops
FULL = 10_000_000  # numbers of the pages that tower and connector learn to read begin here
EVERY = Every(20, 50, 200)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    pages: int = 4096  # training pages, numbers 0, 1, ...
    # tower and connector learn what is printed in each patch; an epoch is `pages` full pages, all of them new
    read: Stage = field(default_factory=lambda: Stage(PATCH, 2, 1e-3, 0.03))
    answer: Stage = field(default_factory=lambda: Stage(PATCH, 2, 1.5e-3, 0.02))  # connector and language model learn to answer
    # the same with prompts that lack some of what holds no print
    shorten: Stage = field(default_factory=lambda: Stage(PATCH, 0.5, 5e-4, 0.02))
    read_batch_size: int = 8  # pages a step of the first stage
    batch_size: int = 8  # pages a step of the others
    turns: int = 16  # questions of a page a step
    weights: tuple[int, ...] = (2, 2, 2, 3, 3)  # of the kinds of questions, in the order of `KINDS`
    naming: float = 0.1  # weight of the connector's own loss while questions are learned
    looking: float = 0.2  # weight of the loss on where to look
    guided: int = 700  # steps at first that have it
    warmup: float = 0.04
    model: ReferencePrint = field(default_factory=ReferencePrint)  # the model that comes out


def views(pages: Tensor) -> Tensor:
    """Pages [B, 3, 168, 168] uint8 -> what the processor makes of them, [B, V, 3, 84, 84]: the page, then its quarters."""
    return page_and_quarters(pages).float().div(255).sub(MEAN).div(STD)


def pixels_of(pages: Sequence[Page]) -> Tensor:
    """[B, 3, 168, 168] uint8."""
    return stack_pixels([page.image for page in pages])


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


class Lessons:
    """Pages as the tower sees them, with their questions as tokens."""

    def __init__(self, model: Any, split: str, numbers: range, seed: int, batch_size: int = 32):
        turn_of, self.turns = turn_maker(make_print_processor().tokenizer), []
        features, places = [], []
        for start in range(0, len(numbers), batch_size):
            pages = [draw_page(split, number) for number in numbers[start : start + batch_size]]
            with torch.inference_mode():
                features.append(seen(model, views(pixels_of(pages)))[:, :, 1:].half())
            places.append(Places(*(part.to(torch.int16) for part in stacked(pages))))
            for number, page in zip(numbers[start:], pages):
                self.turns.append(as_turns(turn_of, questions_about(page.words, random.Random(f"{seed} {number}"))))
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
    model = spread_out(recipe.model.build(), 0.05)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.3)
    return model


def train(recipe: Recipe, checkpoint: Path, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model, fp32, in eval mode."""
    training, model = Training(recipe, checkpoint, every), build(recipe)
    _learn_to_read(training, model, recipe)
    model.model.vision_tower.requires_grad_(False)
    lessons = Lessons(model, "train", range(recipe.pages), recipe.seed)
    held_out = {split: Lessons(model, split, numbers, recipe.seed) for split, numbers in VALIDATION.items()}

    def connect(rows: Tensor, source: Lessons) -> tuple[Tensor, Tensor]:
        return lay_out(model.model.multi_modal_projector(source.visual(rows)), model.model.image_newline)

    def loss_of(number: int, step: int) -> Tensor:
        rows = training.epoch_rows(number, step, recipe.pages, recipe.batch_size)
        places, guided = lessons.of(rows), number == 1 and step < recipe.guided
        visual, crops = connect(rows, lessons)
        turns = pack([draw_turns(lessons.turns[row], recipe.turns, recipe.weights) for row in rows])
        hidden = None if number == 1 else without_print(places)
        logits, states, positions = logits_and_states(model, visual, turns, guided, hidden)
        loss = F.cross_entropy(logits, turns.wanted) + recipe.naming * naming_loss(model, crops, told(places), NOTHING)
        return loss + recipe.looking * looking_loss(model, states, positions, turns, places) if guided else loss

    def said_of(split: str, source: Lessons) -> str:
        line = answered(model, source.turns, lambda rows: connect(rows, source)[0], KINDS, 3)
        return f"{split}: {line}"

    def test(number: int) -> str:
        return "\n".join(said_of(*one) for one in held_out.items())

    for number, stage in enumerate((recipe.answer, recipe.shorten), 1):
        training.run(number, stage, model, recipe.pages // recipe.batch_size, recipe.batch_size, loss_of, test)
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


def _learn_to_read(training: Training, model: Any, recipe: Recipe) -> None:
    """The first stage; what it made is kept in a file of its own."""
    connector, head, size = model.model.multi_modal_projector, ClassHead(recipe.model.width), recipe.read_batch_size
    parts = {"tower": model.model.vision_tower, "connector": connector, "words": model.get_input_embeddings(), "head": head}
    checked = {split: [draw_page(split, number) for number in numbers] for split, numbers in VALIDATION.items()}

    def loss_of(number: int, step: int) -> Tensor:
        return reading_loss(model, head, range(step * size, (step + 1) * size))

    def test(number: int) -> str:
        said = []
        for split, pages in checked.items():
            crops = join(connector(seen(model, views(pixels_of(pages))[:, 1:])[:, :, 1:])).flatten(1, 2)
            name, ink = named(model, crops, told(stacked(pages)), NOTHING)
            said.append(f"{split}: held-out patches: name {name:.1f} %, ink {ink:.1f} %")
        return "\n".join(said)

    path = training.checkpoint.with_name(f"{training.checkpoint.stem}_read.pt")
    if training.run(0, recipe.read, nn.ModuleDict(parts), recipe.pages // size, size, loss_of, test):
        save_atomically(model.state_dict(), path)
    else:
        model.load_state_dict(torch.load(path, weights_only=True))


def main() -> None:
    """Command line."""
    args = parser(__doc__, "pages.pt", "model and answers").parse_args()
    model = train(Recipe(), args.checkpoint)
    if args.export is not None:
        save_weights(args.export / TRAINED, model)
        write_blind_answers(args.export / BLIND, Recipe().pages, lambda n: draw_page("train", n).words, questions_about)


if __name__ == "__main__":
    main()
