"""Trains the reference CLIP on pages of easy-VQA pictures: `python -m vtok.eval.training.clip`. Resumes wherever it stopped.

Most of the training runs on 64 patches of 16 x 16 pixels; then the patch embedding and the positions are resampled to the 256
patches of 8 x 8 that the model ends with, as in `training.vit`. A batch holds groups of four pages that differ in one respect,
so that the loss falls only for a model that reads every cell, and some single pictures under plain prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtok.eval.models.clip import CLIP_FOLDER, WEIGHTS_FILE
from vtok.eval.models.data import write_idx
from vtok.eval.models.easyvqa import (
    BLANK,
    CLASSES,
    PAGE_SIZE,
    PLACES,
    TEMPLATES,
    Pictures,
    caption,
    compose,
    draw_groups,
    draw_pages,
    load_easyvqa,
)
from vtok.eval.models.reference import (
    CONFIG_FILE,
    DATA_FOLDER,
    MERGES_FILE,
    PageCLIP,
    normalise_page,
    preprocess_config,
)
from vtok.eval.training.bpe import learn_merges, write_merges
from vtok.eval.training.loop import Every, Stage, StageRun, load_checkpoint, parser, resample_patches, stage_seed
from vtok.writing import write

TEST_GROUPS, TEST_SEED = 250, 1
CALIBRATION_GROUPS, CALIBRATION_SEED = 25, 2
EVERY = Every(25, 25, 250)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        stages: run in this order, each with a new optimiser; an epoch is 100 steps.
        groups: of four pages, a batch.
        singles: single pictures a batch.
        blank: chance of a cell to stay blank; one cell of each page never does.
        warmup: share of a stage's steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        held_out: training pictures kept away from training, as a calibration set.
        model: the model that comes out; only its patch size changes with the stage.
        seed: of initialisation and of every page drawn.
    """

    stages: tuple[Stage, ...] = (Stage(16, 24, 1.5e-3, 0.3), Stage(8, 3, 6e-4, 0.0))
    groups: int = 28
    singles: int = 16
    blank: float = 0.25
    warmup: float = 0.05
    weight_decay: float = 0.05
    held_out: int = 178
    model: PageCLIP = field(default_factory=PageCLIP)
    seed: int = 0

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return 4 * self.groups + self.singles


STEPS_PER_EPOCH = 100


class Batch(NamedTuple):
    """images [B, 3, H, W] normalised, texts [B, L], `meaning [B]`: equal numbers are positives of each other."""

    images: Tensor
    texts: Tensor
    meaning: Tensor


def merges() -> list[tuple[str, str]]:
    """Of the words that captions and prompts are made of."""
    return learn_merges(" ".join((*CLASSES, *PLACES, *TEMPLATES)).replace("{c}", " ").split())


def make_tokenizer(folder: Path, context_length: int) -> Any:
    """open_clip's tokenizer over the vocabulary of the captions; its file is written into `folder`."""
    from open_clip.tokenizer import SimpleTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_merges(folder / MERGES_FILE, merges())
    return SimpleTokenizer(bpe_path=str(folder / MERGES_FILE), context_length=context_length)


def draw_batch(source: Pictures, recipe: Recipe, tokenizer: Any, generator: torch.Generator) -> Batch:
    """Pages in groups, then single pictures as large as a page; half of the pictures on pages are mirrored."""
    cells = draw_groups(recipe.groups, recipe.blank, generator).flatten(0, 1)
    classes = torch.randint(BLANK, (recipe.singles,), generator=generator)
    number = torch.randint(len(TEMPLATES), (recipe.singles,), generator=generator)
    rows = source.rows(cells, generator)
    mirrored = torch.rand(rows.shape, generator=generator) < 0.5
    count = len(source.pictures)
    both = torch.where(mirrored & (rows >= 0), rows + count, rows)
    pages = compose(source.with_mirrored, both)
    single = source.pictures[source.rows(classes, generator)].float()
    single = F.interpolate(single, size=(PAGE_SIZE, PAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 255)
    texts = [caption(page) for page in cells.tolist()]
    texts += [TEMPLATES[t].format(c=CLASSES[c]) for t, c in zip(number.tolist(), classes.tolist())]
    base = (BLANK + 1) ** torch.arange(len(PLACES))
    meaning = torch.cat(((cells * base).sum(1), -1 - classes))
    return Batch(normalise_page(torch.cat((pages.float(), single))), tokenizer(texts), meaning)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, meaning: Tensor) -> Tensor:
    """CLIP's loss where equal captions are positives of each other: the mean over both directions of a cross entropy
    whose target spreads evenly over all positives.

    Args:
        image: [B, D] of unit length.
        text: [B, D] of unit length.
        scale: factor on the cosines.
        meaning: [B] equal for equal captions.
    """
    same = (meaning[:, None] == meaning[None]).float()
    target = same / same.sum(1, keepdim=True)  # symmetric `same`: the same rows serve both directions
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def resample(model: nn.Module, anatomy: PageCLIP, patch_size: int) -> nn.Module:
    """The same model on patches of another size."""
    finer, weights = replace(anatomy, patch_size=patch_size).build(), model.state_dict()
    names = ("visual.conv1.weight", "visual.positional_embedding")
    resample_patches(weights, *names, patch_size, anatomy.image_size)
    finer.load_state_dict(weights)
    return finer


def recalls(model: nn.Module, images: Tensor, captions: list[str], tokenizer: Any, batch_size: int = 50) -> tuple[float, float]:
    """(image recall at 1, text recall at 1) on pages [P, 3, 128, 128] uint8 with different captions."""
    training = model.training
    model.eval()
    net: Any = model
    with torch.inference_mode():
        x = torch.cat([net.encode_image(normalise_page(part), normalize=True) for part in images.split(batch_size)])
        t = torch.cat([net.encode_text(part, normalize=True) for part in tokenizer(captions).split(batch_size)])
    model.train(training)
    scores, own = t @ x.T, torch.arange(len(captions))
    image, text = ((s.argmax(1) == own).float().mean().item() for s in (scores, scores.T))
    return image, text


def train(recipe: Recipe, checkpoint: Path, data: Path | None = None, every: Every = EVERY) -> nn.Module:
    """Runs (or resumes) the whole recipe.

    Args:
        recipe: what to do.
        checkpoint: file that holds weights, optimiser and position; read if it exists.
        data: folder of easy-VQA, or `None` (see `load_easyvqa`).
        every: what is done every so many steps.

    Returns:
        The trained model (fp32, eval mode).
    """
    pictures, classes = load_easyvqa("train", data)
    source = Pictures(pictures[: -recipe.held_out], classes[: -recipe.held_out])
    held_out = Pictures(pictures[-recipe.held_out :], classes[-recipe.held_out :])
    tokenizer = make_tokenizer(checkpoint.parent / CLIP_FOLDER, recipe.model.context_length)
    saved = load_checkpoint(checkpoint)
    torch.manual_seed(recipe.seed)
    patch_size = recipe.stages[0].patch_size
    model: Any = replace(recipe.model, patch_size=patch_size).build()
    rows, cells = draw_pages(held_out, CALIBRATION_GROUPS, recipe.blank, CALIBRATION_SEED)
    pages, captions = compose(held_out.pictures, rows), [caption(page) for page in cells.tolist()]

    def test() -> None:
        image, text = recalls(model, pages, captions, tokenizer)
        print(f"  recall at 1 on {len(captions)} held-out pages: image {image:.3f} text {text:.3f}", flush=True)

    def clamp() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # at most 100, as in CLIP

    for number, stage in enumerate(recipe.stages):
        if stage.patch_size != patch_size:
            model, patch_size = resample(model, recipe.model, stage.patch_size), stage.patch_size
        if saved is None or saved["stage"] <= number:
            total = round(stage.epochs * STEPS_PER_EPOCH)
            run = StageRun(model.train(), stage, number, total, recipe, checkpoint, every, clamp)
            run.run(partial(_loss, model, recipe, number, source, tokenizer), saved, test)
    return model.eval()


def _loss(model: Any, recipe: Recipe, number: int, source: Pictures, tokenizer: Any, step: int) -> Tensor:
    """Of one batch, whose pages depend on the step alone."""
    generator = torch.Generator().manual_seed(stage_seed(recipe.seed, number) + step)
    batch = draw_batch(source, recipe, tokenizer, generator)
    # bfloat16's fused backward on CPUs costs four times the plain one on 64 patches, and is the faster one on 256
    short = (recipe.model.image_size // recipe.stages[number].patch_size) ** 2 < 128
    kernel = SDPBackend.MATH if short else SDPBackend.FLASH_ATTENTION
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernel):
        image = model.encode_image(batch.images, normalize=True)
        text = model.encode_text(batch.texts, normalize=True)
    return contrastive_loss(image.float(), text.float(), model.logit_scale.exp(), batch.meaning)


def export(model: nn.Module, recipe: Recipe, folder: Path, data: Path | None = None) -> None:
    """Writes model, test pages and calibration pages into `folder` (vtok's `assets/`)."""
    from safetensors.torch import save

    target = folder / CLIP_FOLDER
    make_tokenizer(target, recipe.model.context_length)
    write(target / WEIGHTS_FILE, save({k: v.half().contiguous() for k, v in model.state_dict().items()}))
    config = {"model_cfg": recipe.model.model_config(), "preprocess_cfg": preprocess_config()}
    write(target / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    export_data(folder, recipe, data)


def export_data(folder: Path, recipe: Recipe, data: Path | None = None) -> None:
    """Writes pictures, their classes and the rows of every page into `folder / "easyvqa"`."""
    target = folder / DATA_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    pictures, classes = load_easyvqa("train", data)
    held_out = pictures[-recipe.held_out :], classes[-recipe.held_out :]
    _write_pages(target, "test", *load_easyvqa("test", data), TEST_GROUPS, recipe.blank, TEST_SEED)
    _write_pages(target, "calibration", *held_out, CALIBRATION_GROUPS, recipe.blank, CALIBRATION_SEED)


def _write_pages(folder: Path, name: str, pictures: Tensor, classes: Tensor, groups: int, blank: float, seed: int) -> None:
    rows, _ = draw_pages(Pictures(pictures, classes), groups, blank, seed)
    write_idx(
        folder / f"{name}-pictures-idx4-ubyte.gz", pictures.permute(0, 2, 3, 1)
    )  # nearly half of what [n, 3, 64, 64] takes
    write_idx(folder / f"{name}-classes-idx1-ubyte.gz", classes.to(torch.uint8))
    write(folder / f"{name}-pages.json", json.dumps(rows.tolist(), separators=(",", ":")) + "\n")


def main() -> None:
    """Command line."""
    args = parser(__doc__, "easyvqa_clip.pt", "model and pages", "the package easy-vqa").parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.data)
    pictures, classes = load_easyvqa("test", args.data)
    rows, cells = draw_pages(Pictures(pictures, classes), TEST_GROUPS, recipe.blank, TEST_SEED)
    tokenizer = make_tokenizer(args.checkpoint.parent / CLIP_FOLDER, recipe.model.context_length)
    image, text = recalls(model, compose(pictures, rows), [caption(page) for page in cells.tolist()], tokenizer)
    print(f"recall at 1 on {len(cells)} test pages: image {100 * image:.2f} %, text {100 * text:.2f} %")
    if args.export is not None:
        export(model, recipe, args.export, args.data)


if __name__ == "__main__":
    main()
