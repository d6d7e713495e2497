"""A stretch of training that stops and resumes anywhere: what a step draws depends on its number alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtok.eval.training.vit import Stage, make_optimizer, save_atomically


class StageRecipe(Protocol):
    """What a recipe must say: images a step, share of warm-up, AdamW's weight decay, seed."""

    @property
    def batch_size(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def seed(self) -> int: ...


def stage_seed(seed: int, number: int) -> int:
    """Where a stage's random numbers start."""
    return seed + 1_000_000 * (number + 1)


class StageRun:
    """A stage in progress.

    Args:
        trained: all that has parameters to train.
        stage: its learning rates.
        number: which stage it is, for the checkpoint and the random numbers.
        total: steps.
        recipe: see `StageRecipe`.
        checkpoint: file that `advance` writes.
    """

    def __init__(self, trained: nn.Module, stage: Stage, number: int, total: int, recipe: StageRecipe, checkpoint: Path):
        self.trained, self.stage, self.number, self.total = trained, stage, number, total
        self.recipe, self.checkpoint = recipe, checkpoint
        self.optimizer = make_optimizer(trained, recipe.weight_decay)
        self.step = self.first = 0
        self.started = time.monotonic()

    def resume(self, saved: dict[str, Any]) -> None:
        """Goes on where a checkpoint of the same stage was written."""
        self.trained.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = self.first = saved["step"]
        print(f"resumed stage {self.number} at step {self.step} of {self.total} from {self.checkpoint}", flush=True)

    def advance(self, loss_of: Callable[[int], Tensor], log_every: int, save_every: int) -> None:
        """One step with the loss of its batch, `loss_of(step)`, which may use torch's global random numbers."""
        torch.manual_seed(stage_seed(self.recipe.seed, self.number) + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr_at(self.step, self.total, self.recipe.warmup)
        loss = loss_of(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % log_every == 0:
            rate = (self.step - self.first) * self.recipe.batch_size / (time.monotonic() - self.started)
            where = f"stage {self.number} step {self.step}/{self.total}"
            print(f"{where} loss {loss.item():.4f} {rate:.1f} images/s", flush=True)
        if self.step % save_every == 0 or self.step == self.total:
            state = {"model": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_atomically({**state, "stage": self.number, "step": self.step}, self.checkpoint)
