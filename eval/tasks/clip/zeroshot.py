"""Zero-shot classification by any open_clip or Hugging Face dual encoder, with the metrics and fields of clip_benchmark.

Patched and unpatched models see the very same batches: what a method costs is a paired difference with its standard error.

Shapes: n images, K classes, D width of the common space.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError, MissingExtraError, brief, shown
from vtok.eval.common.distributed import current
from vtok.eval.common.statistics import mean_stderr, share
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.clip import DualEncoder
from vtok.eval.models.easyvqa import CLASSES, TEMPLATES
from vtok.eval.options import PICTURES, ZeroshotOptions
from vtok.eval.tasks.class_folders import are_ids, labels_for, wordnet_ids
from vtok.eval.tasks.clip.pipeline import Progress, run
from vtok.eval.tasks.encoders import compared
from vtok.eval.tasks.image_folder import CheckedImages, open_dataset
from vtok.reading import exists, from_json, read_text

IMAGENET_NAMES = "imagenet"  # class names that open_clip brings
Template = str | Callable[[str], str]


def evaluate(
    model: str | DualEncoder,
    data: str | os.PathLike,
    settings: Sequence[Any] = (None,),
    options: ZeroshotOptions | None = None,
    progress: Progress | None = None,
    memory: BaselineCache[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Zero-shot accuracy; see `vtok.eval.tasks` for what all tasks share.

    Args:
        model: a name (see `load_clip`), or a model.
        data: folder with one sub-folder of images a class, what `options.dataset` reads, or `"reference-pictures"`.
        settings, options, progress: see there, and `ZeroshotOptions`.
        memory: see `vtok.eval.tasks.encoders.show`.

    Returns:
        Records with clip_benchmark's fields; `metrics` are shares in [0, 1]: `acc1`, `acc5` (`None` below five classes),
        `mean_per_class_recall`, and `agreement` with the unpatched model.
    """
    options = options or ZeroshotOptions()
    images, names, name, notes = _open(os.fspath(data), options)
    prompts = templates(options.templates or (TEMPLATES if name == "easyvqa" else ("a photo of a {c}.",)))

    def score(classifier: Tensor, labels: Tensor) -> Callable[[Tensor], _Scored]:
        if int(labels.max()) >= len(names):
            raise ConfigError(f"the data has label {int(labels.max())}, but there are only {len(names)} class names")
        return lambda features: _Scored(features, classifier, labels)

    about: dict[str, Any] = {"dataset": name, "task": "zeroshot_classification", "notes": notes}
    about |= {"num_classes": len(names), "num_templates": len(prompts)}
    texts = partial(class_embeddings, names=names, prompts=prompts)
    return run(model, images, data, settings, options, progress, memory, about, texts, score)


def class_embeddings(encoder: DualEncoder, names: Sequence[str], prompts: Sequence[Template]) -> Tensor:
    """[K, D] of unit length, on the CPU: the mean over all prompts of each class, as in CLIP. Processes share the classes."""
    processes, rows = current(), dict[int, Tensor]()
    for i, name in enumerate(names):
        if processes.owns(i):
            texts = [prompt(name) if callable(prompt) else prompt.format(c=name) for prompt in prompts]
            rows[i] = F.normalize(encoder.encode_text(texts).mean(0), dim=0).cpu()
    return torch.stack(list(processes.gather(rows, range(len(names))).values()))


def templates(given: Sequence[str]) -> list[Template]:
    """Prompts as they were named: texts, files, or open_clip's sets; `ConfigError` for one without `{c}`."""
    found: list[Template] = []
    for text in given:
        if text in ("openai", "simple"):
            from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

            found += OPENAI_IMAGENET_TEMPLATES if text == "openai" else SIMPLE_IMAGENET_TEMPLATES
        elif Path(text).is_file():
            found += [line.strip() for line in Path(text).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            found.append(text)
    for prompt in found:
        try:
            fits = callable(prompt) or prompt.format(c="x") != prompt.format(c="y")
        except (LookupError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(f"a prompt needs {{c}} where the class name goes, got {shown(prompt)}")
    return found


class _Scored:
    """Predictions of one setting."""

    def __init__(self, features: Tensor, classifier: Tensor, labels: Tensor):
        scores = features @ classifier.T  # [n, K]
        self.labels, self.classes = labels, classifier.shape[0]
        ranked = scores.topk(min(5, self.classes), dim=1).indices
        self.prediction = ranked[:, 0]
        self.correct = (self.prediction == labels).double().numpy()
        self.top5 = (ranked == labels[:, None]).any(1).double().numpy()

    def metrics(self, base: _Scored | None) -> dict[str, Any]:
        acc1, stderr = mean_stderr(self.correct)
        recall, recall_stderr = mean_per_class(self.correct, self.labels.numpy())
        found: dict[str, Any] = {
            "acc1": acc1,
            "acc5": float(self.top5.mean()) if self.classes >= 5 else None,
            "mean_per_class_recall": recall,
            "acc1_stderr": stderr,
            "acc1_ci": share(self.correct).ends,
            "mean_per_class_recall_stderr": recall_stderr,
        }
        if base is not None:
            found |= compared(self.correct, base.correct, self.prediction == base.prediction)
        return found


def mean_per_class(hits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean over the classes that occur of the share of hits, and its standard error (not a number if a class has one image)."""
    parts = np.array([mean_stderr(hits[labels == label]) for label in np.unique(labels)])
    return float(parts[:, 0].mean()), float(np.sqrt((parts[:, 1] ** 2).sum()) / len(parts))


def _open(data: str, options: ZeroshotOptions) -> tuple[CheckedImages, list[str], str, list[str]]:
    """(images, class names, name of the data set, what to know about the classes)."""
    if data == PICTURES:
        from PIL import Image

        from vtok.eval.models.reference import load_reference_pictures

        pictures, classes = load_reference_pictures("test")
        arrays = pictures.permute(0, 2, 3, 1).numpy()
        pairs = [(Image.fromarray(array), int(label)) for array, label in zip(arrays, classes)]
        return CheckedImages(pairs, "RGB", options.num_samples), list(CLASSES), "easyvqa", []
    images = open_dataset(data, options.dataset, options.split, options.class_map, "RGB", options.num_samples)
    names, notes = _names(images, options)
    return images, names, options.dataset or os.path.basename(os.path.normpath(data)), notes


def _names(images: CheckedImages, options: ZeroshotOptions) -> tuple[list[str], list[str]]:
    """Class names, and what to know about them; the images get their labels."""
    known, (given, ids) = images.class_to_idx, _given(options)
    if given is None:
        if not known:
            raise ConfigError("the data does not name its classes; pass classnames, a file with one a line")
        return _from_folders(known), []
    if not known or options.class_map:
        return given, []
    folders = {name.replace("_", " "): name for name in known}
    numberings = [*([ids] if ids else []), [folders.get(name, name) for name in given]]
    remedy = "pass class_map, a file with the name of a folder a line in the order of the class names"
    images.relabel, note = labels_for(known, images.empty, len(given), numberings, f"the {len(given)} class names", remedy)
    return given, [note] if note else []


def _given(options: ZeroshotOptions) -> tuple[list[str] | None, Sequence[str]]:
    """(class names that were asked for, or `None`; WordNet ids of these classes, where they are known)."""
    if options.classnames == IMAGENET_NAMES:
        return _imagenet_names(), wordnet_ids(len(_imagenet_names()))
    if not options.classnames:
        return None, ()
    path = Path(options.classnames)
    if not exists(path):
        raise ConfigError(f"class names: {brief(path)} does not exist; name a file with one a line, or 'imagenet'")
    text = read_text(path, "class names:")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()], ()
    found = from_json(text, f"class names: {path} is no JSON file")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"class names: {path} must hold a list of texts")
    return found, ()


def _from_folders(class_to_idx: Mapping[str, int]) -> list[str]:
    """What folders are called, underscores as spaces; those of ImageNet by the names of its classes."""
    names = [name for name, _ in sorted(class_to_idx.items(), key=lambda pair: pair[1])]
    if are_ids(names):
        words = dict(zip(wordnet_ids(len(_imagenet_names())), _imagenet_names()))
        strange = [name for name in names if name not in words]
        if strange:
            raise ConfigError(
                f"the folders are WordNet ids, and {strange[0]} is none of ImageNet's 1,000 classes; pass classnames, a file "
                "with a name a line in their order"
            )
        return [words[name] for name in names]
    if all(name.isdecimal() for name in names) and any(len(name) > 1 for name in names):
        raise ConfigError(
            f"the folders are numbers ({', '.join(names[:3])}, ...), which say nothing to a text encoder; pass classnames, a "
            "file with a name a line in their order, or 'imagenet'"
        )
    return [name.replace("_", " ") for name in names]


def _imagenet_names() -> list[str]:
    """open_clip's names of ImageNet's classes, in the order of their WordNet ids."""
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "open_clip") from error
    return list(IMAGENET_CLASSNAMES)
