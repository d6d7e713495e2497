"""RefCOCO (Yu et al., ECCV 2016) as grounding: a sentence describes a thing, its box is asked for.

Files: REFER's `refs(unc).p`, `[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}]`, `instances.json`,
COCO's `{"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "bbox": [x, y, width, height]}]}`, and
the images, `COCO_train2014_NUMBER.jpg`. Splits: val, testA (people), testB (other things). Every sentence is a question.
Rows of the `datasets` library have a thing a row with all its sentences.

Boxes are `[left, top, right, bottom]` as shares of the width and the height of the image. Of an answer the first four
numbers in square brackets count, divided by commas; without any the box is empty. Scores are lmms-eval's: `iou`,
intersection over union, `acc_10` to `acc_90`, whether it is at least 0.1 to 0.9 (papers print `acc_50`), `center_acc`,
whether the middle of the box lies in the true one. lmms-eval stops with a division by zero where neither box covers
anything; that is 0 here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.data import Question, VQAData
from vtok.eval.tasks.vqa.sources.files import checked
from vtok.eval.tasks.vqa.sources.hub import Hub
from vtok.eval.tasks.vqa.sources.reading import Pictures, entries, fields, load_json, located, number_of, text_of, texts_of
from vtok.eval.tasks.vqa.task import QuestionTask, Score, Sources
from vtok.reading import from_pickle

ASK = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). All values "
    "are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the region this "
    "sentence describes: "
)
SPLIT = "val"
Box = tuple[float, float, float, float]
_FAR = 1e6  # pixels, beyond all images
_EMPTY: Box = (0.0, 0.0, 0.0, 0.0)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]")
_REFS_FORM = '[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}, ...]}, ...]'
_COCO_FORM = '{"images": [{"id", "file_name", "width", "height"}, ...], "annotations": [{"id", "bbox"}, ...]}'
_HUB_FORM = '{"question_id", "answer": [SENTENCE, ...], "bbox": [x, y, width, height]}'


def parse_box(text: str) -> Box:
    """The first four numbers in square brackets of an answer, or an empty box."""
    found = _BOX.search(text)
    return _EMPTY if found is None else tuple(float(number) for number in found.groups())  # type: ignore[return-value]


def iou(box: Box, other: Box) -> float:
    """Area that both cover over the area that either covers; 0 where that is nothing."""
    width = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    height = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    both = width * height
    either = _area(box) + _area(other) - both
    return both / either if either else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def center_inside(box: Box, other: Box) -> bool:
    """Whether the middle of the other box lies in a box."""
    x, y = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _share(value: Any, width: Any, height: Any, place: str) -> Box:
    """[x, y, width, height] in pixels -> a box in shares of the image."""
    numbers = isinstance(value, (list, tuple)) and len(value) == 4 and all(_finite(v) for v in value)
    if not numbers or not all(_finite(v) and v > 0 for v in (width, height)):
        raise ConfigError(
            f"{place}: 'bbox' must be [x, y, width, height] in an image with a size, found {shown(value)} in {shown(width)} x "
            f"{shown(height)}"
        )
    x, y, w, h = value
    return x / width, y / height, (x + w) / width, (y + h) / height


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FAR


def _questions(number: Any, sentences: Sequence[str], box: Box, image: Any) -> list[Question]:
    """One for each sentence about a thing."""
    target = "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
    return [
        Question(f"{number}/{i}", ASK + sentence, (target,), image, {}, {"box": list(box)})
        for i, sentence in enumerate(sentences)
    ]


def _read(sources: Sources) -> VQAData:
    path, split = located(sources, "refs(*).p"), sources.split or SPLIT
    coco = path.parent / "instances.json"
    content = load_json(coco, _COCO_FORM)
    images, boxes = (_by_id(content, name, coco) for name in ("images", "annotations"))
    pictures, found, splits = Pictures.of(sources), list[Question](), dict[Any, None]()
    for i, ref in enumerate(_refs(path)):
        place = f"{path}: entry {i}"
        names = ("ref_id", "ann_id", "image_id", "split", "sentences")
        number, thing, image, own, sentences = fields(ref, names, place, _REFS_FORM)
        splits.setdefault(text_of(own, "'split'", place))
        if own != split:
            continue
        place = f"{path}: reference {brief(number_of(number, 'ref_id', place))}"
        image, thing = number_of(image, "'image_id'", place), number_of(thing, "'ann_id'", place)
        if not isinstance(sentences, list):
            raise ConfigError(f"{place}: 'sentences' must be a list, found {shown(sentences)}; expected {_REFS_FORM}")
        if image not in images or thing not in boxes:
            raise ConfigError(f"{place}: {coco.name} has no image {brief(image)} with the annotation {brief(thing)}")
        name, width, height = fields(images[image], ("file_name", "width", "height"), f"{coco}: image {image}", _COCO_FORM)
        (bbox,) = fields(boxes[thing], ("bbox",), f"{coco}: annotation {thing}", _COCO_FORM)
        file = str(pictures.find(text_of(name, "'file_name'", f"{coco}: image {image}"), f"{coco}: image {image}"))
        told = [text_of(one.get("sent") if isinstance(one, dict) else one, "'sent'", place) for one in sentences]
        found += _questions(number, told, _share(bbox, width, height, place), file)
    if not found:
        raise ConfigError(
            f"{path} has no reference of the split {shown(split)}, only of {', '.join(map(str, splits))} (--split)"
        )
    return checked("refcoco", found, path, pictures, "", split)


def _by_id(content: Any, name: str, coco: Path) -> dict[Any, Any]:
    """The images or annotations of COCO's file by their numbers."""
    found = {}
    for i, one in enumerate(entries(content, name, coco, _COCO_FORM)):
        place = f"{coco}: {name}, entry {i}"
        found[number_of(fields(one, ("id",), place, _COCO_FORM)[0], "'id'", place)] = one
    return found


def _refs(path: Path) -> list[Any]:
    """What REFER's file holds."""
    try:
        found = from_pickle(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever stands in a file that is no pickle
        raise ConfigError(f"{path} is no pickle of plain lists and texts of the form {_REFS_FORM}: {error}") from error
    return entries(found, None, path, _REFS_FORM)


def _from_row(row: Any, place: str, image: Any, split: str) -> list[Question]:
    number, sentences, bbox = fields(row, ("question_id", "answer", "bbox"), place, _HUB_FORM)
    box = _share(bbox, row["width"], row["height"], place)
    return _questions(number, texts_of(sentences, "'answer'", place), box, image)


def _iou(said: str, q: Question) -> float:
    return iou(tuple(q.facts["box"]), parse_box(said))


def _within(share: int) -> Score:
    """Whether a box is as near as some percent."""
    return lambda said, q: float(_iou(said, q) >= share / 100)


TASK = QuestionTask(
    name="refcoco",
    read=_read,
    scores={
        **{f"acc_{share}": _within(share) for share in (10, 30, 50, 70, 90)},
        "iou": _iou,
        "center_acc": lambda said, q: float(center_inside(tuple(q.facts["box"]), parse_box(said))),
    },
    primary="acc_50",
    correct="acc_50",
    columns={"acc@0.5": "acc_50", "IoU": "iou"},
    max_new_tokens=1024,
    hub=Hub("lmms-lab-encoder/RefCOCO", None, SPLIT, _from_row, "", sizes=True, same_image="file_name"),
)
