"""What trained ATP modules do to a model: whether the budget holds, whether counts follow the image, whether thresholds do.

Each question is asked once: the answer is scored by its first token, given the prompt (easy-VQA's answers are one token each).
"Exchanged" takes the thresholds of each prompt from another one of its batch, about another image: what a prompt's own
thresholds are worth beyond the schedule that they make on average.

Shapes: B prompts of a batch, n questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtok
from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.eval.common.statistics import Interval, mean_interval, mean_stderr, paired_difference, share, with_error
from vtok.eval.models.reference_vlm import load_reference_questions
from vtok.eval.training.atp.questions import Asked, Host, as_asked
from vtok.methods.atp import ATP, Slots
from vtok.methods.atp.losses import average_tokens
from vtok.methods.atp.modules import ATPModules, load
from vtok.methods.atp.reducer import ATPReducer
from vtok.targets import vlm_targets


class _Exchanged(ATPModules):
    """Modules that give every prompt the thresholds of the one in front of it in the batch, the first those of the last."""

    def thresholds(self, layer: int, self_score: Tensor, cross: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        theta_r, theta_s = super().thresholds(layer, self_score, cross, slots)
        return theta_r.roll(1), theta_s.roll(1)


@dataclass(frozen=True)
class ExchangedATP(ATP):
    """ATP with thresholds exchanged between the prompts of a batch: a control, which no file describes."""

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        reducer = super().build_vlm(info)
        assert isinstance(reducer, ATPReducer)
        modules = _Exchanged(reducer.modules.spec)
        modules.load_state_dict(reducer.modules.state_dict())
        return dataclasses.replace(reducer, modules=modules.eval())


@dataclass(frozen=True)
class Answers:
    """How a model did on n questions."""

    right: Tensor  # [n] 1 where the first token of the answer had the highest logit
    loss: Tensor  # [n] its negative log likelihood
    counts: Tensor  # [n, M] visual tokens behind every module; empty columns if unpruned
    average: Tensor  # [n] visual tokens on average over the decoder layers


@dataclass(frozen=True)
class ATPReport:
    """The model unpruned, pruned, and pruned by thresholds of other prompts, on the same questions in the same batches."""

    layers: tuple[int, ...]  # decoder layers in front of which modules stand
    total: int  # visual tokens of an image
    target: float | None  # what training aimed at
    unpruned: Answers
    pruned: Answers
    exchanged: Answers


def load_test_questions() -> Asked:
    """The bundled test questions about easy-VQA's pictures."""
    return as_asked(load_reference_questions())


def spread(asked: Asked, count: int | None, batch_size: int, seed: int = 0) -> list[list[int]]:
    """Batches of random questions, each batch about different images; a last question that is left alone goes unasked."""
    order = torch.randperm(len(asked.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    waiting, batches = order[:count], []
    while waiting:
        chosen = asked.different(waiting, batch_size)
        taken = set(chosen)
        waiting = [number for number in waiting if number not in taken]
        if len(chosen) > 1:
            batches.append(chosen)
    return batches


def answer(host: Host, config: MethodConfig | None, asked: Asked, batches: Sequence[Sequence[int]]) -> Answers:
    """Asks every question once, with the model patched for the time of it; it must not be patched before."""
    found, model = [], host.model
    if config is not None:
        vtok.patch(model, config)
    try:
        for numbers in batches:
            images = [asked.images[asked.rows[i]] for i in numbers]
            inputs = host.inputs(images, [host.prompt(asked.questions[i]) for i in numbers])
            answered = host.batch(asked, numbers)
            first = (answered.labels >= 0).int().argmax(1, keepdim=True)
            wanted = answered.labels.gather(1, first)
            with torch.inference_mode():
                logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            right, loss = logits.argmax(-1) == wanted[:, 0], -logits.log_softmax(-1).gather(1, wanted)[:, 0]
            none = torch.zeros(len(numbers), 0)
            found.append((right.double(), loss.double(), *((none, none) if config is None else _counts(model))))
    finally:
        vtok.unpatch(model)
    return Answers(*map(torch.cat, zip(*found)))


def _counts(model: Any) -> tuple[Tensor, Tensor]:
    """(visual tokens [B, M] behind every module, [B] on average over the decoder layers) of the last prompts."""
    (target,) = vlm_targets(model)
    pruner = target.installed()
    assert pruner is not None and pruner.last is not None
    visual, left, columns = pruner.last.visual, pruner.last.visual.sum(1), []
    total = left
    for layer in sorted(pruner.layers):
        stage = pruner.last.stages.get(layer)
        if stage is not None:
            left = (visual.gather(1, stage.column.clamp_min(0)) & (stage.column >= 0)).sum(1)
        columns.append(left)
    counts = torch.stack(columns, 1).double()
    return counts, average_tokens(counts, sorted(pruner.layers), total.double(), target.info.depth)


def measure(host: Host, weights: Path, asked: Asked, count: int | None = None, batch_size: int = 50) -> ATPReport:
    """Runs the three models on `count` random questions (`None` = all); `weights`: file of the modules of the host."""
    spec, batches = load(weights).spec, spread(asked, count, batch_size)
    configs = (None, ATP(weights=str(weights)), ExchangedATP(weights=str(weights)))
    unpruned, pruned, exchanged = (answer(host, config, asked, batches) for config in configs)
    return ATPReport(spec.sites, spec.num_slots, spec.target_tokens, unpruned, pruned, exchanged)


def _pm(values: Tensor, scale: float = 1.0, digits: int = 2, interval: Callable[[Any], Interval] = mean_interval) -> str:
    numbers = values.double().numpy()
    mean, error = mean_stderr(numbers)
    known = {"mean": mean, "mean_stderr": error, "mean_ci": interval(numbers).ends}
    return with_error(known, "mean", scale, digits)


def table(report: ATPReport) -> str:
    """The report as text: means with standard errors, differences paired."""
    p, x, u = report.pruned, report.exchanged, report.unpruned
    lines = [
        f"{len(u.right)} questions, {report.total} visual tokens, modules in front of the decoder layers "
        f"{', '.join(map(str, report.layers))}; mean ± standard error",
        f"tokens on average over layers: {_pm(p.average)}, target {report.target}; exchanged: {_pm(x.average)}",
    ]
    for i, layer in enumerate(report.layers):
        c = p.counts[:, i]
        quarter = [int(torch.quantile(c, q).item()) for q in (0.05, 0.5, 0.95)]
        lines.append(
            f"tokens from layer {layer} on: {_pm(c)}, standard deviation {c.std():.1f}, 5 % / median / 95 %: "
            f"{quarter[0]} / {quarter[1]} / {quarter[2]}, {len(c.unique())} different counts"
        )
    for name, a in (("unpruned", u), ("atp", p), ("atp, exchanged", x)):
        lines.append(f"{name}: first answer token right {_pm(a.right, 100, interval=share)} %, loss {_pm(a.loss, digits=4)}")
    for name, a in (("atp - unpruned", p), ("exchanged - atp", x)):
        b = u if a is p else p
        lines.append(
            f"{name}: {_pm(a.right - b.right, 100, interval=paired_difference)} points, loss {_pm(a.loss - b.loss, digits=4)}"
        )
    return "\n".join(lines)
