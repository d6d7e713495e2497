"""Models by name, ready to be tuned, each with calibration and held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vtok.config import MethodConfig
from vtok.errors import ConfigError
from vtok.eval.models import REFERENCE, load_model
from vtok.eval.settings import placed
from vtok.eval.tasks.timm_pipeline import Options, create_model, data_config
from vtok.eval.tune_samples import Samples, reference_vit_samples
from vtok.eval.tune_subjects import Encoder, Subject


class Prepared(NamedTuple):
    """What a search needs.

    Attributes:
        subject: model and method.
        calibration: samples to search on.
        held_out: samples to compare on.
        model: the model as run files name it.
        options: of the task, as run files have them.
    """

    subject: Subject
    calibration: Samples
    held_out: Samples
    model: Mapping[str, Any]
    options: Mapping[str, Any]


def prepared_subject(
    model: str,
    config: MethodConfig,
    *,
    data: str | None = None,
    held_out: str | None = None,
    images: int = 400,
    held_out_images: int | None = None,
    seed: int = 0,
    pretrained: bool = True,
    checkpoint: str = "",
    num_classes: int | None = None,
    class_map: str = "",
    workers: int = 4,
    batch_size: int = 100,
    device: str | None = None,
) -> Prepared:
    """See the flags of `vtok tune`.

    Raises:
        ConfigError: no such model or data, or too little of it.
        UnsupportedModelError: the method does not work on the model.
    """
    if model == REFERENCE:
        _brings_data(model, data, held_out)
        net = placed(load_model(model), device=device)
        calibration, compared = reference_vit_samples(images, held_out_images, seed)
        subject = Encoder(net, model, config, calibration, (1, 28, 28))
        return Prepared(subject, calibration, compared, {"backend": "reference", "name": "reference-vit"}, {})
    if ":" in model:
        raise ConfigError(f"{model}: name a timm model or one that comes with vtok; others can be tuned from Python")
    if data is None:
        raise ConfigError(f"{model} brings no images: pass --data FOLDER")
    from vtok.eval.tune_folder import folder_samples

    options = Options(
        pretrained=pretrained,
        checkpoint=checkpoint,
        num_classes=num_classes,
        class_map=class_map,
        workers=workers,
        batch_size=batch_size,
        seed=seed,
    )
    net = placed(create_model(model, options).eval(), device=device)
    preprocessing = data_config(net, options)
    calibration, compared = folder_samples(net, preprocessing, data, held_out, images, held_out_images, options, seed)
    subject = Encoder(net, model, config, calibration, preprocessing["input_size"])
    given = {"checkpoint": checkpoint, "num_classes": num_classes, "class_map": class_map}
    stated = {name: value for name, value in given.items() if value}
    return Prepared(subject, calibration, compared, {"backend": "timm", "name": model}, stated)


def _brings_data(model: str, data: str | None, held_out: str | None) -> None:
    """Raises if data are named for a model that comes with its own."""
    if data is not None or held_out is not None:
        raise ConfigError(f"{model} comes with its images; leave --data and --held-out out")
