"""What a task needs of a run: its options, the model on its device, calibration inputs, the prompt that a budget is for.

Which kind of model a task takes is read off the annotation of its parameter `model`, its options off that of `options`: a new
task needs no line here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, VtokError, brief, shown, unknown
from vtok.eval.common.distributed import current
from vtok.eval.common.settings import LONG, TYPES, Setting, to_device, weight_sharing_copy
from vtok.eval.common.timing import named_kernels
from vtok.eval.models.clip import DualEncoder, load_clip
from vtok.eval.models.reference import load_reference_pages, load_reference_pictures
from vtok.eval.models.reference_next import calibration_pages
from vtok.eval.models.reference_vlm import load_reference_questions
from vtok.eval.models.vlm import REFERENCE_NEXT, REFERENCE_PRINT, VisionLanguageModel, load_vlm
from vtok.eval.runs.again import ELSEWHERE
from vtok.eval.runs.schema import BUNDLED_DATA, REFERENCE
from vtok.eval.tasks import TASKS
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.fashion import is_fashion, open_fashion
from vtok.eval.tasks.image_folder import CheckedImages, Sample, open_dataset
from vtok.eval.tasks.pictures import CALIBRATION as CALIBRATED
from vtok.eval.tasks.pictures import CLIP_ART, PHOTOGRAPHS, is_bundled, open_pictures
from vtok.eval.tasks.timm_pipeline import data_config
from vtok.eval.tasks.vqa.pipeline import kv_bytes
from vtok.eval.tasks.vqa.sources.hub import HUB
from vtok.eval.tasks.vqa.sources.opening import open_vqa, printed_pages
from vtok.reading import exists
from vtok.targets import vlm_targets

CALIBRATION = 128  # images
CALIBRATION_PROMPTS = 32
PAGES = 48  # of "reference-pages/calibration"
BUNDLED_PICTURES = 14  # of "clip-art/calibration": an encoder of ordinary size takes its time, and every step runs them


def task_options(config: Any, task: str, pretrained: bool, workers: int, folder: Path | None) -> Any:
    """The task's own options, from what a `RunConfig` says; samples go into `folder`. Data that comes with vtok is in memory
    and needs no `workers` that read images. Errors are those of `options_class`."""
    kind = options_class(task)
    wanted = {
        "batch_size": config.batch_size,
        "model_dtype": LONG[config.dtype],
        "pretrained": pretrained,
        "seed": config.seed,
        "num_samples": config.num_samples,
        "workers": 0 if config.backend == REFERENCE else workers,
        "output": "" if folder is None else str(folder),
    }
    if config.backend != "timm":  # weights go by tag there, and names need a backend
        backend = None if config.backend == REFERENCE else config.backend
        wanted |= {"pretrained": (config.pretrained or "") if pretrained else "", "backend": backend}
    if get_type_hints(kind).get("pretrained") is bool:  # of classifiers: whether, not which
        wanted["pretrained"] = pretrained
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}
    known = {field.name for field in dataclasses.fields(kind)}
    made: Any = kind
    return made(**{name: value for name, value in (wanted | own).items() if name in known})


def check_there(task: str, data: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises `ConfigError` for data that is a path to nothing, before weights are loaded. What comes with vtok, of the hub or
    of another package's task has a name; a data set that the `options` of a run name may be fetched."""
    brought = {name for known in BUNDLED_DATA.values() for name in known.values()}
    if data in brought or is_bundled(data) or is_fashion(data) or data.partition(":")[0] == HUB or exists(data):
        return
    ours = TASKS.get(task).__module__.startswith("vtok.")  # another package's task may know other names
    if not (options or {}).get("dataset") and (ours or os.sep in data):
        raise ConfigError(f"data of task {task}: {brief(data)} does not exist")


def check_options(config: Any) -> None:
    """Raises `ConfigError` unless each of a run's `options` is one of some task of it, and not a key of the run itself."""
    known = {field.name for task in config.tasks for field in dataclasses.fields(options_class(task))} - set(ELSEWHERE)
    for name in config.options:
        if name not in known:
            raise ConfigError(f"{config.path}: {unknown('key', f'options.{name}', (f'options.{k}' for k in known))}")


def options_class(task: str) -> type:
    """The dataclass of a task's options. Raises `ConfigError`: the task does not annotate its parameter `options` with one."""
    hint = get_type_hints(TASKS.get(task)).get("options")
    kind = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
    if not isinstance(kind, type):
        raise ConfigError(f"task {task} must annotate its parameter `options` with a dataclass, found {shown(hint)}")
    return kind


def model_kinds(task: str) -> list[type]:
    """Types of models that a task takes, names among them."""
    hint = get_type_hints(TASKS.get(task)).get("model")
    return [one for one in (hint, *get_args(hint)) if isinstance(one, type)]


def load_for(task: str, config: Any, options: Any) -> Any:
    """The model of a run as its task takes it, on its device and in its type; a name where the task takes names alone.

    Raises:
        ConfigError: no such model, weights or device.
        MissingExtraError: its library is not installed.
    """
    kinds = model_kinds(task)
    model: Any
    if any(issubclass(kind, VisionLanguageModel) for kind in kinds):
        model = load_vlm(config.model)
    elif any(issubclass(kind, DualEncoder) for kind in kinds):
        model = load_clip(config.model, options.pretrained, options.backend, options.seed)
    elif nn.Module in kinds:
        from vtok.eval.tasks.imagenet import load_named

        model = load_named(config.model, options)
    else:
        return config.model
    device = current().device(getattr(options, "device", None))
    dtype = TYPES[LONG[config.dtype]]
    if isinstance(model, nn.Module):
        return to_device(model.eval(), dtype, device)
    return dataclasses.replace(model, net=to_device(model.net.eval(), dtype, device))


def network(model: Any) -> nn.Module | None:
    """The module inside what `load_for` returns; `None` for a name."""
    return model if isinstance(model, nn.Module) else getattr(model, "net", None)


def resolved_setting(setting: Setting, model: Any, calibration: Any, prompt: Mapping[str, int] | None) -> Setting:
    """A setting with what its budget needs beside the model: images (`calibration`), or the prompt that it is for."""
    net = network(model)
    if net is None or setting.method is None:
        return setting
    budget, extra = "flops" in setting.params, {}
    if not vlm_targets(net):
        extra = {"calibration": calibration} if budget and calibration is not None else {}
    elif budget:
        extra = _prompt_or_calibration(setting, net, calibration, prompt)
    elif calibration is not None:
        methods = setting.method if isinstance(setting.method, list) else [setting.method]
        extra = {"calibration": calibration} if any(getattr(config, "calibrates", False) for config in methods) else {}
    return dataclasses.replace(setting, params={**setting.params, **extra})


def _prompt_or_calibration(
    setting: Setting, net: nn.Module, calibration: Any, prompt: Mapping[str, int] | None
) -> dict[str, Any]:
    """What a budget is solved for: a prompt where that is exact, calibration inputs where counts depend on image or text."""
    stated: dict[str, Any] = {} if prompt is None else {"prompt": dict(prompt)}
    if calibration is None:
        return stated
    params = {name: value for name, value in setting.params.items() if name != "flops"}
    try:
        exact = vtok.plan(net, setting.method or "", **params, **stated).estimate.exact
    except VtokError:  # said when the model is patched
        return stated
    return stated if exact else {"calibration": calibration}


def calibration_for(task: str, config: Any, model: Any, options: Any) -> Any:
    """Inputs of a model that are not evaluated: of the run's `calibration`, or for reference models those that come with vtok.

    Returns:
        [., C, H, W] images; for vision-language models a list of prompts; `None` where there are none.

    Raises:
        ConfigError: data that cannot be read.
    """
    named = config.calibration.get(task)
    if named is None and config.backend != REFERENCE:
        return None
    if isinstance(model, VisionLanguageModel):
        return _prompts(model, named)
    if not isinstance(model, (nn.Module, DualEncoder)):
        return None
    return _images(BUNDLED_DATA.get(config.model, {}).get(task, ""), named, model, options)


def _images(brought: str, named: str | None, model: nn.Module | DualEncoder, options: Any) -> Tensor:
    """[., C, H, W], evenly spaced and prepared as a task prepares its own, on the model's device and in its type.

    Args:
        brought: data that come with the model and the task that they are for, as `BUNDLED_DATA` names them.
        named: data of the task's kind; `None` = what comes with vtok.
        model: a classifier, or a dual encoder.
        options: of the task.

    Raises:
        ConfigError: none of them can be read.
    """
    if isinstance(model, nn.Module):
        from timm.data import create_transform

        about, wanted = data_config(model, options), ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        net, transform = model, create_transform(**{name: about[name] for name in wanted}, is_training=False)
        mode = "L" if int(about["input_size"][0]) == 1 else "RGB"
    else:
        net, transform, mode = model.net, model.preprocess, "RGB"
    known = _BUNDLED[brought] if named is None else _BY_NAME.get(named)
    data = known() if known is not None else _named(str(named), options, mode)
    data.transform = transform
    found = [item.image for item in (data[row] for row in range(len(data))) if isinstance(item, Sample)]
    if not found:
        raise ConfigError(f"calibration: none of the {len(data)} images of {named} could be read")
    first = next(net.parameters())
    return torch.stack(found).to(first.device, first.dtype)


def _named(named: str, options: Any, mode: str) -> CheckedImages:
    if named.endswith(".json"):
        return CheckedImages(open_captions(named, options.split, getattr(options, "images", ""), None), mode, CALIBRATION)
    return open_dataset(named, getattr(options, "dataset", ""), options.split, "", mode, CALIBRATION)


def _pictures(pixels: Tensor) -> CheckedImages:
    """From [n, 3, H, W], uint8."""
    return CheckedImages([(Image.fromarray(one.permute(1, 2, 0).numpy()), 0) for one in pixels], "RGB", CALIBRATION)


# Data that come with vtok -> what reads the bundled images that its budgets are solved on.
_BUNDLED: dict[str, Callable[[], CheckedImages]] = {
    "fashion-mnist": lambda: open_fashion(CALIBRATION, split="calibration"),
    "reference-pages": lambda: _pictures(load_reference_pages("calibration").images),
    "reference-pictures": lambda: _pictures(load_reference_pictures("calibration")[0]),
    **dict.fromkeys((CLIP_ART, PHOTOGRAPHS), lambda: open_pictures(CALIBRATED, BUNDLED_PICTURES)),
}
# Names that a run's `calibration` may have: what the demo's budgets are solved on.
_BY_NAME: dict[str, Callable[[], CheckedImages]] = {
    "fashion-mnist/calibration": lambda: open_fashion(CALIBRATION, "fashion-mnist/calibration"),
    CALIBRATED: lambda: open_pictures(CALIBRATED, BUNDLED_PICTURES),
    "reference-pages/calibration": lambda: _pictures(load_reference_pages("calibration").images[:PAGES]),
}


def _prompts(model: VisionLanguageModel, named: str | None) -> Any:
    """Inputs of some questions, one a batch where they come from a run's own data."""
    if named is not None:
        data = open_vqa(named).take(CALIBRATION_PROMPTS)
        return [model.inputs([data.read(q.image)], [q.text + data.prompt]) for q in data.questions]
    if model.name == REFERENCE_NEXT:
        pages = calibration_pages()
        return [model.inputs(pages, ["is top left blank?"] * len(pages))]
    if model.name == REFERENCE_PRINT:
        data = printed_pages(calibration=True)
        first = list({q.image: q for q in data.questions}.values())[:CALIBRATION_PROMPTS]
        return [model.inputs([data.read(q.image) for q in first], [first[0].text] * len(first))]
    asked = load_reference_questions("calibration")
    rows = [i * len(asked.texts) // CALIBRATION_PROMPTS for i in range(CALIBRATION_PROMPTS)]
    pixels = asked.pictures.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(pixels[int(asked.rows[row])]) for row in rows]
    return [model.inputs(pictures, [asked.texts[row] for row in rows])]


def prompt_of(record: Mapping[str, Any], net: nn.Module | None) -> dict[str, int] | None:
    """The mean prompt of an unpatched vision-language model's record, as `vtok.patch(flops=...)` takes it.

    What is no image is text: as many tokens as the bytes of keys and values leave. `None` for other models.
    """
    if net is None or "kv_bytes" not in record or not vlm_targets(net):
        return None
    layers = len(record["tokens"]["mean_per_layer"])
    each = int(kv_bytes(net, torch.ones(1, dtype=torch.long), torch.zeros(1, layers, dtype=torch.long))[0])
    text = record["kv_bytes"]["patched"] / each - record["tokens"]["in"]
    return {"images": 1, "text_tokens": max(1, round(text))}


def prompt_kernel(model: VisionLanguageModel, setting: Setting) -> str:
    """Attention kernels of tower and decoder layers for one prompt, under a setting."""
    net = setting.apply(weight_sharing_copy(model.net))
    vlm = vlm_targets(net)[0].vlm
    blocks = [block.module for block in vlm.tower.blocks] if vlm.tower is not None else []
    inputs = model.inputs([Image.new("RGB", (64, 64), "grey")], ["what?"])
    return named_kernels([*blocks, *vlm.text.layers], lambda: net(**inputs))
