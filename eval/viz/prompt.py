"""Token maps of a vision-language model: in its vision tower, before its LLM, and in front of decoder layers.

Shapes: n visual tokens of the prompt, V views that the vision tower sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

import vtok
from vtok.core import prompt as prompts
from vtok.errors import ConfigError, StateError
from vtok.eval.common.pictures import open_picture
from vtok.eval.common.settings import Setting, weight_sharing_copy
from vtok.eval.models.vlm import REFERENCE_LLAVA, REFERENCE_NEXT, REFERENCE_PRINT, REFERENCE_SCENES, VisionLanguageModel
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, PRINT, SCENES, VQAData
from vtok.eval.tasks.vqa.pipeline import answer
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz.draw import Stage, TokenMaps, View
from vtok.eval.viz.input import number_of, shown
from vtok.eval.viz.overlay import groups_by_block, tokens_left
from vtok.eval.viz.prompt_overlay import all_that_stays, kept_by_layer
from vtok.patches.hf_packed.adapter import raster_places
from vtok.patches.hf_vlm.install import observed
from vtok.targets import vlm_targets
from vtok.targets.resolve import run_of

DEFAULT_QUESTION = "What is shown here?"
QUESTIONS = {REFERENCE_LLAVA: EASY_VQA, REFERENCE_NEXT: PAGES, REFERENCE_SCENES: SCENES, REFERENCE_PRINT: PRINT}


def prompt_maps(
    model: VisionLanguageModel, setting: Setting, image: Any, question: str | None = None, new_tokens: int = 8
) -> TokenMaps:
    """Which visual tokens of a question are left, place by place, and what is answered, under a setting of an unpatched model.

    Args:
        image: path, PIL image, or the number of a bundled question of a reference model.
        question: default: the bundled one, else `DEFAULT_QUESTION`.
        new_tokens: length of the answer at most.

    Raises:
        ConfigError: no such image, or visual tokens that are no grid.
    """
    picture, question = _asked(model, image, question)
    inputs = model.inputs([picture], [question])
    seen = list(observed(vlm_targets(model.net)[0].vlm, inputs, ()))
    if len(seen) != 1 or len(seen[0].tokens) != 1:
        raise ConfigError(f"{model.name} takes the image as several; token maps are drawn of one")
    views = seen[0].views
    drawn = _views(picture, views, inputs.get("pixel_values"), model)
    net = weight_sharing_copy(model.net).eval()
    setting.apply(net)
    (target,) = vlm_targets(net)
    pruner = target.installed()
    if pruner is not None and pruner.joint is not None:  # something acts in the vision tower: only then is there a map of it
        vtok.patch(net, list(pruner.configs), trace=True)
        pruner = target.installed()
    said = answer(model, net, inputs, new_tokens).texts[0]
    last = None if pruner is None else pruner.last
    stages = _tower_stages(net, target.vlm, drawn)
    if last is None and not stages:
        raise StateError(f"{setting.title} leaves this prompt as it is; there is no map to draw")
    if last is not None:
        kept = kept_by_layer(last)
        for layer, name in _names(sorted(kept), target.info.depth):
            left = kept[layer][0][last.visual[0]].cpu().numpy()
            maps = tuple(_in_view(left, view) for view in views if not _newline_alone(view))
            stages.append(Stage(name, maps, int(left.sum())))
    title = f"{model.name}: {setting.title}, asked {question!r}"
    configs = () if pruner is None else pruner.configs
    notes = ("the last stage holds no more than the method always keeps (min_tokens): its thresholds let all others go",)
    few = bool(stages) and bool(all_that_stays(configs, stages[-1].tokens))
    return TokenMaps(title, drawn, tuple(stages), seen[0].tokens.shape[1], said, notes if few else ())


@cache
def questions_of(name: str) -> VQAData:
    """The bundled questions of a reference model, read once."""
    return open_vqa(QUESTIONS[name])


def _asked(model: VisionLanguageModel, image: Any, question: str | None) -> tuple[Any, str]:
    """(picture, question); a number is that of a bundled question."""
    number = number_of(image)
    if number is None:
        return open_picture(image), question or DEFAULT_QUESTION
    if model.name not in QUESTIONS:
        raise ConfigError(f"{model.name} comes without images; name an image file instead of {number}")
    data = questions_of(model.name)
    if not 0 <= number < len(data.questions):
        raise ConfigError(f"question {number}: {model.name} comes with questions 0 to {len(data.questions) - 1}")
    asked = data.questions[number]
    return data.read(asked.image), question or asked.text + data.prompt


def _views(picture: Any, views: Sequence[prompts.View], pixels: Any, model: VisionLanguageModel) -> tuple[View, ...]:
    """Views to draw on: what the tower saw, if it saw as many; else the whole picture."""
    drawn = [view for view in views if not _newline_alone(view)]
    cut: list[np.ndarray] = [np.asarray(picture) / 255] * len(drawn)
    if isinstance(pixels, Tensor) and pixels.ndim >= 4 and len(drawn) > 1:
        crops = pixels.reshape(-1, *pixels.shape[-3:])
        if len(crops) == len(drawn):
            processor = getattr(model.processor, "image_processor", None)
            mean, std = (getattr(processor, name, None) or [0.5] * 3 for name in ("image_mean", "image_std"))
            cut = [shown(crop[:3], mean, std) for crop in crops]
    found = []
    for number, (view, pixel) in enumerate(zip(drawn, cut)):
        columns = view.columns - view.newline
        if view.rows == 1 and columns > 3:
            raise ConfigError(f"the {columns} visual tokens of {model.name} are no grid that could be drawn")
        name = "overview" if view.overview else f"view {number}" if len(drawn) > 2 else "crops" if len(drawn) > 1 else ""
        found.append(View(pixel, (view.rows, columns), name))
    return tuple(found)


def _tower_stages(net: Any, vlm: Any, views: tuple[View, ...]) -> list[Stage]:
    """Maps of the vision tower, if it is patched and saw just what is shown."""
    run = None if vlm.tower is None else run_of(vlm.tower.module)
    if run is None:
        return []
    stages = []
    for block, groups in enumerate(groups_by_block(run)):
        if len(groups) != len(views) or any(groups.shape[1] != view.grid[0] * view.grid[1] for view in views):
            return []
        if vlm.packed:
            order = [raster_places(vlm.tower, view.grid).argsort().numpy() for view in views]  # of units, row by row
            groups = np.stack([own[places] for own, places in zip(groups, order)])
        tokens = sum(map(tokens_left, groups))
        stages.append(Stage(f"vision tower, block {block}", tuple(groups), tokens))
    return stages


def _names(layers: Sequence[int], depth: int) -> list[tuple[int, str]]:
    """(decoder layer where something was dropped, name of the stretch up to the next)."""
    found = []
    for layer, following in zip(layers, [*layers[1:], depth]):
        where = f"decoder layer {layer}" if following - layer == 1 else f"decoder layers {layer} to {following - 1}"
        found.append((layer, where))
    return found


def _in_view(left: np.ndarray, view: prompts.View) -> np.ndarray:
    """[rows * columns] map of a view: every token that is left lives on alone."""
    grid = left[view.start : view.stop].reshape(view.rows, view.columns)
    kept = (grid[:, :-1] if view.newline else grid).ravel()
    return np.where(kept, np.arange(len(kept)), -1)


def _newline_alone(view: prompts.View) -> bool:
    return view.newline and view.columns == 1
