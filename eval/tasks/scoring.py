"""Top-1 and top-5 as timm's validate.py counts them: single labels, ReaL label sets, a subset of the classes.

Shapes: b images, K model outputs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.errors import ConfigError, brief, shown
from vtok.reading import from_json, read_text

BUNDLED = "timm"  # as the value of real_labels: the file that comes with timm
_VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")


class Scores(NamedTuple):
    """What a batch scored: most likely class [b], whether it or one of the top 5 is right [b], whether the image counts [b].

    Images that ReaL leaves without a label do not count; models with fewer than five outputs have a top K.
    """

    prediction: Tensor
    top1: Tensor
    top5: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Scorer:
    """Compares logits with labels.

    Attributes:
        valid: outputs that count, in the order of the dataset's labels; `None` = all.
        real: label sets of the images 1, 2, ... of ImageNet's validation set; `None` = use the dataset's labels.
    """

    valid: tuple[int, ...] | None = None
    real: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def load(cls, valid_labels: str | os.PathLike = "", real_labels: str | os.PathLike = "") -> Scorer:
        """Reads a file with an output number a line, and a ReaL JSON file ("timm": the one that timm brings along)."""
        valid = real = None
        if valid_labels:
            lines = _text(valid_labels).split()
            try:
                valid = tuple(int(line) for line in lines)
            except ValueError as error:
                raise ConfigError(f"valid labels {valid_labels} must hold one output number a line: {brief(error)}") from error
        if real_labels:
            wrong = f"ReaL labels {real_labels} must be a JSON list of lists of classes"
            sets = from_json(_text(real_labels), wrong)
            try:
                if not isinstance(sets, list) or not sets:
                    raise TypeError(f"found {shown(sets)}")
                real = tuple(tuple(int(label) for label in one) for one in sets)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigError(f"{wrong}: {brief(error)}") from error
        return cls(valid, real)

    def num_labels(self, outputs: int) -> int:
        """How many labels a dataset may have for a model with so many outputs."""
        if self.valid is None:
            return outputs
        if not self.valid or min(self.valid) < 0 or max(self.valid) >= outputs:
            raise ConfigError(
                f"valid labels must name some of the model's outputs 0 to {outputs - 1}, got {shown(list(self.valid))}"
            )
        return len(self.valid)

    def score(self, logits: Tensor, labels: Tensor, names: Sequence[str]) -> Scores:
        """Scores logits [b, K] against labels [b] of the dataset, or ReaL's, which are looked up by file names."""
        if self.valid is not None:
            logits = logits[:, list(self.valid)]
        ranked = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        if self.real is None:
            hits = ranked == labels.cpu()[:, None]
            return Scores(ranked[:, 0], hits[:, 0], hits.any(1), torch.ones(len(hits), dtype=torch.bool))
        if self.valid is not None:  # ReaL speaks of the model's outputs
            ranked = torch.tensor(self.valid)[ranked]
        sets = [self._real(name) for name in names]
        hits = torch.tensor([[int(p) in one for p in row] for row, one in zip(ranked, sets)])
        return Scores(ranked[:, 0], hits[:, 0], hits.any(1), torch.tensor([bool(one) for one in sets]))

    def _real(self, name: str) -> tuple[int, ...]:
        assert self.real is not None
        found = _VAL_FILE.search(os.path.basename(name))
        number = int(found.group(1)) if found else 0
        if not 1 <= number <= len(self.real):
            raise ConfigError(
                f"ReaL labels belong to ILSVRC2012_val_00000001 to ILSVRC2012_val_{len(self.real):08d}; {name} is none of these"
            )
        return self.real[number - 1]


def _text(path: str | os.PathLike) -> str:
    if path == BUNDLED:
        return (files("timm.data") / "_info" / "imagenet_real_labels.json").read_text()
    return read_text(path, "labels")
