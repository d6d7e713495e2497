"""timm's evaluation pipeline under timm's flags: which model, which preprocessing, which loader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vtok.errors import ConfigError, MissingExtraError, VtokError, brief, shown
from vtok.eval.common.checked import check_fields, check_range
from vtok.eval.common.settings import towers
from vtok.eval.tasks.image_folder import CheckedImages, collate
from vtok.targets.resolve import Size

_INF = float("inf")
_LIMITS = {
    "batch_size": (1, _INF),
    "workers": (0, _INF),
    "num_samples": (1, _INF),
    "num_classes": (0, 1_000_000),
    "img_size": (1, _INF),
    "in_chans": (1, 1024),
    "input_size": (1, 100_000),
    "crop_pct": (1e-3, 1000.0),
    "crop_border_pixels": (0, 100_000),
    "std": (1e-9, _INF),
}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),  # of timm, but for training's "random"
    "crop_mode": ("squash", "border", "center"),
}


@dataclass(frozen=True)
class Options:
    """timm's flags, under timm's names (`-` as `_`), with timm's defaults.

    Attributes:
        dataset: timm's name of a dataset ("hfds/...", "torch/..."); "" = image folder or .tar.
        split: of the dataset; a folder of that name inside the data folder is used if there is one.
        class_map: file that maps folder names to classes; "" = by WordNet ids, names or numbers of the folders, or
            by their natural order where there are as many as outputs.
        num_samples: evenly spaced images to take; `None` = all.
        pretrained: load pretrained weights (for a model given by name, without checkpoint).
        checkpoint: file with weights, for a model given by name.
        use_ema: take the averaged weights of the checkpoint.
        num_classes, gp, model_kwargs: for timm's create_model.
        batch_size: images in a batch.
        workers: processes that read images; 0 = none.
        img_size, in_chans, input_size, crop_pct, crop_mode, crop_border_pixels, mean, std, interpolation: preprocessing;
            `None` = as the model's configuration says, which published numbers rest on.
        use_train_size: take the size the model was trained at where it has another for tests.
        pin_mem: page-locked memory for transfers.
        channels_last: memory format.
        device: `None` = the GPU if there is one.
        amp, amp_dtype: autocast.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        real_labels: ReaL JSON, or "timm" for the file that timm brings along.
        valid_labels: file with the numbers of the model's outputs that count.
        seed: of weights that are not loaded; stored with the result.
    """

    dataset: str = ""
    split: str = "validation"
    class_map: str = ""
    num_samples: int | None = None
    pretrained: bool = True
    checkpoint: str = ""
    use_ema: bool = False
    num_classes: int | None = None
    gp: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    workers: int = 4
    img_size: int | None = None
    in_chans: int | None = None
    input_size: tuple[int, int, int] | None = None
    use_train_size: bool = False
    crop_pct: float | None = None
    crop_mode: str | None = None
    crop_border_pixels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    pin_mem: bool = False
    channels_last: bool = False
    device: str | None = None
    amp: bool = False
    amp_dtype: str = "float16"
    model_dtype: str | None = None
    real_labels: str = ""
    valid_labels: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        channels = self.in_chans or (self.input_size[0] if self.input_size else 3)
        for name, allowed in (("mean", (1, channels)), ("std", (1, channels)), ("input_size", (3,))):
            value = getattr(self, name)
            if value is not None and len(value) not in allowed:
                raise ConfigError(f"{name} takes {' or '.join(str(n) for n in allowed)} numbers, got {shown(value)}")
        check_range(self, _LIMITS)
        for type_ in (self.amp_dtype, self.model_dtype):
            if type_ is not None:
                self.dtype(type_)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")

    def dtype(self, name: str) -> torch.dtype:
        """`amp_dtype` or `model_dtype` as a torch type."""
        if name not in TYPES:
            raise ConfigError(f"unknown type {shown(name)}; known: {', '.join(TYPES)}")
        return TYPES[name]


def create_model(name: str, options: Options, meta: bool = False) -> nn.Module:
    """timm's `create_model` with the weights that the options name; `meta`: without memory for weights.

    Raises:
        ConfigError: timm has no such model, or its weights cannot be had.
        MissingExtraError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    kwargs = dict(options.model_kwargs)
    kwargs |= {"num_classes": options.num_classes} if options.num_classes is not None else {}
    kwargs |= {"global_pool": options.gp} if options.gp is not None else {}
    channels = options.in_chans or (options.input_size[0] if options.input_size else None)
    kwargs |= {"in_chans": channels} if channels else {}
    if options.checkpoint and not os.path.isfile(options.checkpoint):
        raise ConfigError(f"checkpoint {options.checkpoint} does not exist")
    torch.manual_seed(options.seed)  # weights that no checkpoint sets
    try:
        with torch.device("meta") if meta else nullcontext():
            model = timm.create_model(name, pretrained=options.pretrained and not options.checkpoint, **kwargs)
        if options.checkpoint:
            timm.models.load_checkpoint(model, options.checkpoint, options.use_ema)
    except VtokError:
        raise
    except Exception as error:  # unknown name or argument, no weights, no network, a broken checkpoint: each raises its own
        raise ConfigError(f"timm cannot make {brief(name, 80)}: {brief(error)}") from error
    return model


def data_config(model: nn.Module, options: Options) -> dict[str, Any]:
    """Preprocessing as timm resolves it from model and flags: input_size, interpolation, mean, std, crop_pct, crop_mode.

    A model built for one input size gets that size, whatever its configuration recommends for tests.

    Raises:
        ConfigError: the flags ask for a size that the model does not take.
    """
    from timm.data import resolve_data_config
    from timm.data.loader import adapt_to_chs

    config = resolve_data_config(asdict(options), model=model, use_test_size=not options.use_train_size)
    fixed = _fixed_size(model)
    asked = options.img_size is not None or options.input_size is not None
    if fixed is not None and asked and tuple(config["input_size"]) != fixed:
        raise ConfigError(
            f"{type(model).__name__} was built for {fixed}, the flags ask for {tuple(config['input_size'])}; "
            "build it for that size (model_kwargs img_size) or drop the flag"
        )
    config["input_size"] = tuple(config["input_size"]) if fixed is None else fixed
    for key in ("mean", "std"):
        config[key] = adapt_to_chs(config[key], config["input_size"][0])
    return config


def _fixed_size(model: nn.Module) -> Size | None:
    """The one (channels, height, width) that a model takes, `None` if it takes several."""
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is None or not getattr(embed, "strict_img_size", True):
        return None
    return towers(model)[0][1].input_size


def create_loader(data: CheckedImages, config: Mapping[str, Any], options: Options) -> DataLoader:
    """timm's evaluation loader; its batches are `Batch`es. Images are normalised where they are read."""
    from timm.data import create_loader as timm_loader

    border: dict[str, Any] = {} if options.crop_border_pixels is None else {"crop_border_pixels": options.crop_border_pixels}
    dataset: Any = data  # timm sets its `transform`; it asks for no more of a dataset
    return timm_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=options.batch_size,
        use_prefetcher=False,  # it would put images and labels on the GPU and drop the rest of a batch
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=options.workers,
        pin_memory=options.pin_mem,
        persistent_workers=False,
        collate_fn=collate,
        **border,
    )
