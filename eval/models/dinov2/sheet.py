"""What the methods keep and merge of photographs: `python -m vtok.eval.models.dinov2.sheet FILE.png`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtok.eval.models.dinov2.model import load_dinov2, normalise
from vtok.eval.tasks.pictures import asset_folder
from vtok.eval.viz.overlay import overlay_sheet

SHOWN = ("astronaut-1", "chelsea-1", "rocket-1", "face-1")
BUDGET = 0.6


def write_sheet(path: Path) -> None:
    """A row a photograph, a column a setting, all at one budget. Raises `ConfigError` without the package with the weights."""
    from PIL import Image

    pixels = [np.array(Image.open(asset_folder("photographs") / f"{name}.jpg")) for name in SHOWN]
    images = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
    more: dict[str, dict[str, Any]] = {"pitome, protect=late": {"protect": "late"}, "ats": {"calibration": images}}
    names = ("tome", "pitome", "pitome, protect=late", "ats", "zero_tprune", "random")
    settings = [(name, name.partition(",")[0], {"flops": BUDGET, **more.get(name, {})}) for name in names]
    heading = f"DINOv2 ViT-S/14 at {BUDGET:g} of the FLOPs"
    overlay_sheet(load_dinov2(), images, [one / 255 for one in pixels], settings, path, [""] * len(SHOWN), heading)


if __name__ == "__main__":
    write_sheet(Path(sys.argv[1]))
