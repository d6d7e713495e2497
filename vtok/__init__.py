"""vtok: fewer visual tokens inside the vision transformer you already have.

    vtok.patch(model, method="pitome")

Importing vtok needs torch alone; a backend is imported only when a model of it is patched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vtok._version import __version__
from vtok.api import info, patch, patched, plan, prune_inputs, save_config, supports, unmerge, unpatch
from vtok.errors import (
    BudgetError,
    ConfigError,
    MissingExtraError,
    StateError,
    UnknownNameError,
    UnsupportedModelError,
    VtokError,
)
from vtok.prompt_cost import Prompt
from vtok.registry import ADAPTERS, METHODS

if TYPE_CHECKING:
    from vtok.methods.atp import ATP
    from vtok.methods.ats import ATS
    from vtok.methods.cdpruner import CDPruner
    from vtok.methods.correlation import Correlation
    from vtok.methods.dart import DART
    from vtok.methods.divprune import DivPrune
    from vtok.methods.downsample import Downsample
    from vtok.methods.evs import EVS
    from vtok.methods.fastervlm import FasterVLM
    from vtok.methods.fastv import FastV
    from vtok.methods.fastvid import FastVID
    from vtok.methods.hired import HiRED
    from vtok.methods.holov import HoloV
    from vtok.methods.pitome import PiToMe
    from vtok.methods.prumerge import PruMerge
    from vtok.methods.pyramiddrop import PyramidDrop
    from vtok.methods.random_drop import RandomDrop
    from vtok.methods.sparsevlm import SparseVLM
    from vtok.methods.todre import ToDRE
    from vtok.methods.tome import ToMe
    from vtok.methods.uniform_grid import UniformGrid
    from vtok.methods.vidcom2 import VidCom2
    from vtok.methods.visionzip import VisionZip
    from vtok.methods.vispruner import VisPruner
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

_PACKAGES = ("eval", "methods", "ops", "patches")

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
    if name in _PACKAGES:  # imported by being named: help(vtok.eval.demo)
        return import_module(f"vtok.{name}")
    raise AttributeError(f"module 'vtok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
