"""timm's evaluation pipeline under timm's flags: which model, which preprocessing, which loader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader

from vtok.errors import ConfigError, MissingExtraError, VtokError, brief, shown
from vtok.eval.common.checked import Count, DType, Seed, Whole, check_fields
from vtok.eval.common.settings import towers
from vtok.eval.tasks.image_folder import CheckedImages, collate
from vtok.targets.resolve import Size

Pixels = Annotated[int, Field(ge=1, le=100_000)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]  # of timm, but for training's "random"
Deviation = Annotated[float, Field(ge=1e-9)]


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
        seed: for random initialisation.
    """

    dataset: str = ""
    split: str = "validation"
    class_map: str = ""
    num_samples: Count | None = None
    pretrained: bool = True
    checkpoint: str = ""
    use_ema: bool = False
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    gp: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: Count = 256
    workers: Whole = 4
    img_size: Count | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    input_size: tuple[Pixels, Pixels, Pixels] | None = None
    use_train_size: bool = False
    crop_pct: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    crop_mode: Literal["squash", "border", "center"] | None = None
    crop_border_pixels: Annotated[int, Field(ge=0, le=100_000)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Deviation, ...] | None = None
    interpolation: Interpolation | None = None
    pin_mem: bool = False
    channels_last: bool = False
    device: str | None = None
    amp: bool = False
    amp_dtype: DType = "float16"
    model_dtype: DType | None = None
    real_labels: str = ""
    valid_labels: str = ""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        channels = self.in_chans or (self.input_size[0] if self.input_size else 3)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) not in (1, channels):
                raise ConfigError(f"{name} takes 1 or {channels} numbers, got {shown(value)}")


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
            timm.models.load_checkpoint(model, options.checkpoint, options.use_ema, weights_only=True)
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
