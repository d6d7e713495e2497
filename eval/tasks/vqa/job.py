"""One evaluation on questions about images: settings, their samples, the records made of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vtok
from vtok.config import MethodConfig
from vtok.eval.common.distributed import current
from vtok.eval.common.records import BASELINES, Records, key_of
from vtok.eval.common.settings import Setting, fingerprint, versions, weight_sharing_copy
from vtok.eval.tasks.vqa.pipeline import Asking, Entry, Line, Progress, Samples, ask
from vtok.eval.tasks.vqa.records import Scored, accuracy_fields, cost_fields, time_fields, token_fields


class Job:
    """One evaluation: what is asked, and settings that are asked one after the other.

    `folder` (`None` = none) gets the files; `again` makes of a setting the run file that repeats it, or `None`; `skipped` has
    pictures that could not be read, and why.
    """

    def __init__(
        self,
        asking: Asking,
        folder: Path | None,
        again: Callable[[Setting], dict[str, Any] | None],
        skipped: Sequence[tuple[str, str]] = (),
    ):
        self.asking, self.folder, self.again = asking, folder, again
        self.model, self.data, self.task = asking.model, asking.data, asking.task
        self.skipped = [{"file": file, "reason": why} for file, why in skipped]
        self.samples = Samples(None if folder is None else folder / "samples.jsonl")
        self.entries: list[Entry] = []
        self.weights, self.asked = fingerprint(self.model.net), self.data.identity()

    def entry(self, setting: Setting) -> Entry:
        """A setting with the model patched so; errors are those of `vtok.patch`."""
        net = setting.apply(weight_sharing_copy(self.model.net))
        first = next(self.model.net.parameters())
        identity = {
            "task": self.task.name,
            "model": self.model.name,
            "weights": self.weights,
            "methods": [config.to_dict() for config in configs_of(net)],
            "params": {k: v for k, v in setting.params.items() if k != "calibration"},
            "data": self.data.name,
            "questions": self.asked,
            "prompt": self.data.prompt,
            "max_new_tokens": self.asking.max_new_tokens,
            "batch_size": self.asking.batch_size,
            "dtype": str(first.dtype),
            "seed": self.asking.seed,
            "vtok": versions()["vtok"],
            **({"frames_as_images": True} if self.model.frames_as_images else {}),
        }
        return Entry(setting, net, key_of(identity))

    def run(self, entries: Sequence[Entry], progress: Progress | None) -> None:
        """Asks with new entries, beside the unpatched one."""
        self.entries += entries
        base = [e for e in self.entries if e.unpatched and e not in entries]
        self.samples.check(entries, self.data.questions)
        ask(self.asking, [*base, *entries], self.samples, progress)

    def baselines(self) -> list[Entry]:
        """Random and uniform at the mean share of visual tokens that every setting kept; of these two the other one."""
        wanted: dict[tuple[float, str], None] = {}
        for entry in self.entries:
            share = float(self.kept(entry).mean()) / self.visual(entry)
            if not entry.unpatched and 0 < share < 1:
                wanted |= dict.fromkeys((round(share, 4), name) for name in BASELINES if name != entry.setting.name)
        found = [self.entry(Setting(name, {"keep": share})) for share, name in wanted]
        there = {entry.key for entry in self.entries}
        return [entry for entry in found if entry.key not in there]

    def lines(self, entry: Entry) -> list[Line]:
        found = [self.samples.line(entry, question) for question in self.data.questions]
        assert None not in found
        return [line for line in found if line is not None]

    def kept(self, entry: Entry) -> np.ndarray:
        """[n] visual tokens, mean over the decoder layers."""
        return np.array([sum(line["kept_tokens"]) / len(line["kept_tokens"]) for line in self.lines(entry)])

    def visual(self, entry: Entry) -> float:
        """Mean number of image tokens of a prompt as the processor makes it."""
        lines = self.lines(entry)
        return sum(line["visual_tokens"] for line in lines) / len(lines)

    def records(self, outside: tuple[str, list[str]] | None) -> list[dict[str, Any]]:
        """One a setting; those that are new go to `results.jsonl`, answers to files of their own."""
        base = next((e for e in self.entries if e.unpatched), None)
        before = None if base is None else self._scored([line["prediction"] for line in self.lines(base)])
        records = [self._record(entry, base, before) for entry in self.entries]
        if outside is not None:
            name, scored = outside[0], self._scored(outside[1])
            records.append(
                {
                    **self._common(),
                    "method": name,
                    "title": name,
                    "params": {},
                    **accuracy_fields(self.data, scored, before, None),
                }
            )
        if self.folder is not None and current().rank == 0:
            file = Records(self.folder / "results.jsonl")
            known = file.by_key()
            file.extend([record for record in records if record.get("key") and record["key"] not in known])
            for number, entry in enumerate(self.entries if self.task.write is not None else ()):
                title = re.sub(r"[^\w.@-]+", "-", entry.setting.title).strip("-")
                answers = [line["prediction"] for line in self.lines(entry)]
                name = f"answers_{number}-{title[:60]}-{entry.key[:8]}"  # other data or another seed has files of its own
                self.task.write(self.folder, name, self.data.questions, answers)  # type: ignore[misc]
        return records

    def _scored(self, answers: list[str]) -> Scored:
        return Scored(self.data, answers, self.task, self.asking.seed)

    def _record(self, entry: Entry, base: Entry | None, before: Scored | None) -> dict[str, Any]:
        lines = self.lines(entry)
        scored = self._scored([line["prediction"] for line in lines])
        unpatched = None if base is None else self.lines(base)
        timed, cost = time_fields(lines, not entry.unpatched, self.asking.seed, current().world), self._cost(entry)
        if "speedup" in timed and "implied_speedup" in cost:
            timed["achieved"] = timed["speedup"] / cost["implied_speedup"]
        return {
            "key": entry.key,
            **self._common(),
            "method": entry.setting.name,
            "title": entry.setting.title,
            "params": _plain([config.to_dict() for config in configs_of(entry.net)]),
            **accuracy_fields(self.data, scored, None if entry.unpatched else before, self.kept(entry)),
            **token_fields(lines, unpatched, self.visual(entry)),
            **cost,
            **timed,
            **({} if (content := self.again(entry.setting)) is None else {"config": content}),
        }

    def _cost(self, entry: Entry) -> dict[str, Any]:
        """Of the unpatched model what a patched one next to it was compared with."""
        if not entry.unpatched:
            return cost_fields(self.lines(entry))
        found = next((cost for other in self.entries if (cost := cost_fields(self.lines(other)))), {})
        return {
            name: {"model": found[name]["base"], "base": found[name]["base"], "pruner": 0.0}
            for name in ("gmacs", "gflops")
            if name in found
        }

    def _common(self) -> dict[str, Any]:
        first = next(self.model.net.parameters())
        return {
            "task": self.task.name,
            "primary": self.task.primary,
            "percent": self.task.percent,
            "dataset": self.data.name,
            "split": self.data.split,
            "model": self.model.name,
            "weights": self.weights,
            "backend": "transformers",
            "prompt": self.data.prompt,
            "max_new_tokens": self.asking.max_new_tokens,
            "batch_size": self.asking.batch_size,
            "param_count": round(sum(p.numel() for p in self.model.net.parameters()) / 1e6, 2),
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "threads": torch.get_num_threads(),
            "seed": self.asking.seed,
            "versions": versions(),
            "num_skipped": len(self.skipped),
            "skipped": self.skipped,
        }


def configs_of(net: nn.Module) -> list[MethodConfig]:
    """Configs of everything that is patched into a model, tower and LLM."""
    info = vtok.info(net)
    found = [config for tower in info.towers for config in tower.configs]
    found += [config for prompt in info.prompts for config in prompt.configs]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def _plain(configs: list[dict[str, Any]]) -> Any:
    """A mapping for one method or none, as other tasks have it, else a list."""
    if len(configs) == 1:
        return {name: value for name, value in configs[0].items() if name != "method"}
    return configs or {}
