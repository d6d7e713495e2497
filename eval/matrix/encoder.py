"""The support matrix: every method on every tiny model of every backend, patched, run and compared. Nothing is taken on trust:
a cell says yes only if tokens went down and the output is that of the full-length pass (`vtok.testing.encoder_oracle`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vtok
from vtok.errors import VtokError
from vtok.patches.protocol import Example
from vtok.registry import METHODS, encoder_methods
from vtok.targets import find_targets
from vtok.targets.resolve import Size
from vtok.testing import tiny
from vtok.testing.encoder_oracle import Evidence, check_reduction
from vtok.testing.trials import trial

YES, TOWER, WITH_OPTIONS, NO, FAILED = "yes", "tower", "with options", "no", "FAILED"
STATUSES = (YES, TOWER, WITH_OPTIONS, NO, FAILED)
VLM = "VLM"  # stands for the backend in cells of vision-language models
IMAGES = 3


@dataclass(frozen=True)
class Cell:
    """One method on one tiny model.

    Attributes:
        backend, model, family: of the example.
        method: name.
        status: "yes"; "tower": tokens go down in a VLM's vision tower alone;
            "with options": refused by default, works with `request`; "no": refused; "FAILED": not refused, but wrong.
        params: the method's setting.
        request: parameters that the default lacks.
        reason: why the default is refused, or what failed; "" for a yes.
        evidence: of the run, if there was one.
        classes: names of classes that the reason may hold -> what a note for several models says instead.
        remark: on `request`.
    """

    backend: str
    model: str
    family: str
    method: str
    status: str
    params: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    evidence: Evidence | None = None
    classes: dict[str, str] = field(default_factory=dict)
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return {**asdict(self), "evidence": None if self.evidence is None else self.evidence._asdict()}


Check = Callable[[nn.Module, Tensor], Evidence]


def judge(
    model: nn.Module, x: Tensor, method: str, input_size: Size | None = None, check: Check = check_reduction
) -> dict[str, Any]:
    """Tries a method, at the setting of its `trial`, on a model, as it is and then with each of its alternatives.

    Args:
        model: unpatched, float64, in eval mode; left as it was.
        x: what it takes.
        input_size: (channels, height, width), as for `vtok.patch`.
        check: what a patched model must pass.

    Returns:
        The fields of a `Cell` that the run decides.
    """
    params, refusal = dict(trial(method).encoder), ""
    for request, config in METHODS.get(method).variants(find_targets(model, input_size)[0].info, **params):
        patched = False
        try:
            vtok.patch(model, config, input_size=input_size, trace=True)
            patched = True
            evidence = check(model, x)
        except Exception as error:  # a cell that breaks is a finding; the rest of the matrix goes on
            if isinstance(error, VtokError) and not patched:
                refusal = refusal or str(error)
                continue
            evidence = Evidence(fault=f"{type(error).__name__}: {error}")
        finally:
            vtok.unpatch(model)
        status = FAILED if evidence.fault else WITH_OPTIONS if request else YES
        return {
            "status": status,
            "params": {**params, **request},
            "request": request,
            "reason": evidence.fault or refusal,
            "evidence": evidence,
        }
    return {"status": NO, "params": params, "reason": refusal}


def cells(
    examples: Mapping[str, Example], methods: Sequence[str] | None = None, check: Check = check_reduction
) -> Iterator[Cell]:
    """Every method (default: all) on every example ("backend: name" -> example), one cell at a time."""
    for key, example in examples.items():
        model = tiny.build(example).double()
        x = tiny.images(example, IMAGES, torch.float64)
        family = example.family or example.name.split()[0].rstrip(",")
        classes = {tower.tower: "the model" for tower in vtok.info(model).towers}
        for method in encoder_methods() if methods is None else methods:
            found = judge(model, x, method, example.input_size, check)
            yield Cell(key.partition(":")[0], example.name, family, method, classes=classes, **found)


def to_json(found: Sequence[Cell]) -> str:
    """A JSON list of cells."""
    return json.dumps([cell.to_dict() for cell in found], indent=2)


def counts(found: Sequence[Cell]) -> str:
    """How many cells say what, in a sentence."""
    models, methods = {(c.backend, c.model) for c in found}, {c.method for c in found}
    tally = Counter(c.status for c in found)
    parts = [f"{tally[status]} {status.lower()}" for status in STATUSES if status != TOWER or tally[TOWER]]
    return f"{len(models)} models x {len(methods)} methods = {len(found)} cells: {', '.join(parts)}."
