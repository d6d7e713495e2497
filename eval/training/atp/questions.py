"""What ATP's modules are trained and measured on: questions about images, and the model with its processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.errors import ConfigError, brief
from vtok.eval.common.pictures import open_picture
from vtok.eval.models.scenes import draw_scene, one_of_each
from vtok.eval.models.vlm import REFERENCE_LLAVA, BeginsOnce, VisionLanguageModel, load_vlm
from vtok.eval.tasks.vqa.sources.reading import text_of
from vtok.eval.training.llava import load_lessons
from vtok.reading import exists, from_json, read_text

IGNORED = -100
HELD_OUT = 178  # pictures that the reference LLaVA was not trained on either, see `training.llava`


class Asked(NamedTuple):
    """Questions with their answers; `rows` says which of `images` (what the processor takes, or paths) each is about."""

    images: Sequence[Any]
    questions: Sequence[str]
    answers: Sequence[str]
    rows: Sequence[int]

    def different(self, numbers: Iterable[int], count: int) -> list[int]:
        """The first `count` of these questions that are about an image each of its own."""
        chosen: dict[int, int] = {}
        for number in numbers:
            chosen.setdefault(self.rows[number], number)
            if len(chosen) == count:
                break
        return list(chosen.values())


class Batch(NamedTuple):
    """inputs of the model with answers behind the questions; labels [B, L], `IGNORED` outside the answers."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Host(NamedTuple):
    """The frozen model and the processor that makes its prompts."""

    model: Any
    processor: Any

    def prompt(self, question: str) -> str:
        """See `VisionLanguageModel.prompt`."""
        return VisionLanguageModel(self.model, self.processor, "").prompt(question)

    def inputs(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """One batch, padded on the left."""
        self.processor.tokenizer.padding_side = "left"
        opened = [open_picture(image) if isinstance(image, (str, Path)) else image for image in images]
        made = BeginsOnce(self.processor)(images=opened, text=list(texts), padding=True, return_tensors="pt")
        weight = next(self.model.parameters())
        return dict(made.to(weight.device, weight.dtype))

    def batch(self, asked: Asked, numbers: Sequence[int]) -> Batch:
        """Questions with their answers behind them."""
        prompts = [self.prompt(asked.questions[i]) for i in numbers]
        answered = [f"{prompt} {asked.answers[i]}" for prompt, i in zip(prompts, numbers)]
        inputs = self.inputs([asked.images[asked.rows[i]] for i in numbers], answered)
        tokens = (self.processor.tokenizer(texts)["input_ids"] for texts in (prompts, answered))
        count = torch.tensor([len(b) - len(a) for a, b in zip(*tokens)])
        ids = inputs["input_ids"]
        place = torch.arange(ids.shape[1], 0, -1, device=ids.device)  # 1 at the last token
        return Batch(inputs, ids.where(place <= count[:, None].to(ids.device), IGNORED))


def load_host(folder: Path | None) -> Host:
    """The model of a folder, or of a name, in eval mode, frozen, with its processor; `None` = the reference LLaVA."""
    found = load_vlm(REFERENCE_LLAVA if folder is None else str(folder))
    return Host(found.net.requires_grad_(False), found.processor)


def as_asked(questions: Any) -> Asked:
    """Questions as the reference models have them."""
    return Asked(list(questions.pictures), questions.texts, questions.answers, questions.rows.tolist())


def load_easyvqa_questions(data: Path | None) -> Asked:
    """easy-VQA's training questions, those about the held-out pictures left out."""
    return as_asked(load_lessons(HELD_OUT, data)[0])


def load_scene_questions(split: str, numbers: range) -> Asked:
    """A question of every kind about each of these scenes of a split."""
    texts, answers, scenes, _ = zip(*one_of_each(split, numbers))
    images = [draw_scene(split, number).image for number in numbers]
    return Asked(images, texts, answers, [scene - numbers.start for scene in scenes])


def load_questions_file(path: Path) -> Asked:
    """Questions of a JSON lines file. Raises `ConfigError` if it is missing, empty, or a line lacks `image`, `question` or
    `answer`.
    """
    if not exists(path):
        raise ConfigError(f"{brief(path)} does not exist; pass JSON lines with image, question and answer")
    images: dict[str, int] = {}
    questions, answers, rows = [], [], []
    for number, line in enumerate(read_text(path, "questions", 1 << 30).splitlines(), 1):
        try:
            entry = from_json(line, "no JSON")
            image, question, answer = entry["image"], entry["question"], entry["answer"]
        except (ConfigError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: expected an object with image, question and answer ({error})") from error
        place = f"{path}:{number}"
        rows.append(images.setdefault(str(path.parent / text_of(image, "'image'", place)), len(images)))
        questions.append(text_of(question, "'question'", place))
        answers.append(text_of(answer, "'answer'", place))
    if not questions:
        raise ConfigError(f"{path} holds no questions")
    return Asked(list(images), questions, answers, rows)
