"""What methods make of image features inside tiny vision-language models: rows that stay, and what stands there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers_todre import row_of
from torch import Tensor
from vlm_zoo import build

import vtok
from vtok.config import MethodConfig
from vtok.core.prompt import ImageFeatures, VLMReducer
from vtok.core.reduction import Plan
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.tower import taps as tower_taps

Values = dict[str, Tensor]


class Chosen:
    """The choice of a method among the image features of a model.

    Attributes:
        stays: [n] bool of every image, images first, then videos.
        features: [n, D] of every image, as they enter the LLM.
        whole: [n, D], as the model made them.
        outputs: what the model would return, changed.
    """

    def __init__(self, model: Any, values: Values, config: MethodConfig):
        (vlm,) = find(model)
        reducer = config.build_vlm(vlm.info)
        taps = tower_taps.TowerTaps(reducer.tower_blocks)
        with torch.no_grad(), taps.on(vlm.tower):
            outputs = hf.encode(vlm.module, values, taps)
            chosen = hf.choose(vlm.module, outputs, reducer, vlm.family, values)
        self.outputs, self.rows = chosen.outputs, chosen.rows
        self.whole = [x for output in outputs.values() for x in output.pooler_output]
        self.features = [x for output in chosen.outputs.values() for x in output.pooler_output]
        flat = torch.cat(list(chosen.rows.values()))
        self.stays = list(flat.split([len(x) for x in self.whole]))
        self.columns = hf.kept_columns(values["input_ids"], vlm.tokens, chosen.rows)


def seen_by(model: Any, values: Values, blocks: tuple[int, ...]) -> list[ImageFeatures]:
    """What a method is shown that looks at some blocks of the tower."""
    found: list[ImageFeatures] = []

    class Witness(VLMReducer):
        tower_blocks = blocks  # type: ignore[assignment]

        def features(self, images: ImageFeatures) -> Plan | None:
            found.append(images)
            return None

    (vlm,) = find(model)
    taps = tower_taps.TowerTaps(blocks)
    with torch.no_grad(), taps.on(vlm.tower):
        hf.choose(vlm.module, hf.encode(vlm.module, values, taps), Witness(), vlm.family, values)
    return found


def encoded(values: Values, chosen: Chosen) -> dict[str, Any]:
    """Inputs that bring the chosen features with them, for an unpatched model."""
    rest = {k: v for k, v in values.items() if not k.startswith("pixel_values")}
    return {**rest, "mm_encoder_outputs": copy.copy(chosen.outputs)}


def patched(name: str, kernel: str, config: MethodConfig) -> Any:
    return vtok.patch(build(name, kernel), config)


__all__ = ["Chosen", "encoded", "patched", "row_of", "seen_by"]
