"""Models by name, ready to be tuned, each with calibration and held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
from vtok.eval.tune.samples import Samples, folder_samples, reference_clip_samples, reference_vit_samples
from vtok.eval.tune.subjects import Encoder, Subject
from vtok.targets.resolve import Size

_TRANSFORMERS = "transformers:"


class Prepared(NamedTuple):
    """What a search needs: what is tuned, samples to search and to compare on, model and task's options as run files name
    them."""

    subject: Subject
    calibration: Samples
    held_out: Samples
    model: Mapping[str, Any]
    options: Mapping[str, Any]


def prepared_subject(model: str, config: MethodConfig, source: Source) -> Prepared:
    """A model with a method to tune, and samples.

    Args:
        model: a key of `BUNDLED`, a timm name, or transformers:NAME for a vision-language model of Hugging Face.

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
            compared = None if source.held_out is None else open_vqa(source.held_out)
            return _prompts(model.removeprefix(_TRANSFORMERS), "transformers", open_vqa(source.data), compared, config, source)
    elif ":" in model:
        raise ConfigError(f"{model}: name a timm model, transformers:NAME of a vision-language model, or {', '.join(BUNDLED)}")
    else:
        check_timm_name(model, BUNDLED)
    if source.data is None:
        raise ConfigError(f"{model} brings no images: pass --data FOLDER")
    return _folder(model, config, source)


def _encoder(
    name: str,
    stated: str,
    samples: Callable[[Source], tuple[Samples, Samples]],
    size: Size,
    config: MethodConfig,
    source: Source,
) -> Prepared:
    """A bundled encoder, under the name that run files have for it; of the CLIP the image tower."""
    net, found = to_device(load_model(name), device=source.device), samples(source)
    return Prepared(Encoder(net, name, config, found[0], size), *found, {"backend": "reference", "name": stated}, {})


def _asked(name: str, data: Callable[[bool], VQAData], config: MethodConfig, source: Source) -> Prepared:
    """A bundled model whose answers are one token; `data` are its questions, those to calibrate on if it is told so."""
    return _prompts(name, "reference", data(True), data(False), config, source, labelled=True)


def _prompts(
    name: str,
    backend: str,
    data: VQAData,
    compared: VQAData | None,
    config: MethodConfig,
    source: Source,
    labelled: bool = False,
) -> Prepared:
    from vtok.eval.tune.prompts import Prompts, prompt_samples

    model = load_vlm(name)
    model = VisionLanguageModel(to_device(model.net, device=source.device), model.processor, model.name)
    found = prompt_samples(model, data, compared, source.images, source.held_out_images, source.seed, labelled)
    return Prepared(Prompts(model, config, found[0]), *found, {"backend": backend, "name": name}, {})


def _folder(model: str, config: MethodConfig, source: Source) -> Prepared:
    shared = ("pretrained", "checkpoint", "num_classes", "class_map", "workers", "batch_size", "seed")
    options = Options(**{name: getattr(source, name) for name in shared})
    net = to_device(create_model(model, options).eval(), device=source.device)
    preprocessing = data_config(net, options)
    found = folder_samples(net, preprocessing, source, options)
    stated = {name: value for name in shared[1:4] if (value := getattr(source, name))}
    subject = Encoder(net, model, config, found[0], preprocessing["input_size"])
    return Prepared(subject, *found, {"backend": "timm", "name": model}, stated)


# name -> what comes with vtok under it
BUNDLED: dict[str, Callable[[MethodConfig, Source], Prepared]] = {
    REFERENCE: partial(_encoder, REFERENCE, "reference-vit", reference_vit_samples, (1, 28, 28)),
    REFERENCE_CLIP: partial(_encoder, REFERENCE_CLIP, REFERENCE_CLIP, reference_clip_samples, (3, 128, 128)),
    REFERENCE_LLAVA: partial(_asked, REFERENCE_LLAVA, easy_vqa),
    REFERENCE_SCENES: partial(_asked, REFERENCE_SCENES, scene_questions),
    REFERENCE_PRINT: partial(_asked, REFERENCE_PRINT, printed_pages),
}
