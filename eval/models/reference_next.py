"""The reference LLaVA-NeXT, which reads pages of 2 x 2 easy-VQA pictures, and questions about pages.

A page of 128 x 128 pixels is shown as a view of the whole page and a crop of each cell, 64 x 64 pixels and 64 tokens each; with
the ends of the lines that is a prompt of 336 visual tokens. Crops of blank cells hold nothing to read.

What is bundled are the differences from the reference LLaVA, to which `load_reference_llava_next` adds them.

Shapes: P pages [P, 3, 128, 128] uint8, Q questions, `cells [P, 4]` classes (see `vtok.eval.models.easyvqa`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.eval.models.easyvqa import BLANK, CLASSES, COLOURS, PLACES, SHAPES, Pictures, compose
from vtok.eval.models.reference import load_reference_pictures
from vtok.eval.models.reference_vlm import (
    YES_NO,
    Questions,
    ReferenceLLaVA,
    collect_questions,
    home_of,
    load_reference_llava,
    make_processor,
    read_questions,
    save_folder,
)

NEXT_FOLDER = "easyvqa_llava_next"
DIFFERENCES = "differences.safetensors"
PAGE_QUESTIONS = "test-page-questions.json.gz"
BLANK_WORD = "blank"
CALIBRATION_PAGES = 32  # on which thresholds are calibrated
_SCALE = ".scale"


@dataclass(frozen=True)
class ReferenceLLaVANeXT(ReferenceLLaVA):
    """Anatomy of the reference LLaVA-NeXT: Hugging Face's `LlavaNextForConditionalGeneration`, otherwise like the LLaVA."""

    patch_size: int = 8

    kind: ClassVar[str] = "LlavaNext"
    image_processor: ClassVar[str] = "LlavaNextImageProcessor"

    def grids(self) -> dict[str, Any]:
        """Heights and widths that an image may be brought to: pages, two pictures side by side, two on top of each other."""
        one, two = self.image_size, 2 * self.image_size
        return {"image_grid_pinpoints": [[two, two], [one, two], [two, one]]}


make_next_processor = make_processor


def page_and_quarters(pages: Tensor) -> Tensor:
    """[B, 3, 2 s, 2 s] -> [B, 5, 3, s, s]: the page at half its size, then its quarters row by row."""
    half = pages.shape[-1] // 2
    small = F.interpolate(pages, size=(half, half), mode="bicubic", antialias=True, align_corners=False)
    crops = pages.unflatten(3, (2, half)).unflatten(2, (2, half)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat((small[:, None], crops), 1)


def differences(weights: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` as differences from `base`, as it will be when `add_differences` is called, a byte each: matrices of the same
    shape as int8 times a scale of the row, the rest as it is, in fp16.
    """
    found = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and name in base and base[name].shape == weight.shape:
            change = weight.float() - base[name].float()
            scale = (change.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
            found[name] = (change / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            found[name + _SCALE] = scale
        else:
            found[name] = weight.half().contiguous()
    return found


def add_differences(found: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `differences` was given, fp32. Raises `ValueError` where `base` lacks a tensor or has one of another
    shape.
    """
    weights = {}
    for name, value in found.items():
        if name.endswith(_SCALE):
            continue
        if value.dtype != torch.int8:
            weights[name] = value.float()
            continue
        if name not in base or base[name].shape != value.shape:
            shape = list(base[name].shape) if name in base else "nothing"
            raise ValueError(
                f"the differences in {name} are for {list(value.shape)}, the LLaVA has {shape}; install vtok again"
            )
        weights[name] = base[name].float() + value.float() * found[name + _SCALE].float()[:, None]
    return weights


def load_reference_llava_next(folder: Path | None = None, llava: Path | None = None) -> Any:
    """The trained reference LLaVA-NeXT in eval mode, fp32.

    `folder` holds its configuration and its differences from the LLaVA in the folder `llava`; `None` = the bundled ones. Raises
    `FileNotFoundError` if the weights of one of the two are missing.
    """
    from safetensors.torch import load_file
    from transformers import LlavaNextConfig

    home = home_of(NEXT_FOLDER, folder)
    if not (home / DIFFERENCES).is_file():
        raise FileNotFoundError(
            f"{home} lacks {DIFFERENCES}; train it: python -m vtok.eval.training.llava_next --export assets; or install "
            "vtok again"
        )
    weights = add_differences(load_file(home / DIFFERENCES), load_reference_llava(llava).state_dict())
    model = ReferenceLLaVANeXT().build(LlavaNextConfig.from_pretrained(home))
    model.load_state_dict(weights)
    return model


def load_reference_llava_next_processor(folder: Path | None = None) -> Any:
    """Its processor: `processor(images=..., text=PROMPT.format(question=...), return_tensors="pt")`."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(home_of(NEXT_FOLDER, folder))


def write_reference_llava_next(folder: Path) -> None:
    """Writes the reference LLaVA-NeXT as a folder of its own, complete, for `from_pretrained` (4.6 MB)."""
    save_folder(folder, load_reference_llava_next(), load_reference_llava_next_processor())


def draw_cells(count: int, generator: torch.Generator) -> Tensor:
    """Contents of `count` pages, [count, 4]: as many with one cell filled as with two, three and four (a random rest)."""
    cells = torch.randint(BLANK, (count, len(PLACES)), generator=generator)
    filled = torch.randint(1, len(PLACES) + 1, (count,), generator=generator)
    even = count - count % len(PLACES)
    filled[:even] = torch.arange(even) % len(PLACES) + 1
    order = torch.rand(count, len(PLACES), generator=generator).argsort(1)
    return torch.where(order < filled[:, None], cells, BLANK)


def questions_about(cells: list[int], generator: torch.Generator) -> list[tuple[str, str]]:
    """Sixteen questions about a page with their answers.

    Shape, colour and "is it blank" of every cell (a blank cell's shape and colour are "blank"), then two classes that are on
    the page and two that are not, of which one differs from a class on the page in its shape or its colour alone.
    """

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    asked = []
    for cell, place in zip(cells, PLACES):
        shape, colour = (SHAPES[cell % len(SHAPES)], COLOURS[cell // len(SHAPES)]) if cell != BLANK else (BLANK_WORD,) * 2
        asked += [(f"what shape is {place}?", shape), (f"what color is {place}?", colour)]
        asked.append((f"is {place} blank?", YES_NO[int(cell != BLANK)]))
    there = [cell for cell in cells if cell != BLANK]
    present = [there[pick(len(there))] for _ in range(2)]
    near = [c for c in range(BLANK) if c not in there and any(_one_apart(c, t) for t in there)]
    absent = [c for c in range(BLANK) if c not in there]
    classes = [*present, near[pick(len(near))], absent[pick(len(absent))]]
    asked += [(f"is there a {CLASSES[c]}?", YES_NO[int(c not in there)]) for c in classes]
    return asked


def _one_apart(a: int, b: int) -> bool:
    return a != b and (a // len(SHAPES) == b // len(SHAPES) or a % len(SHAPES) == b % len(SHAPES))


def page_questions(pictures: Tensor, classes: Tensor, rows: Tensor, asked: Iterable[tuple[str, str, int]]) -> Questions:
    """`Questions` from pictures [n, 3, 64, 64] with classes [n], the pictures `rows [P, 4]` of every page (-1 = blank) and
    (question, answer, page).
    """
    found = collect_questions(compose(pictures, rows), asked)
    cells = torch.cat((classes, classes.new_tensor([BLANK])))[rows]
    return found._replace(density=(cells != BLANK).sum(1)[found.rows], cells=cells)


def load_reference_page_questions() -> Questions:
    """Bundled questions about 600 pages of test pictures, 150 with each number of filled cells: six a page, of each kind."""
    stored = read_questions(PAGE_QUESTIONS)
    return page_questions(*load_reference_pictures("test"), torch.tensor(stored["rows"]), stored["questions"])


def calibration_pages() -> list[Any]:
    """A few PIL pages of training pictures, with as many filled cells as those of the test have on average."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    source = Pictures(*load_reference_pictures("calibration"))
    rows = source.rows(draw_cells(CALIBRATION_PAGES, generator), generator)
    return [Image.fromarray(page) for page in compose(source.pictures, rows).permute(0, 2, 3, 1).numpy()]
