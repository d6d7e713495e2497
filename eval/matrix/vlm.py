"""The support matrix of vision-language models: every method on every tiny one, patched, run and compared with the oracle
(`vtok.testing.prompt_oracle`)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import vtok
from vtok.errors import VtokError
from vtok.eval.matrix import encoder as matrix
from vtok.eval.matrix.encoder import FAILED, NO, TOWER, WITH_OPTIONS, YES, Cell
from vtok.patches.hf_vlm.examples import VLMExample
from vtok.patches.hf_vlm.families import VLM, find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.registry import METHODS
from vtok.targets.vlm.tower import ON_GRID
from vtok.testing import tiny
from vtok.testing.encoder_oracle import Evidence
from vtok.testing.prompt_oracle import NOTHING, check_any_prompts
from vtok.testing.trials import trial


def judge(model: Any, example: VLMExample, method: str) -> dict[str, Any]:
    """Tries a method, at the setting of its `trial`, on an unpatched model built from an example, as it is and then with each
    of its alternatives.

    Returns:
        The fields of a `Cell` that the run decides.
    """
    config_class, (vlm,) = METHODS.get(method), find(model)
    tried, why, last = trial(method), [], None
    params = dict(tried.prompt)
    with tempfile.TemporaryDirectory() as folder:
        requests = tried.requests(config_class, vlm.info, folder) if tried.requests else config_class.alternatives(vlm.info)
        for request in ({}, *requests):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that prompts keep their length is what the cell says
                    vtok.patch(model, config_class.create(**{**params, **request}))
                pruner = pruner_of(find(model)[0])
                alone = pruner is not None and not pruner.shortens
                evidence = check_any_prompts(model, example)
            except VtokError as error:
                why.append(str(error))
                continue
            except Exception as error:  # a cell that breaks is a finding; the rest of the matrix goes on
                alone, evidence = False, Evidence(fault=f"{type(error).__name__}: {error}")
            finally:
                vtok.unpatch(model)
            shown = {k: v.removeprefix(f"{folder}/") if isinstance(v, str) else v for k, v in request.items()}
            status = FAILED if evidence.fault else WITH_OPTIONS if request else TOWER if alone else YES
            last = {
                "status": status,
                "params": {**params, **shown},
                "request": shown,
                "reason": evidence.fault or (ON_GRID if status == TOWER else why[0] if why else ""),
                "evidence": evidence,
                "remark": tried.remark if request else "",
            }
            if evidence.fault != NOTHING:  # a wrong answer is not hidden by a right one under other parameters
                return last
            why.append(evidence.fault)
    return last or {"status": NO, "params": params, "reason": why[-1]}


def _classes(vlm: VLM) -> dict[str, str]:
    """Names that reasons may hold -> what a note for several models says instead."""
    inside = set(vlm.text.modules())
    named = {type(m).__name__: "its vision tower" for m in vlm.module.children() if m not in inside}
    if vlm.tower is not None:
        named[vlm.tower.info.name] = "its vision tower"
    return {**named, vlm.info.name: "the model"}


def cells(examples: Mapping[str, VLMExample], methods: Sequence[str] | None = None) -> Iterator[Cell]:
    """Every method (default: all) on every example (name -> example), one cell at a time."""
    families: dict[str, str] = {}
    for name, example in examples.items():
        model = tiny.build_vlm(example)
        family, (vlm,) = families.setdefault(type(model).__name__, name), find(model)
        for method in METHODS.names() if methods is None else methods:
            yield Cell(matrix.VLM, name, family, method, classes=_classes(vlm), **judge(model, example, method))
