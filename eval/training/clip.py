"""Trains the reference CLIP on pages of easy-VQA pictures: `python -m vtok.eval.training.clip`. Resumes wherever it stopped.

Most of the training runs on 64 patches of 16 x 16 pixels; then the patch embedding and the positions are resampled to the 256
patches of 8 x 8 that the model ends with, as in `training.vit`. A batch holds groups of four pages that differ in one respect,
so that the loss falls only for a model that reads every cell, and some single pictures under plain prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtok.eval.models import easyvqa
from vtok.eval.models.assets import save_weights
from vtok.eval.models.clip import CLIP_FOLDER, WEIGHTS_FILE
from vtok.eval.models.data import write_idx
from vtok.eval.models.reference import CONFIG_FILE, DATA_FOLDER, MERGES_FILE, PageCLIP, normalise_page, preprocess_config
from vtok.eval.training.bpe import learn_merges, write_merges
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser, resample, stage_seed
from vtok.writing import write

TEST_GROUPS, TEST_SEED = 250, 1
CALIBRATION_GROUPS, CALIBRATION_SEED = 25, 2
EVERY = Every(25, 25, 250)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    # run in this order, each with a new optimiser; an epoch is 100 steps
    stages: tuple[Stage, ...] = (Stage(16, 24, 1.5e-3, 0.3), Stage(8, 3, 6e-4, 0.0))
    groups: int = 28  # of four pages, a batch
    singles: int = 16  # single pictures a batch
    blank: float = 0.25  # chance of a cell to stay blank; one cell of each page never does
    held_out: int = 178  # training pictures kept away from training, as a calibration set
    model: PageCLIP = field(default_factory=PageCLIP)  # the model that comes out; only its patch size changes with the stage

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
    return learn_merges(" ".join((*easyvqa.CLASSES, *easyvqa.PLACES, *easyvqa.TEMPLATES)).replace("{c}", " ").split())


def make_tokenizer(folder: Path, context_length: int) -> Any:
    """open_clip's tokenizer over the vocabulary of the captions; its file is written into `folder`."""
    from open_clip.tokenizer import SimpleTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_merges(folder / MERGES_FILE, merges())
    return SimpleTokenizer(bpe_path=str(folder / MERGES_FILE), context_length=context_length)


def draw_batch(source: easyvqa.Pictures, recipe: Recipe, tokenizer: Any, generator: torch.Generator) -> Batch:
    """Pages in groups, then single pictures as large as a page; half of the pictures on pages are mirrored."""
    cells = easyvqa.draw_groups(recipe.groups, recipe.blank, generator).flatten(0, 1)
    classes = torch.randint(easyvqa.BLANK, (recipe.singles,), generator=generator)
    number = torch.randint(len(easyvqa.TEMPLATES), (recipe.singles,), generator=generator)
    rows = source.rows(cells, generator)
    mirrored = torch.rand(rows.shape, generator=generator) < 0.5
    count = len(source.pictures)
    both = torch.where(mirrored & (rows >= 0), rows + count, rows)
    pages = easyvqa.compose(source.with_mirrored, both)
    single = source.pictures[source.rows(classes, generator)].float()
    large = (easyvqa.PAGE_SIZE, easyvqa.PAGE_SIZE)
    single = F.interpolate(single, size=large, mode="bicubic", align_corners=False).clamp(0, 255)
    texts = [easyvqa.caption(page) for page in cells.tolist()]
    texts += [easyvqa.TEMPLATES[t].format(c=easyvqa.CLASSES[c]) for t, c in zip(number.tolist(), classes.tolist())]
    base = (easyvqa.BLANK + 1) ** torch.arange(len(easyvqa.PLACES))
    meaning = torch.cat(((cells * base).sum(1), -1 - classes))
    return Batch(normalise_page(torch.cat((pages.float(), single))), tokenizer(texts), meaning)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, meaning: Tensor) -> Tensor:
    """CLIP's loss where equal captions are positives of each other: the mean over both directions of a cross entropy
    whose target spreads evenly over all positives.

    image, text [B, D] of unit length; `scale`: factor on the cosines; meaning [B] equal for equal captions.
    """
    same = (meaning[:, None] == meaning[None]).float()
    target = same / same.sum(1, keepdim=True)  # symmetric `same`: the same rows serve both directions
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.inference_mode()
def recalls(model: Any, images: Tensor, captions: list[str], tokenizer: Any, batch_size: int = 50) -> tuple[float, float]:
    """(image recall at 1, text recall at 1) on pages [P, 3, 128, 128] uint8 with different captions; `model` in eval mode."""
    x = torch.cat([model.encode_image(normalise_page(part), normalize=True) for part in images.split(batch_size)])
    t = torch.cat([model.encode_text(part, normalize=True) for part in tokenizer(captions).split(batch_size)])
    scores, own = t @ x.T, torch.arange(len(captions))
    image, text = ((s.argmax(1) == own).float().mean().item() for s in (scores, scores.T))
    return image, text


def train(recipe: Recipe, checkpoint: Path, data: Path | None = None, every: Every = EVERY) -> nn.Module:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model, fp32, in eval mode.

    Without a folder of `data` see `load_easyvqa`.
    """
    source, held_out = easyvqa.learned_and_held_out(recipe.held_out, data)
    tokenizer = make_tokenizer(checkpoint.parent / CLIP_FOLDER, recipe.model.context_length)
    training = Training(recipe, checkpoint, every)
    torch.manual_seed(recipe.seed)
    patch_size = recipe.stages[0].patch_size
    model: Any = replace(recipe.model, patch_size=patch_size).build()
    pages = captioned_pages(held_out, CALIBRATION_GROUPS, recipe.blank, CALIBRATION_SEED)

    def loss_of(number: int, step: int) -> Tensor:
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

    def test(number: int) -> str:
        image, text = recalls(model, *pages, tokenizer)
        return f"recall at 1 on {len(pages[1])} held-out pages: image {image:.3f} text {text:.3f}"

    def clamp() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # at most 100, as in CLIP

    for number, stage in enumerate(recipe.stages):
        if stage.patch_size != patch_size:
            model, patch_size = resample(model, recipe.model, stage.patch_size), stage.patch_size
        training.run(number, stage, model, STEPS_PER_EPOCH, recipe.batch_size, loss_of, test, clamp)
    return model.eval()


def captioned_pages(source: easyvqa.Pictures, groups: int, blank: float, seed: int) -> tuple[Tensor, list[str]]:
    """(pages [4 groups, 3, 128, 128] uint8, their captions), see `draw_pages`."""
    rows, cells = easyvqa.draw_pages(source, groups, blank, seed)
    return easyvqa.compose(source.pictures, rows), [easyvqa.caption(page) for page in cells.tolist()]


def export(model: nn.Module, recipe: Recipe, folder: Path, data: Path | None = None) -> None:
    """Writes the model, and pictures, their classes and the rows of every page of test and calibration, into `folder` (vtok's
    `assets/`).
    """
    target = folder / CLIP_FOLDER
    make_tokenizer(target, recipe.model.context_length)
    save_weights(target / WEIGHTS_FILE, model)
    config = {"model_cfg": recipe.model.model_config(), "preprocess_cfg": preprocess_config()}
    write(target / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    (folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
    parts = {
        "test": (easyvqa.Pictures(*easyvqa.load_easyvqa("test", data)), TEST_GROUPS, TEST_SEED),
        "calibration": (easyvqa.learned_and_held_out(recipe.held_out, data)[1], CALIBRATION_GROUPS, CALIBRATION_SEED),
    }
    for name, (source, groups, seed) in parts.items():
        path, (rows, _) = folder / DATA_FOLDER / name, easyvqa.draw_pages(source, groups, recipe.blank, seed)
        # channels last: nearly half of what [n, 3, 64, 64] takes
        write_idx(Path(f"{path}-pictures-idx4-ubyte.gz"), source.pictures.permute(0, 2, 3, 1))
        write_idx(Path(f"{path}-classes-idx1-ubyte.gz"), source.classes.to(torch.uint8))
        write(f"{path}-pages.json", json.dumps(rows.tolist(), separators=(",", ":")) + "\n")


def main() -> None:
    """Command line."""
    args = parser(__doc__, "easyvqa_clip.pt", "model and pages", "the package easy-vqa").parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.data)
    pages = captioned_pages(easyvqa.Pictures(*easyvqa.load_easyvqa("test", args.data)), TEST_GROUPS, recipe.blank, TEST_SEED)
    tokenizer = make_tokenizer(args.checkpoint.parent / CLIP_FOLDER, recipe.model.context_length)
    image, text = recalls(model, *pages, tokenizer)
    print(f"recall at 1 on {len(pages[1])} test pages: image {100 * image:.2f} %, text {100 * text:.2f} %")
    if args.export is not None:
        export(model, recipe, args.export, args.data)


if __name__ == "__main__":
    main()
