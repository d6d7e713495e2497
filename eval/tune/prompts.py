"""Tuning of methods on vision-language models, on prompts or in the tower: by the first token of the answer.

Costs are those of tower, connector and prefill, measured on calibration prompts: what a method drops inside the language model
depends on the words and the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vtok
from vtok.capabilities import candidates_at, search_space
from vtok.config import MethodConfig, ModelInfo
from vtok.core.search_space import Point, Space
from vtok.cost.budget import solve_prompt, within
from vtok.cost.prefill import Prompt, PromptEstimate
from vtok.errors import UnsupportedModelError
from vtok.eval.common.records import key_of
from vtok.eval.common.settings import Setting, fingerprint, macs_fields
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tune.samples import Batch, Samples, calibration_count, enough, shuffled
from vtok.eval.tune.score import class_values
from vtok.eval.tune.subjects import Priced, Subject
from vtok.patches.hf_vlm.families import VLM
from vtok.targets import vlm_targets
from vtok.targets.vlm.estimate import planned
from vtok.targets.vlm.resolve import POSITIONS, resolve
from vtok.targets.vlm.tower import budget_candidates

PRICED = 16  # calibration prompts that say what a setting costs


class Prompts(Subject):
    """A vision-language model; the first `PRICED` calibration prompts say what a setting costs.

    Raises:
        UnsupportedModelError: vtok does not know the model, or the method acts neither on its prompts nor in its tower.
    """

    objective = "kl"

    def __init__(self, model: VisionLanguageModel, config: MethodConfig, calibration: Samples):
        super().__init__(model.net, model.name, config, calibration)
        found = vlm_targets(self.patched)
        if len(found) != 1:
            raise UnsupportedModelError(f"{model.name} is not one vision-language model that vtok knows, but {len(found)}")
        self.info = found[0].info
        budget_candidates(found[0].vlm, config)  # refuses a method that the model or its tower cannot have
        self.identity = {"model": model.name, "weights": fingerprint(model.net), "prompts": True}

    def space(self) -> Space:
        return search_space(self.config, self._inside() or self.info)

    def default(self, flops: float) -> Priced:
        steps = budget_candidates(self._vlm(), self.config)
        config, budget = solve_prompt(self.config, flops, steps, self.info.name, self._price, "the calibration prompts")
        return config, budget.reached

    def at(self, point: Point, limit: float) -> Priced:
        config, cost = within(candidates_at(self.config, self._inside() or self.info, point), limit, self._price)
        return config, cost.fraction

    def _inside(self) -> ModelInfo | None:
        """Of the vision tower, if that is where the method acts."""
        tower = self._vlm().tower
        return tower.info if self.config.in_tower and tower is not None else None

    def _price(self, config: MethodConfig) -> PromptEstimate:
        return self._once(config, lambda: self._measured(config))

    def _measured(self, config: MethodConfig) -> PromptEstimate:
        count = min(PRICED, len(self._calibration))
        inputs, _ = next(self._calibration.read(0, count, count))
        try:
            model = self.apply(config)
            self.outputs(model, inputs)
            found = self.cost(model)
        finally:
            self.apply(None)
        if found is not None:
            return found
        vlm = self._vlm()  # what a no-op costs, which leaves nothing to measure
        return planned(self.patched, vlm, resolve(vlm, (config,), POSITIONS[0]), Prompt())

    def _vlm(self) -> VLM:
        return vlm_targets(self.patched)[0].vlm

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """[b, V]: scores of the first token of the answers."""
        net: Any = model
        with torch.inference_mode():
            return net(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]

    def values(self, outputs: Tensor, unpatched: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
        return class_values(outputs.float().cpu(), unpatched, labels)

    def apply(self, config: MethodConfig | None) -> nn.Module:
        return Setting(config).apply(self.patched)

    def cost(self, model: nn.Module) -> PromptEstimate | None:
        """Of the last batch, mean over its prompts as if each were alone; `None` of an unpatched model."""
        for prompt in vtok.info(model).prompts:
            if prompt.estimate is not None:
                return prompt.mean_estimate or prompt.estimate
        return None

    def cost_fields(self, costs: list[Any], counts: list[int]) -> dict[str, Any]:
        if any(cost is None for cost in costs):
            return {}
        share = [count / sum(counts) for count in counts]

        def mean(of: Callable[[PromptEstimate], float]) -> float:
            return sum(of(cost) * part for cost, part in zip(costs, share))

        macs = {
            "base": mean(lambda cost: cost.base_macs),
            "model": mean(lambda cost: cost.macs),
            "pruner": mean(lambda cost: cost.reduction_macs),
        }
        layers = [mean(lambda cost, i=i: cost.layers[i].visual) for i in range(self.info.depth)]  # type: ignore[misc]
        return {"tokens": {"in": layers[0], "out": layers[-1], "mean_per_layer": layers}, **macs_fields(macs)}


def prompt_samples(
    model: VisionLanguageModel,
    data: VQAData,
    compared: VQAData | None,
    questions: int | None,
    held_out: int | None,
    seed: int,
    labelled: bool = False,
) -> tuple[Samples, Samples]:
    """Questions to calibrate on and others to compare on; no image is in both.

    Held-out questions are about different images each, so that they are independent.

    Args:
        compared: others; `None` = part the images of `data` in two halves.
        questions: to calibrate on; `None` = `CALIBRATION`.
        held_out: to compare on; `None` = one for every image.
        labelled: every answer is one token, whose number is the label.

    Raises:
        ConfigError: there are fewer.
    """
    if compared is None:
        images = list(dict.fromkeys(q.image for q in data.questions))
        images = [images[row] for row in shuffled(len(images), seed, "images")]
        ours, theirs = set(images[: len(images) // 2]), set(images[len(images) // 2 :])
        calibrated = [q for q in data.questions if q.image in ours]
        others, compared = [q for q in data.questions if q.image in theirs], data
    else:
        calibrated, others = list(data.questions), list(compared.questions)
    calibrated = [calibrated[row] for row in shuffled(len(calibrated), seed)]
    others = [others[row] for row in shuffled(len(others), seed, "held out")]
    one_each = list({question.image: question for question in reversed(others)}.values())[::-1]
    first = calibrated[: calibration_count(questions, len(calibrated), "questions to calibrate on")]
    left = one_each[: enough(held_out, len(one_each), "--held-out-images", "images to compare on, with a question each")]
    return (
        _asked(model, data, first, f"{data.name} (calibration)", labelled),
        _asked(model, compared, left, f"{compared.name} (held out)", labelled),
    )


def _asked(model: VisionLanguageModel, data: VQAData, questions: Sequence[Question], name: str, labelled: bool) -> Samples:
    def read(start: int, stop: int, size: int) -> Iterator[Batch]:
        for first in range(start, stop, size):
            batch = questions[first : min(first + size, stop)]
            inputs = model.inputs([data.read(q.image) for q in batch], [q.text + data.prompt for q in batch])
            yield inputs, torch.tensor([_token(model, q.target) for q in batch]) if labelled else None

    asked = replace(data, questions=questions).identity()
    identity = key_of({"data": data.name, "prompt": data.prompt, "questions": asked})
    return Samples(name, identity, len(questions), read, labelled, dataset=data.name, task="vqa")


def _token(model: VisionLanguageModel, answer: str) -> int:
    """The number of an answer that is one token."""
    return model.processor.tokenizer(answer, add_special_tokens=False)["input_ids"][0]
