"""Videos of models that no row describes: their placeholders, which features belong to one video, and to one of its frames.

Nearly all models mark the columns of a video by an id of its own, whether text stands between its frames (times, markers) or
not, and hand over the features of a video as one, frame by frame. Where that is otherwise, it is said here.

Shapes: n visual tokens of a video, F frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vtok.core.prompt import View
from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.hf_vlm.generic.outputs import feature_list, short_output
from vtok.patches.protocol import look_up


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


# Classes whose processors write the placeholder of images for every token of a video.
AS_IMAGES: dict[str, bool] = dict.fromkeys(
    (
        *(_in(f"glm{name}") + f"Glm{cls}Model" for name, cls in (("4v", "4v"), ("46v", "46V"), ("4v_moe", "4vMoe"))),
        _in("glm_ocr") + "GlmOcrModel",
        _in("glm5_next") + "Glm5NextModel",
        _in("molmo2") + "Molmo2Model",
        _in("nemotron_h_omni") + "NemotronH_Omni_Reasoning_V3",
    ),
    True,
)
COMPRESSED = "video_compression_mask"  # [features] bool, False = the processor put no placeholder into the prompt
_CHUNKS = "a long video comes in chunks, which are handed over one by one, and nothing says which belong together"
_PIECES = "its frames, and slices of frames, are handed over one by one, and nothing says which belong together"
# Classes whose features of a video are not one -> why the frames of a video cannot be compared.
PARTED: dict[str, str] = {
    _in("kimi_k25") + "Kimi_K25Model": _CHUNKS,
    _in("minimax_m3_vl") + "MiniMaxM3VLModel": _CHUNKS,
    _in("minicpm_ocr") + "MiniCPMOcrModel": _PIECES,
    _in("minicpmv4_6") + "MiniCPMV4_6Model": _PIECES,
    _in("minicpmv4_7") + "MiniCPMV4_7Model": _PIECES,
}

# Classes that encode videos as they do images.
AS_PICTURES: dict[str, bool] = {_in("perception_lm") + "PerceptionLMModel": True}


def encoder_of(model: Any, modality: str) -> Callable[..., Any] | None:
    """The function of a model that encodes the images or the videos of a prompt, or `None`."""
    function: Callable[..., Any] | None = getattr(model, f"get_{modality}_features", None)
    if function is not None or modality != "video" or not look_up(model, AS_PICTURES):
        return function

    def as_pictures(pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        return model.get_image_features(pixel_values=pixel_values_videos, **kwargs)

    return as_pictures


def placeholders_of(module: Any) -> dict[str, int]:
    """Modality -> id of its placeholder in the prompts of a model."""
    found = {modality: getattr(module.config, f"{modality}_token_id", None) for modality in ("image", "video")}
    if look_up(module, AS_IMAGES):
        found["video"] = found["image"]
    return {modality: token for modality, token in found.items() if token is not None}


def why_no_frames(module: Any) -> str | None:
    """Why the frames of a video of a model cannot be compared, or `None` if they can."""
    return look_up(module, PARTED)


def views(model: Any, modality: str, number: int, first: int, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[View, ...]:
    """One row of tokens for an image. Of a video each frame by itself, as a column: how its tokens lie is not known, but that
    they lie alike in every frame. One row where frames are not known. (`image_features.Views`)
    """
    count = _frames(model, number, kwargs) if modality == "video" and why_no_frames(model) is None else 0
    if not count or len(x) % count:
        return (View(0, 1, len(x)),)
    size = len(x) // count
    return tuple(View(start, size, 1) for start in range(0, len(x), size))


def _frames(model: Any, number: int, kwargs: Mapping[str, Any]) -> int:
    """F of a video, as the inputs state it; 0 = they do not, or tokens have left it already."""
    if COMPRESSED in kwargs and kwargs[COMPRESSED] is not None and not bool(kwargs[COMPRESSED].all()):
        return 0
    frames, grids, sizes = (kwargs.get(name) for name in ("num_frames_per_video", "video_grids", "video_grid_thw"))
    if frames is not None:
        return int(frames[number])
    if grids is not None:
        return int(grids[number][0])
    if sizes is not None:  # ERNIE makes one of two
        return int(sizes[number][0]) // getattr(model.config.vision_config, "temporal_merge_size", 1)
    return _shape(kwargs)[1]


def compressed(output: Any, kwargs: Mapping[str, Any]) -> Any:
    """Encoded videos without the tokens that the processor left out of the prompt (VideoLLaMA 3); the model is then to be
    called without that mask. One that does not fit is left to the model to refuse.
    """
    mask = kwargs.get(COMPRESSED)
    if mask is None or bool(mask.all()) or len(mask) != sum(len(x) for x in feature_list(output)):
        return output
    return short_output(output, mask)


def _shape(kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """(videos, frames of each) of pixels [videos, frames, C, H, W]; zeros where pixels come in another way."""
    pixels = kwargs.get("pixel_values_videos")
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else kwargs.get("video_shape", ())
    return (shape[0], shape[1]) if len(shape) == 5 else (0, 0)


def pieces(modality: str, original: Sequence[int], total: int, kwargs: Mapping[str, Any]) -> int:
    """How many of the features that a model hands over make one video: 1, or all frames (Video-LLaVA, Perception LM).

    Args:
        modality: "image" or "video".
        original: which of the features of the call each of these is, if generate() has repeated them for beams.
        total: features of the call.
        kwargs: of the call.

    Raises:
        StateError: frames of a video are missing, or not in their order.
    """
    videos, frames = _shape(kwargs) if modality == "video" else (0, 0)
    if frames <= 1 or total != videos * frames:
        return 1
    starts = range(0, len(original), frames)
    if any(
        list(original[i : i + frames]) != [*range(original[i], original[i] + frames)] or original[i] % frames for i in starts
    ):
        raise StateError(
            f"the features of a video of {frames} frames come frame by frame, and those of mm_encoder_outputs are not all of "
            "them in order; pass what get_video_features returned, or pixels"
        )
    return frames


def check(model: Any, modality: str) -> None:
    """Raises for a model that shortens videos itself when it merges them into the prompt."""
    rate = getattr(model, "video_pruning_rate", 0) if modality == "video" else 0
    if rate:
        raise UnsupportedModelError(
            f"{type(model).__name__} drops tokens of videos itself (video_pruning_rate={rate}), by what vtok would have "
            "changed; set model.video_pruning_rate to 0"
        )
