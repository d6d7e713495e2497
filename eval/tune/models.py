"""Models by name, ready to be tuned, each with calibration and held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vtok.config import MethodConfig
from vtok.errors import ConfigError
from vtok.eval.common.settings import to_device
from vtok.eval.models.by_name import REFERENCE, load_model, short_name
from vtok.eval.models.clip import REFERENCE as REFERENCE_CLIP
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_PRINT, REFERENCE_SCENES, VisionLanguageModel, load_vlm
from vtok.eval.options import Options, Source
from vtok.eval.tasks.timm_pipeline import check_timm_name, create_model, data_config
from vtok.eval.tasks.vqa.data import VQAData
from vtok.eval.tasks.vqa.sources.opening import easy_vqa, open_vqa, printed_pages, scene_questions
from vtok.eval.tune.samples import Samples, reference_clip_samples, reference_vit_samples
from vtok.eval.tune.subjects import Encoder, Subject

_TRANSFORMERS = "transformers:"


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


def prepared_subject(model: str, config: MethodConfig, source: Source) -> Prepared:
    """A model with a method to tune, and samples.

    Args:
        model: a key of `BUNDLED`, a timm name, or transformers:NAME for a vision-language model of Hugging Face.
        config: of the method.
        source: of everything else.

    Raises:
        ConfigError: no such model or data, or too little of it.
        UnsupportedModelError: the method does not work on the model.
    """
    model = short_name(model)
    if model in BUNDLED:
        if source.data is not None or source.held_out is not None:
            raise ConfigError(f"{model} comes with its images; leave --data and --held-out out")
        return BUNDLED[model](config, source)
    if model.startswith(_TRANSFORMERS):
        if source.data is not None:
            return _questions(model.removeprefix(_TRANSFORMERS), config, source)
    elif ":" in model:
        raise ConfigError(f"{model}: name a timm model, transformers:NAME of a vision-language model, or {', '.join(BUNDLED)}")
    else:
        check_timm_name(model, BUNDLED)
    if source.data is None:
        raise ConfigError(f"{model} brings no images: pass --data FOLDER")
    return _folder(model, config, source)


def _reference_vit(config: MethodConfig, source: Source) -> Prepared:
    net = to_device(load_model(REFERENCE), device=source.device)
    calibration, compared = reference_vit_samples(source.images, source.held_out_images, source.seed)
    subject = Encoder(net, REFERENCE, config, calibration, (1, 28, 28))
    return Prepared(subject, calibration, compared, {"backend": "reference", "name": "reference-vit"}, {})


def _reference_clip(config: MethodConfig, source: Source) -> Prepared:
    """Its image tower, whose embeddings should stay what they are."""
    net = to_device(load_model(REFERENCE_CLIP), device=source.device)
    calibration, compared = reference_clip_samples(source.images, source.held_out_images, source.seed)
    subject = Encoder(net, REFERENCE_CLIP, config, calibration, (3, 128, 128))
    return Prepared(subject, calibration, compared, {"backend": "reference", "name": REFERENCE_CLIP}, {})


def _asks(name: str, data: Callable[[bool], VQAData]) -> Callable[[MethodConfig, Source], Prepared]:
    """A bundled model whose answers are one token; `data` are its questions, those to calibrate on if it is told so."""

    def prepared(config: MethodConfig, source: Source) -> Prepared:
        from vtok.eval.tune.prompts import Prompts, prompt_samples

        net = _on(load_vlm(name), source.device)
        counts = (source.images, source.held_out_images, source.seed)
        found = prompt_samples(net, data(True), data(False), *counts, labelled=True)
        return Prepared(Prompts(net, config, found[0]), *found, {"backend": "reference", "name": name}, {})

    return prepared


def _questions(name: str, config: MethodConfig, source: Source) -> Prepared:
    from vtok.eval.tune.prompts import Prompts, prompt_samples

    assert source.data is not None
    net = _on(load_vlm(name), source.device)
    compared = None if source.held_out is None else open_vqa(source.held_out)
    found = prompt_samples(net, open_vqa(source.data), compared, source.images, source.held_out_images, source.seed)
    return Prepared(Prompts(net, config, found[0]), *found, {"backend": "transformers", "name": name}, {})


def _on(model: VisionLanguageModel, device: str | None) -> VisionLanguageModel:
    return VisionLanguageModel(to_device(model.net, device=device), model.processor, model.name)


def _folder(model: str, config: MethodConfig, source: Source) -> Prepared:
    from vtok.eval.tune.folder_samples import folder_samples

    assert source.data is not None
    options = Options(
        pretrained=source.pretrained,
        checkpoint=source.checkpoint,
        num_classes=source.num_classes,
        class_map=source.class_map,
        workers=source.workers,
        batch_size=source.batch_size,
        seed=source.seed,
    )
    net = to_device(create_model(model, options).eval(), device=source.device)
    preprocessing = data_config(net, options)
    found = folder_samples(
        net, preprocessing, source.data, source.held_out, source.images, source.held_out_images, options, source.seed
    )
    given = {"checkpoint": source.checkpoint, "num_classes": source.num_classes, "class_map": source.class_map}
    stated = {name: value for name, value in given.items() if value}
    subject = Encoder(net, model, config, found[0], preprocessing["input_size"])
    return Prepared(subject, *found, {"backend": "timm", "name": model}, stated)


# name -> what comes with vtok under it
BUNDLED: dict[str, Callable[[MethodConfig, Source], Prepared]] = {
    REFERENCE: _reference_vit,
    REFERENCE_CLIP: _reference_clip,
    REFERENCE_LLAVA: _asks(REFERENCE_LLAVA, easy_vqa),
    REFERENCE_SCENES: _asks(REFERENCE_SCENES, scene_questions),
    REFERENCE_PRINT: _asks(REFERENCE_PRINT, printed_pages),
}
