"""vtok: fewer visual tokens inside the vision transformer or vision-language model you already have.

    vtok.patch(model, method="tome")

vtok needs torch alone; a backend is imported only when a model of it is patched. What is named here is imported when it is
first used, so that importing vtok takes no time.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vtok._version import __version__
from vtok.errors import (
    BudgetError,
    ConfigError,
    MissingExtraError,
    StateError,
    UnknownNameError,
    UnsupportedModelError,
    VtokError,
)
from vtok.measuring import benchmark, evaluate
from vtok.registry import ADAPTERS, METHODS

if TYPE_CHECKING:
    from vtok._signatures import patch, patched, plan
    from vtok.api import info, prune_inputs, save_config, supports, unmerge, unpatch
    from vtok.cost.prefill import Prompt
    from vtok.methods.atp import ATP
    from vtok.methods.ats import ATS
    from vtok.methods.baselines.downsample import Downsample
    from vtok.methods.baselines.random_drop import RandomDrop
    from vtok.methods.baselines.uniform_grid import UniformGrid
    from vtok.methods.correlation import Correlation
    from vtok.methods.features.cdpruner import CDPruner
    from vtok.methods.features.divprune import DivPrune
    from vtok.methods.features.fastervlm import FasterVLM
    from vtok.methods.features.hired import HiRED
    from vtok.methods.features.holov import HoloV
    from vtok.methods.features.prumerge import PruMerge
    from vtok.methods.features.visionzip import VisionZip
    from vtok.methods.features.vispruner import VisPruner
    from vtok.methods.in_llm.dart import DART
    from vtok.methods.in_llm.fastv import FastV
    from vtok.methods.in_llm.pyramiddrop import PyramidDrop
    from vtok.methods.in_llm.sparsevlm import SparseVLM
    from vtok.methods.pitome import PiToMe
    from vtok.methods.pixel_dedup import PixelDedup
    from vtok.methods.todre import ToDRE
    from vtok.methods.tome import ToMe
    from vtok.methods.video.evs import EVS
    from vtok.methods.video.fastvid import FastVID
    from vtok.methods.video.vidcom2 import VidCom2
    from vtok.methods.zero_tprune import ZeroTPrune

# Config classes, imported on first use: class name -> method name.
_CONFIGS = {
    "ATP": "atp",
    "ATS": "ats",
    "CDPruner": "cdpruner",
    "Correlation": "correlation",
    "DART": "dart",
    "DivPrune": "divprune",
    "Downsample": "downsample",
    "EVS": "evs",
    "FastV": "fastv",
    "FastVID": "fastvid",
    "FasterVLM": "fastervlm",
    "HiRED": "hired",
    "HoloV": "holov",
    "PiToMe": "pitome",
    "PixelDedup": "pixel_dedup",
    "PruMerge": "prumerge",
    "PyramidDrop": "pyramiddrop",
    "RandomDrop": "random",
    "SparseVLM": "sparsevlm",
    "ToDRE": "todre",
    "ToMe": "tome",
    "UniformGrid": "uniform",
    "VidCom2": "vidcom2",
    "VisPruner": "vispruner",
    "VisionZip": "visionzip",
    "ZeroTPrune": "zero_tprune",
}

# Functions and classes, imported on first use: name -> module.
_NAMES = {
    **dict.fromkeys(
        ("info", "patch", "patched", "plan", "prune_inputs", "save_config", "supports", "unmerge", "unpatch"), "vtok.api"
    ),
    "Prompt": "vtok.cost.prefill",
}

__all__ = [
    "ADAPTERS",
    "ATP",
    "ATS",
    "DART",
    "EVS",
    "METHODS",
    "BudgetError",
    "CDPruner",
    "ConfigError",
    "Correlation",
    "DivPrune",
    "Downsample",
    "FastV",
    "FastVID",
    "FasterVLM",
    "HiRED",
    "HoloV",
    "MissingExtraError",
    "PiToMe",
    "PixelDedup",
    "Prompt",
    "PruMerge",
    "PyramidDrop",
    "RandomDrop",
    "SparseVLM",
    "StateError",
    "ToDRE",
    "ToMe",
    "UniformGrid",
    "UnknownNameError",
    "UnsupportedModelError",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "VtokError",
    "ZeroTPrune",
    "__version__",
    "benchmark",
    "evaluate",
    "info",
    "patch",
    "patched",
    "plan",
    "prune_inputs",
    "save_config",
    "supports",
    "unmerge",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _CONFIGS:
        return METHODS.get(_CONFIGS[name])
    if name in _NAMES:
        found = globals()[name] = getattr(import_module(_NAMES[name]), name)
        return found
    if (
        not name.startswith("_") and find_spec(f"vtok.{name}") is not None
    ):  # imported by being named: help(vtok.eval.demo.encoders)
        return import_module(f"vtok.{name}")
    raise AttributeError(f"module 'vtok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
