"""What a model of lmms-eval did prompt by prompt: kept visual tokens and times, handed to the harness with the answers.

Shapes: B prompts of a batch, L columns, T new tokens.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics
from loguru import logger
from torch import Tensor

import vtok
from vtok.errors import VtokError
from vtok.eval.tasks.vqa.pipeline import Clock, kept_tokens, kv_bytes, macs, only_vlm
from vtok.patches.hf_vlm.image_features import visual_columns

Document = tuple[str, str, Any]  # task, split, number


@dataclass
class PromptCounts(TokenCounts):
    """What the harness writes into `token_counts` of a sample; see assets/docs/evaluate.md. Its own fields come first."""

    visual_tokens: int | None = None
    kept_tokens: list[int] | None = None
    kv_bytes: int | None = None
    ttft_ms: float | None = None
    decode_ms_per_token: float | None = None
    elapsed_ms: float | None = None
    batch_size: int | None = None
    gmacs: dict[str, float] | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values if self.error is not None else {"gmacs": None, "decode_ms_per_token": None, **values}


class Recorder:
    """Stands in for `generate()` of a model and notes what every prompt kept and took.

    Which document a prompt is about follows from the order in which the model class reads documents.
    """

    def __init__(self, net: Any):
        self._net, self._generate = net, net.generate
        self._asked: deque[Document] = deque()
        self._counts: defaultdict[Document | None, deque[PromptCounts]] = defaultdict(deque)
        self._batches: list[PromptCounts] = []  # one of each batch that was answered
        self.all: list[PromptCounts] = []

    @contextmanager
    def watching(self, lm: Any) -> Iterator[None]:
        """Notes what happens inside; a failure that the harness would take for an empty answer comes through if it must."""
        documents = lm.task_dict
        lm.task_dict, self._net.generate = _Documents(documents, self._asked.append), self.generate
        try:
            yield
        except _Stop as stop:
            raise stop.error from None
        finally:
            lm.task_dict = documents
            del self._net.generate

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's own: [B, L + T]."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        about = [self._asked.popleft() if self._asked else None for _ in ids]
        clock = Clock(ids.device)
        criteria = [*(kwargs.pop("stopping_criteria", None) or ()), clock]
        try:
            made = self._generate(*args, stopping_criteria=criteria, **kwargs)
        except Exception as error:  # lmms-eval would make an empty answer of any failure: it is recorded, then raised again
            if isinstance(error, VtokError) or not self._batches:
                raise _Stop(error) from error
            self._add(about, [PromptCounts(error=f"{type(error).__name__}: {error}") for _ in ids])
            raise
        elapsed = clock.seconds()
        visual = visual_columns(ids, only_vlm(self._net).tokens).sum(1)
        kept = _kept(self._net, visual)
        prompt = torch.full_like(visual, ids.shape[1]) if mask is None else mask.sum(1)
        stored = kv_bytes(self._net, prompt - visual, kept)
        spent = macs(self._net) if bool(visual.any()) else None
        new = _lengths(made[:: len(made) // len(ids), ids.shape[1] :], kwargs.get("eos_token_id"))
        counts = [
            PromptCounts(
                input_tokens=int(prompt[i]),
                output_tokens=new[i],
                visual_tokens=int(visual[i]),
                kept_tokens=kept[i].tolist(),
                kv_bytes=int(stored[i]),
                ttft_ms=1000 * clock.first,
                decode_ms_per_token=None if clock.later is None else 1000 * clock.later,
                elapsed_ms=1000 * elapsed,
                batch_size=len(ids),
                gmacs=None if spent is None else dict(zip(("model", "base", "pruner"), (value / 1e9 for value in spent))),
            )
            for i in range(len(ids))
        ]
        self._batches.append(counts[0])
        self._add(about, counts)
        return made

    def results(self, requests: Sequence[Instance], answers: Sequence[Any]) -> list[GenerationResult]:
        """The answers, each with what its prompt kept and took; nothing is said where that is not certain."""
        known = not self._asked and None not in self._counts
        if not known:
            logger.warning("vtok: the model class read documents in an unforeseen order; samples get no counts of tokens")
        found = []
        for request, answer in zip(requests, answers):
            text, own = unwrap_generation_output(answer)
            number, task, split = request.args[-3:]
            mine = self._counts[task, split, number]
            counts = mine.popleft() if known and mine else None
            if counts is not None and own is not None:
                counts.reasoning_tokens = own.reasoning_tokens
            found.append(GenerationResult(text=text, token_counts=own if counts is None else counts))
        return found

    def log(self, already: int) -> None:
        """Adds totals and means to the harness's metrics, of which there were `already` so many before the answers: a class
        that has logged its totals since is not counted twice."""
        answered = [c for c in self.all if c.error is None]
        if not self.all:
            return
        failed = len(self.all) - len(answered)
        if failed:
            first = next(c.error for c in self.all if c.error is not None)
            logger.warning(f"vtok: {failed} of {len(self.all)} prompts failed and count as empty answers, first: {first}")
        warm = self._batches[1:] or self._batches
        later = [c.decode_ms_per_token for c in warm if c.decode_ms_per_token is not None]
        figures: dict[str, float] = {
            "visual_tokens": _mean(c.visual_tokens for c in answered),
            "kept_tokens": _mean(_mean(c.kept_tokens or ()) for c in answered),
            "ttft_ms": _mean(c.ttft_ms for c in warm),
            **({"decode_ms_per_token": _mean(later)} if later else {}),
            "failed": failed,
        }
        logger.info("vtok: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        history = get_logged_metrics_history()
        if len(history) > already:
            history[-1].update(figures)
            return
        seconds, tokens = sum(c.elapsed_ms or 0.0 for c in self._batches) / 1000, sum(c.output_tokens or 0 for c in answered)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, figures)

    def _add(self, about: Sequence[Document | None], counts: Sequence[PromptCounts]) -> None:
        self.all += counts
        for document, one in zip(about, counts):
            self._counts[document].append(one)


class _Stop(BaseException):
    """Passes through `except Exception`, by which lmms-eval makes an empty answer of any failure."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class _Documents:
    """task -> split -> number -> document, noting every document that is read."""

    def __init__(self, inner: Any, note: Callable[[Document], None], path: tuple[str, ...] = ()):
        self._inner, self._note, self._path = inner, note, path

    def __getitem__(self, key: Any) -> Any:
        found = self._inner[key]
        if len(self._path) < 2:
            return _Documents(found, self._note, (*self._path, key))
        self._note((*self._path, key))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _kept(net: Any, visual: Tensor) -> Tensor:
    """[B, decoder layers] visual tokens that entered each layer; `visual` [B] those of the prompts. Beams are counted once."""
    seen = [len(row.tokens_out) for prompt in vtok.info(net).prompts for row in prompt.rows]
    beams = max(seen, default=len(visual)) // len(visual) if bool(visual.any()) else 1
    if not bool(visual.any()):  # what was noted last belongs to an earlier prompt
        return visual[:, None].repeat(1, only_vlm(net).info.depth)
    return kept_tokens(net, visual.repeat_interleave(beams))[::beams]


def _lengths(new: Tensor, ends: Any) -> list[int]:
    """Tokens of each answer, the end of the sequence included, what fills the row after it left out. new: [B, T]."""
    stops = torch.as_tensor([] if ends is None else ends, device=new.device).reshape(-1)
    over = torch.isin(new, stops).cumsum(1) - torch.isin(new, stops).long() > 0
    return (~over).sum(1).tolist()


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
