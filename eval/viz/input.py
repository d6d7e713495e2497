"""One image as a model takes it, and as it looks then: cropped and scaled like the model's own input, colours undone.

Shapes: [C, H, W] for the model, [H, W, 3] in [0, 1] to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.common.pictures import open_picture
from vtok.eval.common.settings import towers
from vtok.eval.models.data import FASHION_MEAN, FASHION_STD, normalise

_GUESS = 0.5  # mean and deviation where the model does not say


class Prepared(NamedTuple):
    """An image for an encoder: pixels [1, C, H, W], the picture [H, W, 3] in [0, 1], and how it was prepared where the model
    does not say."""

    pixels: Tensor
    picture: np.ndarray
    note: str = ""


def home_of(model: Any) -> str:
    """Folder or name that a Hugging Face model was loaded from, "" for other models and those built from a configuration."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def prepared(model: nn.Module, image: Any, transform: Callable[[Any], Tensor] | None = None, home: str = "") -> Prepared:
    """An image as an encoder takes it.

    Args:
        model: timm's and open_clip's say how they want images, Hugging Face's if they were loaded from a folder or the hub.
        image: path, PIL image, or a tensor [C, H, W] or [1, C, H, W] that is ready.
        transform: PIL image -> [C, H, W], instead of the model's own.
        home: folder or name of Hugging Face's image processor; default: what the model was loaded from.

    Raises:
        ConfigError: no image, or one of another shape than the model takes.
    """
    if isinstance(image, Tensor):
        pixels = image[None] if image.ndim == 3 else image
        if pixels.ndim != 4 or len(pixels) != 1:
            raise ConfigError(f"one image is drawn at a time: a tensor [C, H, W] or [1, C, H, W], got {list(image.shape)}")
        return Prepared(_placed(model, pixels), _stretched(pixels[0]))
    size = towers(model)[0][1].input_size
    opened, note = open_picture(image), ""
    own, mean, std = _own(model, size, home or home_of(model))
    if transform is not None:
        pixels = transform(opened)
        return Prepared(_placed(model, pixels[None]), _stretched(pixels))
    if own is None:
        note = f"the model does not say how it wants images: scaled to {size[2]} x {size[1]} pixels in [-1, 1]"
        mean = std = [_GUESS]
    pixels = _resized(opened, size, _GUESS, _GUESS) if own is None else own(opened)
    return Prepared(_placed(model, pixels[None]), shown(pixels, mean, std), note)


def number_of(image: Any) -> int | None:
    """The number of a bundled image or question, as Python and the command line write it; `None` = it is none."""
    return image if isinstance(image, int) else int(image) if isinstance(image, str) and image.isdigit() else None


def reference_pixels(image: Any) -> Prepared:
    """An image for the reference ViT: a path, a PIL image, or a tensor [28, 28] uint8."""
    gray = image if isinstance(image, Tensor) else torch.tensor(np.array(open_picture(image).convert("L").resize((28, 28))))
    pixels = normalise(gray[None, None])
    return Prepared(pixels, shown(pixels[0], [FASHION_MEAN], [FASHION_STD]))


def _own(
    model: Any, size: tuple[int, int, int], home: str
) -> tuple[Callable[[Any], Tensor] | None, Sequence[float], Sequence[float]]:
    """(PIL image -> [C, H, W], mean, deviation), as the model itself says."""
    if isinstance(getattr(model, "preprocess_cfg", None), Mapping):
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = dict(model.preprocess_cfg)
        return image_transform_v2(PreprocessCfg(**config), is_train=False), config["mean"], config["std"]
    if isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        from timm.data import create_transform, resolve_model_data_config

        config = {**resolve_model_data_config(model), "input_size": size}
        return create_transform(**config, is_training=False), config["mean"], config["std"]
    if home:
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(home)
        except (OSError, ValueError):
            return None, (), ()
        return _by(processor), processor.image_mean, processor.image_std
    return None, (), ()


def _by(processor: Any) -> Callable[[Any], Tensor]:
    def apply(image: Any) -> Tensor:
        made = processor(images=image, return_tensors="pt")
        pixels = made["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise ConfigError(
                f"{type(processor).__name__} cuts images into parts; pass a transform that returns one image [C, H, W]"
            )
        return pixels[0]

    return apply


def _resized(image: Any, size: tuple[int, int, int], mean: float, std: float) -> Tensor:
    channels, height, width = size
    scaled = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = torch.from_numpy(np.array(scaled)).float() / 255
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
    if len(pixels) != channels:
        raise ConfigError(f"the model takes {channels} channels; pass a transform that returns [{channels}, {height}, {width}]")
    return (pixels - mean) / std


def _placed(model: nn.Module, pixels: Tensor) -> Tensor:
    first = next(model.parameters())
    return pixels.to(first.device, first.dtype)


def shown(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[H, W, 3]: colours as they were before the model's normalisation."""
    first, second = (torch.tensor(list(values)).view(-1, 1, 1) for values in (std, mean))
    return _rgb(pixels.float().cpu() * first + second)


def _stretched(pixels: Tensor) -> np.ndarray:
    """[H, W, 3] of a tensor whose normalisation is not known: its own range becomes [0, 1]."""
    values = pixels.float()
    low, high = values.min(), values.max()
    return _rgb((values - low) / (high - low).clamp_min(1e-9))


def _rgb(values: Tensor) -> np.ndarray:
    shown = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    return shown.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
