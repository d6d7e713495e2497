"""Vision-language models of Hugging Face by name or folder, with the processor that makes their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtok.errors import ConfigError, MissingExtraError

REFERENCE_LLAVA, REFERENCE_NEXT = "reference-llava", "reference-llava-next"


class BeginsOnce:
    """A processor for prompts that may begin with the token that begins a sequence, as some chat templates make them.

    Its tokenizer would put that token in front of them once more: a prompt is taken as it is then, as transformers' own
    `apply_chat_template(tokenize=True)` does. Everything else is the processor's.

    Args:
        processor: images and prompts -> inputs of a model.
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
    """A model that answers questions about images.

    Attributes:
        net: the model, with `generate()`.
        processor: images and prompts -> inputs of the model.
        name: under which it was found.
    """

    net: Any
    processor: Any
    name: str

    def prompt(self, question: str, image: bool = True) -> str:
        """What is asked: one user turn of the processor's chat template, or the image's placeholder and the question.

        Args:
            question: the text.
            image: whether there is one.
        """
        if getattr(self.processor, "chat_template", None):
            content = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return f"{self.processor.image_token} {question}" if image else question

    def inputs(self, images: Sequence[Any], questions: Sequence[str]) -> Any:
        """One batch, padded on the left: image i belongs to question i; all of them are `None` for questions without one.

        Raises:
            ConfigError: the processor cannot make a batch of it.
        """
        seen = any(image is not None for image in images)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # a prompt ends where its answer begins
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            made = BeginsOnce(self.processor)(
                images=[[image] for image in images] if seen else None,
                text=[self.prompt(question, seen) for question in questions],
                padding=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{type(self.processor).__name__}, the processor of {self.name}, cannot prepare questions with images: {error}"
            ) from error
        first = next(self.net.parameters())
        return made.to(first.device, first.dtype)

    def texts(self, ids: torch.Tensor) -> list[str]:
        """Token ids [B, T] of answers -> texts."""
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def load_vlm(name: str) -> VisionLanguageModel:
    """A vision-language model in eval mode.

    Args:
        name: `"reference-llava"` or `"reference-llava-next"`, which come with vtok; or a name or folder of Hugging Face.

    Raises:
        ConfigError: no such model, or one without a processor or without weights.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    if name in _references():
        load, processor = _references()[name]
        return VisionLanguageModel(load(), processor(), name)
    try:
        net = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot load {name} as a vision-language model with its processor: {error}") from error
    if getattr(processor, "tokenizer", None) is None:
        raise ConfigError(f"{name} comes with a {type(processor).__name__} instead of a processor for images and prompts")
    return VisionLanguageModel(net, processor, name)


def _references() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    from vtok.eval.models.reference_next import load_reference_llava_next, load_reference_llava_next_processor
    from vtok.eval.models.reference_vlm import load_reference_llava, load_reference_llava_processor

    return {
        REFERENCE_LLAVA: (load_reference_llava, load_reference_llava_processor),
        REFERENCE_NEXT: (load_reference_llava_next, load_reference_llava_next_processor),
    }
