"""What the choice of tokens is worth on the reference ViT (`vtok.eval.common.control`), and what an early choice foresees.

Shapes: B batch, N tokens, P prefix tokens, n patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from vtok.api import patched
from vtok.config import MethodConfig, ModelInfo, Reducer, require_cls
from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, Place, Site, TokenState
from vtok.eval.common import terminal
from vtok.eval.common.control import RandomChoice
from vtok.eval.common.records import Record, Records, correctness, key_of
from vtok.eval.common.statistics import mean_stderr, paired_difference, with_error
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.reference import load_reference_vit
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.tables import Column, Table
from vtok.eval.runs.runner import RESULTS
from vtok.eval.tasks.imagenet import evaluate
from vtok.eval.tasks.scoring import Scores
from vtok.eval.tasks.timm_pipeline import Options
from vtok.registry import METHODS


@dataclass(frozen=True)
class Watch(MethodConfig):
    """Reduces nothing; `seen` receives what the class token attends to in every block: [B, n], heads averaged, sums to 1."""

    name: ClassVar[str] = "watch"
    seen: list[Tensor]

    def build(self, info: ModelInfo) -> WatchReducer:
        require_cls(info, self.name, "there is nothing to watch")
        return WatchReducer(self.seen, info.depth)


@dataclass(frozen=True)
class WatchReducer(Reducer):
    """Looks at every block."""

    seen: list[Tensor]
    depth: int
    needs: ClassVar[frozenset[str]] = frozenset("qk")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.BLOCK_MID, i) for i in range(self.depth))

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        attn = view.probs(first=1)[:, :, 0, state.num_prefix :].mean(1)
        self.seen.append(attn / attn.sum(-1, keepdim=True))
        return None

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        return n


def attention_kept(model: nn.Module, images: Tensor, block: int) -> list[float]:
    """Share of the class token's attention, in every block, that falls on the half of the patches which it attends to most in
    one block: how well an early choice by class attention foresees later blocks (0.5 = chance). images: [B, C, H, W].
    """
    seen: list[Tensor] = []
    with patched(model, Watch(seen)), torch.inference_mode():
        model(images)
    half = seen[block].argsort(dim=-1, descending=True)[:, : seen[block].shape[1] // 2]
    return [float(attn.gather(1, half).sum(1).mean()) for attn in seen]


def controls(section: Section) -> list[tuple[Row, RandomChoice]]:
    """Every setting of a method that chooses, with its control."""
    chosen = [row for row in section.patched if row.method in METHODS.names() and not row.baseline]
    return [(row, RandomChoice(METHODS.get(row.method).from_dict(row.record["params"]))) for row in chosen]


def measure_controls(section: Section, out: Path, console: Console) -> dict[str, Record]:
    """Measures the controls that have no record yet, on the samples of a section of the reference ViT, into the folder of its
    results.

    Returns:
        Key of a setting -> the record of its control.
    """
    records, model, first = Records(out / RESULTS), load_reference_vit(), section.first
    options = Options(num_samples=first["n"], batch_size=first["batch_size"], workers=0, device="cpu", seed=first["seed"])
    done, found, memory = records.by_key(), dict[str, Record](), BaselineCache[Scores]()
    with terminal.progress(console) as progress:
        for row, choice in progress.track(controls(section), description="tokens at random"):
            key = key_of({"of": row.record["key"], "control": choice.seed})
            if key not in done:
                record = evaluate(model, first["dataset"], [None, choice], options, memory=memory)[-1]
                kept = {name: row.record[name] for name in ("model", "budget", "threads", "device_name")}
                title = row.label.replace(row.method, choice.name, 1)
                record.pop("config", None)  # no run file names a control
                records.append({**record, **kept, "setting": title, "key": key})
            found[row.record["key"]] = done.get(key) or records.by_key()[key]
    return found


def value_of_choice(section: Section, found: Mapping[str, Record]) -> Table:
    """Every method beside its control: top-1, and what the choice is worth in paired points."""

    def worth(row: Row) -> str:
        change = correctness(row.record).astype(float) - correctness(found[row.record["key"]])
        gain, error = mean_stderr(change)
        told = {"gain": gain, "gain_stderr": error, "gain_ci": paired_difference(change).ends}
        return with_error(told, "gain", 100, 2, "+")

    columns = [
        Column("method", lambda row: row.method, left=True),
        Column("budget", lambda row: f"{row.budget:g}"),
        Column("top-1 %", lambda row: f"{row.record['metrics']['top1']:.2f}"),
        Column("tokens at random", lambda row: f"{found[row.record['key']]['metrics']['top1']:.2f}"),
        Column("the choice is worth", worth),
    ]
    title, caption = "what the choice of tokens is worth", "± standard error, paired; same places and counts"
    return Table.of([row for row in section.patched if row.record["key"] in found], columns, title, caption)
