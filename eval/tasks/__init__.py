"""Evaluation tasks by name. An entry is a function `(model, data_dir, settings, options) -> records`, one record a setting.

Other packages add theirs through the entry-point group `vtok.tasks`.
"""

from __future__ import annotations

from typing import Any

from vtok.registry import Registry

TASKS: Registry[Any] = Registry(
    "task",
    {
        "imagenet": "vtok.eval.tasks.imagenet:evaluate",
        "retrieval": "vtok.eval.tasks.retrieval:evaluate",
        "vqa": "vtok.eval.tasks.vqa:evaluate",
        "zeroshot": "vtok.eval.tasks.zeroshot:evaluate",
    },
    group="vtok.tasks",
)
