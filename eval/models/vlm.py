"""Vision-language models of Hugging Face by name or folder, with the processor that makes their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vtok.errors import ConfigError, unknown
from vtok.eval.common.videos import Clip
from vtok.eval.models.assets import library
from vtok.reading import is_folder

REFERENCE_LLAVA, REFERENCE_NEXT = "reference-llava", "reference-llava-next"
REFERENCE_SCENES, REFERENCE_PRINT = "reference-scenes", "reference-print"
BUNDLED = (REFERENCE_LLAVA, REFERENCE_NEXT, REFERENCE_SCENES, REFERENCE_PRINT)


class BeginsOnce:
    """A processor for prompts that may begin with the token that begins a sequence, as some chat templates make them.

    Its tokenizer would put that token in front of them once more: a prompt is taken as it is then, as transformers' own
    `apply_chat_template(tokenize=True)` does. Everything else is the processor's.
    """

    def __init__(self, processor: Any):
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        if name == "_processor":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(self, *args: Any, text: Any = None, **kwargs: Any) -> Any:
        begin = getattr(getattr(self._processor, "tokenizer", None), "bos_token", None)
        texts = [text] if isinstance(text, str) else text
        if begin and texts and all(isinstance(one, str) and one.startswith(begin) for one in texts):
            kwargs.setdefault("add_special_tokens", False)
        return self._processor(*args, text=text, **kwargs)


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model that answers questions about images."""

    net: Any  # the model, with `generate()`
    processor: Any  # images and prompts -> inputs of the model
    name: str  # under which it was found
    # whether frames of a video are shown as so many images, which is not what models for videos expect
    frames_as_images: bool = False

    def prompt(self, question: str, image: bool = True, shown: Sequence[str] = ("image",)) -> str:
        """What is asked: one user turn of the processor's chat template, or the placeholders and the question.

        `shown` in front of the question: "image" or "video", once for each; nothing without `image`.
        """
        shown = shown if image else ()
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": kind} for kind in shown), {"type": "text", "text": question}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return " ".join([*(getattr(self.processor, f"{kind}_token") for kind in shown), question])

    def inputs(self, images: Sequence[Any], questions: Sequence[str]) -> Any:
        """One batch, padded on the left: image i belongs to question i; all of them are `None` for questions without one.

        An image is a PIL image, a list of images that are shown together, or a `Clip`, frames of a video. Raises `ConfigError`
        if the processor cannot make a batch of it.
        """
        seen = [self._seen(image) for image in images]
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # a prompt ends where its answer begins
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        clips = [one for one in seen if isinstance(one, Clip)]
        pictures = [one for one in seen if isinstance(one, list)]
        kinds = [("video",) if isinstance(one, Clip) else ("image",) * len(one or ()) for one in seen]
        try:
            made = BeginsOnce(self.processor)(
                images=pictures or None,
                text=[self.prompt(question, shown=shown) for question, shown in zip(questions, kinds)],
                padding=True,
                return_tensors="pt",
                **(self._videos(clips) if clips else {}),
            )
        except (ValueError, TypeError, KeyError) as error:
            what = "videos" if clips else "images"
            raise ConfigError(
                f"{type(self.processor).__name__}, the processor of {self.name}, cannot prepare questions with {what}: {error}"
            ) from error
        first = next(self.net.parameters())
        return made.to(first.device, first.dtype)

    def _seen(self, image: Any) -> Any:
        """A list of images, a `Clip`, or `None`."""
        if isinstance(image, Clip) and self.frames_as_images:
            return list(image.frames)
        if isinstance(image, Clip) and getattr(self.processor, "video_processor", None) is None:
            raise ConfigError(
                f"{type(self.processor).__name__}, the processor of {self.name}, reads no videos; with --frames-as-images "
                "their frames are shown as so many images"
            )
        return image if image is None or isinstance(image, (Clip, list)) else [image]

    @staticmethod
    def _videos(clips: Sequence[Clip]) -> dict[str, Any]:
        """Keywords of a processor: frames that are chosen already, and when they were."""
        facts = [
            {"total_num_frames": c.total, "fps": c.fps, "frames_indices": list(c.numbers), "duration": c.total / c.fps}
            for c in clips
        ]
        return {
            "videos": [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips],
            "do_sample_frames": False,
            "video_metadata": facts,
        }

    def texts(self, ids: torch.Tensor) -> list[str]:
        """Token ids [B, T] of answers -> texts."""
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def load_vlm(name: str) -> VisionLanguageModel:
    """A vision-language model in eval mode, by the name of one that comes with vtok (`BUNDLED`), or a name or folder of Hugging
    Face.

    Raises:
        ConfigError: no such model, or one without a processor or without weights.
        MissingExtraError: transformers is not installed.
    """
    transformers = library("transformers")
    if name in _references():
        load, processor = _references()[name]
        return VisionLanguageModel(load(), processor(), name)
    if "/" not in name and not is_folder(name):
        where = f"{', '.join(_references())} come with vtok; give a Hugging Face model as OWNER/NAME, or a folder"
        raise unknown("vision-language model", name, _references(), where)
    try:
        net = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot load {name} as a vision-language model with its processor: {error}") from error
    if getattr(processor, "tokenizer", None) is None:
        raise ConfigError(f"{name} comes with a {type(processor).__name__} instead of a processor for images and prompts")
    return VisionLanguageModel(net, processor, name)


def _references() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    from vtok.eval.models.pages import load_reference_print, make_print_processor
    from vtok.eval.models.reference_next import load_reference_llava_next, load_reference_llava_next_processor
    from vtok.eval.models.reference_vlm import load_reference_llava, load_reference_llava_processor
    from vtok.eval.models.scenes import load_reference_scenes, make_scenes_processor

    return {
        REFERENCE_LLAVA: (load_reference_llava, load_reference_llava_processor),
        REFERENCE_NEXT: (load_reference_llava_next, load_reference_llava_next_processor),
        REFERENCE_SCENES: (load_reference_scenes, make_scenes_processor),
        REFERENCE_PRINT: (load_reference_print, make_print_processor),
    }
