"""Trains the reference ViT on Fashion-MNIST: `python -m vtok.eval.training.vit`. Resumes wherever it stopped.

Most of the training runs on 49 patches of 4 x 4 pixels; then the patch embedding and the positions are resampled to the 196
patches of 2 x 2 that the model ends with, and it goes on for a few epochs. That takes about an hour on two CPU cores. Patch
dropout would be as cheap, but teaches a model to do without random tokens, and so to make every pruning method look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.assets import save_weights
from vtok.eval.models.data import load_fashion_mnist, normalise, write_idx
from vtok.eval.models.reference import VIT_WEIGHTS, FashionViT, top1
from vtok.eval.training.loop import BaseRecipe, Every, Stage, Training, parser

EVERY = Every(50, 200)


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """See `BaseRecipe`."""

    # run in this order; each starts with a new optimiser
    stages: tuple[Stage, ...] = (Stage(4, 8, 2e-3, 0.3), Stage(2, 2.5, 1e-3, 0.0))
    batch_size: int = 128  # images a step
    warmup: float = 0.08
    drop_path: float = 0.05  # stochastic depth rate of the last block
    label_smoothing: float = 0.05  # of the cross entropy
    shift: int = 2  # largest random translation in pixels; images are also mirrored at random
    held_out: int = 1000  # training images kept away from training, as a calibration set


def augment(images: Tensor, shift: int) -> Tensor:
    """Mirrors half of the images [B, 1, H, W] and translates each by up to `shift` pixels (zeros move in)."""
    batch, _, height, width = images.shape
    flip = torch.rand(batch, 1, 1, 1) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    down, right = torch.randint(0, 2 * shift + 1, (2, batch, 1, 1))
    rows = torch.arange(height)[None, :, None] + down  # [B, H, 1]
    columns = torch.arange(width)[None, None, :] + right  # [B, 1, W]
    return F.pad(images, (shift,) * 4)[torch.arange(batch)[:, None, None], 0, rows, columns][:, None]


def train(recipe: Recipe, checkpoint: Path, data: Path | None = None, every: Every = EVERY) -> nn.Module:
    """Runs (or resumes) the whole recipe, see `Training`; the trained model, fp32, in eval mode.

    Without a folder of `data` see `load_fashion_mnist`.
    """
    images, labels = load_fashion_mnist("train", data)
    images, labels = images[: -recipe.held_out], labels[: -recipe.held_out]
    training, size = Training(recipe, checkpoint, every), recipe.batch_size
    torch.manual_seed(recipe.seed)
    model: Any = FashionViT(patch_size=recipe.stages[0].patch_size).build(drop_path_rate=recipe.drop_path)

    def loss_of(number: int, step: int) -> Tensor:
        rows = training.epoch_rows(number, step, len(images), size)
        x = augment(normalise(images[rows]), recipe.shift)
        return F.cross_entropy(model(x), labels[rows], label_smoothing=recipe.label_smoothing)

    for number, stage in enumerate(recipe.stages):
        if model.patch_embed.patch_size[0] != stage.patch_size:
            model.set_input_size(patch_size=(stage.patch_size, stage.patch_size))  # resamples weights and positions
        training.run(number, stage, model, len(images) // size, size, loss_of)
    return model.eval()


def export(model: nn.Module, folder: Path, held_out: int, data: Path | None = None) -> None:
    """Writes the fp16 weights, the 10,000 test images and the calibration images into `folder` (vtok's `assets/`)."""
    save_weights(folder / VIT_WEIGHTS, model)
    target = folder / "fashion_mnist"
    target.mkdir(parents=True, exist_ok=True)
    for name, split, part in (("t10k", "t10k", slice(None)), ("calibration", "train", slice(-held_out, None))):
        images, labels = load_fashion_mnist(split, data)
        write_idx(target / f"{name}-images-idx3-ubyte.gz", images[part, 0])
        write_idx(target / f"{name}-labels-idx1-ubyte.gz", labels[part].to(torch.uint8))


def main() -> None:
    """Command line."""
    args = parser(__doc__, "fashion_vit.pt", "weights and images", "Debian's dataset-fashion-mnist").parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.data)
    images, labels = load_fashion_mnist("t10k", args.data)
    print(f"top-1 on {len(labels)} test images: {100 * top1(model, normalise(images), labels):.2f} %")
    if args.export is not None:
        export(model, args.export, recipe.held_out, args.data)


if __name__ == "__main__":
    main()
