"""Where image features lie in what `get_image_features` returns, for every layout that transformers has.

Nearly all models: `pooler_output`, one tensor [n, D] an image (or one of all), and `deepstack_features` for deeper layers of
the LLM. Granite Vision: none but `deepstack_features`, each with the layer that it goes to. Llama 4: `last_hidden_state`, which
the model projects when it merges.

Shapes: n visual tokens of an image, D width of the LLM (Llama 4: of its vision tower).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vtok.patches.hf_vlm.encoded import plain_class


def feature_list(output: Any) -> list[Tensor]:
    """The features [n, D] of every image."""
    return list(getattr(output, _name(output)) if not _layered(output) else _planes(output)[0])


def deep_features(output: Any) -> list[list[Tensor]]:
    """Features that are added to the same tokens in deeper layers of the LLM: for each layer those of every image."""
    planes = _planes(output)
    return [list(features) for features in (planes[1:] if _layered(output) else planes)]


def with_features(output: Any, images: list[Tensor], deep: Sequence[list[Tensor]] = ()) -> Any:
    """A copy of a model output that holds other features of the same shapes, and other ones of deeper layers if it has any."""
    changed = copy.copy(output)
    if _layered(output):
        layers = [layer for layer, _ in output.deepstack_features]
        changed.deepstack_features = list(zip(layers, [images, *deep]))
        return changed
    if deep:
        changed.deepstack_features = list(deep)
    name = _name(output)
    setattr(changed, name, torch.stack(images) if isinstance(getattr(output, name), Tensor) else images)
    return changed


def joined(images: list[Tensor], size: int) -> list[Tensor]:
    """Tensors [n, ...] with every `size` of them, the frames of a video, in one."""
    return images if size == 1 else [torch.cat(images[i : i + size]) for i in range(0, len(images), size)]


def parted(videos: list[Tensor], size: int) -> list[Tensor]:
    """The reverse of `joined`, of frames that have as many tokens."""
    return videos if size == 1 else [part for x in videos for part in x.chunk(size)]


def short_output(output: Any, rows: Tensor, size: int = 1) -> Any:
    """A copy of a model output that holds the kept features alone, deep ones included, in the container the model expects.

    Features stay parted by image, by which generate() repeats them for beams. A model that expects one tensor gets
    [images, n, D] if every image keeps as many, else [1, all, D]: that cannot be repeated for several rows (`repeatable`).

    Args:
        output: of `get_image_features`.
        rows: [features in all] bool.
        size: how many entries of the output are one video, where a model hands over frames.
    """

    def kept(features: Any) -> Any:
        parts = joined([x[stays] for x, stays in zip(features, rows.split([len(x) for x in features]))], size)
        if not isinstance(features, Tensor):
            return parts
        return torch.stack(parts) if len({len(x) for x in parts}) == 1 else torch.cat(parts)[None]

    planes = [kept(features) for features in _planes(output)]
    if _layered(output):
        values: dict[str, Any] = {"deepstack_features": list(zip((layer for layer, _ in output.deepstack_features), planes))}
    else:
        values = {_name(output): kept(getattr(output, _name(output))), **({"deepstack_features": planes} if planes else {})}
    base = plain_class(output)
    return base(**{field.name: values.get(field.name) for field in fields(base)})


def repeatable(output: Any, images: int) -> bool:
    """Whether generate() can repeat a shortened output of so many images for beams, row by row."""
    return len(getattr(output, _name(output)) if not _layered(output) else _planes(output)[0]) == images


def _name(output: Any) -> str:
    """Of the field that holds the features."""
    return "last_hidden_state" if getattr(output, "pooler_output", None) is None else "pooler_output"


def _planes(output: Any) -> list[Any]:
    found = list(getattr(output, "deepstack_features", None) or ())
    return [features for _, features in found] if _layered(output) else found


def _layered(output: Any) -> bool:
    """Whether features come in pairs (layer of the LLM, features of every image), and nowhere else."""
    found = getattr(output, "deepstack_features", None) or ()
    return getattr(output, "pooler_output", None) is None and any(isinstance(pair[0], int) for pair in found)
