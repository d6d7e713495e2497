"""Trains the reference ViT on Fashion-MNIST: `python -m vtok.eval.train_vit`. Resumes from its checkpoint, wherever it stopped.

Patch dropout falls in phases (most tokens dropped first, none in the last), which trains a 197-token ViT in about an hour
and a half on two CPU cores: a step with a quarter of the tokens costs a quarter. The last phase sees every token, so that the
model is not hardened against losing them at random.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.eval.data import cache_dir, load_fashion_mnist, normalise, write_idx
from vtok.eval.reference import VIT_WEIGHTS, FashionViT, top1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        phases: (epochs, share of patch tokens dropped), run in this order.
        batch_size: images a step.
        lr: peak learning rate of AdamW; linear warm-up, then linear decay to zero over all phases.
        warmup: share of all steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        drop_path: stochastic depth rate of the last block.
        label_smoothing: of the cross entropy.
        shift: largest random translation in pixels; images are also mirrored at random.
        held_out: training images kept away from training, as a calibration set.
        seed: of initialisation, order, dropout and augmentation.
    """

    phases: tuple[tuple[float, float], ...] = ((8, 0.75), (4, 0.5), (1.5, 0.0))
    batch_size: int = 128
    lr: float = 2e-3
    warmup: float = 0.08
    weight_decay: float = 0.05
    drop_path: float = 0.05
    label_smoothing: float = 0.05
    shift: int = 2
    held_out: int = 1000
    seed: int = 0

    def dropout_at(self, step: int, steps_per_epoch: int) -> float:
        """Patch dropout rate of a step."""
        end = 0.0
        for epochs, rate in self.phases:
            end += epochs * steps_per_epoch
            if step < end:
                return rate
        return self.phases[-1][1]

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of a step: linear up, linear down to zero."""
        up = max(1, round(self.warmup * total))
        return self.lr * min((step + 1) / up, (total - step) / (total - up))


def augment(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images [B, 1, H, W] and translates each by up to `shift` pixels (zeros move in)."""
    batch, _, height, width = images.shape
    flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    down, right = torch.randint(0, 2 * shift + 1, (2, batch, 1, 1), generator=generator)
    rows = torch.arange(height)[None, :, None] + down  # [B, H, 1]
    columns = torch.arange(width)[None, None, :] + right  # [B, 1, W]
    return F.pad(images, (shift,) * 4)[torch.arange(batch)[:, None, None], 0, rows, columns][:, None]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decay if parameter.ndim == 2 else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def save_atomically(payload: dict, path: Path) -> None:
    """A stop at any moment leaves the old checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(payload, scratch)
    os.replace(scratch, path)


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
    per_epoch = len(images) // recipe.batch_size
    total = round(sum(epochs for epochs, _ in recipe.phases) * per_epoch)

    torch.manual_seed(recipe.seed)
    model = FashionViT().build(patch_drop_rate=0.5, drop_path_rate=recipe.drop_path)
    patch_drop: Any = model.patch_drop
    optimizer = make_optimizer(model, recipe)
    step = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"resumed at step {step} of {total} from {checkpoint}", flush=True)

    started, first = time.monotonic(), step
    model.train()
    while step < total:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed * 1000 + epoch))
        for i in range(position, per_epoch):
            if step >= total:
                break
            generator = torch.Generator().manual_seed(recipe.seed + step)  # a resumed run draws what the whole one drew
            torch.manual_seed(recipe.seed + step)
            patch_drop.prob = drop = recipe.dropout_at(step, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step, total)
            rows = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            x = augment(normalise(images[rows]), recipe.shift, generator)
            loss = F.cross_entropy(model(x), labels[rows], label_smoothing=recipe.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % log_every == 0:
                rate = (step - first) * recipe.batch_size / (time.monotonic() - started)
                print(f"step {step}/{total} loss {loss.item():.3f} drop {drop} {rate:.0f} images/s", flush=True)
            if step % save_every == 0 or step == total:
                save_atomically({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint)
    return model.eval()


def export(model: nn.Module, folder: Path, held_out: int, data: Path | None = None) -> None:
    """Writes the fp16 weights, the 10,000 test images and the calibration images into `folder` (vtok's `assets/`)."""
    from safetensors.torch import save_file

    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / VIT_WEIGHTS)
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
