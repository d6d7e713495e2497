"""Published results: the operating points that papers, logs and issues quote and that a run here can repeat, by table; what
they cost here beside what was published; and the points that cannot be repeated, with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

import vtok
from vtok.errors import ConfigError, shown, unknown
from vtok.eval.models.by_name import load_model
from vtok.eval.runs import loader as runs
from vtok.eval.runs.loader import RunConfig, points
from vtok.eval.tasks.timm_pipeline import Options, create_model
from vtok.reading import is_folder
from vtok.targets import vlm_targets

TOLERANCE = 0.03  # a larger difference between GMACs and published GFLOPs needs a reason
_MODEL_OPTIONS = ("num_classes", "gp", "model_kwargs", "img_size")  # options of a task that change what timm builds


class Missing(NamedTuple):
    """An operating point that no run repeats."""

    paper: str  # method or paper
    point: str  # model, setting, data
    published: str  # the figures, as their source prints them
    reason: str  # why there is no run


@dataclass(frozen=True)
class Cost:
    """What an operating point costs, planned here and as published."""

    gmacs: float  # of a forward pass of the patched model; of a vision-language model tower, connector and prefill of a prompt
    base_gmacs: float  # of the unpatched one
    gflops: float | None  # gflops, base_gflops: as published; `None` = not stated
    base_gflops: float | None
    exact: bool  # False if `gmacs` is an upper bound, because counts depend on the input

    @property
    def deviations(self) -> tuple[float | None, float | None]:
        """(patched, unpatched): by which share vtok counts more than was published."""
        return _deviation(self.gmacs, self.gflops), _deviation(self.base_gmacs, self.base_gflops)

    @property
    def agrees(self) -> bool:
        """Whether no difference exceeds `TOLERANCE`."""
        return all(one is None or abs(one) <= TOLERANCE for one in self.deviations)


def _deviation(gmacs: float, gflops: float | None) -> float | None:
    return None if gflops is None else gmacs / gflops - 1


def tables() -> dict[str, list[RunConfig]]:
    """Table -> its runs, tables in alphabetical order; a run may belong to several."""
    found: dict[str, list[RunConfig]] = {}
    for name in runs.bundled():
        run = runs.load(name)
        for table in run.tables:
            found.setdefault(table, []).append(run)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def slug(table: str) -> str:
    """A table's name as one word: "PiToMe LLaVA-1.5" -> "pitome_llava_1_5"."""
    return re.sub(r"[^a-z0-9]+", "_", table.lower()).strip("_")


def table_of(name: str, overrides: Sequence[str] = ()) -> tuple[str, list[RunConfig]]:
    """A table by its name or its slug, or all run files of a folder; `overrides` are those of `runs.load`.

    Raises:
        UnknownNameError: there is none.
        ConfigError: the folder holds no run file, or a file or override that cannot be read.
    """
    if os.sep in name or is_folder(name):
        paths = sorted(Path(name).glob("*.yaml"))
        if not paths:
            raise ConfigError(f"{name} is no folder with run files (*.yaml)")
        return Path(name).name, [runs.load(str(path), overrides) for path in paths]
    known = tables()
    for table, found in known.items():
        if slug(name) == slug(table):
            return table, [runs.load(run.name, overrides) for run in found] if overrides else found
    raise unknown("table", slug(name), [slug(table) for table in known])


def missing() -> list[Missing]:
    """The operating points that no run repeats, in the order of the file. Raises `ConfigError`: the file is damaged."""
    path = files("vtok.configs") / f"{runs.NOT_REPRODUCIBLE}.yaml"
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    for i, row in enumerate(content):
        if set(row) != set(Missing._fields) or not all(isinstance(value, str) and value for value in row.values()):
            raise ConfigError(f"{path}: entry {i} must have texts for {', '.join(Missing._fields)}, found {shown(row)}")
    return [Missing(**row) for row in content]


def meta_model(run: RunConfig) -> nn.Module:
    """The model of a run without any weights, on the meta device.

    Raises:
        ConfigError, MissingExtraError: see `load_model`.
    """
    if run.backend == "timm":
        known = {field.name for field in fields(Options)} & set(_MODEL_OPTIONS)
        options = {name: value for name, value in run.options.items() if name in known}
        return create_model(run.model, Options(pretrained=False, **options), meta=True).eval()
    if run.backend == runs.REFERENCE:
        return load_model(run.model)
    return load_model(f"{run.backend}:{run.model}", meta=True)


def plans(run: RunConfig, model: nn.Module | None = None, prompt: Mapping[str, Any] | None = None) -> list[Any]:
    """What the settings of a run, at every point of its sweep, do to its model, before anything runs: one `vtok.plan` each, of
    a vision-language model for `prompt` (default: one image and 64 other tokens)."""
    net = meta_model(run) if model is None else model
    extra: dict[str, Any] = {"prompt": dict(prompt or {})} if vlm_targets(net) else {}
    patched = [setting for point in points(run) for setting in point.settings if setting.method is not None]
    different = {repr(setting): setting for setting in patched}  # a setting may have its own numbers under every budget
    return [vtok.plan(net, setting.method, **setting.params, **extra) for setting in different.values()]  # type: ignore[arg-type]  # None was left out above


def cost(run: RunConfig, model: nn.Module | None = None) -> Cost:
    """GMACs of a run's one setting, beside the GFLOPs that were published for it."""
    estimate = plans(run, model)[0].estimate
    p = run.published
    return Cost(estimate.macs / 1e9, estimate.base_macs / 1e9, p.get("gflops"), p.get("base_gflops"), estimate.exact)


def groups(table: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs of a table that differ in nothing but the method: they share a model and what the unpatched one does."""
    found: dict[str, list[RunConfig]] = {}
    for run in table:
        found.setdefault(repr(without_method(run)), []).append(run)
    return list(found.values())


def without_method(run: RunConfig) -> dict[str, Any]:
    """A run's content as plain values, but for what is patched and what was published."""
    left_out = ("method", "methods", "table", "published", "output")
    return {key: value for key, value in run.content.items() if key not in left_out}
