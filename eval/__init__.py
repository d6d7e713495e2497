"""Evaluation: accuracy, FLOPs and speed of patched models against the unpatched ones, and the program `vtok`.

What the numbers mean: assets/docs/api/evaluation.md. Names and modules of this package are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_NAMES = {"TokenMaps": "viz.draw", "visualize": "viz.token_maps", "write_report": "report.html"}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"vtok.eval.{_NAMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"vtok.eval.{name}") is not None:
        return import_module(f"vtok.eval.{name}")
    raise AttributeError(f"module 'vtok.eval' has no attribute {name!r}")
