"""Trains the reference ViT on Fashion-MNIST: `python -m vtok.eval.training.vit`. Resumes wherever it stopped.

Most of the training runs on 49 patches of 4 x 4 pixels; then the patch embedding and the positions are resampled to the 196
patches of 2 x 2 that the model ends with, and it goes on for a few epochs. That takes about an hour on two CPU cores. Patch
dropout would be as cheap, but teaches a model to do without random tokens, and so to make every pruning method look alike.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.models.data import cache_dir, load_fashion_mnist, normalise, write_idx
from vtok.eval.models.reference import VIT_WEIGHTS, FashionViT, top1
from vtok.writing import replacing, write


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one patch size.

    Attributes:
        patch_size: side of a patch in pixels.
        epochs: may be a fraction.
        lr: peak learning rate of AdamW; linear warm-up, then linear decay to `final` of it.
        final: learning rate at the end, as a share of the peak.
    """

    patch_size: int
    epochs: float
    lr: float
    final: float

    def lr_at(self, step: int, total: int, warmup: float) -> float:
        """Learning rate of a step."""
        up = max(1, round(warmup * total))
        down = 1 - (1 - self.final) * (step - up) / max(1, total - up)
        return self.lr * min((step + 1) / up, down)


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


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decay if parameter.ndim == 2 else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))  # the schedule sets the rate of every step


def save_atomically(payload: dict, path: Path) -> None:
    """A stop at any moment leaves the old checkpoint or the new one, never half of one."""
    with replacing(path) as scratch:
        torch.save(payload, scratch)


def train(recipe: Recipe, checkpoint: Path, data: Path | None = None, log_every: int = 50, save_every: int = 200) -> nn.Module:
    """Runs (or resumes) the whole recipe.

    Args:
        recipe: what to do.
        checkpoint: file that holds weights, optimiser and position; read if it exists, rewritten every `save_every` steps.
        data: folder of the IDX files, or `None` (see `load_fashion_mnist`).
        log_every: steps between log lines.
        save_every: steps between checkpoints.

    Returns:
        The trained model (fp32, eval mode).
    """
    images, labels = load_fashion_mnist("train", data)
    images, labels = images[: -recipe.held_out], labels[: -recipe.held_out]
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    torch.manual_seed(recipe.seed)
    model: Any = FashionViT(patch_size=recipe.stages[0].patch_size).build(drop_path_rate=recipe.drop_path)
    for number, stage in enumerate(recipe.stages):
        if model.patch_embed.patch_size[0] != stage.patch_size:
            model.set_input_size(patch_size=(stage.patch_size, stage.patch_size))  # resamples weights and positions
        if saved is None or saved["stage"] <= number:
            here = saved if saved is not None and saved["stage"] == number else None
            _run_stage(model, recipe, number, images, labels, checkpoint, here, log_every, save_every)
    return model.eval()


def _run_stage(
    model: nn.Module,
    recipe: Recipe,
    number: int,
    images: Tensor,
    labels: Tensor,
    checkpoint: Path,
    saved: dict[str, Any] | None,
    log_every: int,
    save_every: int,
) -> None:
    stage, per_epoch = recipe.stages[number], len(images) // recipe.batch_size
    total, step = round(stage.epochs * per_epoch), 0
    optimizer = make_optimizer(model, recipe.weight_decay)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"resumed stage {number} at step {step} of {total} from {checkpoint}", flush=True)
    started, first = time.monotonic(), step
    model.train()
    while step < total:
        epoch, position = divmod(step, per_epoch)
        seed = recipe.seed + 1_000_000 * (number + 1)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))
        rows = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        torch.manual_seed(seed + step)  # a resumed run draws what an uninterrupted one draws
        for group in optimizer.param_groups:
            group["lr"] = stage.lr_at(step, total, recipe.warmup)
        x = augment(normalise(images[rows]), recipe.shift)
        loss = F.cross_entropy(model(x), labels[rows], label_smoothing=recipe.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % log_every == 0:
            rate = (step - first) * recipe.batch_size / (time.monotonic() - started)
            print(f"stage {number} step {step}/{total} loss {loss.item():.3f} {rate:.0f} images/s", flush=True)
        if step % save_every == 0 or step == total:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stage": number, "step": step}
            save_atomically(state, checkpoint)


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
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=cache_dir() / "train" / "fashion_vit.pt")
    parser.add_argument("--data", type=Path, default=None, help="folder of the IDX files (default: Debian's, else download)")
    parser.add_argument("--export", type=Path, default=None, help="folder that receives weights and images, e.g. assets")
    args = parser.parse_args()
    recipe = Recipe()
    model = train(recipe, args.checkpoint, args.data)
    images, labels = load_fashion_mnist("t10k", args.data)
    print(f"top-1 on {len(labels)} test images: {100 * top1(model, normalise(images), labels):.2f} %")
    if args.export is not None:
        export(model, args.export, recipe.held_out, args.data)


if __name__ == "__main__":
    main()
