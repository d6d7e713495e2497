"""Trains the reference LLaVA-NeXT on pages of easy-VQA pictures: `python -m vtok.eval.training.llava_next`. Resumes wherever it
stopped. It starts from the LLaVA that `vtok.eval.training.llava` left behind at the end of its stage of 64 tokens.

All sixteen questions about a page go through the model in one sequence, each as if it were alone (see
`vtok.eval.training.turns`). So that the language model learns soon where a crop's tokens belong, its lower layers are also
asked, for every token of a crop, in which cell it lies and what is in that cell.

Shapes: B pages, P = 336 visual tokens: 64 of the whole page, then 16 lines of 16 tokens of the crops and the end of the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.data import cache_dir
from vtok.eval.models.easyvqa import BLANK, PICTURE_SIZE, PLACES, Pictures, compose, learned_and_held_out, load_easyvqa
from vtok.eval.models.reference import DATA_FOLDER, normalise_page
from vtok.eval.models.reference_next import (
    DIFFERENCES,
    NEXT_FOLDER,
    PAGE_QUESTIONS,
    ReferenceLLaVANeXT,
    differences,
    draw_cells,
    make_next_processor,
    page_and_quarters,
    page_questions,
    questions_about,
)
from vtok.eval.models.reference_vlm import (
    LLAVA_FOLDER,
    Questions,
    load_reference_llava,
    make_tokenizer,
    save_settings,
    write_questions,
)
from vtok.eval.training.llava import augment, right_answers
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser, stage_file, stage_seed
from vtok.eval.training.turns import logits_and_states, pack, share_right, turn_maker, turns_about
from vtok.writing import write

STEPS_PER_EPOCH = 100
TEST_PAGES, TEST_SEED = 600, 3
HELD_OUT_PAGES, HELD_OUT_SEED = 60, 4
EVERY = Every(25, 25, 50)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    # run in this order, each with a new optimiser; an epoch is 100 steps. The second one starts again at the full rate, because
    # left and right are told apart late.
    stages: tuple[Stage, ...] = (Stage(8, 3, 1e-3, 0.0), Stage(8, 2, 1e-3, 0.0))
    batch_size: int = 16  # pages a step
    placing: float = 0.3  # weight of the loss for place and contents of every token of a crop
    placing_layer: int = 3  # layer of the language model after which it is asked for them
    # largest random translation of a picture in its cell, in pixels; pictures are also mirrored both ways at random
    shift: int = 4
    held_out: int = 178  # training pictures kept away from training, as in `training.llava`.
    model: ReferenceLLaVANeXT = field(default_factory=ReferenceLLaVANeXT)  # the model that comes out


def views(pages: Tensor) -> Tensor:
    """Pages [B, 3, 128, 128] uint8 -> what the processor makes of them, [B, 5, 3, 64, 64]: the page, then its cells."""
    return normalise_page(page_and_quarters(pages))


def read_pages(model: Any, pages: Tensor) -> Tensor:
    """Visual tokens [B, P, D] as the language model takes them."""
    sizes = torch.tensor([pages.shape[-2:]] * len(pages))
    return torch.stack(list(model.model.get_image_features(views(pages), image_sizes=sizes).pooler_output))


class Placer(nn.Module):
    """Place, and contents of the cell, of every token of the crops; used in training only."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.place, self.contents = nn.Linear(width, len(PLACES)), nn.Linear(width, BLANK + 1)
        half = torch.arange(2 * side) // side
        self.side, self.cell = side, 2 * half[:, None] + half  # [lines, tokens of a line]

    def loss(self, hidden: Tensor, cells: Tensor) -> Tensor:
        """Mean cross entropy of both. hidden [B, prefix + T, D] of the language model, cells [B, 4]."""
        side = self.side
        start, lines = 1 + side * side, 2 * side
        x = hidden[:, start : start + lines * (lines + 1)].unflatten(1, (lines, lines + 1))[:, :, :-1]
        place = self.cell.expand(len(x), -1, -1).flatten()
        contents = cells[:, self.cell].flatten()
        return F.cross_entropy(self.place(x).flatten(0, 2), place) + F.cross_entropy(self.contents(x).flatten(0, 2), contents)


def draw_pages(source: Pictures, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(pages [B, 3, 128, 128], cells [B, 4]) of pictures that are moved and mirrored, each in its cell."""
    cells = draw_cells(recipe.batch_size, generator)
    rows = source.rows(cells, generator)
    pictures = augment(source.pictures[rows.clamp(min=0).flatten()], recipe.shift)
    return compose(pictures, torch.where(rows < 0, -1, torch.arange(rows.numel()).view_as(rows))), cells


def draw_questions(source: Pictures, pages: int, seed: int) -> tuple[Tensor, list[tuple[str, str, int]]]:
    """Rows [pages, 4] of pictures (-1 = blank) of pages to test on, and six questions about each: (question, answer, page).

    Shape and colour of a filled cell, one of both of any cell, whether a cell is blank, and a class that is there and one that
    is not.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = draw_cells(pages, generator)
    asked = []
    for number, page in enumerate(cells.tolist()):
        own = questions_about(page, generator)
        filled = [place for place, cell in enumerate(page) if cell != BLANK]
        one, other, third, fourth = torch.randint(1 << 30, (4,), generator=generator).tolist()
        chosen = [3 * filled[one % len(filled)], 3 * filled[other % len(filled)] + 1, 3 * (third // 2 % 4) + third % 2]
        chosen += [3 * (fourth % 4) + 2, 12 + fourth // 4 % 2, 14 + fourth // 8 % 2]
        asked += [(*own[i], number) for i in chosen]
    return source.rows(cells, generator), asked


def accuracy(model: Any, questions: Questions, batch_size: int = 50) -> Tensor:
    """Which questions plain `generate()` answers rightly, one at a time, `batch_size` a call: [Q] bool."""
    processor = make_next_processor(ReferenceLLaVANeXT(patch_size=model.config.vision_config.patch_size))
    return right_answers(model, processor, questions, batch_size)


def packed_accuracy(model: Any, questions: Questions, tokenizer: Any) -> float:
    """Share answered rightly, all questions of a page in one sequence."""
    return share_right(turns_about(questions, tokenizer), model, lambda rows: read_pages(model, questions.pictures[rows]), 20)


def start(anatomy: ReferenceLLaVANeXT, llava: dict[str, Tensor]) -> Any:
    """A LLaVA-NeXT with the weights of a LLaVA on patches of the same size; only the end of a line is new."""
    model = anatomy.build()
    missing, unexpected = model.load_state_dict(llava, strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise ValueError(f"these are not the weights of such a LLaVA: {missing} are missing, {unexpected} are not known")
    return model


def train(recipe: Recipe, checkpoint: Path, llava: Path, data: Path | None = None, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model, fp32, in eval mode.

    `llava`: weights of the LLaVA on 64 tokens, as `training.llava` leaves them behind; without `data` see `load_easyvqa`.

    Raises:
        FileNotFoundError: no LLaVA to start from.
    """
    if not llava.is_file():
        raise FileNotFoundError(f"{llava} is missing: the LLaVA to start from; run python -m vtok.eval.training.llava before")
    source, away = learned_and_held_out(recipe.held_out, data)
    held_out = _drawn_questions(away, HELD_OUT_PAGES, HELD_OUT_SEED)
    torch.manual_seed(recipe.seed)
    model = start(recipe.model, torch.load(llava, weights_only=True))
    placer = Placer(recipe.model.text_width, PICTURE_SIZE // recipe.model.patch_size)
    training, tokenizer = Training(recipe, checkpoint, every), make_tokenizer()
    turn_of = turn_maker(tokenizer)

    def loss_of(number: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(stage_seed(recipe.seed, number) + step)
        pages, cells = draw_pages(source, recipe, generator)
        turns = pack([[turn_of(*asked) for asked in questions_about(page, generator)] for page in cells.tolist()])
        logits, states, _ = logits_and_states(model, read_pages(model, pages), turns)
        return F.cross_entropy(logits, turns.wanted) + recipe.placing * placer.loss(states[recipe.placing_layer], cells)

    def test(number: int) -> str:
        return f"{100 * packed_accuracy(model, held_out, tokenizer):.2f} % on held-out pages"

    for number, stage in enumerate(recipe.stages):
        trained = nn.ModuleList([model, placer])
        training.run(number, stage, trained, STEPS_PER_EPOCH, recipe.batch_size, loss_of, test)
    return model.eval()


def _drawn_questions(source: Pictures, pages: int, seed: int) -> Questions:
    return page_questions(source.pictures, source.classes, *draw_questions(source, pages, seed))


def export(model: Any, recipe: Recipe, folder: Path, data: Path | None = None) -> None:
    """Writes the model, as differences from the LLaVA in `folder`, and the test questions into `folder` (vtok's `assets/`)."""
    from safetensors.torch import save

    save_settings(folder / NEXT_FOLDER, model, make_next_processor(recipe.model))
    base = load_reference_llava(folder / LLAVA_FOLDER).state_dict()
    write(folder / NEXT_FOLDER / DIFFERENCES, save(differences(model.state_dict(), base), metadata={"format": "pt"}))
    (folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
    rows, asked = draw_questions(Pictures(*load_easyvqa("test", data)), TEST_PAGES, TEST_SEED)
    write_questions(folder / DATA_FOLDER / PAGE_QUESTIONS, {"rows": rows.tolist(), "questions": asked})


def main() -> None:
    """Command line."""
    found = parser(__doc__, "easyvqa_llava_next.pt", "model and questions", "the package easy-vqa")
    standard = stage_file(cache_dir() / "train" / "easyvqa_llava.pt", 1)
    found.add_argument("--llava", type=Path, default=standard, help="weights to start from")
    args = found.parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.llava, args.data)
    if args.export is not None:
        export(model, recipe, args.export, args.data)
    questions = _drawn_questions(Pictures(*load_easyvqa("test", args.data)), TEST_PAGES, TEST_SEED)
    right = accuracy(model, questions).double()
    for name, part in [("all", right >= 0), ("open", questions.open), ("yes/no", ~questions.open)]:
        print(f"{name}: {100 * right[part].mean():.2f} % of {int(part.sum())} questions")
    for density in range(1, len(PLACES) + 1):
        part = questions.density == density
        print(f"pages with {density} filled: {100 * right[part].mean():.2f} % of {int(part.sum())} questions")


if __name__ == "__main__":
    main()
