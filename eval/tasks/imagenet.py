"""ImageNet-style accuracy of a timm model on a folder of images, with the pipeline, flags and fields of timm's validate.py.

Patched and unpatched models see the very same batches: what a method costs is a paired difference with its standard error.
Pictures are turned as their EXIF data say, which timm leaves out, and folders are matched with the model's classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.records import bits
from vtok.eval.common.settings import Setting, backend, dtype_of, evaluating, model_name, to_device
from vtok.eval.common.statistics import mean_stderr, share
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.dinov2 import REFERENCE_DINOV2, load_clip_art
from vtok.eval.models.reference import load_reference_vit
from vtok.eval.runs.again import run_file
from vtok.eval.tasks.class_folders import are_ids, labels_for, wordnet_ids
from vtok.eval.tasks.encoders import Passes, Progress, compared, described, show, unpatched_only
from vtok.eval.tasks.fashion import is_fashion, open_fashion
from vtok.eval.tasks.image_folder import CheckedImages, open_dataset, other_files
from vtok.eval.tasks.pictures import is_bundled, open_pictures
from vtok.eval.tasks.scoring import Scorer, Scores
from vtok.eval.tasks.timm_pipeline import Options, check_timm_name, create_loader, create_model, data_config
from vtok.targets.resolve import towers

REFERENCE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "reference-vit": load_reference_vit,
    "reference": load_reference_vit,  # its name on the command line
    REFERENCE_DINOV2: load_clip_art,
}


def evaluate(
    model: str | nn.Module,
    data_dir: str | os.PathLike,
    settings: Sequence[Any] = (None,),
    options: Options | None = None,
    progress: Progress | None = None,
    memory: BaselineCache[Scores] | None = None,
) -> list[dict[str, Any]]:
    """Top-1 and top-5 accuracy; see `vtok.eval.tasks` for what all tasks share.

    Args:
        model: a timm name, `"reference-vit"`, `"reference-dinov2"`, or a model.
        data_dir: folder with one sub-folder of images a class, what `options.dataset` reads, or `"fashion-mnist"`, which comes
            with vtok (`"fashion-mnist/test"`: the same images, of which `num_samples` takes the first), as the pictures of
            `vtok.eval.tasks.pictures` do (`"clip-art"`).
        settings, options, progress: see there, and `Options`.
        memory: see `vtok.eval.tasks.encoders.show`.

    Returns:
        Records with timm's fields, accuracies in percent, rounded as timm does; `metrics` unrounded, in percent, `agreement` of
        predictions with the unpatched model's among them.
    """
    options = options or Options()
    chosen = Setting.several(settings)
    scorer, brought = Scorer.load(options.valid_labels, options.real_labels), _brought(os.fspath(data_dir), options)
    opened = (os.fspath(data_dir), options.dataset, options.split, options.class_map, "RGB", options.num_samples)
    data = open_dataset(*opened) if brought is None else brought  # before weights
    net = load_named(model, options) if isinstance(model, str) else model
    name = model if isinstance(model, str) else model_name(model)
    unpatched_only(net)
    with evaluating(net):
        base = to_device(net, dtype_of(options.model_dtype), current().device(options.device))
        if options.channels_last:
            base = copy.deepcopy(base).to(memory_format=torch.channels_last)
        config = data_config(base, options)
        size = config["input_size"]
        if brought is None:
            data.mode = "RGB" if size[0] == 3 else "L"
        towers(base, size)  # raises where vtok knows no tower, before anything is computed
        notes = _check_labels(data, scorer, base, options)
        found = show(
            base,
            chosen,
            data,
            lambda part: create_loader(part, config, options),
            size,
            options,
            lambda model, images: model(images),
            lambda logits, batch: scorer.score(logits, batch.labels, [data.filename(row) for row in batch.rows]),
            progress,
            memory,
        )
    skipped, n = found.skipped, len(_column(found.settings[0], "top1"))
    if not n:
        why = f"; the first: {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise ConfigError(f"none of the {len(data)} files in {data_dir} could be read and scored{why}")
    common = described(base, size, n, skipped + other_files(data, options.class_map), options) | {
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "task": "imagenet",
        "backend": backend(net),
        "dataset": os.fspath(data_dir),
        "labels": "real" if scorer.real is not None else "dataset",
        "notes": notes,
    }
    own = {"pretrained": options.pretrained} if isinstance(model, str) and model not in REFERENCE_MODELS else {}
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    again = [run_file("imagenet", model, common["backend"], data_dir, setting, options, dtype) for setting in chosen]
    return [
        {"model": name, **_score(one, found.unpatched), **common, **own, **({} if content is None else {"config": content})}
        for one, content in zip(found.settings, again)
    ]


def load_named(name: str, options: Options) -> nn.Module:
    """A reference model, or one of timm; errors are those of `create_model`, and `ConfigError` where weights are missing."""
    if name in REFERENCE_MODELS:
        return REFERENCE_MODELS[name]()
    check_timm_name(name, REFERENCE_MODELS)
    return create_model(name, options)


def _brought(data: str, options: Options) -> CheckedImages | None:
    """The images that come with vtok under a name, as their models take them."""
    if options.dataset or not (is_fashion(data) or is_bundled(data)):
        return None
    return open_fashion(options.num_samples, data) if is_fashion(data) else open_pictures(data, options.num_samples)


def _column(passes: Passes[Scores], name: str) -> torch.Tensor:
    """[n]: one field of the scores, for the images that count."""
    return torch.cat([getattr(s, name)[s.counts] for s in passes.results] or [torch.empty(0)])


def _score(one: Passes[Scores], unpatched: Passes[Scores] | None) -> dict[str, Any]:
    """Accuracies of a setting, alone and against the unpatched model, and what it costs."""
    hits = _column(one, "top1").double().numpy()
    top1, stderr = (100 * value for value in mean_stderr(hits))
    top5 = 100 * float(_column(one, "top5").double().mean())
    metrics: dict[str, Any] = {"top1": top1, "top1_stderr": stderr, "top1_ci": share(hits).scaled(100).ends, "top5": top5}
    if unpatched is not None and one is not unpatched:
        same = _column(one, "prediction") == _column(unpatched, "prediction")
        metrics |= compared(hits, _column(unpatched, "top1").double().numpy(), same, 100)
    return {
        "top1": round(top1, 4),
        "top1_err": round(100 - top1, 4),
        "top5": round(top5, 4),
        "top5_err": round(100 - top5, 4),
        "metrics": metrics,
        "primary": "top1",
        "percent": True,
        "correct": bits(hits),
        **one.fields(),
    }


def _check_labels(data: CheckedImages, scorer: Scorer, model: nn.Module, options: Options) -> list[str]:
    """Notes on how the folder's labels fit the model's outputs; `ConfigError` if they cannot."""
    outputs, classes = getattr(model, "num_classes", None), data.class_to_idx
    if outputs is None:
        return []
    if outputs < 1:
        raise ConfigError(f"{model_name(model)} has no classifier (num_classes={outputs})")
    labels = scorer.num_labels(outputs)
    if scorer.real is not None or not classes:
        return []
    if max(classes.values()) >= labels and (options.class_map or len(set(classes.values())) > labels):
        raise ConfigError(
            f"the data has label {max(classes.values())} (of {len(classes)} classes), but only {labels} outputs of the model "
            "count; pass class_map, valid_labels or num_classes"
        )
    if options.class_map:
        return []
    chosen = scorer.valid is not None
    data.relabel, note = labels_for(classes, data.empty, labels, _names(model, scorer), *_asked(labels), ordered=chosen)
    if note and are_ids(list(classes)) and labels > len(classes):
        note += "; predictions are among all of them: pass valid_labels where papers take the data's alone"
    return [note] if note else []


def folder_labels(data: CheckedImages, model: nn.Module) -> bool:
    """Whether the classes of data are those of a model, or some of them; the data then has the model's labels."""
    outputs, classes = getattr(model, "num_classes", 0) or 0, data.class_to_idx
    if not classes or outputs < 1:
        return False
    try:
        data.relabel, _ = labels_for(classes, data.empty, outputs, _names(model, Scorer()), *_asked(outputs))
    except ConfigError:
        return False
    return True


def _asked(labels: int) -> tuple[str, str]:
    """What has the labels, and what to do where nothing says which is which."""
    remedy = (
        "pass class_map, a file with a folder's name a line in the order of the outputs, valid_labels, the outputs that the "
        "folders are, or num_classes"
    )
    return f"the model's {labels} outputs that count", remedy


def _names(model: nn.Module, scorer: Scorer) -> list[Sequence[str]]:
    """Names of a model's classes in the order of its outputs, as far as they are known: WordNet ids, its own."""
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    known = [wordnet_ids(int(getattr(model, "num_classes", 0))), own]
    chosen = [[names[i] for i in scorer.valid] if scorer.valid is not None else names for names in known if names]
    return [[str(name) for name in names] for names in chosen]
