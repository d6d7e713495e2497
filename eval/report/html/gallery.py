"""Token maps of chosen images under every setting of a section. What cannot be drawn is said and never fails the page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtok.config import MethodConfig
from vtok.errors import ConfigError
from vtok.eval.common.settings import Setting
from vtok.eval.models.by_name import REFERENCE, REFERENCE_CLIP, load_model
from vtok.eval.models.vlm import BUNDLED, VisionLanguageModel, load_vlm
from vtok.eval.report.html.groups import images_of, labels_of
from vtok.eval.report.html.questions import Questions
from vtok.eval.report.html.repeat import model_name
from vtok.eval.report.rows import Row
from vtok.eval.report.sections import Section
from vtok.eval.report.values import text
from vtok.eval.runs.again import configs_of
from vtok.eval.tasks.vqa.metrics import exact_match
from vtok.eval.viz.draw import TokenMaps
from vtok.eval.viz.input import prepared, reference_pixels
from vtok.eval.viz.overlay import legend
from vtok.eval.viz.prompt import prompt_maps, questions_of
from vtok.eval.viz.prompt_overlay import all_that_stays
from vtok.eval.viz.token_maps import bundled, encoder_maps

SIDE = 128  # pixels of a drawn image
_COLOURS = 96
_ENCODERS = {"fashion_vit": REFERENCE, "reference-vit": REFERENCE, REFERENCE: REFERENCE, REFERENCE_CLIP: REFERENCE_CLIP}


class Tile(NamedTuple):
    """One setting on one image."""

    uri: str  # of the picture, with its data
    label: str  # of the setting
    words: str  # what is left, what is answered
    verdict: str  # "right", "wrong" or ""
    alt: str  # for those who cannot see it


class Item(NamedTuple):
    """One image, the untouched one first."""

    title: str
    tiles: list[Tile]


@dataclass
class Gallery:
    """All images of a section."""

    items: list[Item] = field(default_factory=list)  # what was drawn
    problems: list[str] = field(default_factory=list)  # what could not be drawn, and why
    choice: str = ""  # how the images were chosen
    legend: str = ""  # what the colours mean


def gallery(
    section: Section,
    asked: Questions | None,
    count: int,
    images: Sequence[str],
    progress: Callable[[str], None] = lambda words: None,
) -> Gallery:
    """Draws images under every setting whose model can be had.

    Args:
        section: its records name model and parameters.
        asked: single questions, of which disputed ones are drawn first.
        count: images, if none are named.
        images: files, or numbers of bundled images (of questions, for vision-language models).
        progress: told which picture of how many is drawn.
    """
    found, maps = Gallery(), list[TokenMaps]()
    progress(f"{section.title}: building the model for token maps")
    try:
        name, model = _model(section, bool([image for image in images if not image.isdigit()]))
    except Exception as error:  # whatever a record names: the page is worth more than its pictures
        found.problems.append(f"the model cannot be had: {text(error)}")
        return found
    chosen, found.choice = list(images), "as named"
    if not chosen and asked is not None and asked.shown and isinstance(model, VisionLanguageModel):
        chosen = [str(one.doc_id) for one in asked.shown[:count]]
        found.choice = "questions on which most settings disagree with the unpatched model"
    elif not chosen:
        known = images_of(section) or range(_count(section))
        chosen = [str(known[i * len(known) // count]) for i in range(min(count, len(known)))]
        found.choice = "evenly spaced over the data"
    settings = _settings(section, found.problems)
    for number, image in enumerate(chosen):

        def told(done: int, label: str, before: int = number * len(settings)) -> None:
            progress(f"{section.title}: token map {before + done} of {len(chosen) * len(settings)} ({label})")

        try:
            found.items.append(_item(name, model, section, settings, image, found.problems, maps, told))
        except Exception as error:  # as above
            found.problems.append(f"image {image}: {text(error)}")
    found.problems = list(dict.fromkeys(found.problems))
    words = legend(drawn for one in maps for stage in one.stages[-1:] for drawn in stage.maps)
    found.legend = f"{words[:1].upper()}{words[1:]}." if words else ""
    return found


def _model(section: Section, files: bool) -> tuple[str, Any]:
    """(name, model): a bundled one, or one of timm or open_clip if the user named image files. Raises `ConfigError`: it is
    another one."""
    record = section.first
    name = model_name(record)
    known = _ENCODERS.get(name.split("@")[0])
    if known is not None:
        return known, load_model(known)
    if name in BUNDLED:
        return name, load_vlm(name)
    if not files:
        raise ConfigError(f"{name} does not come with vtok; name image files (--image) to draw timm's or open_clip's")
    if record.get("backend") == "open_clip":
        return name, load_model(
            f"open_clip:{name}/{text(record.get('pretrained'))}".rstrip("/"), bool(record.get("pretrained"))
        )
    import timm

    if not timm.is_model(name.split(".")[0]):  # never a repository that a file of results names
        raise ConfigError(f"{name} is neither bundled nor in timm's registry")
    return name, load_model(name, pretrained=True)


def _settings(section: Section, problems: list[str]) -> list[tuple[Row, list[MethodConfig]]]:
    """What was patched in, from the resolved parameters of the records."""
    found = []
    for row in section.patched:
        try:
            found.append((row, configs_of(row.record)))
        except Exception as error:  # parameters may be anything
            problems.append(f"{row.label}: {text(error)}")
    return found


def _count(section: Section) -> int:
    n = section.first.get("n")
    values = [v for v in n.values() if isinstance(v, int)] if isinstance(n, dict) else [n] if isinstance(n, int) else []
    return max(min(values, default=1), 1)


def _item(
    name: str,
    model: Any,
    section: Section,
    settings: list[tuple[Row, list[MethodConfig]]],
    image: str,
    problems: list[str],
    drawn: list[TokenMaps],
    told: Callable[[int, str], None],
) -> Item:
    """One image under every setting; its maps are added to those that were `drawn`."""
    tiles: list[Tile] = []
    title, shown = "", None
    for number, (row, configs) in enumerate(settings, 1):
        told(number, row.label)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of grids that are kept: the record has said so when it was made
                torch.manual_seed(0)
                maps = _maps(name, model, configs, image)
        except Exception as error:  # a method may refuse today what it took when the record was made
            if isinstance(error, ConfigError) and not tiles and "does not exist" in str(error):
                raise
            problems.append(f"{row.label}: {text(error)}")
            continue
        if shown is None:
            title, shown = _title(name, section, image, maps), maps
        drawn.append(maps)
        tiles.append(_tile(row, configs, maps, _verdict(name, section, row, image, maps)))
    if shown is None:
        raise ConfigError("no setting could be drawn")
    base = section.base
    said = shown.answer is not None
    verdict = _verdict(name, section, base, image, shown) if base is not None and not said else ""
    first = Tile(_uri(shown), "unpatched" if verdict else "image", f"{shown.patches} tokens", verdict, f"{title}, untouched")
    return Item(title, [first, *tiles])


def _maps(name: str, model: Any, configs: list[MethodConfig], image: str) -> TokenMaps:
    setting = Setting(configs)
    if isinstance(model, VisionLanguageModel):
        return prompt_maps(model, setting, image)
    source = bundled(name, int(image)) if image.isdigit() else image
    return encoder_maps(model, setting, reference_pixels(source) if name == REFERENCE else prepared(model, source), name)


def _title(name: str, section: Section, image: str, maps: TokenMaps) -> str:
    if not image.isdigit():
        return Path(image).name
    if maps.answer is not None:
        asked = questions_of(name).questions[int(image)]
        return f"Question {image}: {asked.text} ({asked.target})"
    label = labels_of(section, int(image))
    return f"Image {image}" + (f": {label}" if label else "")


def _verdict(name: str, section: Section, row: Row, image: str, maps: TokenMaps) -> str:
    """ "right" or "wrong"; "" where it is not known which sample of the record an image is."""
    if not image.isdigit():
        return ""
    if maps.answer is not None:
        return "right" if exact_match(maps.answer, questions_of(name).questions[int(image)].target) else "wrong"
    known = images_of(section) or []
    if row.correct is None or int(image) not in known or len(row.correct) != len(known):
        return ""
    return "right" if row.correct[known.index(int(image))] else "wrong"


def _tile(row: Row, configs: Sequence[MethodConfig], maps: TokenMaps, verdict: str) -> Tile:
    last = maps.stages[-1]
    least = all_that_stays(configs, last.tokens)
    words = f"{last.tokens} of {maps.patches}" + (f" ({least})" if least else "")
    words += "" if maps.answer is None else f", says “{text(maps.answer, 40)}”"
    return Tile(_uri(maps, last), row.label, words, verdict, f"{row.label}: {words} tokens after the last layer")


def _uri(maps: TokenMaps, stage: Any = None) -> str:
    """The picture inside the page."""
    buffer = io.BytesIO()
    maps.image(stage, SIDE).quantize(_COLOURS).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
