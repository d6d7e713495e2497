"""A stretch of training that stops and resumes anywhere: what a step draws depends on its number alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vtok.eval.models.data import cache_dir
from vtok.writing import replacing


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


class Every(NamedTuple):
    """Steps between log lines, between checkpoints, and between tests on held-out samples (`None` = no tests)."""

    log: int = 25
    save: int = 25
    test: int | None = None


class StageRecipe(Protocol):
    """What a recipe must say: samples a step, share of warm-up, AdamW's weight decay, seed."""

    @property
    def batch_size(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def seed(self) -> int: ...


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


def load_checkpoint(checkpoint: Path) -> dict[str, Any] | None:
    """What a training left behind; `None` = it has not begun."""
    return torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None


def stage_seed(seed: int, number: int) -> int:
    """Where a stage's random numbers start."""
    return seed + 1_000_000 * (number + 1)


def resample_patches(weights: dict[str, Tensor], patches: str, places: str, patch_size: int, image_size: int) -> None:
    """Interpolates patch embedding and positions (the class token's first) to patches of another size, in place, as timm does.

    Args:
        weights: of a model, by name.
        patches, places: names of the two.
        patch_size: new side of a patch in pixels.
        image_size: side of an image.
    """
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    weights[patches] = resample_patch_embed(weights[patches], [patch_size] * 2)
    grid = [image_size // patch_size] * 2
    weights[places] = resample_abs_pos_embed(weights[places][None], grid, num_prefix_tokens=1)[0]


def epoch_rows(recipe: StageRecipe, number: int, step: int, total: int) -> Tensor:
    """[batch_size] rows of a step's batch, of `total` in the random order of its epoch."""
    epoch, position = divmod(step, total // recipe.batch_size)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(stage_seed(recipe.seed, number) + epoch))
    return order[position * recipe.batch_size : (position + 1) * recipe.batch_size]


@dataclass
class StageRun:
    """A stage in progress.

    Attributes:
        trained: all that has parameters to train.
        stage: its learning rates.
        number: which stage it is, for the checkpoint and the random numbers.
        total: steps.
        recipe: see `StageRecipe`.
        checkpoint: file that is written every so many steps and at the end.
        every: see `Every`.
        after_step: called when the weights have changed.
    """

    trained: nn.Module
    stage: Stage
    number: int
    total: int
    recipe: StageRecipe
    checkpoint: Path
    every: Every
    after_step: Callable[[], Any] = lambda: None

    def run(
        self, loss_of: Callable[[int], Tensor], saved: dict[str, Any] | None, test: Callable[[], Any] = lambda: None
    ) -> None:
        """All steps, or those that a checkpoint leaves.

        Args:
            loss_of: step -> loss of its batch; it may use torch's global random numbers.
            saved: a checkpoint, of this stage or another.
            test: called every so many steps and at the end.
        """
        optimizer = make_optimizer(self.trained, self.recipe.weight_decay)
        first, started = 0, time.monotonic()
        if saved is not None and saved["stage"] == self.number:
            self.trained.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
            print(f"resumed stage {self.number} at step {first} of {self.total} from {self.checkpoint}", flush=True)
        for step in range(first, self.total):
            torch.manual_seed(stage_seed(self.recipe.seed, self.number) + step)  # a resumed run draws what a whole one draws
            for group in optimizer.param_groups:
                group["lr"] = self.stage.lr_at(step, self.total, self.recipe.warmup)
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.after_step()
            done = step + 1
            if done % self.every.log == 0:
                rate = (done - first) * self.recipe.batch_size / (time.monotonic() - started)
                where = f"stage {self.number} step {done}/{self.total}"
                print(f"{where} loss {loss.item():.4f} {rate:.1f} images/s", flush=True)
            if done % self.every.save == 0 or done == self.total:
                state = {"model": self.trained.state_dict(), "optimizer": optimizer.state_dict()}
                save_atomically({**state, "stage": self.number, "step": done}, self.checkpoint)
            if self.every.test is not None and (done % self.every.test == 0 or done == self.total):
                test()


def parser(doc: str | None, checkpoint: str, exported: str, data: str = "") -> argparse.ArgumentParser:
    """The command line that all trainings have.

    Args:
        doc: of the module.
        checkpoint: name of the default file.
        exported: what `--export` writes.
        data: where the data are that `--data` names another folder of; "" = there is no such flag.
    """
    found = argparse.ArgumentParser(description=doc)
    found.add_argument("--checkpoint", type=Path, default=cache_dir() / "train" / checkpoint)
    if data:
        found.add_argument("--data", type=Path, default=None, help=f"folder of the data (default: {data})")
    found.add_argument("--export", type=Path, default=None, help=f"folder that receives {exported}, e.g. assets")
    return found
