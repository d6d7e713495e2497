"""Questions by name or from files: those that come with vtok, lines of JSON, VQAv2's format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, PRINT, SCENES, Question, VQAData, blind_answers, kind_of
from vtok.eval.tasks.vqa.sources.files import find_vqav2, read_lines

_BLIND_PAGES, _BLIND_SEED = 2000, 5


def open_vqa(data: str | os.PathLike, questions: str = "", annotations: str = "", images: str = "") -> VQAData:
    """Questions by name (`"easy-vqa"`, `"easy-vqa-pages"`, `"scenes"`, `"print"`, which come with vtok), or from files.

    Files are one with an object `{"id", "image", "question", "answers"}` a line, or those of a folder in VQAv2's format, where
    questions, annotations and images that are not named are looked for: by "uestions" and "nnotations" in their names, and
    images at any depth.
    """
    name = os.fspath(data)
    if name in _BUNDLED:
        return _BUNDLED[name]()
    path = Path(name)
    if path.suffix == ".jsonl":
        return read_lines(path, Path(images) if images else None)
    if not path.is_dir() and not questions:
        raise ConfigError(
            f"{name} is neither {', '.join(_BUNDLED)}, a .jsonl file nor a folder with VQAv2's questions, annotations "
            "and images"
        )
    return find_vqav2(path, questions, annotations, images)


def easy_vqa(calibration: bool = False) -> VQAData:
    """The bundled questions of easy-VQA's test set, or about training pictures that were kept out of training."""
    from vtok.eval.models.assets import asset
    from vtok.eval.models.reference import DATA_FOLDER
    from vtok.eval.models.reference_vlm import load_reference_questions

    if calibration:
        found = load_reference_questions("calibration")
        return _stored(f"{EASY_VQA}/calibration", found, [{}] * len(found.texts), {})
    found = load_reference_questions("test")
    blind = json.loads(asset(f"{DATA_FOLDER}/blind-answers.json").read_text(encoding="utf-8"))
    return _stored(EASY_VQA, found, [{"kind": kind_of(answer)} for answer in found.answers], blind)


def easy_vqa_pages() -> VQAData:
    """The bundled questions about pages of four cells; `density` is the number of cells that hold a picture."""
    from vtok.eval.models.reference_next import load_reference_page_questions

    found = load_reference_page_questions()
    groups = [{"kind": kind_of(a), "density": str(d)} for a, d in zip(found.answers, found.density.tolist())]
    return _stored(PAGES, found, groups, blind_page_answers())


def _stored(name: str, found: Any, groups: Sequence[Mapping[str, str]], blind: Mapping[str, str]) -> VQAData:
    """Questions, each with what it is counted under, about pictures that lie in a tensor."""
    from PIL import Image

    arrays = found.pictures.permute(0, 2, 3, 1).numpy()
    asked = enumerate(zip(found.texts, found.answers, found.rows.tolist(), groups))
    questions = [Question(i, text, (answer,), row, group) for i, (text, answer, row, group) in asked]
    return VQAData(name, questions, lambda row: Image.fromarray(arrays[row]), blind=blind)


def scene_questions(calibration: bool = False) -> VQAData:
    """The bundled questions about test scenes, or about scenes of training pictures that were kept out of training."""
    from vtok.eval.models import scenes

    split, numbers = ("train", scenes.CALIBRATION_SCENES) if calibration else ("test", range(scenes.TEST_SCENES))
    asked = [(one, {"kind": one.kind}) for one in scenes.one_of_each(split, numbers)]
    return _drawn(SCENES, calibration, asked, lambda number: scenes.draw_scene(split, number).image, scenes.BLIND)


def printed_pages(calibration: bool = False) -> VQAData:
    """The same about pages of small print; `density` says how many quarters hold words."""
    from vtok.eval.models import pages

    split, numbers = ("train", pages.CALIBRATION_PAGES) if calibration else ("test", range(pages.TEST_PAGES))
    asked = [(one, {"kind": one.kind, "density": str(pages.density(one.number))}) for one in pages.one_of_each(split, numbers)]
    return _drawn(PRINT, calibration, asked, lambda number: pages.draw_page(split, number).image, pages.BLIND)


def _drawn(name: str, calibration: bool, asked: Sequence[Any], read: Callable[[Any], Any], blind: str) -> VQAData:
    """The same about pictures that are drawn when they are asked for."""
    from vtok.eval.models.asked import blind_answers_of

    questions = [Question(i, one.text, (one.answer,), one.number, groups) for i, (one, groups) in enumerate(asked)]
    title = f"{name}/calibration" if calibration else name
    return VQAData(title, questions, read, blind={} if calibration else blind_answers_of(blind))


@cache
def blind_page_answers() -> dict[str, str]:
    """`blind_answers` of the questions about pages, from as many random pages, drawn like those of training."""
    import torch

    from vtok.eval.models.reference_next import draw_cells, questions_about

    generator = torch.Generator().manual_seed(_BLIND_SEED)
    asked = [pair for cells in draw_cells(_BLIND_PAGES, generator).tolist() for pair in questions_about(cells, generator)]
    return blind_answers(*zip(*asked))


_BUNDLED = {EASY_VQA: easy_vqa, PAGES: easy_vqa_pages, SCENES: scene_questions, PRINT: printed_pages}
