"""Questions by name or from files: those that come with vtok, lines of JSON, VQAv2's format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtok.errors import ConfigError
from vtok.eval.tasks.vqa.data import EASY_VQA, PAGES, PRINT, SCENES, Question, VQAData, blind_answers, kind_of
from vtok.eval.tasks.vqa.files import find_vqav2, read_lines

_BLIND_PAGES, _BLIND_SEED = 2000, 5


def open_vqa(data: str | os.PathLike, questions: str = "", annotations: str = "", images: str = "") -> VQAData:
    """Questions by name, or from files.

    Args:
        data: `"easy-vqa"`, `"easy-vqa-pages"`, `"scenes"` or `"print"`, which come with vtok; a file with an object
            `{"id", "image", "question", "answers"}` a line; or a folder of files in VQAv2's format.
        questions: VQAv2's question file; "" = the one in the folder whose name holds "uestions".
        annotations: VQAv2's annotation file; "" = the one in the folder whose name holds "nnotations".
        images: folder of the images; "" = look in the folder of the data, at any depth.

    Raises:
        ConfigError: no such data, a file that is not of the form, a question without answers or without its image.
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


def easy_vqa() -> VQAData:
    """The bundled questions of easy-VQA's test set."""
    from vtok.eval.models.assets import asset
    from vtok.eval.models.reference import DATA_FOLDER
    from vtok.eval.models.reference_vlm import load_reference_questions

    found = load_reference_questions("test")
    groups = [{"kind": kind_of(answer)} for answer in found.answers]
    blind = json.loads(asset(f"{DATA_FOLDER}/blind-answers.json").read_text(encoding="utf-8"))
    return VQAData(EASY_VQA, _questions(found, groups), _reader(found.pictures), blind=blind)


def calibration_questions() -> VQAData:
    """The bundled questions about training pictures of easy-VQA that were kept out of training."""
    from vtok.eval.models.reference_vlm import load_reference_questions

    found = load_reference_questions("calibration")
    return VQAData(f"{EASY_VQA}/calibration", _questions(found, [{}] * len(found.texts)), _reader(found.pictures))


def easy_vqa_pages() -> VQAData:
    """The bundled questions about pages of four cells; `density` is the number of cells that hold a picture."""
    from vtok.eval.models.reference_next import load_reference_page_questions

    found = load_reference_page_questions()
    groups = [{"kind": kind_of(a), "density": str(d)} for a, d in zip(found.answers, found.density.tolist())]
    return VQAData(PAGES, _questions(found, groups), _reader(found.pictures), blind=blind_page_answers())


def scene_questions() -> VQAData:
    """The bundled questions about test scenes; `kind` says what is asked."""
    from vtok.eval.models.scenes import TEST_SCENES, blind_answers_of_scenes

    return _scenes(SCENES, "test", range(TEST_SCENES), blind_answers_of_scenes())


def calibration_scenes() -> VQAData:
    """Questions about scenes of training pictures that were kept out of training."""
    from vtok.eval.models.scenes import CALIBRATION_SCENES

    return _scenes(f"{SCENES}/calibration", "train", CALIBRATION_SCENES)


def _scenes(name: str, split: str, numbers: range, blind: Mapping[str, str] = MappingProxyType({})) -> VQAData:
    from vtok.eval.models.scenes import draw_scene, one_of_each

    asked = one_of_each(split, numbers)
    questions = [Question(i, one.text, (one.answer,), one.scene, {"kind": one.kind}) for i, one in enumerate(asked)]
    return VQAData(name, questions, lambda number: draw_scene(split, number).image, blind=blind)


def printed_pages() -> VQAData:
    """The bundled questions about pages of small print; `kind` says what is asked, `density` how many quarters hold words."""
    from vtok.eval.models.pages import TEST_PAGES, blind_answers_of_pages

    return _printed(PRINT, "test", range(TEST_PAGES), blind_answers_of_pages())


def calibration_printed_pages() -> VQAData:
    """Questions about pages in the print of training that were kept out of training."""
    from vtok.eval.models.pages import CALIBRATION_PAGES

    return _printed(f"{PRINT}/calibration", "train", CALIBRATION_PAGES)


def _printed(name: str, split: str, numbers: range, blind: Mapping[str, str] = MappingProxyType({})) -> VQAData:
    from vtok.eval.models.pages import draw_page, one_of_each

    asked = one_of_each(split, numbers)
    groups = [{"kind": one.kind, "density": str(one.density)} for one in asked]
    questions = [Question(i, one.text, (one.answer,), one.page, group) for i, (one, group) in enumerate(zip(asked, groups))]
    return VQAData(name, questions, lambda number: draw_page(split, number).image, blind=blind)


@cache
def blind_page_answers() -> dict[str, str]:
    """`blind_answers` of the questions about pages, from as many random pages, drawn like those of training."""
    import torch

    from vtok.eval.models.reference_next import draw_cells, questions_about

    generator = torch.Generator().manual_seed(_BLIND_SEED)
    asked = [pair for cells in draw_cells(_BLIND_PAGES, generator).tolist() for pair in questions_about(cells, generator)]
    return blind_answers(*zip(*asked))


def _questions(found: Any, groups: Sequence[Mapping[str, str]]) -> list[Question]:
    asked = zip(found.texts, found.answers, found.rows.tolist(), groups)
    return [Question(i, text, (answer,), row, group) for i, (text, answer, row, group) in enumerate(asked)]


def _reader(pictures: Any) -> Callable[[int], Any]:
    from PIL import Image

    arrays = pictures.permute(0, 2, 3, 1).numpy()
    return lambda row: Image.fromarray(arrays[row])


_BUNDLED: dict[str, Callable[[], VQAData]] = {
    EASY_VQA: easy_vqa,
    PAGES: easy_vqa_pages,
    SCENES: scene_questions,
    PRINT: printed_pages,
}
