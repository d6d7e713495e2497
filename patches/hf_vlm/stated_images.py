"""What an image of a stated size is to a Hugging Face vision-language model, and what runs once for every feature of it.

Shapes: sizes are (channels, height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtok.core.prompt import View
from vtok.cost.prefill import StatedImage
from vtok.errors import ConfigError

Size = tuple[int, int, int]
FeaturesOf = Callable[[int], int]  # patches of a view -> features of it


def vision_config(model: Any) -> Any:
    """The config of a model's vision tower."""
    return model.config.vision_config


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def native_size(model: Any) -> Size:
    """The size that the vision tower was built for."""
    config = vision_config(model)
    return (getattr(config, "num_channels", 3), *_pair(config.image_size))


def _patches(model: Any, size: Size) -> tuple[int, int]:
    rows, columns = _pair(vision_config(model).patch_size)
    return size[1] // rows, size[2] // columns


def _square(start: int, n: int) -> View:
    side = math.isqrt(n)
    return View(start, side, side) if side * side == n else View(start, 1, n)


def whole_image(model: Any, size: Size | None, features: FeaturesOf) -> StatedImage:
    """One view of a fixed size.

    Args:
        model: without its language head.
        size: of the image; `None` = the usual one.
        features: patches of a view -> features that the connector makes of them.

    Raises:
        ConfigError: the model reads images of another size.
    """
    native = native_size(model)
    if size is not None and tuple(size) != native:
        raise ConfigError(
            f"{type(model).__name__} reads images of {native[1]} x {native[2]} pixels with {native[0]} channels, whatever size "
            f"they had; input_size={tuple(size)} is another: leave it out, and count tiles as images"
        )
    rows, columns = _patches(model, native)
    return StatedImage(native, 1, (1, rows, columns), (_square(0, features(rows * columns)),))


def any_resolution(model: Any, size: Size | None, features: FeaturesOf) -> StatedImage:
    """LLaVA-NeXT and LLaVA-OneVision: an overview and crops, with padding removed and a newline token behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    channels, side, _ = native = native_size(model)
    size = size or (channels, 2 * side, 2 * side)
    config = model.config
    rows, columns = _patches(model, native)
    crops = get_anyres_image_grid_shape(size[1:], config.image_grid_pinpoints, side)
    here, there = crops[0] * rows, crops[1] * columns
    if size[2] / size[1] > there / here:
        pad = (here - int(round(size[1] * (there / size[2]), 7))) // 2
        here -= 2 * pad
    else:
        pad = (there - int(round(size[2] * (here / size[1]), 7))) // 2
        there -= 2 * pad
    most = getattr(config, "vision_aspect_ratio", None)
    if most is not None:
        ratio = math.sqrt(here * there / (int(most.rpartition("_")[2]) * rows**2))
        if ratio > 1.1:
            here, there = int(here // ratio), int(there // ratio)
    overview = _square(0, features(rows * columns))._replace(overview=True)
    layout = (overview, View(overview.stop, here, there + 1, newline=True))
    return StatedImage(size, crops[0] * crops[1] + 1, (1, rows, columns), layout)


def packed_image(model: Any, size: Size | None, features: FeaturesOf) -> StatedImage:
    """Qwen-VL: patches of an image of any size, whole groups of them."""
    config = vision_config(model)
    size = size or (getattr(config, "in_channels", 3), 448, 448)
    unit = config.patch_size * config.spatial_merge_size
    rows, columns = (max(1, round(side / unit)) for side in size[1:])
    merge = config.spatial_merge_size
    return StatedImage(size, 1, (1, rows * merge, columns * merge), (View(0, rows, columns),))


def shuffled(model: Any, patches: int) -> int:
    """A pixel shuffle: squares of `scale_factor` patches become one feature."""
    return patches // model.config.scale_factor**2


def downsampled(model: Any, patches: int) -> int:
    """InternVL's pixel shuffle: `downsample_ratio` is what is left of a side."""
    return round(patches * model.config.downsample_ratio**2)


def pooled(model: Any, patches: int) -> int:
    """Gemma3: pooled to a number of features, whatever there were."""
    return int(model.config.mm_tokens_per_image)


def merged(model: Any, patches: int) -> int:
    """Qwen-VL: squares of `spatial_merge_size` patches become one feature."""
    return patches // vision_config(model).spatial_merge_size ** 2


def one_each(model: Any, patches: int) -> int:
    """A feature for every patch."""
    return patches


@dataclass(frozen=True)
class VisionCosts:
    """What the vision side of one class of models does beside its tower, whose blocks are priced by themselves.

    Attributes:
        modules: paths of what runs once for every feature; linear layers inside are priced.
        weights: paths of bare matrices that every feature is multiplied with, in place of `modules`.
        per_view: (model, tokens of a view that reach the connector) -> features of it.
        image: (model, size or `None`, patches of a view -> features of it) -> what an image is.
    """

    modules: tuple[str, ...] = ("multi_modal_projector",)
    weights: tuple[str, ...] = ()
    per_view: Callable[[Any, int], int] = one_each
    image: Callable[[Any, Size | None, FeaturesOf], StatedImage] = whole_image
