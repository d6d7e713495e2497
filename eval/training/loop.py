"""A stretch of training that stops and resumes anywhere: what a step draws depends on its number alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.eval.models.data import cache_dir
from vtok.writing import replacing


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one patch size."""

    patch_size: int  # side of a patch in pixels
    epochs: float  # may be a fraction
    lr: float  # peak learning rate of AdamW; linear warm-up, then linear decay to `final` of it
    final: float  # learning rate at the end, as a share of the peak

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


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """What every recipe says; a recipe is everything that decides the result."""

    warmup: float = 0.05  # share of a stage's steps spent warming up
    weight_decay: float = 0.05  # AdamW's, on matrices only
    seed: int = 0  # of initialisation and of all that is drawn


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


def stage_seed(seed: int, number: int) -> int:
    """Where a stage's random numbers start."""
    return seed + 1_000_000 * (number + 1)


def stage_file(checkpoint: Path, number: int) -> Path:
    """Where the model at the end of a stage is kept."""
    return checkpoint.with_name(f"{checkpoint.stem}_stage{number}.pt")


def resample(model: Any, anatomy: Any, patch_size: int) -> Any:
    """The same model on patches of another size in pixels: patch embedding and positions (the class token's first) interpolated
    as timm does it; `anatomy` says how models are built.
    """
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    weights = model.state_dict()
    patches, places = (
        next(name for name in weights if name.endswith(ends))
        for ends in (
            ("visual.conv1.weight", "patch_embedding.weight"),
            ("visual.positional_embedding", "position_embedding.weight"),
        )
    )
    weights[patches] = resample_patch_embed(weights[patches], [patch_size] * 2)
    grid = [anatomy.image_size // patch_size] * 2
    weights[places] = resample_abs_pos_embed(weights[places][None], grid, num_prefix_tokens=1)[0]
    built = replace(anatomy, patch_size=patch_size).build()
    built.load_state_dict(weights)
    return built


@dataclass
class Training:
    """A training in progress, stage by stage."""

    recipe: BaseRecipe  # see `BaseRecipe`
    checkpoint: Path  # file that is written every so many steps and at the end of a stage; read if it exists
    every: Every  # see `Every`
    saved: dict[str, Any] | None = field(init=False)  # what the checkpoint held at the start; `None` = it has not begun

    def __post_init__(self) -> None:
        self.saved = torch.load(self.checkpoint, weights_only=True) if self.checkpoint.is_file() else None

    def epoch_rows(self, number: int, step: int, total: int, batch_size: int) -> Tensor:
        """[batch_size] rows of a step's batch, of `total` in the random order of its epoch."""
        epoch, position = divmod(step, total // batch_size)
        generator = torch.Generator().manual_seed(stage_seed(self.recipe.seed, number) + epoch)
        return torch.randperm(total, generator=generator)[position * batch_size : (position + 1) * batch_size]

    def run(
        self,
        number: int,
        stage: Stage,
        trained: nn.Module,
        epoch: int,
        batch_size: int,
        loss_of: Callable[[int, int], Tensor],
        test: Callable[[int], str] | None = None,
        after_step: Callable[[], Any] = lambda: None,
    ) -> bool:
        """All steps of a stage, or those that the checkpoint leaves.

        Args:
            number: which stage it is, for the checkpoint and the random numbers.
            stage: its learning rates.
            trained: all that has parameters to train.
            epoch: steps.
            batch_size: samples a step.
            loss_of: (number, step) -> loss of its batch; it may use torch's global random numbers.
            test: number -> what is found on held-out samples, called every so many steps and at the end.
            after_step: called when the weights have changed.

        Returns:
            Whether there was anything to do: not if a later stage has begun.
        """
        if self.saved is not None and self.saved["stage"] > number:
            return False
        optimizer = make_optimizer(trained.train(), self.recipe.weight_decay)
        total, first, started = round(stage.epochs * epoch), 0, time.monotonic()
        if self.saved is not None and self.saved["stage"] == number:
            trained.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            first = self.saved["step"]
            print(f"resumed stage {number} at step {first} of {total} from {self.checkpoint}", flush=True)
        for step in range(first, total):
            torch.manual_seed(stage_seed(self.recipe.seed, number) + step)  # a resumed run draws what a whole one draws
            for group in optimizer.param_groups:
                group["lr"] = stage.lr_at(step, total, self.recipe.warmup)
            loss = loss_of(number, step)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after_step()
            done = step + 1
            if done % self.every.log == 0:
                rate = (done - first) * batch_size / (time.monotonic() - started)
                print(f"stage {number} step {done}/{total} loss {loss.item():.4f} {rate:.1f} images/s", flush=True)
            if done % self.every.save == 0 or done == total:
                state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
                save_atomically({**state, "stage": number, "step": done}, self.checkpoint)
            if test is not None and self.every.test is not None and (done % self.every.test == 0 or done == total):
                trained.eval()
                with torch.inference_mode():
                    for line in test(number).splitlines():
                        print(f"  {line}", flush=True)
                trained.train()
        return True


def parser(doc: str | None, checkpoint: str, exported: str, data: str = "") -> argparse.ArgumentParser:
    """The command line that all trainings have.

    `doc` of the module; `checkpoint`: name of the default file; `exported`: what `--export` writes; `data`: where the data are
    that `--data` names another folder of, "" = there is no such flag.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--checkpoint", type=Path, default=cache_dir() / "train" / checkpoint)
    if data:
        found.add_argument("--data", type=Path, default=None, help=f"folder of the data (default: {data})")
    found.add_argument("--export", type=Path, default=None, help=f"folder that receives {exported}, e.g. assets")
    return found
