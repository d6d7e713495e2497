"""Models by name, for the command line.

A name is timm's, `reference` (or `reference-vit`), `reference-clip` (both come with vtok), `reference-dinov2` (its weights come
with a package), a bundled vision-language model's (`reference-llava`, `reference-llava-next`, `reference-scenes`,
`reference-print`), or starts
with its library: `open_clip:ViT-B-16` (its image tower; `open_clip:ViT-B-16/openai` with weights) or `transformers:OWNER/NAME`.
Architectures in `HUGGING_FACE` are built without asking the hub for a configuration, and so are the vision-language models of
`configs/architectures.yaml`: those in `ARCHITECTURES` and, without weights (`meta`), the checkpoints in `PUBLISHED`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError, unknown
from vtok.eval.common.settings import towers
from vtok.eval.models.architectures import ARCHITECTURES, PUBLISHED, Architecture, build, build_architecture, build_published
from vtok.eval.models.assets import library
from vtok.eval.models.clip import REFERENCE as REFERENCE_CLIP
from vtok.eval.models.data import normalise
from vtok.eval.models.dinov2 import REFERENCE_DINOV2, load_clip_art
from vtok.eval.models.reference import (
    load_reference_clip,
    load_reference_images,
    load_reference_pages,
    load_reference_vit,
    normalise_page,
)
from vtok.eval.models.vlm import BUNDLED, load_vlm
from vtok.eval.tasks.timm_pipeline import Options, check_timm_name, create_model
from vtok.reading import is_folder

REFERENCE = "reference"  # on the command line; its long name is that of run files and tasks
REFERENCE_VIT = "reference-vit"
_OPEN_CLIP, _TRANSFORMERS = "open_clip:", "transformers:"
# Name -> what loads the image tower of a reference model.
_REFERENCE: dict[str, Callable[[], Any]] = {
    REFERENCE: load_reference_vit,
    REFERENCE_CLIP: lambda: load_reference_clip().net.visual,
    REFERENCE_DINOV2: load_clip_art,
}
# Name -> (class of transformers, what its configuration changes of the defaults): for runs with random weights.
HUGGING_FACE: dict[str, Architecture] = {
    "vit-base-patch16-224": ("ViTForImageClassification", {"num_labels": 1000}),
    "clip-vit-base-patch16": ("CLIPVisionModelWithProjection", {"patch_size": 16}),
}


def short_name(name: str) -> str:
    """A name, and of the small ViT, which has two, the shorter one."""
    return REFERENCE if name == REFERENCE_VIT else name


def load_model(
    name: str,
    pretrained: bool = False,
    img_size: int | None = None,
    seed: int = 0,
    meta: bool = False,
    random_on: tuple[str, torch.dtype] | None = None,
) -> nn.Module:
    """A model (of dual encoders the image tower) in eval mode, called as `model(images)`.

    Args:
        name: see above.
        pretrained: load weights; otherwise they are random, unless the name says which.
        img_size: input size in pixels, `None` = the model's own.
        seed: of random weights.
        meta: build it without any weights, on the meta device.
        random_on: (device, type) in which random weights of a published vision-language model are made, which never exist
            elsewhere; other models are made on the CPU.

    Raises:
        ConfigError: no such model or weights, or a size that cannot be changed.
        MissingExtraError: the library is not installed.
    """
    name = short_name(name)
    if name.startswith(REFERENCE):
        if name not in (*_REFERENCE, *BUNDLED):
            raise unknown("bundled model", name, (*_REFERENCE, *BUNDLED))
        if img_size is not None:
            raise ConfigError(f"{name} has a size of its own; drop the image size {img_size}")
        return _REFERENCE[name]() if name in _REFERENCE else load_vlm(name).net
    if name.startswith(_OPEN_CLIP):
        return _open_clip(name.removeprefix(_OPEN_CLIP), pretrained, img_size, seed, meta)
    if name.startswith(_TRANSFORMERS):
        published = name.removeprefix(_TRANSFORMERS)
        if random_on is not None and published in PUBLISHED and not (pretrained or meta or img_size):
            torch.manual_seed(seed)
            return build_published(published, *random_on)
        return _hugging_face(published, pretrained, img_size, seed, meta)
    kwargs = {"img_size": img_size} if img_size else {}
    check_timm_name(name, (*_REFERENCE, *BUNDLED))
    return create_model(name, Options(pretrained=pretrained, model_kwargs=kwargs, seed=seed), meta).eval()


def sample_images(name: str, model: nn.Module, batch_size: int, seed: int = 0) -> Tensor:
    """[B, C, H, W]: test images for a reference model, else noise of the size that the model was built for."""
    name = short_name(name)
    if name == REFERENCE:
        images, _ = load_reference_images("test")
        return normalise(images[:batch_size])
    if name == REFERENCE_CLIP:
        return normalise_page(load_reference_pages("test").images[:batch_size])
    size = towers(model)[0][1].input_size
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(seed))


def _open_clip(name: str, pretrained: bool, img_size: int | None, seed: int, meta: bool) -> nn.Module:
    open_clip = library("open_clip", "open_clip_torch")
    name, _, tag = name.partition("/")
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models(), "open_clip.list_models() names all")
    if pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip has several weights of {name}; name one: open_clip:{name}/TAG with TAG in {', '.join(tags)}"
        )
    torch.manual_seed(seed)
    silenced, device, weights = logging.root.manager.disable, "meta" if meta else "cpu", None if meta or not tag else tag
    try:
        if meta:
            logging.disable(logging.WARNING)  # that no weights are loaded is what was asked for
        with torch.device(device):
            model: Any = open_clip.create_model(name, pretrained=weights, device=device, force_image_size=img_size)
    except (RuntimeError, OSError, ValueError) as error:  # unknown tag, no network
        raise ConfigError(f"open_clip cannot make {name} {tag}".rstrip() + f": {error}") from error
    finally:
        logging.disable(silenced)
    return model.visual.eval()


def _hugging_face(name: str, pretrained: bool, img_size: int | None, seed: int, meta: bool) -> nn.Module:
    transformers = library("transformers")
    size = {} if img_size is None else {"image_size": img_size}
    torch.manual_seed(seed)
    if name in ARCHITECTURES:
        if pretrained or img_size is not None:
            raise ConfigError(f"{name} has random weights and a size of its own; drop --pretrained and the image size")
        return build(name, seed, meta)
    if name in HUGGING_FACE:
        if pretrained:
            raise ConfigError(
                f"{name} is an architecture; for weights name a model of the hub or a folder: transformers:OWNER/NAME"
            )
        return build_architecture(HUGGING_FACE[name], "meta" if meta else "cpu", **size)
    if meta and name in PUBLISHED and img_size is None:
        return build_published(name)
    if "/" not in name and not is_folder(name):
        raise unknown("architecture", name, [*HUGGING_FACE, *ARCHITECTURES])
    try:
        if pretrained and not meta:
            return _image_tower(transformers.AutoModel.from_pretrained(name, **size))
        config = transformers.AutoConfig.from_pretrained(name, **size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {name}: {error}") from error
    with torch.device("meta" if meta else "cpu"):
        return _image_tower(transformers.AutoModel.from_config(config))


def _image_tower(model: Any) -> nn.Module:
    """What takes pixels alone: the tower of a dual encoder, else the model."""
    return getattr(model, "vision_model", model).eval()
