"""Trains ATP's modules for a vision-language model of one image grid, such as LLaVA-1.5: `python -m vtok.eval.training.atp`.

The model stays frozen; what learns are the thresholds, from the language loss under soft masks and from the budget losses. A
run resumes wherever it stopped. `--report FILE` measures modules instead: see `vtok.eval.training.atp.report`.

By default the model is the reference LLaVA and the questions are easy-VQA's; `--model reference-scenes` takes that model and
questions about scenes. For a model of one's own: `--model FOLDER` and
`--questions FILE`, JSON lines with `image` (a path, relative to the file), `question` and `answer`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vtok.errors import ConfigError
from vtok.eval.models.scenes import TEST_SCENES
from vtok.eval.models.vlm import REFERENCE_SCENES
from vtok.eval.training.atp.questions import (
    IGNORED,
    Asked,
    Batch,
    Host,
    load_easyvqa_questions,
    load_host,
    load_questions_file,
    load_scene_questions,
)
from vtok.eval.training.atp.report import load_test_questions, measure, table
from vtok.eval.training.loop import parser, save_atomically
from vtok.methods.atp.modules import ATPModules
from vtok.methods.atp.reducer import SoftATP
from vtok.methods.atp.spec import ATPSpec
from vtok.patches.decoder.soft_gates import softened
from vtok.targets import vlm_targets

ATP_WEIGHTS, SCENES_WEIGHTS = "easyvqa_llava_atp.safetensors", "scenes/atp.safetensors"
SCENES = range(2_000_000, 2_000_800)  # training scenes that the model was not trained on


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result.

    Attributes:
        target_tokens: N_target, visual tokens on average over the decoder layers (paper: 144 of 576). 36 of 256 are too few for
            the sparsest grid in every prompt of the reference LLaVA, so that thresholds have something to decide.
        layers: decoder layers in front of which modules stand; `None` = the paper's, scaled to the depth.
        hidden: width of a module's hidden layer.
        inputs: what the thresholds read, see `ATPSpec`.
        steps: of the optimiser.
        batch_size: questions a step, each about another image.
        lr: peak rate of AdamW; linear warm-up, then a half cosine down to zero.
        warmup: share of the steps spent warming up.
        temperature: T of the soft masks in the first and in the last step, rising geometrically, so that soft counts come close
            to those of hard pruning (the reproductions take 10 or 100 throughout).
        lambda_atp: weight of L_atp, which makes tokens dear that go deep.
        lambda_target: weight of L_target, here as a share of the visual tokens. L_atp pulls at a token of the last module with
            `lambda_atp` times its layer, L_target with `lambda_target` times the share of layers behind it: with the
            reproductions' 0.2 the budget would be missed from below, so it weighs more here.
        over: what N_avg runs over, "layers" or "modules".
        seed: of initialisation and order.
    """

    target_tokens: float = 36
    layers: tuple[int, ...] | None = None
    hidden: int = 32
    inputs: str = "grid"
    steps: int = 200
    batch_size: int = 16
    lr: float = 6e-3
    warmup: float = 0.05
    temperature: tuple[float, float] = (10.0, 40.0)
    lambda_atp: float = 0.01
    lambda_target: float = 5.0
    over: str = "layers"
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        up = max(1, round(self.warmup * self.steps))
        down = 0.5 + 0.5 * math.cos(math.pi * max(0, step - up) / max(1, self.steps - up))
        return self.lr * min((step + 1) / up, down)

    def temperature_at(self, step: int) -> float:
        """T of a step."""
        first, last = self.temperature
        return first * (last / first) ** (step / max(1, self.steps - 1))


def make_modules(host: Host, recipe: Recipe) -> ATPModules:
    """Untrained modules for a model: all thresholds are 0.5. Raises `ConfigError` if the model has no fixed grid of visual
    tokens, or the target is not below it.
    """
    (target,) = vlm_targets(host.model)
    info = target.info
    if info.grid is None:
        raise ConfigError(f"ATP needs the same grid of visual tokens for every image; those of {info.name} depend on the image")
    shape = (info.depth, info.width, info.grid)
    spec = ATPSpec(*shape, recipe.layers, recipe.hidden, recipe.inputs, target_tokens=recipe.target_tokens)
    least = spec.num_slots * spec.sites[0] / spec.depth if recipe.over == "layers" else 0
    if not least < recipe.target_tokens < spec.num_slots:
        raise ConfigError(
            f"target_tokens={recipe.target_tokens:g} cannot be reached: of {spec.num_slots} visual tokens, the layers in front "
            f"of the first module (layer {spec.sites[0]}) alone cost {least:g} on average; choose a target between them"
        )
    torch.manual_seed(recipe.seed)
    return ATPModules(spec).to(next(host.model.parameters()).device)


def draw(asked: Asked, recipe: Recipe, step: int) -> list[int]:
    """Questions of a step, about different images; they depend on seed and step alone, so that a resumed run draws the same."""
    generator = torch.Generator().manual_seed(recipe.seed + 1_000_003 * (step + 1))
    order = torch.randperm(len(asked.rows), generator=generator).tolist()
    return asked.different(order, recipe.batch_size)


def advance(host: Host, modules: ATPModules, batch: Batch, recipe: Recipe, step: int) -> tuple[float, float, float]:
    """Gradients of one step, for the caller's optimiser; the language loss, soft and hard counts on average over the layers."""
    soft = SoftATP(modules, recipe.temperature_at(step), batch.labels != IGNORED)
    with softened(host.model, soft):
        loss = host.model(**batch.inputs, labels=batch.labels, use_cache=False).loss
    weights = {"lambda_atp": recipe.lambda_atp, "lambda_target": recipe.lambda_target}
    losses = soft.losses(target_tokens=recipe.target_tokens, over=recipe.over, **weights)
    (loss + losses.extra).backward()
    with torch.no_grad():
        return loss.item(), losses.average.item(), soft.hard_average(recipe.over).item()


def train(host: Host, asked: Asked, recipe: Recipe, checkpoint: Path, log_every: int = 10, save_every: int = 10) -> ATPModules:
    """Runs (or resumes) the whole recipe; the trained modules in eval mode.

    `checkpoint` is a file that holds modules, optimiser and step; it is read if it exists, and rewritten every `save_every`
    steps.
    """
    modules = make_modules(host, recipe)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=recipe.lr, weight_decay=0.0)
    first = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resumed at step {first} of {recipe.steps} from {checkpoint}", flush=True)
    started = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        language, soft, hard = advance(host, modules, host.batch(asked, draw(asked, recipe, step)), recipe, step)
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            rate = (done - first) * recipe.batch_size / (time.monotonic() - started)
            print(
                f"step {done}/{recipe.steps} language loss {language:.4f} tokens {soft:.1f} soft, {hard:.1f} hard, "
                f"target {recipe.target_tokens:g} {rate:.1f} questions/s",
                flush=True,
            )
        if done % save_every == 0 or done == recipe.steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save_atomically(state, checkpoint)
    return modules.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    standard = Recipe()
    found = parser(__doc__, "atp.pt", "the modules", "the package easy-vqa")
    found.add_argument("--model", type=Path, default=None, help="folder, or reference-scenes (default: the reference LLaVA)")
    found.add_argument("--questions", type=Path, default=None, help="JSON lines (default: easy-VQA's training questions)")
    found.add_argument("--target", type=float, default=standard.target_tokens, help="visual tokens on average over layers")
    found.add_argument("--layers", type=int, nargs="+", default=None, help="decoder layers (default: the paper's, scaled)")
    found.add_argument("--steps", type=int, default=standard.steps)
    found.add_argument("--batch-size", type=int, default=standard.batch_size)
    found.add_argument("--report", type=Path, default=None, help="measure the modules of this file, train nothing")
    found.add_argument("--count", type=int, default=None, help="questions of the report (default: all test questions)")
    args = found.parse_args(arguments)
    host, scenes = load_host(args.model), str(args.model) == REFERENCE_SCENES
    split, numbers = ("train", SCENES) if args.report is None else ("test", range(TEST_SCENES))
    if args.questions is not None:
        asked = load_questions_file(args.questions)
    elif scenes:
        asked = load_scene_questions(split, numbers)
    else:
        asked = load_easyvqa_questions(args.data) if args.report is None else load_test_questions()
    if args.report is not None:
        print(table(measure(host, args.report, asked, args.count)))
        return
    layers = None if args.layers is None else tuple(args.layers)
    recipe = Recipe(args.target, layers, steps=args.steps, batch_size=args.batch_size)
    modules = train(host, asked, recipe, args.checkpoint)
    if args.export is not None:
        path = args.export / (SCENES_WEIGHTS if scenes else ATP_WEIGHTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        modules.save(path)
        print(f"modules are in {path}")


if __name__ == "__main__":
    main()
