"""Trains the reference LLaVA on easy-VQA's questions: `python -m vtok.eval.training.llava`. Resumes wherever it stopped.

Ten questions about a picture go through the model in one sequence, each as if it were alone (see
`vtok.eval.training.turns`), so that the picture is read once for all of them.

The tower starts by naming shape and colour, which is cheap to learn; then the model answers questions from 64 patches of 8 x 8
pixels; then the patch embedding and the positions are resampled to the 256 patches of 4 x 4 that it ends with.

Shapes: B pictures, P visual tokens, W channels of the tower, D of the language model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.data import write_idx
from vtok.eval.models.easyvqa import COLOURS, SHAPES, classes_of, package_data, read_pictures
from vtok.eval.models.reference import DATA_FOLDER, normalise_page
from vtok.eval.models.reference_vlm import (
    LLAVA_FOLDER,
    PROMPT,
    Questions,
    ReferenceLLaVA,
    about,
    collect_questions,
    make_processor,
    make_tokenizer,
    save_folder,
    write_questions,
)
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser, resample, save_atomically, stage_file
from vtok.eval.training.turns import Turns, answer_logits, pack, share_right, some_of, turns_about

ANSWER_TOKENS = 4
EVERY = Every(50, 25, 500)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    # first stretch: the tower alone learns to name shape and colour
    tower: Stage = field(default_factory=lambda: Stage(8, 6, 2e-3, 0.1))
    # run after it in this order, each with a new optimiser
    stages: tuple[Stage, ...] = (Stage(8, 7, 1.5e-3, 0.15), Stage(4, 1.5, 8e-4, 0.0))
    batch_size: int = 32  # pictures a step
    turns: int = 10  # questions of a picture a step, at most
    naming: float = 0.1  # weight of the loss for shape and colour on the class token, which keeps its attention meaningful
    warmup: float = 0.06
    shift: int = 4  # largest random translation in pixels; pictures are also mirrored both ways at random
    # training pictures whose class is known kept away from training: the calibration set of `training.clip`.
    held_out: int = 178
    # the model that comes out; only its patch size changes with the stage
    model: ReferenceLLaVA = field(default_factory=ReferenceLLaVA)


def read(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(visual tokens [B, P, D] as the language model takes them, pooled class token [B, W]) of pictures [B, 3, H, W]."""
    seen = model.model.vision_tower(pixels)
    return model.model.multi_modal_projector(seen.last_hidden_state[:, 1:]), seen.pooler_output


def augment(pictures: Tensor, shift: int) -> Tensor:
    """Mirrors pictures [B, 3, H, W] at random both ways and moves each by up to `shift` pixels (the border is repeated)."""
    batch, _, height, width = pictures.shape
    for axis in (-1, -2):
        pictures = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, pictures.flip(axis), pictures)
    down, right = torch.randint(-shift, shift + 1, (2, batch, 1, 1))
    rows = (torch.arange(height)[None, :, None] + down).clamp(0, height - 1)  # [B, H, 1]
    columns = (torch.arange(width)[None, None, :] + right).clamp(0, width - 1)  # [B, 1, W]
    return pictures[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


class Lessons:
    """Training pictures with their questions, as tokens, and the classes of those whose class is known (-1 otherwise)."""

    def __init__(self, questions: Questions, classes: Tensor):
        self.pictures, self.classes, self.turns = questions.pictures, classes, turns_about(questions, make_tokenizer())

    def draw(self, rows: Tensor, count: int) -> Turns:
        """Up to `count` random questions about each of the pictures `rows`."""
        return pack([some_of(self.turns[row], count) for row in rows])


def load_questions(split: str, data: Path | None = None) -> tuple[Questions, Tensor]:
    """Questions of a split, and the classes of its pictures, -1 if unknown; the pictures of known class come first."""
    home = (package_data() if data is None else data) / split
    asked = [(q, a, n) for q, a, n in json.loads((home / "questions.json").read_text(encoding="utf-8"))]
    labels = classes_of(asked)
    numbers = sorted({number for _, _, number in asked}, key=lambda number: (number not in labels, number))
    row = {number: i for i, number in enumerate(numbers)}
    questions = collect_questions(read_pictures(home, numbers), [(q, a, row[n]) for q, a, n in asked])
    return questions, torch.tensor([labels.get(number, -1) for number in numbers])


def load_lessons(held_out: int, data: Path | None = None) -> tuple[Questions, Tensor, Questions]:
    """(questions to learn from, classes of their pictures, questions about the last `held_out` pictures of known class)."""
    questions, classes = load_questions("train", data)
    known = int((classes >= 0).sum())
    away = torch.arange(known - held_out, known)
    kept = torch.cat((torch.arange(known - held_out), torch.arange(known, len(classes))))
    return about(questions, kept), classes[kept], about(questions, away)


def accuracy(model: Any, questions: Questions, patch_size: int, batch_size: int = 100, blank: bool = False) -> dict[str, float]:
    """Share of questions answered rightly by plain `generate()`, one at a time, in percent: "all", "open", "yes_no".

    `patch_size` is that of the tower, `batch_size` says how many go into a call, `blank` shows a white picture instead.
    """
    processor = make_processor(ReferenceLLaVA(image_size=questions.pictures.shape[-1], patch_size=patch_size))
    hit = right_answers(model, processor, questions, batch_size, blank).double()
    parts = {"all": torch.ones_like(questions.open), "open": questions.open, "yes_no": ~questions.open}
    return {name: 100 * hit[part].mean().item() for name, part in parts.items()}


def right_answers(model: Any, processor: Any, questions: Any, batch_size: int, blank: bool = False) -> Tensor:
    """Which questions plain `generate()` answers rightly, one at a time: [Q] bool.

    `batch_size` of them go into a call, padded on the left; `blank` shows white pictures instead.
    """
    right = []
    for rows in torch.arange(len(questions.texts)).split(batch_size):
        text = [PROMPT.format(question=questions.texts[i]) for i in rows.tolist()]
        inputs = processor(images=list(questions.pictures[questions.rows[rows]]), text=text, padding=True, return_tensors="pt")
        if blank:
            inputs["pixel_values"].fill_(1.0)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        right += [a == questions.answers[i] for a, i in zip(said, rows.tolist())]
    return torch.tensor(right)


def packed_accuracy(model: Any, lessons: Lessons) -> float:
    """Share of all questions answered rightly, all questions of a picture in one sequence (what `accuracy` says, sooner)."""
    return share_right(lessons.turns, model, lambda rows: read(model, normalise_page(lessons.pictures[rows]))[0], 50)


def train(recipe: Recipe, checkpoint: Path, data: Path | None = None, every: Every = EVERY) -> Any:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model, fp32, in eval mode.

    Without a folder of `data` see `load_easyvqa`. The model at the end of each stage is written beside the checkpoint.
    """
    learned, classes, away = load_lessons(recipe.held_out, data)
    lessons, held_out = Lessons(learned, classes), Lessons(away, torch.full((recipe.held_out,), -1))
    training, size = Training(recipe, checkpoint, every), recipe.batch_size
    torch.manual_seed(recipe.seed)
    patch_size = recipe.tower.patch_size
    model = replace(recipe.model, patch_size=patch_size).build()
    namer = Namer(recipe.model.width)

    def loss_of(number: int, step: int) -> Tensor:
        rows = training.epoch_rows(number, step, len(lessons.pictures), size)
        pixels = normalise_page(augment(lessons.pictures[rows], recipe.shift))
        classes = lessons.classes[rows]
        if number == 0:  # shape and colour alone
            seen = model.model.vision_tower(pixels)
            patches = seen.last_hidden_state[:, 1:].mean(1)
            return namer.loss(seen.pooler_output, classes, namer.pooled) + namer.loss(patches, classes, namer.patches)
        visual, pooled = read(model, pixels)
        turns = lessons.draw(rows, recipe.turns)
        loss = F.cross_entropy(answer_logits(model, visual, turns), turns.wanted)
        return loss + recipe.naming * namer.loss(pooled, classes, namer.pooled)

    def test(number: int) -> str:
        return f"{100 * packed_accuracy(model, held_out):.2f} % of the held-out questions" if number else ""

    for number, stage in enumerate((recipe.tower, *recipe.stages)):
        if stage.patch_size != patch_size:
            model, patch_size = resample(model, recipe.model, stage.patch_size), stage.patch_size
        if training.run(number, stage, nn.ModuleList([model, namer]), len(lessons.pictures) // size, size, loss_of, test):
            save_atomically(model.state_dict(), stage_file(checkpoint, number))
    return model.eval()


class Namer(nn.Module):
    """Shape and colour from the class token and from the mean of the patches; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.pooled, self.patches = (nn.Linear(width, len(SHAPES) + len(COLOURS)) for _ in range(2))

    def loss(self, features: Tensor, classes: Tensor, layer: nn.Module) -> Tensor:
        """Mean cross entropy of shape and colour over the pictures of known class. features [B, W], classes [B]."""
        logits, known = layer(features).float(), classes >= 0
        colour, shape = classes // len(SHAPES), classes % len(SHAPES)
        loss = F.cross_entropy(logits[known, : len(SHAPES)], shape[known])
        return loss + F.cross_entropy(logits[known, len(SHAPES) :], colour[known])


def export(model: Any, recipe: Recipe, folder: Path, data: Path | None = None) -> None:
    """Writes the model, the questions, and the test pictures that `training.clip.export` leaves out: those of unknown class.

    `folder` is vtok's `assets/`.
    """
    save_folder(folder / LLAVA_FOLDER, model, make_processor(recipe.model))
    folder = folder / DATA_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    test, classes = load_questions("test", data)
    _, _, calibration = load_lessons(recipe.held_out, data)
    write_idx(folder / "test-rest-pictures-idx4-ubyte.gz", test.pictures[classes < 0].permute(0, 2, 3, 1))
    for name, part in (("test", test), ("calibration", calibration)):
        write_questions(folder / f"{name}-questions.json.gz", list(zip(part.texts, part.answers, part.rows.tolist())))


def main() -> None:
    """Command line."""
    args = parser(__doc__, "easyvqa_llava.pt", "model and questions", "the package easy-vqa").parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.data)
    if args.export is not None:
        export(model, recipe, args.export, args.data)
    questions, _ = load_questions("test", args.data)
    for name, blank in (("test questions", False), ("of them with a white picture", True)):
        share = accuracy(model, questions, recipe.model.patch_size, blank=blank)
        print(f"{len(questions.texts)} {name}: " + ", ".join(f"{k} {v:.2f} %" for k, v in share.items()))


if __name__ == "__main__":
    main()
