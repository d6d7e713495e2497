"""RefCOCO (Yu et al., ECCV 2016) as grounding: a sentence describes a thing, its box is asked for.

Boxes are `[left, top, right, bottom]` as shares of the width and the height of the image. The scores are lmms-eval's, which
stops with a division by zero where neither box covers anything; that is 0 here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtok.errors import ConfigError, brief, shown
from vtok.eval.tasks.vqa.sources.reading import entries, load_json, located, text_of
from vtok.eval.tasks.vqa.task import Hub, Pictures, Question, QuestionTask, Row, Rows, Score, Sources
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


def _questions(row: Row) -> list[Question]:
    """One for each sentence about a thing."""
    number, sentences, bbox = row.key("question_id"), row.texts("answer"), row.need("bbox")[0]
    box = _share(bbox, row.get("width"), row.get("height"), row.place)
    target = "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
    return [
        Question(f"{number}/{i}", ASK + sentence, (target,), row.image, {}, {"box": list(box)})
        for i, sentence in enumerate(sentences)
    ]


def _read(sources: Sources) -> Rows:
    path, split = located(sources, "refs(*).p"), sources.split or SPLIT
    pictures = Pictures.of(sources)
    return Rows(_rows(path, split, pictures), path, pictures, split)


def _rows(path: Path, split: str, pictures: Pictures) -> Iterator[Row]:
    """The references of a split as rows of the `datasets` library have them."""
    coco = path.parent / "instances.json"
    content = load_json(coco, _COCO_FORM)
    images, boxes = (_by_id(content, name, coco) for name in ("images", "annotations"))
    splits: dict[Any, None] = {}
    for i, entry in enumerate(_refs(path)):
        ref = Row(entry, f"{path}: entry {i}", _REFS_FORM)
        sentences = ref.need("ref_id", "ann_id", "image_id", "split", "sentences")[-1]
        splits.setdefault(ref.text("split"))
        if ref.text("split") != split:
            continue
        ref = replace(ref, place=f"{path}: reference {brief(ref.key('ref_id'))}")
        image, thing = ref.key("image_id"), ref.key("ann_id")
        if not isinstance(sentences, list):
            raise ConfigError(f"{ref.place}: 'sentences' must be a list, found {shown(sentences)}; expected {_REFS_FORM}")
        if image not in images or thing not in boxes:
            raise ConfigError(f"{ref.place}: {coco.name} has no image {brief(image)} with the annotation {brief(thing)}")
        shown_image = images[image]
        told = [text_of(one.get("sent") if isinstance(one, dict) else one, "'sent'", ref.place) for one in sentences]
        width, height, bbox = *shown_image.need("width", "height"), *boxes[thing].need("bbox")
        fields = {"question_id": ref.get("ref_id"), "answer": told, "bbox": bbox, "width": width, "height": height}
        file = str(pictures.find(shown_image.text("file_name"), shown_image.place))
        if told:
            yield Row(fields, ref.place, _REFS_FORM, i, file, split)
    if split not in splits:
        raise ConfigError(
            f"{path} has no reference of the split {shown(split)}, only of {', '.join(map(str, splits))} (--split)"
        )


def _by_id(content: Any, name: str, coco: Path) -> dict[Any, Row]:
    found = {}
    for i, entry in enumerate(entries(content, name, coco, _COCO_FORM)):
        number = Row(entry, f"{coco}: {name}, entry {i}", _COCO_FORM).key("id")
        found[number] = Row(entry, f"{coco}: {name.removesuffix('s')} {number}", _COCO_FORM)
    return found


def _refs(path: Path) -> list[Any]:
    try:
        found = from_pickle(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever stands in a file that is no pickle
        raise ConfigError(f"{path} is no pickle of plain lists and texts of the form {_REFS_FORM}: {error}") from error
    return entries(found, None, path, _REFS_FORM)


def _iou(said: str, q: Question) -> float:
    return iou(tuple(q.facts["box"]), parse_box(said))


def _within(share: int) -> Score:
    return lambda said, q: float(_iou(said, q) >= share / 100)


TASK = QuestionTask(
    name="refcoco",
    read=_read,
    question=_questions,
    scores={
        **{f"acc_{share}": _within(share) for share in (10, 30, 50, 70, 90)},
        "iou": _iou,
        "center_acc": lambda said, q: float(center_inside(tuple(q.facts["box"]), parse_box(said))),
    },
    primary="acc_50",
    columns={"acc@0.5": "acc_50", "IoU": "iou"},
    max_new_tokens=1024,
    hub=Hub("lmms-lab-encoder/RefCOCO", None, SPLIT, _HUB_FORM, sizes=True, same_image="file_name"),
)
