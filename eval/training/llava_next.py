"""Trains the reference LLaVA-NeXT on pages of easy-VQA pictures: `python -m vtok.eval.training.llava_next`. Resumes wherever it
stopped. It starts from the LLaVA that `vtok.eval.training.llava` left behind at the end of its stage of 64 tokens.

All sixteen questions about a page go through the model in one sequence, each as if it were alone (see
`vtok.eval.training.turns`). So that the language model learns soon where a crop's tokens belong, its lower layers are also
asked, for every token of a crop, in which cell it lies and what is in that cell.

Shapes: B pages, P = 336 visual tokens: 64 of the whole page, then 16 lines of 16 tokens of the crops and the end of the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.data import cache_dir
from vtok.eval.models.easyvqa import BLANK, PICTURE_SIZE, PLACES, Pictures, compose, load_easyvqa
from vtok.eval.models.reference import DATA_FOLDER, normalise_page
from vtok.eval.models.reference_next import (
    DIFFERENCES,
    NEXT_FOLDER,
    PAGE_QUESTIONS,
    PageQuestions,
    ReferenceLLaVANeXT,
    differences,
    draw_cells,
    make_next_processor,
    page_questions,
    questions_about,
    write_page_questions,
)
from vtok.eval.models.reference_vlm import EOS, LLAVA_FOLDER, load_reference_llava, make_tokenizer, save_settings
from vtok.eval.training.llava import augment, right_answers, stage_file
from vtok.eval.training.loop import Every, Stage, StageRun, load_checkpoint, parser, stage_seed
from vtok.eval.training.turns import IGNORED, Turn, answer_logits, pack
from vtok.writing import write

STEPS_PER_EPOCH = 100
TEST_PAGES, TEST_SEED = 600, 3
HELD_OUT_PAGES, HELD_OUT_SEED = 60, 4
EVERY = Every(25, 25, 50)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        stages: run in this order, each with a new optimiser; an epoch is 100 steps. The second one starts again at the full
            rate, because left and right are told apart late.
        batch_size: pages a step.
        placing: weight of the loss for place and contents of every token of a crop.
        placing_layer: layer of the language model after which it is asked for them.
        warmup: share of the steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        shift: largest random translation of a picture in its cell, in pixels; pictures are also mirrored both ways at random.
        held_out: training pictures kept away from training, as in `training.llava`.
        model: the model that comes out.
        seed: of every page drawn.
    """

    stages: tuple[Stage, ...] = (Stage(8, 3, 1e-3, 0.0), Stage(8, 2, 1e-3, 0.0))
    batch_size: int = 16
    placing: float = 0.3
    placing_layer: int = 3
    warmup: float = 0.05
    weight_decay: float = 0.05
    shift: int = 4
    held_out: int = 178
    model: ReferenceLLaVANeXT = field(default_factory=ReferenceLLaVANeXT)
    seed: int = 0


def views(pages: Tensor) -> Tensor:
    """Pages [B, 3, 128, 128] uint8 -> what the processor makes of them, [B, 5, 3, 64, 64]: the page, then its cells."""
    small = F.interpolate(pages, size=(PICTURE_SIZE,) * 2, mode="bicubic", antialias=True, align_corners=False)
    crops = pages.unflatten(3, (2, PICTURE_SIZE)).unflatten(2, (2, PICTURE_SIZE)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return normalise_page(torch.cat((small[:, None], crops), 1))


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


def _loss(model: Any, placer: Placer, recipe: Recipe, number: int, source: Pictures, tokenizer: Any, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(stage_seed(recipe.seed, number) + step)
    pages, cells = draw_pages(source, recipe, generator)
    turns = pack([[_turn(tokenizer, q, a) for q, a in questions_about(page, generator)] for page in cells.tolist()])
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[recipe.placing_layer - 1]
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        logits = answer_logits(model, read_pages(model, pages), turns)
    finally:
        handle.remove()
    loss = F.cross_entropy(logits, turns.targets[turns.targets != IGNORED])
    return loss + recipe.placing * placer.loss(seen[0], cells)


def _turn(tokenizer: Any, question: str, answer: str) -> Turn:
    return tokenizer.encode(question, add_special_tokens=False), tokenizer.convert_tokens_to_ids(answer)


def draw_questions(source: Pictures, pages: int, seed: int) -> tuple[Tensor, list[tuple[str, str, int]]]:
    """Pages to test on, and six questions about each.

    Shape and colour of a filled cell, one of both of any cell, whether a cell is blank, and a class that is there and one that
    is not.

    Returns:
        (rows [pages, 4] of pictures, -1 = blank; (question, answer, page)).
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


def accuracy(model: Any, questions: PageQuestions, batch_size: int = 50, crops: bool = True) -> Tensor:
    """Which questions plain `generate()` answers rightly, one at a time: [Q] bool.

    Args:
        model: a LLaVA-NeXT.
        questions: what to ask.
        batch_size: questions a call, padded on the left.
        crops: show the crops; otherwise they are white, and only the view of the whole page is left.
    """
    processor = make_next_processor(ReferenceLLaVANeXT(patch_size=model.config.vision_config.patch_size))

    def white(inputs: Any) -> None:
        inputs["pixel_values"][:, 1:] = 1.0

    return right_answers(model, processor, questions, batch_size, None if crops else white)


def packed_accuracy(model: Any, questions: PageQuestions, tokenizer: Any, batch_size: int = 20) -> float:
    """Share answered rightly, all questions of a page in one sequence."""
    model.eval()
    turns: list[list[Turn]] = [[] for _ in questions.pictures]
    for text, answer, row in zip(questions.texts, questions.answers, questions.rows.tolist()):
        turns[row].append(_turn(tokenizer, text, answer))
    hits = 0
    with torch.inference_mode():
        for rows in torch.arange(len(turns)).split(batch_size):
            packed = pack([turns[row] for row in rows.tolist()])
            wanted = packed.targets[packed.targets != IGNORED]
            right = answer_logits(model, read_pages(model, questions.pictures[rows]), packed).argmax(-1) == wanted
            hits += int(right[wanted != EOS].sum())
    model.train()
    return hits / len(questions.texts)


def start(anatomy: ReferenceLLaVANeXT, llava: dict[str, Tensor]) -> Any:
    """A LLaVA-NeXT with the weights of a LLaVA on patches of the same size; only the end of a line is new."""
    model = anatomy.build()
    missing, unexpected = model.load_state_dict(llava, strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise ValueError(f"these are not the weights of such a LLaVA: {missing} are missing, {unexpected} are not known")
    return model


def train(recipe: Recipe, checkpoint: Path, llava: Path, data: Path | None = None, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe.

    Args:
        recipe: what to do.
        checkpoint: file that holds weights, optimiser and position; read if it exists.
        llava: weights of the LLaVA on 64 tokens, as `training.llava` leaves them behind.
        data: folder of easy-VQA, or `None` (see `load_easyvqa`).
        every: what is done every so many steps.

    Returns:
        The trained model (fp32, eval mode).

    Raises:
        FileNotFoundError: no LLaVA to start from.
    """
    if not llava.is_file():
        raise FileNotFoundError(f"{llava} is missing: the LLaVA to start from; run python -m vtok.eval.training.llava before")
    pictures, classes = load_easyvqa("train", data)
    kept, away = slice(0, -recipe.held_out), slice(-recipe.held_out, None)
    source = Pictures(pictures[kept], classes[kept])
    rows, asked = draw_questions(Pictures(pictures[away], classes[away]), HELD_OUT_PAGES, HELD_OUT_SEED)
    held_out, tokenizer = page_questions(pictures[away], classes[away], rows, asked), make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = start(recipe.model, torch.load(llava, weights_only=True))
    placer = Placer(recipe.model.text_width, PICTURE_SIZE // recipe.model.patch_size)
    saved = load_checkpoint(checkpoint)

    def test() -> None:
        print(f"  {100 * packed_accuracy(model, held_out, tokenizer):.2f} % on held-out pages", flush=True)

    for number, stage in enumerate(recipe.stages):
        if saved is None or saved["stage"] <= number:
            total, trained = round(stage.epochs * STEPS_PER_EPOCH), nn.ModuleList([model.train(), placer])
            run = StageRun(trained, stage, number, total, recipe, checkpoint, every)
            run.run(partial(_loss, model, placer, recipe, number, source, tokenizer), saved, test)
    return model.eval()


def export(model: Any, recipe: Recipe, folder: Path, data: Path | None = None) -> None:
    """Writes the model, as differences from the LLaVA in `folder`, and the test questions into `folder` (vtok's `assets/`)."""
    from safetensors.torch import save

    save_settings(folder / NEXT_FOLDER, model, make_next_processor(recipe.model))
    base = load_reference_llava(folder / LLAVA_FOLDER).state_dict()
    write(folder / NEXT_FOLDER / DIFFERENCES, save(differences(model.state_dict(), base), metadata={"format": "pt"}))
    export_questions(folder / DATA_FOLDER, data)


def export_questions(folder: Path, data: Path | None = None) -> None:
    """Writes the test questions about pages."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, classes = load_easyvqa("test", data)
    rows, asked = draw_questions(Pictures(pictures, classes), TEST_PAGES, TEST_SEED)
    write_page_questions(folder / PAGE_QUESTIONS, rows, asked)


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
    pictures, classes = load_easyvqa("test", args.data)
    rows, asked = draw_questions(Pictures(pictures, classes), TEST_PAGES, TEST_SEED)
    questions = page_questions(pictures, classes, rows, asked)
    right = accuracy(model, questions).double()
    for name, part in [("all", right >= 0), ("open", questions.open), ("yes/no", ~questions.open)]:
        print(f"{name}: {100 * right[part].mean():.2f} % of {int(part.sum())} questions")
    for density in range(1, len(PLACES) + 1):
        part = questions.density == density
        print(f"pages with {density} filled: {100 * right[part].mean():.2f} % of {int(part.sum())} questions")


if __name__ == "__main__":
    main()
