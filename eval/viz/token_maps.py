"""Token maps of one image, layer by layer: `visualize(model, method, image)`.

Shapes: G x G patches, P prefix tokens, depth blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, StateError
from vtok.eval.common.settings import Setting, model_name, towers, weight_sharing_copy
from vtok.eval.models.by_name import REFERENCE, load_model, short_name
from vtok.eval.models.clip import REFERENCE as REFERENCE_CLIP
from vtok.eval.models.vlm import BUNDLED, VisionLanguageModel, load_vlm
from vtok.eval.viz.draw import Stage, TokenMaps, View
from vtok.eval.viz.input import Prepared, home_of, number_of, prepared, reference_pixels
from vtok.eval.viz.overlay import groups_by_block, tokens_left
from vtok.targets import vlm_targets
from vtok.targets.resolve import Method, run_of

_TRANSFORMERS = "transformers:"


def visualize(
    model: str | nn.Module | VisionLanguageModel,
    method: Method = "tome",
    image: Any = 0,
    *,
    question: str | None = None,
    processor: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    calibration: Any = None,
    pretrained: bool = True,
    new_tokens: int = 8,
    **params: Any,
) -> TokenMaps:
    """What a method does to one image: after every block of an encoder; of a vision-language model also before and in its LLM.

    Args:
        model: a name of the command line (timm's, `open_clip:NAME/TAG`, `transformers:OWNER/NAME`, `reference`,
            `reference-clip`, `reference-llava`, `reference-llava-next`, `reference-scenes`, `reference-print`), or an unpatched
            model, which is left as it is; of dual encoders the image tower is drawn.
        method: as for `vtok.patch`.
        image: path, PIL image, a tensor [C, H, W] that is ready for an encoder, or the number of a bundled test image (of a
            bundled question, for the reference vision-language models).
        question: to a vision-language model; default: the bundled one, else "What is shown here?".
        processor: of a vision-language model given as a module.
        transform: PIL image -> [C, H, W] for an encoder, instead of the model's own.
        calibration: as for `vtok.patch`.
        pretrained: load weights of a model given by name.
        new_tokens: length of an answer at most.
        **params: parameters of the method, or `flops`.

    Returns:
        The maps: `.save("maps.png")`, `.save("maps.gif")`; a notebook shows the sheet.

    Raises:
        ConfigError: no such image, or one that the model cannot take.
        UnsupportedModelError, UnknownNameError: as `vtok.patch` does.
    """
    setting = Setting(method, {**params, **({} if calibration is None else {"calibration": calibration})})
    if isinstance(model, str):
        name = short_name(model)
        model = _load(name, question, pretrained)
    else:
        name = model.name if isinstance(model, VisionLanguageModel) else model_name(model)
    if not isinstance(model, VisionLanguageModel) and vlm_targets(model):
        if processor is None:
            raise ConfigError(f"{type(model).__name__} answers questions: pass its processor (processor=...)")
        model = VisionLanguageModel(model, processor, name)
    if isinstance(model, VisionLanguageModel):
        from vtok.eval.viz.prompt import prompt_maps

        return prompt_maps(model, setting, image, question, new_tokens)
    home = name.removeprefix(_TRANSFORMERS) if name.startswith(_TRANSFORMERS) else home_of(model)
    tower = image_tower(model)
    return encoder_maps(tower, setting, _image(name, tower, image, transform, home), f"{name}: {setting.title}")


def encoder_maps(model: nn.Module, setting: Setting, image: Prepared, title: str) -> TokenMaps:
    """Maps of an image that is ready for an unpatched encoder, after every block of a patched copy."""
    channels, height, width = image.pixels.shape[1:]
    net = weight_sharing_copy(model).eval()
    _, tower = towers(net, (channels, height, width))[0]
    rows, columns = tower.grid
    vtok.patch(net, setting.method or [], trace=True, input_size=(channels, height, width), **setting.params)
    with torch.inference_mode():
        net(image.pixels)
    run = run_of(net)
    if run is None:
        raise StateError(f"{setting.title} reduces nothing in this model; there is no map to draw")
    stages = []
    for block, (groups,) in enumerate(groups_by_block(run)):
        if len(groups) != rows * columns:
            raise ConfigError(
                f"the {len(groups)} patches of this image are no grid of {rows} x {columns}; nothing can be drawn"
            )
        stages.append(Stage(f"block {block}", (groups,), tokens_left(groups)))
    notes = (image.note,) if image.note else ()
    return TokenMaps(title, (View(image.picture, (rows, columns)),), tuple(stages), rows * columns, notes=notes)


def image_tower(model: nn.Module) -> nn.Module:
    """What takes pixels alone: the image tower of a dual encoder (open_clip's or Hugging Face's), else the model."""
    dual = hasattr(model, "encode_image") or hasattr(model, "get_image_features")
    parts = (getattr(model, name, None) for name in ("visual", "vision_model"))
    return next((part for part in parts if dual and isinstance(part, nn.Module)), model)


def _load(name: str, question: str | None, pretrained: bool) -> nn.Module | VisionLanguageModel:
    if name in BUNDLED:
        return load_vlm(name)
    if question is not None:
        return load_vlm(name.removeprefix(_TRANSFORMERS))
    model = load_model(name, pretrained and not name.startswith("reference"))
    if vlm_targets(model):
        raise ConfigError(f"{name} answers questions: pass one (--question), and a name or folder with a processor")
    return model


def _image(name: str, model: nn.Module, image: Any, transform: Callable[[Any], Tensor] | None, home: str) -> Prepared:
    """The image of an encoder; numbers stand for bundled ones."""
    number = number_of(image)
    if name == REFERENCE and transform is None and not isinstance(image, Tensor):
        return reference_pixels(image if number is None else bundled(name, number))
    if number is None:
        return prepared(model, image, transform, home)
    if name != REFERENCE_CLIP:
        raise ConfigError(f"{name} comes without images; name an image file instead of {number}")
    return prepared(model, bundled(name, number))


@cache
def _bundled_images(name: str) -> Tensor:
    """All test images of a reference encoder, read once."""
    from vtok.eval.models.reference import load_reference_images, load_reference_pages

    return load_reference_images("test")[0] if name == REFERENCE else load_reference_pages("test").images


def bundled(name: str, number: int) -> Any:
    """A test image of a reference encoder: [28, 28] uint8, or a PIL image; a `ConfigError` if there are fewer images."""
    from PIL import Image

    images = _bundled_images(name)
    if not 0 <= number < len(images):
        raise ConfigError(f"image {number}: {name} comes with images 0 to {len(images) - 1}")
    return images[number][0] if name == REFERENCE else Image.fromarray(images[number].permute(1, 2, 0).numpy())
