"""Trains the reference ViT on Fashion-MNIST: `python -m vtok.eval.training.vit`. Resumes wherever it stopped.

Most of the training runs on 49 patches of 4 x 4 pixels; then the patch embedding and the positions are resampled to the 196
patches of 2 x 2 that the model ends with, and it goes on for a few epochs. That takes about an hour on two CPU cores. Patch
dropout would be as cheap, but teaches a model to do without random tokens, and so to make every pruning method look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.data import load_fashion_mnist, normalise, write_idx
from vtok.eval.models.reference import VIT_WEIGHTS, FashionViT, top1
from vtok.eval.training.loop import Every, Stage, StageRun, epoch_rows, load_checkpoint, parser
from vtok.writing import write

EVERY = Every(50, 200)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        stages: run in this order; each starts with a new optimiser.
        batch_size: images a step.
        warmup: share of a stage's steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        drop_path: stochastic depth rate of the last block.
        label_smoothing: of the cross entropy.
        shift: largest random translation in pixels; images are also mirrored at random.
        held_out: training images kept away from training, as a calibration set.
        seed: of initialisation, order, stochastic depth and augmentation.
    """

    stages: tuple[Stage, ...] = (Stage(4, 8, 2e-3, 0.3), Stage(2, 2.5, 1e-3, 0.0))
    batch_size: int = 128
    warmup: float = 0.08
    weight_decay: float = 0.05
    drop_path: float = 0.05
    label_smoothing: float = 0.05
    shift: int = 2
    held_out: int = 1000
    seed: int = 0


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
    """Runs (or resumes) the whole recipe.

    Args:
        recipe: what to do.
        checkpoint: file that holds weights, optimiser and position; read if it exists.
        data: folder of the IDX files, or `None` (see `load_fashion_mnist`).
        every: what is done every so many steps.

    Returns:
        The trained model (fp32, eval mode).
    """
    images, labels = load_fashion_mnist("train", data)
    images, labels = images[: -recipe.held_out], labels[: -recipe.held_out]
    saved = load_checkpoint(checkpoint)
    torch.manual_seed(recipe.seed)
    model: Any = FashionViT(patch_size=recipe.stages[0].patch_size).build(drop_path_rate=recipe.drop_path)

    def loss_of(step: int, number: int) -> Tensor:
        rows = epoch_rows(recipe, number, step, len(images))
        x = augment(normalise(images[rows]), recipe.shift)
        return F.cross_entropy(model(x), labels[rows], label_smoothing=recipe.label_smoothing)

    for number, stage in enumerate(recipe.stages):
        if model.patch_embed.patch_size[0] != stage.patch_size:
            model.set_input_size(patch_size=(stage.patch_size, stage.patch_size))  # resamples weights and positions
        if saved is None or saved["stage"] <= number:
            total = round(stage.epochs * (len(images) // recipe.batch_size))
            run = StageRun(model.train(), stage, number, total, recipe, checkpoint, every)
            run.run(partial(loss_of, number=number), saved)
    return model.eval()


def export(model: nn.Module, folder: Path, held_out: int, data: Path | None = None) -> None:
    """Writes the fp16 weights, the 10,000 test images and the calibration images into `folder` (vtok's `assets/`)."""
    from safetensors.torch import save

    write(folder / VIT_WEIGHTS, save({k: v.half().contiguous() for k, v in model.state_dict().items()}))
    target = folder / "fashion_mnist"
    target.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = load_fashion_mnist("train", data)
    test_images, test_labels = load_fashion_mnist("t10k", data)
    parts = {
        "t10k": (test_images, test_labels),
        "calibration": (train_images[-held_out:], train_labels[-held_out:]),
    }
    for name, (images, labels) in parts.items():
        write_idx(target / f"{name}-images-idx3-ubyte.gz", images[:, 0])
        write_idx(target / f"{name}-labels-idx1-ubyte.gz", labels.to(torch.uint8))


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
