"""The part of vLLM that lays out prompts: a placeholder for every token that will stay, and keys that name the settings."""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from vtok.errors import ConfigError
from vtok.serving.choice import TokenChoice
from vtok.serving.layouts import ImageLayout
from vtok.serving.vllm_plugin.families import choice_of
from vtok.serving.vllm_plugin.prompts import shortened


class ImagesOnly:
    """Put in front of vLLM's info of a model: no videos beside the key."""

    def get_supported_mm_limits(self) -> Any:
        """How many items of a modality a prompt may hold; `None` = any number."""
        return {**super().get_supported_mm_limits(), "video": 0}


class ServedProcessor:
    """Put in front of vLLM's processor of a model.

    Attributes:
        architecture: vLLM's name of the model.
    """

    architecture: ClassVar[str]

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        """How the n tokens of one image or video are laid out; of one made of tiles that are pruned by themselves: of a tile.

        Args:
            modality: "image" or "video".
            number: of the item among those of its modality.
            n: its visual tokens.
            items: of the request, as vLLM parsed them.
            made: what the Hugging Face processor made of them.
        """
        raise NotImplementedError

    def placeholders(self, full: list[int], visual: list[bool], layout: ImageLayout, choice: TokenChoice) -> list[int]:
        """What stands for an image in the prompt once tokens have left; all placeholders get features.

        Args:
            full: what stands for it otherwise.
            visual: of each of these tokens, whether it is a placeholder.
            layout: of the image, or of each of the pieces that are pruned by themselves.
            choice: says how many stay.
        """
        return shortened(full, visual, layout.length, choice.count(layout))

    @cached_property
    def choice(self) -> TokenChoice | None:
        """`None` = nothing is pruned."""
        return choice_of(self.info.get_hf_config(), self.architecture)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Keys of all caches of processed and encoded images, some of which outlive an engine."""
        hashes = super()._get_mm_hashes(inputs)
        if self.choice is None:
            return hashes
        end = f"-vtok-{self.choice.digest}"
        return {modality: [one + end for one in listed] for modality, listed in hashes.items()}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if self.choice is None:
            return updates
        return [self._shorter(update, mm_items, out_mm_kwargs) for update in updates]

    def _shorter(self, update: Any, items: Any, made: Any) -> Any:
        """The same prompt update with the placeholders of tokens that stay."""
        choice = self.choice
        assert choice is not None
        modality = update.modality

        def replacement(number: int) -> Any:
            full, visual = parts(update.replacement(number))
            marks = {token for token, here in zip(full, visual) if here}
            if len(marks) != 1 or any(token in marks for token, here in zip(full, visual) if not here):
                raise ConfigError(f"vtok shortens rows of one placeholder, and this model lays out an {modality} otherwise")
            if choice.tower_blocks and isinstance(items.get(modality), EmbeddingItems):
                raise ConfigError(
                    f"{choice.config.name} looks at the vision tower, and features of images came without it: send pixels, or "
                    "serve a method that looks at features alone, such as divprune"
                )
            layout = self.layout_of(modality, number, sum(visual), items, made)
            short = self.placeholders(full, visual, layout, choice)
            return short if all(visual) else PromptUpdateDetails.select_token_id(short, marks.pop())

        return PromptReplacement(modality=modality, target=update.target, replacement=replacement)


def parts(found: Any) -> tuple[list[int], list[bool]]:
    """(tokens that stand for an image or a video, of each whether it is a placeholder), of what vLLM puts into a prompt."""
    if not isinstance(found, PromptUpdateDetails):
        return list(found), [True] * len(found)
    return list(found.full), [True] * len(found.full) if found.is_embed is None else found.is_embed(found.full).tolist()
