"""Which visual tokens of a prompt survive: counts by part of the picture, and pictures of it.

Shapes: B questions, n visual tokens of a prompt, G x G patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtok.config import MethodConfig
from vtok.errors import StateError
from vtok.eval.common.settings import Setting, weight_sharing_copy
from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.pipeline import answer
from vtok.eval.viz.overlay import Tile, paint, write_sheet
from vtok.patches.decoder.pass_state import Counts
from vtok.targets import vlm_targets


class Survivors(NamedTuple):
    """What a model left of the prompts of one batch: B answers; [B, n] bool, visual tokens that entered the last decoder
    layer."""

    texts: list[str]
    left: np.ndarray


def survivors(
    model: VisionLanguageModel, net: Any, data: VQAData, questions: Sequence[Question], new_tokens: int = 4
) -> Survivors:
    """Asks a batch of questions whose images have as many visual tokens each.

    Args:
        model: whose processor is used.
        net: the same model, patched so that nothing is merged.
        data: where images come from.

    Raises:
        StateError: the model is not patched, or the prompts hold different numbers of visual tokens.
    """
    (target,) = vlm_targets(net)
    pruner = target.installed()
    inputs = model.inputs([data.read(q.image) for q in questions], [q.text + data.prompt for q in questions])
    found = answer(model, net, inputs, new_tokens)
    last = None if pruner is None else pruner.last
    if last is None:
        raise StateError("nothing was dropped: survivors need a patched model")
    kept = kept_by_layer(last)
    stays = kept[max(kept)]
    counts = last.visual.sum(1)
    if bool((counts != counts[0]).any()):
        raise StateError(f"prompts of one batch need equally many visual tokens, got {counts.tolist()}")
    return Survivors(found.texts, stays[last.visual].view(len(stays), -1).cpu().numpy())


def kept_by_layer(last: Counts) -> dict[int, Tensor]:
    """Decoder layer -> [B, L] bool, the visual tokens of prompts of L columns that enter it; layer 0 and those in front of
    which something was dropped."""
    stays = last.visual if last.alive is None else last.visual & last.alive
    found = {0: stays}
    for layer, stage in sorted(last.stages.items()):
        column = stage.column  # [B, M], -1 = padding
        kept = torch.zeros(len(column), last.visual.shape[1] + 1, dtype=torch.bool, device=column.device)
        kept.scatter_(1, column.where(column >= 0, last.visual.shape[1]), True)
        found[layer] = stays & kept[:, :-1]
    return found


def all_that_stays(configs: Sequence[MethodConfig], tokens: int) -> str:
    """What is said of a prompt of which no more is left than a method always keeps; "" of others."""
    return "its minimum" if any(getattr(config, "min_tokens", None) == tokens for config in configs) else ""


def crops_grid(left: np.ndarray, overview: int) -> np.ndarray:
    """[B, G, G] bool: survivors [B, n] among the crops of pages, put together; newline tokens at the ends of the lines and the
    `overview` tokens of the whole page, which come first, left out."""
    crops = left[:, overview:]
    side = int(crops.shape[1] ** 0.5)  # G * (G + 1) tokens
    return crops.reshape(len(left), side, side + 1)[:, :, :side]


def by_cell(grid: np.ndarray) -> np.ndarray:
    """[B, 4] survivors in each quarter of a page, row by row. grid [B, G, G]."""
    half = grid.shape[1] // 2
    return grid.reshape(len(grid), 2, half, 2, half).sum((2, 4)).reshape(len(grid), 4)


def question_sheet(
    model: VisionLanguageModel,
    data: VQAData,
    questions: Sequence[Question],
    settings: Sequence[tuple[str, Setting]],
    path: Path,
    heading: str,
    overview: int = 0,
) -> None:
    """A sheet with one row a question and one column a setting, the images themselves on the left, under each what was said.

    Args:
        model: unpatched; copies are patched.
        settings: (title, setting) of the columns.
        overview: for pages, tokens of the view of the whole page; what is painted are the crops.
    """
    pictures = [np.asarray(data.read(q.image)) / 255 for q in questions]
    columns = []
    for title, setting in settings:
        net = setting.apply(weight_sharing_copy(model.net))
        found = survivors(model, net, data, questions)
        pruner = vlm_targets(net)[0].installed()
        configs = () if pruner is None else pruner.configs
        grids = crops_grid(found.left, overview) if overview else _square(found.left)
        side = grids.shape[1]
        tiles = []
        for picture, grid, said in zip(pictures, grids, found.texts):
            groups = np.where(grid.ravel(), np.arange(side * side), -1)
            least = all_that_stays(configs, int(grid.sum()))
            words = f"{int(grid.sum())} of {side * side} tokens{f' ({least})' if least else ''}\nsays: {said}"
            tiles.append(Tile(paint(picture, groups, (side, side)), words))
        columns.append((title.replace("(", "\n("), tiles))
    asked = [Tile(picture, f"{q.text}\nright: {q.target}") for picture, q in zip(pictures, questions)]
    write_sheet(asked, columns, path, heading, size=(1.9, 2.2))


def _square(left: np.ndarray) -> np.ndarray:
    side = int(left.shape[1] ** 0.5)
    return left.reshape(len(left), side, side)
