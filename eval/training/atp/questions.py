"""What ATP's modules are trained and measured on: questions about images, and the model with its processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.errors import ConfigError, brief
from vtok.eval.common.pictures import open_picture
from vtok.eval.models.reference_vlm import load_reference_llava, load_reference_llava_processor
from vtok.eval.models.vlm import REFERENCE_SCENES, BeginsOnce
from vtok.eval.tasks.vqa.sources.reading import text_of
from vtok.eval.training.llava import load_lessons
from vtok.reading import exists, from_json, read_text

IGNORED = -100
HELD_OUT = 178  # pictures that the reference LLaVA was not trained on either, see `training.llava`


class Asked(NamedTuple):
    """Questions about images.

    Attributes:
        images: what the processor takes, or paths.
        questions: one for each of `rows`.
        answers: likewise.
        rows: number of the image that each is about.
    """

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
        """One user turn of the processor's chat template, or the image's placeholder and the question."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return f"{self.processor.image_token} {question}"

    def inputs(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """One batch, padded on the left."""
        self.processor.tokenizer.padding_side = "left"
        made = BeginsOnce(self.processor)(
            images=[_opened(image) for image in images], text=list(texts), padding=True, return_tensors="pt"
        )
        weight = next(self.model.parameters())
        return dict(made.to(weight.device, weight.dtype))

    def batch(self, asked: Asked, numbers: Sequence[int]) -> Batch:
        """Questions with their answers behind them."""
        prompts = [self.prompt(asked.questions[i]) for i in numbers]
        answered = [f"{prompt} {asked.answers[i]}" for prompt, i in zip(prompts, numbers)]
        inputs = self.inputs([asked.images[asked.rows[i]] for i in numbers], answered)
        count = torch.tensor([len(b) - len(a) for a, b in zip(self._tokens(prompts), self._tokens(answered))])
        ids = inputs["input_ids"]
        place = torch.arange(ids.shape[1], 0, -1, device=ids.device)  # 1 at the last token
        return Batch(inputs, ids.where(place <= count[:, None].to(ids.device), IGNORED))

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.processor.tokenizer(texts)["input_ids"]


def _opened(image: Any) -> Any:
    return open_picture(image) if isinstance(image, (str, Path)) else image


def load_host(folder: Path | None) -> Host:
    """The model of a folder in eval mode, frozen, with its processor; `None` = the reference LLaVA; or "reference-scenes"."""
    if folder is None:
        return Host(load_reference_llava().requires_grad_(False), load_reference_llava_processor())
    if str(folder) == REFERENCE_SCENES:
        from vtok.eval.models.scenes import load_reference_scenes, make_scenes_processor

        return Host(load_reference_scenes().requires_grad_(False), make_scenes_processor())
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    return Host(model, AutoProcessor.from_pretrained(folder))


def load_easyvqa_questions(data: Path | None) -> Asked:
    """easy-VQA's training questions, those about the held-out pictures left out."""
    found, _, _ = load_lessons(HELD_OUT, data)
    return Asked(list(found.pictures), found.texts, found.answers, found.rows.tolist())


def load_scene_questions(split: str, numbers: range) -> Asked:
    """A question of every kind about each of these scenes of a split."""
    from vtok.eval.models.scenes import draw_scene, one_of_each

    found = one_of_each(split, numbers)
    images = [draw_scene(split, number).image for number in numbers]
    return Asked(
        images, [one.text for one in found], [one.answer for one in found], [one.number - numbers.start for one in found]
    )


def load_questions_file(path: Path) -> Asked:
    """Questions of a JSON lines file.

    Raises:
        ConfigError: it is missing, empty, or a line lacks `image`, `question` or `answer`.
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
        file = str(path.parent / text_of(image, "'image'", f"{path}:{number}"))
        rows.append(images.setdefault(file, len(images)))
        questions.append(text_of(question, "'question'", f"{path}:{number}"))
        answers.append(text_of(answer, "'answer'", f"{path}:{number}"))
    if not questions:
        raise ConfigError(f"{path} holds no questions")
    return Asked(list(images), questions, answers, rows)
