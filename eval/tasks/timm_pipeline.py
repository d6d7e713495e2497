"""timm's evaluation pipeline under timm's flags: which model, which preprocessing, which loader."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vtok.errors import ConfigError, MissingExtraError, VtokError, brief, unknown
from vtok.eval.common.settings import towers
from vtok.eval.options import Options
from vtok.eval.tasks.image_folder import CheckedImages, collate
from vtok.targets.resolve import Size


def check_timm_name(name: str, others: Iterable[str] = ()) -> None:
    """Nothing if timm has a model of that name (with or without a tag of weights), or if only its hub can tell.

    `UnknownNameError` offers the nearest name, of timm or of `others`.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    plain, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        return
    if not timm.is_model(plain):
        raise unknown("timm model", plain, [*timm.list_models(), *others], "timm.list_models() names all")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in tags:
        raise unknown(f"weights of {plain}", tag, tags)


def create_model(name: str, options: Options, meta: bool = False) -> nn.Module:
    """timm's `create_model` with the weights that the options name; `meta`: without memory for weights."""
    check_timm_name(name)
    import timm

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

    A model built for one input size gets that size, whatever its configuration recommends for tests; flags that ask for another
    are refused.
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
