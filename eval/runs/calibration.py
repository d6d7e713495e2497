"""Images for budgets of methods whose counts depend on the image, prepared as a task prepares its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.models.clip import DualEncoder
from vtok.eval.models.reference import load_reference_pages, load_reference_pictures
from vtok.eval.tasks.fashion import open_fashion
from vtok.eval.tasks.image_folder import CheckedImages, Sample, open_dataset
from vtok.eval.tasks.pictures import CALIBRATION, CLIP_ART, PHOTOGRAPHS, open_pictures

PAGES = 48  # of "reference-pages/calibration"
PICTURES = 14  # of "clip-art/calibration": an encoder of ordinary size takes its time, and every step of a search runs them


def images(brought: str, named: str | None, model: nn.Module | DualEncoder, options: Any, count: int) -> Tensor:
    """[., C, H, W], on the model's device and in its type.

    Args:
        brought: data that come with the model and the task that they are for, as `BUNDLED_DATA` names them.
        named: data of the task's kind; `None` = what comes with vtok.
        model: a classifier, or a dual encoder.
        options: of the task.
        count: images at most, evenly spaced.

    Raises:
        ConfigError: none of them can be read.
    """
    mode = "L" if isinstance(model, nn.Module) and _channels(model, options) == 1 else "RGB"
    if named is None:
        data = _BUNDLED[brought](count)
    else:
        data = _BY_NAME[named](count) if named in _BY_NAME else _named(named, options, mode, count)
    net = model if isinstance(model, nn.Module) else model.net
    data.transform = _transform(model, options) if isinstance(model, nn.Module) else model.preprocess
    found = [item.image for item in (data[row] for row in range(len(data))) if isinstance(item, Sample)]
    if not found:
        raise ConfigError(f"calibration: none of the {len(data)} images of {named} could be read")
    first = next(net.parameters())
    return torch.stack(found).to(first.device, first.dtype)


def _named(named: str, options: Any, mode: str, count: int) -> CheckedImages:
    from vtok.eval.tasks.clip.captions import open_captions

    if named.endswith(".json"):
        return CheckedImages(open_captions(named, options.split, getattr(options, "images", ""), None), mode, count)
    return open_dataset(named, getattr(options, "dataset", ""), options.split, "", mode, count)


def _pictures(pixels: Callable[[], Tensor]) -> Callable[[int], CheckedImages]:
    """Reads images from pixels [n, 3, H, W], uint8."""

    def read(count: int) -> CheckedImages:
        from PIL import Image

        return CheckedImages([(Image.fromarray(one.permute(1, 2, 0).numpy()), 0) for one in pixels()], "RGB", count)

    return read


# Data that come with vtok -> what reads so many of the bundled images that its budgets are solved on.
_BUNDLED: dict[str, Callable[[int], CheckedImages]] = {
    "fashion-mnist": lambda count: open_fashion(count, split="calibration"),
    "reference-pages": _pictures(lambda: load_reference_pages("calibration").images),
    "reference-pictures": _pictures(lambda: load_reference_pictures("calibration")[0]),
    **dict.fromkeys((CLIP_ART, PHOTOGRAPHS), lambda count: open_pictures(CALIBRATION, min(count, PICTURES))),
}


# Names that a run's `calibration` may have: what the demo's budgets are solved on.
_BY_NAME: dict[str, Callable[[int], CheckedImages]] = {
    "fashion-mnist/calibration": lambda count: open_fashion(count, "fashion-mnist/calibration"),
    CALIBRATION: lambda count: open_pictures(CALIBRATION, min(count, PICTURES)),
    "reference-pages/calibration": _pictures(lambda: load_reference_pages("calibration").images[:PAGES]),
}


def _channels(model: nn.Module, options: Any) -> int:
    from vtok.eval.tasks.timm_pipeline import data_config

    return int(data_config(model, options)["input_size"][0])


def _transform(model: nn.Module, options: Any) -> Any:
    from timm.data import create_transform

    from vtok.eval.tasks.timm_pipeline import data_config

    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{name: data_config(model, options)[name] for name in wanted}, is_training=False)
