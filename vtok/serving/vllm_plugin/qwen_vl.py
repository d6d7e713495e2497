"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: grids of any size, positions in time, height and width; what stays keeps its position.

Which tokens stay is mostly known only when an image has been encoded: their coordinates travel as extra columns of features
(`vtok.serving.vllm_plugin.positions`), which vLLM's runners hand to `recompute_mrope_positions` where "multimodal pruning" is
on. vLLM turns that on by --video-pruning-rate alone; here the model does, in the worker. Methods that look at no feature need
none of this. Videos of Qwen2-VL and Qwen2.5-VL are served as well; the later ones have text between frames, and are not.
"""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5ProcessingInfo
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vtok.errors import ConfigError
from vtok.serving.choice import TokenChoice
from vtok.serving.layouts import ImageLayout, frames_layout
from vtok.serving.vllm_plugin.positions import Grid, placed, prompt_positions, with_columns, without_columns
from vtok.serving.vllm_plugin.processor import ImagesOnly, ServedProcessor
from vtok.serving.vllm_plugin.worker import WithoutGraphs, start

_ON = 1e-9  # a pruning rate that prunes no video


def _merged(grid_thw: Sequence[int], merge: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of visual tokens, of a grid of patches."""
    t, h, w = (int(side) for side in grid_thw)
    return t, h // merge, w // merge


class GridProcessor(ServedProcessor):
    """Put in front of vLLM's processor of a Qwen-VL."""

    def layout_of(self, modality: str, number: int, n: int, items: Any, made: Any) -> ImageLayout:
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return frames_layout(*_merged(made[modality][number][f"{modality}_grid_thw"].data.tolist(), merge), modality)

    def placeholders(self, full: list[int], visual: list[bool], layout: ImageLayout, choice: TokenChoice) -> list[int]:
        """As many as stay of the grid: what vLLM asks for is one less of a video where the model has turned pruning on."""
        return [full[0]] * choice.count(layout) if all(visual) else super().placeholders(full, visual, layout, choice)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM measures its memory with: images, here with the text behind them that `apply` asks for."""
        found = super().get_dummy_inputs(*args, **kwargs)
        end = self.info.get_hf_config().vision_end_token_id
        return dataclasses.replace(found, prompt=[*found.prompt, end])

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """What vLLM's own makes of a request.

        Raises:
            ConfigError: the prompt ends with an image or a video: nothing says where the answer's positions begin.
        """
        config = self.info.get_hf_config()
        if inputs.prompt and inputs.prompt[-1] in (config.image_token_id, config.video_token_id):
            raise ConfigError(
                "the prompt ends with an image or a video, and positions behind one that was pruned are told by the text "
                "there: end with text, as chat templates do"
            )
        return super().apply(inputs, *args, **kwargs)


class GridModel(WithoutGraphs):
    """Put in front of vLLM's Qwen-VL.

    Attributes:
        architecture: vLLM's name of the model.
        supports_multimodal_pruning: tells vLLM's runners to ask `recompute_mrope_positions`.
    """

    architecture: ClassVar[str]
    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        choice = start(self.architecture, vllm_config)
        settings = vllm_config.model_config.get_multimodal_config()
        if settings.video_pruning_rate not in (None, 0, _ON):
            raise ConfigError('vLLM\'s --video-pruning-rate and the key "vtok" would both prune: leave one of them out')
        if choice is not None and not choice.fixed_rows:
            settings.video_pruning_rate = _ON  # of this worker alone
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtok: TokenChoice | None = choice

    def _process_image_input(self, image_input: Any) -> Any:
        features = super()._process_image_input(image_input)
        return features if self.vtok is None else self._vtok_kept(features, image_input, "image")

    def _process_video_input(self, video_input: Any) -> Any:
        features = super()._process_video_input(video_input)
        return features if self.vtok is None else self._vtok_kept(features, video_input, "video")

    def _vtok_kept(self, features: Any, given: Any, modality: str) -> tuple[Tensor, ...]:
        """Images or videos [n, D] -> [k, D], with columns for coordinates [k, D + 6] where these are not known before."""
        assert self.vtok is not None
        merge = self.visual.spatial_merge_size
        width = self.config.get_text_config().hidden_size
        sizes = given[f"{modality}_grid_thw"].tolist()
        seconds = given.get("second_per_grid_ts") if modality == "video" else None
        out = []
        for number, (x, size) in enumerate(zip(features, sizes)):
            frames, rows, columns = _merged(size, merge)
            kept = self.vtok.choose(x[None, :, :width], frames_layout(frames, rows, columns, modality))
            part = kept.apply(x[None])[0]  # features of deeper tower layers stand beside
            if not self.vtok.fixed_rows:
                pace = self._vtok_pace(modality, None if seconds is None else seconds[number])
                grid = Grid(0, len(part), frames, rows, columns, pace)
                part = with_columns(part, grid.coordinates(kept.rows[0]))
            out.append(part)
        return tuple(out)

    def _vtok_pace(self, modality: str, seconds: Any) -> float:
        """Positions in time from one frame to the next, so many seconds later; `None` = not said."""
        if modality == "image":
            return 1.0
        every = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return float(every) * (1.0 if seconds is None else float(seconds))

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if self.vtok is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return image_embeds_split

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if self.vtok is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        return video_embeds_split

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, L] of a prompt before its images are encoded, and of what follows it."""
        if self.vtok is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        return prompt_positions(len(input_tokens), self._vtok_grids(mm_features))

    def _vtok_grids(self, mm_features: Any) -> Iterator[Grid]:
        assert self.vtok is not None
        merge = self.config.vision_config.spatial_merge_size
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            data, modality = feature.data, feature.modality
            grid = _merged(data[f"{modality}_grid_thw"].data.tolist(), merge)
            kept = self.vtok.rows(frames_layout(*grid, modality)) if self.vtok.fixed_rows else None
            seconds = data.get("second_per_grid_ts")
            pace = self._vtok_pace(modality, None if seconds is None else seconds.data)
            yield Grid(feature.mm_position.offset, feature.mm_position.length, *grid, pace=pace, kept=kept)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Takes the columns off the features of this step, and puts what they say at its placeholders."""
        if self.vtok is None:
            return super().recompute_mrope_positions(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
        parts = [without_columns(x) for x in multimodal_embeddings]
        with gpu_sync_allowed():
            if parts:
                ids = torch.as_tensor(input_ids, device=mrope_positions.device)
                config = self.config
                media = (ids == config.image_token_id) | (ids == config.video_token_id)
                mrope_positions = placed(mrope_positions, media, [at for _, at in parts], num_computed_tokens)
            following = int(mrope_positions.max()) + 1
        return [x for x, _ in parts], mrope_positions, following - mrope_positions.shape[1]


def _pruning_on(runner: Any) -> None:
    """What vLLM's runners for GPUs do once a model is loaded, and its runner for CPUs leaves out."""
    choice = getattr(runner.get_model(), "vtok", None)
    if choice is not None:
        runner.is_multimodal_pruning_enabled = not choice.fixed_rows


def _complete(runner: Any) -> None:
    """Lets a class of runners do so; once."""
    load = runner.load_model
    if getattr(load, "vtok", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        _pruning_on(self)

    load_model.vtok = True
    runner.load_model = load_model


_complete(CPUModelRunner)


class VtokQwen2Processor(GridProcessor, Qwen2VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Qwen2VLForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(VtokQwen2Processor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder)
class VtokQwen2(GridModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL, which hands the LLM the features that stay."""

    architecture = "Qwen2VLForConditionalGeneration"


class VtokQwen25Processor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Qwen2_5_VLForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    VtokQwen25Processor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VtokQwen25(GridModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, which hands the LLM the features that stay."""

    architecture = "Qwen2_5_VLForConditionalGeneration"


class VtokQwen3Info(ImagesOnly, Qwen3VLProcessingInfo):
    """vLLM's info without videos."""


class VtokQwen3Processor(GridProcessor, Qwen3VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Qwen3VLForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(VtokQwen3Processor, info=VtokQwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VtokQwen3(GridModel, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, which hands the LLM the features that stay."""

    architecture = "Qwen3VLForConditionalGeneration"


class VtokQwen35Info(ImagesOnly, Qwen3_5ProcessingInfo):
    """vLLM's info without videos."""


class VtokQwen35Processor(GridProcessor, Qwen3VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    architecture = "Qwen3_5ForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(VtokQwen35Processor, info=VtokQwen35Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VtokQwen35(GridModel, Qwen3_5ForConditionalGeneration):
    """vLLM's Qwen3.5, which hands the LLM the features that stay."""

    architecture = "Qwen3_5ForConditionalGeneration"
