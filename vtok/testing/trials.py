"""Parameters under which methods lose tokens on tiny models: what the support matrix and the contract tests run.

A method whose defaults do that needs no row here. Tiny encoders have 64 patches and 4 blocks, several of which are to lose
tokens; tiny vision-language models 16 visual tokens an image, 2 blocks in the tower and 4 decoder layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo
from vtok.methods.atp.modules import ATPModules
from vtok.methods.atp.spec import ATPSpec


class Trial(NamedTuple):
    """How to try one method.

    Attributes:
        encoder: parameters for tiny encoders.
        prompt: the same for tiny vision-language models.
        requests: for a method without working defaults: (its config class, the model, a folder to write into) -> parameters to
            pass, in the order to try; `None` = its `alternatives`.
        remark: on these, for readers of the support matrix: a sentence, without its stop.
    """

    encoder: Mapping[str, Any] = {}
    prompt: Mapping[str, Any] = {}
    requests: Callable[[type[MethodConfig], VLMInfo, str], Sequence[Mapping[str, Any]]] | None = None
    remark: str = ""


def _untrained(config_class: type[MethodConfig], info: VLMInfo, folder: str) -> Sequence[Mapping[str, Any]]:
    """Modules that nobody trained: random, they drop some tokens and keep others."""
    layers = tuple(info.inner_layers)
    made = ATPModules(ATPSpec(depth=info.depth, width=info.width, grid=info.grid or (1, 1), layers=layers, hidden=6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator))
    path = os.path.join(folder, "untrained.safetensors")
    made.save(path)
    return ({"weights": path},)


def _stricter(config_class: type[MethodConfig], info: VLMInfo, folder: str) -> Sequence[Mapping[str, Any]]:
    """Random towers give patches that are less alike than those of trained ones."""
    return tuple({**extra, "alpha": 0.2} for extra in config_class.alternatives(info))


_HALF = Trial(prompt={"keep": 0.5})

TRIALS: dict[str, Trial] = {
    "atp": Trial(
        requests=_untrained,
        remark="Here the modules are random, nobody trained them: the cell shows that tokens go down and are dropped exactly, "
        "not that the right ones are",
    ),
    "ats": Trial({"num_tokens": 24}, {"num_tokens": 6, "layers": [0, 1]}),
    "cdpruner": _HALF,
    "correlation": Trial(requests=_stricter),
    "dart": _HALF,
    "divprune": _HALF,
    "downsample": _HALF,
    "evs": _HALF,
    "fastervlm": _HALF,
    "fastv": _HALF,
    "fastvid": _HALF,
    "hired": _HALF,
    "holov": _HALF,
    "pixel_dedup": Trial(
        prompt={"threshold": 4.6},
        remark="The pixels are random numbers, of which none are the same: this threshold is as large as they differ",
    ),
    "pitome": Trial({"ratio": 0.8}, {"ratio": 0.8}),
    "prumerge": _HALF,
    "random": Trial({"keep": 0.8}, {"keep": 0.5}),
    "tome": Trial({"r": 6}, {"r": 3}),
    "uniform": Trial({"keep": 0.8}, {"keep": 0.5}),
    "vidcom2": _HALF,
    "visionzip": _HALF,
    "vispruner": _HALF,
    "zero_tprune": Trial({"layers": [0, 2], "retain": 0.8, "r": 5}, {"layers": [0, 1], "retain": 0.7}),
}


def trial(method: str) -> Trial:
    """How to try a method; with its defaults if it has no row."""
    return TRIALS.get(method, Trial())
