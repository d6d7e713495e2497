"""ImageNet-style accuracy of a timm model on a folder of images, with the pipeline, flags and fields of timm's validate.py.

Patched and unpatched models see the very same batches: what a method costs is a paired difference with its standard error.
Pictures are turned as their EXIF data say, which timm leaves out, and folders are matched with the model's classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.records import bits
from vtok.eval.common.settings import (
    TYPES,
    PassCost,
    Setting,
    backend,
    dtype_of,
    evaluating,
    mean_cost,
    method_name,
    model_name,
    pass_cost,
    resolved_params,
    to_device,
    versions,
    weight_sharing_copy,
)
from vtok.eval.common.statistics import mean_stderr, paired_difference, share
from vtok.eval.common.timing import BaselineCache, PairedTimer
from vtok.eval.models.dinov2 import REFERENCE_DINOV2, load_clip_art
from vtok.eval.models.reference import load_reference_vit
from vtok.eval.runs.again import run_file
from vtok.eval.tasks.class_folders import are_ids, labels_for, wordnet_ids
from vtok.eval.tasks.fashion import is_fashion, open_fashion
from vtok.eval.tasks.image_folder import CheckedImages, Unreadable, check_same_work, open_dataset, other_files
from vtok.eval.tasks.pictures import is_bundled, open_pictures
from vtok.eval.tasks.scoring import Scorer, Scores
from vtok.eval.tasks.timm_pipeline import Options, check_timm_name, create_loader, create_model, data_config
from vtok.targets.resolve import Size, run_of

REFERENCE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "reference-vit": load_reference_vit,
    "reference": load_reference_vit,  # its name on the command line
    REFERENCE_DINOV2: load_clip_art,
}


class _Part(NamedTuple):
    """What became of one batch: scores and costs, one a setting (none if no file could be read), and what was left out."""

    scores: list[Scores]
    costs: list[PassCost | None]
    skipped: list[Unreadable]


class _Tally:
    """What one setting has scored so far, and what its passes cost."""

    def __init__(self, model: nn.Module, title: str):
        self.model, self.title = model, title
        run = run_of(model)
        self.adapts = run is not None and any(not reducer.exact for _, reducer in run.patch.steps.values())
        self.known = False
        self.scores: list[Scores] = []
        self.costs: list[PassCost] = []
        self.images: list[int] = []

    def passed(self, size: Size) -> PassCost | None:
        """What the pass cost that the model has just made; `None` where it is known already."""
        if self.known and not self.adapts:
            return None
        self.known = True
        return pass_cost(self.model, size)

    def add(self, scores: Scores, cost: PassCost | None) -> None:
        """Takes the scores of a batch, in the order of the data."""
        self.scores.append(scores)
        if cost is not None and (self.adapts or not self.costs):
            self.costs.append(cost)
            self.images.append(len(scores.prediction))

    @property
    def cost(self) -> PassCost:
        """Mean over the images."""
        return mean_cost(self.costs, self.images)

    def column(self, name: str) -> Tensor:
        """[n]: one field of the scores, for the images that count."""
        counts = [s.counts for s in self.scores]
        return torch.cat([getattr(s, name)[c] for s, c in zip(self.scores, counts)] or [torch.empty(0)])


def evaluate(
    model: str | nn.Module,
    data_dir: str | os.PathLike,
    settings: Sequence[Any] = (None,),
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory: BaselineCache[Scores] | None = None,
) -> list[dict[str, Any]]:
    """Top-1 and top-5 accuracy of every setting, all on the same batches.

    Args:
        model: a timm name, `"reference-vit"`, `"reference-dinov2"`, or an unpatched model, which is left as it is.
        data_dir: folder with one sub-folder of images a class, what `options.dataset` reads, or `"fashion-mnist"`, which comes
            with vtok (`"fashion-mnist/test"`: the same images, of which `num_samples` takes the first), as the pictures of
            `vtok.eval.tasks.pictures` do (`"clip-art"`).
        settings: each `None` (unpatched), a method, (method, parameters), or a `Setting`.
        options: see `Options`.
        progress: called with (images done, images).
        memory: what earlier calls with the same model, data and options left of the unpatched model, which then runs on some
            batches only, for the clock.

    Returns:
        One record a setting: timm's fields (`model, top1, top1_err, top5, top5_err, param_count` in M, `img_size, crop_pct,
        interpolation`; accuracies in percent, rounded as timm does); `metrics` unrounded: `top1`, its `top1_stderr` and
        `top1_ci` (95 %), `top5`, and against the unpatched setting, if there is one, the paired `difference` of top-1 with both
        and the `agreement` of predictions, all in percent; `n` images scored; `method, setting, params, tokens, gmacs, gflops,
        implied_speedup`; `samples_per_sec`, `speedup` and `achieved` with intervals, from the passes of the evaluation itself;
        `correct`, one bit an image (see `correctness`); `skipped` (file and reason) and `num_skipped`; `notes`; and what
        describes the run.

    Raises:
        ConfigError: nothing to read, labels that do not fit the model, an input size it does not take.
        UnsupportedModelError: a method does not work on the model.
        MissingExtraError: timm is not installed.
    """
    options = options or Options()
    chosen = Setting.several(settings)
    scorer, data = Scorer.load(options.valid_labels, options.real_labels), _open(os.fspath(data_dir), options)  # before weights
    net = load_named(model, options) if isinstance(model, str) else model
    name = model if isinstance(model, str) else model_name(model)
    if run_of(net) is not None:
        raise ConfigError("evaluate patches copies of the model itself; pass it unpatched (vtok.unpatch(model))")
    processes = current()
    device = processes.device(options.device)
    with evaluating(net):
        base = to_device(net, dtype_of(options.model_dtype), device)
        if options.channels_last:
            base = copy.deepcopy(base).to(memory_format=torch.channels_last)
        config = data_config(base, options)
        size = config["input_size"]
        if not _brought(os.fspath(data_dir), options):
            data.mode = "RGB" if size[0] == 3 else "L"
        notes = _check_labels(data, scorer, base, options)
        tallies = [_Tally(setting.apply(weight_sharing_copy(base), size), setting.title) for setting in chosen]
        first = next((i for i, setting in enumerate(chosen) if setting.method is None), None)
        check_same_work(processes, data, [tally.model for tally in tallies])
        loader = create_loader(data.part(processes.rows(len(data), options.batch_size)), config, options)
        timer = PairedTimer([tally.model for tally in tallies], first, len(loader), memory, processes)
        skipped = _run(tallies, timer, loader, data, scorer, config, options, progress)
    n = len(tallies[0].column("top1"))
    if not n:
        why = f"; the first: {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise ConfigError(f"none of the {len(data)} files in {data_dir} could be read and scored{why}")
    skipped += other_files(data, options.class_map)
    common = _describe(net, base, os.fspath(data_dir), config, options) | {
        "labels": "real" if scorer.real is not None else "dataset",
        "n": n,
        "num_skipped": len(skipped),
        "skipped": [one._asdict() for one in skipped],
        "notes": notes,
    }
    unpatched = None if first is None else tallies[first]
    own = {"pretrained": options.pretrained} if isinstance(model, str) and model not in REFERENCE_MODELS else {}
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    again = [run_file("imagenet", model, common["backend"], data_dir, setting, options, dtype) for setting in chosen]
    return [
        {
            "model": name,
            **_score(tally, unpatched),
            **common,
            **own,
            **timer.fields(i, tally.cost, options.seed),
            **({} if content is None else {"config": content}),
        }
        for i, (tally, content) in enumerate(zip(tallies, again))
    ]


def load_named(name: str, options: Options) -> nn.Module:
    """A reference model, or one of timm; errors are those of `create_model`, and `ConfigError` where weights are missing."""
    if name in REFERENCE_MODELS:
        return REFERENCE_MODELS[name]()
    check_timm_name(name, REFERENCE_MODELS)
    return create_model(name, options)


def _open(data: str, options: Options) -> CheckedImages:
    if is_fashion(data) and not options.dataset:
        return open_fashion(options.num_samples, data)
    if is_bundled(data) and not options.dataset:
        return open_pictures(data, options.num_samples)
    return open_dataset(data, options.dataset, options.split, options.class_map, "RGB", options.num_samples)


def _brought(data: str, options: Options) -> bool:
    """Whether the images come with vtok, and are as their models take them."""
    return not options.dataset and (is_fashion(data) or is_bundled(data))


def _describe(net: nn.Module, base: nn.Module, data_dir: str, config: dict[str, Any], options: Options) -> dict[str, Any]:
    """What all settings of a run share."""
    first = next(base.parameters())
    return {
        "param_count": round(sum(p.numel() for p in net.parameters()) / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "task": "imagenet",
        "backend": backend(net),
        "dataset": data_dir,
        "split": options.split,
        "batch_size": options.batch_size,
        "dtype": options.amp_dtype + " autocast" if options.amp else str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "seed": options.seed,
        "versions": versions(),
    }


def _score(tally: _Tally, unpatched: _Tally | None) -> dict[str, Any]:
    """Accuracies of a setting, alone and against the unpatched model, and what it costs."""
    hits = tally.column("top1").double()
    top1, stderr = (100 * value for value in mean_stderr(hits.numpy()))
    top5 = 100 * float(tally.column("top5").double().mean())
    ends = share(hits.numpy()).scaled(100).ends
    metrics: dict[str, Any] = {"top1": top1, "top1_stderr": stderr, "top1_ci": ends, "top5": top5}
    if unpatched is not None and tally is not unpatched:
        change = (hits - unpatched.column("top1").double()).numpy()
        difference, error = mean_stderr(change)
        same = (tally.column("prediction") == unpatched.column("prediction")).double().mean()
        metrics |= {
            "difference": 100 * difference,
            "difference_stderr": 100 * error,
            "difference_ci": paired_difference(change).scaled(100).ends,
            "agreement": 100 * float(same),
        }
    return {
        "method": method_name(tally.model),
        "setting": tally.title,
        "params": resolved_params(tally.model),
        "top1": round(top1, 4),
        "top1_err": round(100 - top1, 4),
        "top5": round(top5, 4),
        "top5_err": round(100 - top5, 4),
        "metrics": metrics,
        "primary": "top1",
        "percent": True,
        "correct": bits(hits),
        **tally.cost.fields(),
    }


def _run(
    tallies: Sequence[_Tally],
    timer: PairedTimer[Scores],
    loader: Iterable[Any],
    data: CheckedImages,
    scorer: Scorer,
    config: dict[str, Any],
    options: Options,
    progress: Callable[[int, int], None] | None,
) -> list[Unreadable]:
    """Shows every batch to every model; returns what could not be read."""
    first = next(tallies[0].model.parameters())
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    processes, own = timer.processes, dict[int, _Part]()
    with torch.inference_mode(), _autocast(first.device, options):
        for number, batch in zip(count(processes.rank, processes.world), loader):
            own[number] = _Part([], [], batch.skipped)
            if batch.images is not None:
                images = batch.images.to(first.device, first.dtype, memory_format=layout)
                names = [data.filename(row) for row in batch.rows]
                keep = partial(scorer.score, labels=batch.labels, names=names)
                shown = timer.show(number, images, lambda model, x: model(x), keep)
                own[number] = _Part(shown, [tally.passed(config["input_size"]) for tally in tallies], batch.skipped)
            if progress is not None:
                progress(min((number + 1) * options.batch_size, len(data)), len(data))
    timer.join()
    parts = processes.gather(own, range(-(-len(data) // options.batch_size))).values()
    for part in parts:
        for tally, scores, cost in zip(tallies, part.scores, part.costs):
            tally.add(scores, cost)
    return [one for part in parts for one in part.skipped]


def _autocast(device: torch.device, options: Options) -> AbstractContextManager:
    return torch.autocast(device.type, TYPES[options.amp_dtype]) if options.amp else nullcontext()


def _check_labels(data: CheckedImages, scorer: Scorer, model: nn.Module, options: Options) -> list[str]:
    """Notes on how the folder's labels fit the model's outputs.

    Raises:
        ConfigError: they cannot fit.
    """
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
    """Whether the classes of data are those of a model, or some of them; the data then has the model's labels.

    Args:
        data: whose labels are made the model's.
        model: with `num_classes`.
    """
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
