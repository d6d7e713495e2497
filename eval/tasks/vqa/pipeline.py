"""Asks questions in batches, every setting on the same batches, and keeps every answer as soon as it is there.

Shapes: B questions of a batch, L columns of the prompt, T new tokens.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.eval.common.distributed import Processes, current
from vtok.eval.common.records import Records, key_of
from vtok.eval.common.settings import Setting
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.task import QuestionTask
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.generic.outputs import feature_list
from vtok.patches.hf_vlm.image_features import encode, visual_columns
from vtok.targets import vlm_targets

TIMED_AGAIN = 2
Progress = Callable[[int, int], None]
Line = dict[str, Any]


@dataclass
class Entry:
    """One setting: the model patched so, the hash of everything that decides an answer, batches that this process ran."""

    setting: Setting
    net: Any
    key: str
    runs: int = field(default=0)

    @property
    def unpatched(self) -> bool:
        return self.setting.method is None


def doc_key(question: Question) -> str:
    """What a question is known by, as a text that differs for `0` and `"0"`."""
    return json.dumps(question.doc_id, default=repr)


def key_in(entry: Entry, question: Question) -> str:
    """Key of a setting's answer to a question: that of the setting, a slash, `doc_key`."""
    return f"{entry.key}/{doc_key(question)}"


class Answers(NamedTuple):
    """What one setting made of one batch.

    Attributes:
        texts: B answers.
        visual: [B] int64, image tokens of the prompt as the processor made it.
        kept: [B, decoder layers] int64, visual tokens that entered each layer.
        kv_bytes: [B] int64, keys and values of the prompt's real tokens in all layers.
        macs: MACs a question until its first token, mean over the batch: of the model as patched, of the unpatched one, of the
            reduction; `None` if unpatched.
        first, later, seconds: until the first token (vision tower, connector, prompt), a token after it (`None` if there was
            only one), until the last.
    """

    texts: list[str]
    visual: Tensor
    kept: Tensor
    kv_bytes: Tensor
    macs: tuple[float, float, float] | None
    first: float
    later: float | None
    seconds: float


class Samples:
    """Answers by setting and question, in a file of JSON lines, whose lines are not asked again, or (`None`) in memory."""

    def __init__(self, path: Path | None = None):
        self._path, self._records = path, None if path is None else Records(path)
        self._lines: dict[str, Line] = {} if self._records is None else self._records.by_key()

    def line(self, entry: Entry, question: Question) -> Line | None:
        return self._lines.get(key_in(entry, question))

    def check(self, entries: Sequence[Entry], questions: Sequence[Question]) -> None:
        """Warns of answers to these very questions, by the same settings, that nothing says belong to them.

        Their pictures, reference answers, prompt, weights or batches were others, or an earlier release did not note them.
        """
        missing = {e.setting.title for e in entries if any(self.line(e, q) is None for q in questions)}
        texts, known = {doc_key(q): q.text for q in questions}, {key_in(e, q) for e in entries for q in questions}
        others = [
            key
            for key, line in self._lines.items()
            if key not in known
            and line.get("method") in missing
            and texts.get(json.dumps(line.get("doc_id"), default=repr)) == line.get("question", "")
        ]
        if others and current().rank == 0:
            warnings.warn(
                f"{self._path} holds {len(others)} answers to the same words, but nothing shows that they belong to these "
                "pictures, weights and settings, or an earlier release wrote them: the questions are asked again",
                stacklevel=2,
            )

    def add(self, entry: Entry, questions: Sequence[Question], lines: Sequence[Line]) -> None:
        new = [{"key": key_in(entry, q), **line} for q, line in zip(questions, lines)]
        if self._records is not None:
            self._records.extend(new)
        self._lines.update({line["key"]: line for line in new})

    def share(self, processes: Processes, entries: Sequence[Entry], own: Sequence[Question], asked: Sequence[Question]) -> None:
        """Brings the answers of all processes together, in all of them: each asked its `own`, all of them what was `asked`."""
        lines = {key_in(entry, q): self.line(entry, q) for entry in entries for q in own}
        found = processes.gather(lines, (key_in(entry, q) for entry in entries for q in asked))
        self._lines.update({key: line for key, line in found.items() if line is not None})
        if processes.rank == 0 and self._records is not None:  # other machines may have written theirs to files of their own
            known = self._records.by_key()
            self._records.extend([line for key, line in found.items() if line is not None and key not in known])


@dataclass(frozen=True)
class Asking:
    """What is asked of an unpatched model: questions of a task in batches of B, for answers of T tokens at most.

    `seed` is that of methods that draw, with the number of the batch, so that a run that was stopped goes on as it would have.
    """

    model: VisionLanguageModel
    data: VQAData
    task: QuestionTask
    batch_size: int
    max_new_tokens: int
    seed: int = 0


def ask(asking: Asking, entries: Sequence[Entry], samples: Samples, progress: Progress | None = None) -> None:
    """Asks every question under every setting that has no answer to it yet, and stores answers after every batch.

    Times are compared within a batch: where the unpatched setting has all its answers already, it runs again on every
    `TIMED_AGAIN`th batch on which another one does.
    """
    model, data, questions, checked = asking.model, asking.data, asking.data.questions, False
    processes, own = current(), list[Question]()
    if processes.world > 1:
        decides = {"settings": [entry.key for entry in entries], "asked": questions}
        processes.check_same("model, setting or list of questions", key_of(decides))
    for number, (start, batch) in enumerate(batches(questions, asking.batch_size)):
        if not processes.owns(number):
            continue
        own += batch
        missing = [e for e in entries if any(samples.line(e, q) is None for q in batch)]
        if missing:
            images = {q.image: None if q.image is None else data.read(q.image) for q in batch}
            inputs = model.inputs([images[q.image] for q in batch], [q.text + data.prompt for q in batch])
            if not checked and batch[0].image is not None:
                check_image_tokens(model, inputs)
                checked = True
            again = number // processes.world % TIMED_AGAIN == 0
            base: Answers | None = None
            for entry in sorted(entries, key=lambda e: not e.unpatched):
                if entry in missing or (entry.unpatched and again):
                    torch.manual_seed(asking.seed + start)
                    found = answer(model, entry.net, inputs, asking.max_new_tokens)
                    base = found if entry.unpatched and base is None else base
                    if entry in missing:
                        said = found.texts if entry.unpatched else _said(entries, samples, batch)
                        samples.add(entry, batch, _lines(batch, found, said, base, start, entry, asking.task, processes.rank))
                    entry.runs += 1
        if progress is not None:
            progress(start + len(batch), len(questions))
    if processes.world > 1:
        samples.share(processes, entries, own, questions)


def batches(questions: Sequence[Question], size: int) -> Iterator[tuple[int, Sequence[Question]]]:
    """(Number of its first question, questions) of every batch: questions with and without an image do not share one."""
    start = 0
    for _, run in groupby(questions, key=lambda q: q.image is None):
        alike = list(run)
        for first in range(0, len(alike), size):
            batch = alike[first : first + size]
            yield start, batch
            start += len(batch)


def answer(model: VisionLanguageModel, net: Any, inputs: Any, max_new_tokens: int) -> Answers:
    """Greedy answers of a model, or of its patched copy `net`, to one batch of the processor's, and what they cost."""
    length = inputs["input_ids"].shape[1]
    clock = Clock(inputs["input_ids"].device)
    with torch.inference_mode():
        made = net.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, stopping_criteria=[clock], use_cache=True
        )
    visual = visual_columns(inputs["input_ids"], only_vlm(net).tokens).sum(1)
    seen = bool(visual.any())  # what vtok knows of a prompt without an image would be the one before it
    kept = kept_tokens(net, visual) if seen else visual[:, None].repeat(1, only_vlm(net).info.depth)
    text = inputs["attention_mask"].sum(1) - visual
    cost = macs(net) if seen else None
    times = clock.first, clock.later, clock.times[-1]
    return Answers(model.texts(made[:, length:]), visual, kept, kv_bytes(net, text, kept), cost, *times)


def macs(net: nn.Module) -> tuple[float, float, float] | None:
    """MACs of the last prompt of this thread, see `Answers`, without padding."""
    for prompt in vtok.info(net).prompts:
        cost = prompt.mean_estimate or prompt.estimate
        if cost is not None:
            return cost.macs, cost.base_macs, cost.reduction_macs
    return None


def kept_tokens(net: nn.Module, visual: Tensor) -> Tensor:
    """Visual tokens, of `visual` [B], that entered each layer in this thread's last pass: [B, decoder layers] int64."""
    counts = visual[:, None].repeat(1, only_vlm(net).info.depth)
    for prompt in vtok.info(net).prompts:
        for row in prompt.rows:
            layer = int(row.place.rpartition(" ")[2]) if row.place.startswith("decoder layer") else 0
            counts[:, layer:] = torch.tensor(row.tokens_out, device=counts.device)[:, None]
    return counts


def kv_bytes(net: Any, text: Tensor, kept: Tensor) -> Tensor:
    """[B] int64: bytes of the keys and values of prompts with `text` [B] other and `kept` [B, layers] visual tokens."""
    config = only_vlm(net).text.config
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (kept + text[:, None]).sum(1) * 2 * heads * width * next(net.parameters()).element_size()


def check_image_tokens(model: VisionLanguageModel, inputs: Any) -> None:
    """Raises `ConfigError` unless the processor makes as many image tokens as the model makes features."""
    vlm = only_vlm(model.net)
    ids = inputs["input_ids"]
    asked = int(visual_columns(ids, vlm.tokens).sum())
    with torch.inference_mode():
        made = sum(len(x) for output in encode(vlm.module, inputs).values() for x in feature_list(output))
    if asked != made:
        raise ConfigError(
            f"processor and model of {model.name} disagree: the prompts of {len(ids)} questions hold {asked} image tokens, but "
            f"the model makes {made} features of their images; use the processor that was saved with the model"
        )


def _said(entries: Sequence[Entry], samples: Samples, batch: Sequence[Question]) -> list[str] | None:
    """Answers of the unpatched setting, which comes first; `None` without one."""
    base = next((entry for entry in entries if entry.unpatched), None)
    lines = [None if base is None else samples.line(base, question) for question in batch]
    return None if None in lines else [line["prediction"] for line in lines if line is not None]


def _lines(
    batch: Sequence[Question],
    found: Answers,
    said: list[str] | None,
    base: Answers | None,
    start: int,
    entry: Entry,
    task: QuestionTask,
    rank: int,
) -> list[Line]:
    times = {
        "batch": start,
        "rank": rank,
        "cold": entry.runs == 0,  # the first batch of a process warms up
        "seconds": found.seconds,
        "macs": None if found.macs is None else dict(zip(("model", "base", "pruner"), found.macs)),
        "ttft_ms": 1000 * found.first,
        "decode_ms_per_token": None if found.later is None else 1000 * found.later,
        "base_ttft_ms": None if base is None else 1000 * base.first,
        "base_decode_ms_per_token": None if base is None or base.later is None else 1000 * base.later,
    }
    scores = [task.score_all(text, q) for text, q in zip(found.texts, batch)]
    return [
        {
            "doc_id": q.doc_id,
            "method": entry.setting.title,
            "question": q.text,
            "prediction": found.texts[i],
            "target": q.target,
            "score": scores[i][task.sample or task.correct],
            "scores": scores[i],
            "visual_tokens": int(found.visual[i]),
            "kept_tokens": found.kept[i].tolist(),
            "baseline_prediction": None if said is None else said[i],
            "kv_bytes": int(found.kv_bytes[i]),
            **times,
        }
        for i, q in enumerate(batch)
    ]


def only_vlm(net: nn.Module) -> VLM:
    """The vision-language model in a module, patched or not; `UnsupportedModelError` if it holds none, or several."""
    found = vlm_targets(net)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(net).__name__} is no vision-language model that vtok knows: its visual tokens cannot be counted; see "
            "vtok.supports(model)"
        )
    return found[0].vlm


class Clock:
    """Notes when each token is there: a stopping criterion of `generate()` that never stops."""

    def __init__(self, device: torch.device):
        self.device, self.start, self.times = device, time.perf_counter(), list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(self.seconds())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> float:
        """Since the clock was made, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def later(self) -> float | None:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None
