"""easy-VQA as a caption set: 24 classes of single pictures, and pages of 2 x 2 cells under captions that name what is where.

easy-VQA (Victor Zhou, 2019, MIT) holds pictures of one shape each and questions about them, but no captions: `classes_of` reads
shape and colour off the questions and answers, which settles them for 3,578 of the 4,000 training pictures and 888 of the 1,000
test pictures. One picture has only 24 possible captions; a page of four cells has 390,624.

Shapes: n pictures [n, 3, 64, 64] uint8, P pages [P, 3, 128, 128] uint8, `cells [P, 4]`: class of every cell, row by row, or
BLANK.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vtok.eval.models.data import stack_pixels

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
PLACES = ("top left", "top right", "bottom left", "bottom right")
BLANK = len(CLASSES)
TEMPLATES = ("{c}", "a {c}", "a picture of a {c}")
PICTURE_SIZE = 64
PAGE_SIZE = 2 * PICTURE_SIZE
VARIANTS = 4  # pages of a group: one, and three that differ from it in a single respect


def classes_of(questions: Iterable[tuple[str, str, int]]) -> dict[int, int]:
    """Picture number -> index into `CLASSES` of every picture whose questions leave one shape and one colour possible.

    `questions` are (question, answer, number of the picture), as easy-VQA's `questions.json` lists them. Raises `ValueError`
    where the answers about a picture contradict each other.
    """
    possible: dict[int, tuple[set[str], set[str]]] = {}
    for question, answer, number in questions:
        for known, left in zip((SHAPES, COLOURS), possible.setdefault(number, (set(SHAPES), set(COLOURS)))):
            words = re.findall(r"\w+", question)
            named = set(words) & set(known)
            if answer in known:
                left &= {answer}
            elif answer not in ("yes", "no"):
                left &= named or left  # "what color is the circle?": it is a circle
            elif named and (answer == "yes") != bool({"no", "not"} & set(words)):
                left &= named
            else:
                left -= named
    found = {}
    for number, (shapes, colours) in possible.items():
        if not shapes or not colours:
            raise ValueError(f"the answers about picture {number} contradict each other")
        if len(shapes) == len(colours) == 1:
            found[number] = CLASSES.index(f"{colours.pop()} {shapes.pop()}")
    return found


def load_easyvqa(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Pictures whose class is known, in the order of their numbers: [n, 3, 64, 64] uint8, and their classes [n] int64.

    Args:
        split: "train" or "test".
        folder: what holds `train/` and `test/`; `None` = the data of the installed package `easy-vqa`.

    Raises:
        FileNotFoundError: no such folder, or the package is not installed.
    """
    home = package_data() if folder is None else folder
    path = home / split / "questions.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; easy-VQA's folder holds train/ and test/, each with questions.json and images/"
        )
    labels = sorted(classes_of(json.loads(path.read_text(encoding="utf-8"))).items())
    return read_pictures(home / split, [number for number, _ in labels]), torch.tensor([c for _, c in labels])


def read_pictures(folder: Path, numbers: Sequence[int]) -> Tensor:
    """The pictures of these numbers, [n, 3, 64, 64] uint8; `folder` holds `images/`."""
    from vtok.eval.common.pictures import open_picture

    return stack_pixels([open_picture(folder / "images" / f"{number}.png") for number in numbers])


def package_data() -> Path:
    """Folder of the data that the package `easy-vqa` brings. Raises `FileNotFoundError` if it is not installed."""
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise FileNotFoundError('the training pictures come with the package easy-vqa; run: pip install "vtok[train]"')
    return Path(spec.origin).parent / "data"


def caption(cells: Sequence[int]) -> str:
    """ "blue rectangle top left, red circle bottom right": what the four cells hold, blank ones left out."""
    return ", ".join(f"{CLASSES[c]} {place}" for c, place in zip(cells, PLACES) if c != BLANK)


def compose(pictures: Tensor, rows: Tensor) -> Tensor:
    """Pages [P, 3, 128, 128] from the pictures that `rows [P, 4]` name; -1 leaves a cell white."""
    cells = pictures[rows.clamp(min=0)]  # [P, 4, 3, 64, 64]
    cells[rows < 0] = 255
    grid = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # [P, 3, 2, 64, 2, 64]
    return grid.reshape(len(rows), 3, PAGE_SIZE, PAGE_SIZE)


def draw_groups(groups: int, blank: float, generator: torch.Generator) -> Tensor:
    """Contents of pages in groups of four: [groups, 4, 4] classes.

    The first page of a group is drawn at random; the others are the same page with two cells exchanged, with one picture in
    another colour, and with one in another shape. Who tells them apart has read every cell, not just the words of the caption.
    `blank`: chance of a cell to stay blank; one cell of each page never does.
    """

    def pick(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    cells = pick(BLANK, groups, len(PLACES))
    empty = torch.rand(groups, len(PLACES), generator=generator) < blank
    row = torch.arange(groups)
    filled = pick(len(PLACES), groups)
    empty[row, filled] = False
    cells[empty] = BLANK
    pages = cells[:, None].repeat(1, VARIANTS, 1)
    other = (filled + 1 + pick(len(PLACES) - 1, groups)) % len(PLACES)
    pages[row, 1, filled], pages[row, 1, other] = cells[row, other], cells[row, filled]
    colour, shape = cells[row, filled] // len(SHAPES), cells[row, filled] % len(SHAPES)
    recoloured = (colour + 1 + pick(len(COLOURS) - 1, groups)) % len(COLOURS)
    reshaped = (shape + 1 + pick(len(SHAPES) - 1, groups)) % len(SHAPES)
    pages[row, 2, filled] = recoloured * len(SHAPES) + shape
    pages[row, 3, filled] = colour * len(SHAPES) + reshaped
    return pages


class Pictures:
    """Pictures [n, 3, 64, 64] uint8 sorted by class [n], to draw from; every class must occur."""

    def __init__(self, pictures: Tensor, classes: Tensor):
        count = torch.bincount(classes, minlength=BLANK)
        if not bool((count > 0).all()):
            missing = ", ".join(CLASSES[c] for c in (count == 0).nonzero().flatten())
            raise ValueError(f"pages need pictures of all {BLANK} classes; there is none of: {missing}")
        self.pictures, self.classes, self.count = pictures, classes, count
        self.order = torch.argsort(classes, stable=True)
        self.first = count.cumsum(0) - count
        self.with_mirrored = torch.cat((pictures, pictures.flip(-1)))  # picture i mirrored is row n + i

    def rows(self, cells: Tensor, generator: torch.Generator) -> Tensor:
        """A random picture of each class in `cells` (any shape): its row, or -1 for BLANK."""
        known = cells.clamp(max=BLANK - 1)
        share = torch.rand(cells.shape, generator=generator, dtype=torch.float64)
        chosen = self.order[self.first[known] + (share * self.count[known]).long()]
        return torch.where(cells == BLANK, -1, chosen)


def learned_and_held_out(held_out: int, folder: Path | None = None) -> tuple[Pictures, Pictures]:
    """Training pictures to learn from, and the last `held_out` of them, which are kept away; see `load_easyvqa`."""
    pictures, classes = load_easyvqa("train", folder)
    count = len(pictures) - held_out
    return Pictures(pictures[:count], classes[:count]), Pictures(pictures[count:], classes[count:])


def draw_pages(source: Pictures, groups: int, blank: float, seed: int) -> tuple[Tensor, Tensor]:
    """Pages with captions that are all different, in groups of four (see `draw_groups`): rows [4 groups, 4] of pictures, -1 =
    blank, and cells [4 groups, 4], classes.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[str] = set()
    chosen: list[Tensor] = []
    while len(chosen) < groups:
        group = draw_groups(1, blank, generator)[0]
        captions = {caption(page) for page in group.tolist()}
        if len(captions) == VARIANTS and not captions & seen:
            seen |= captions
            chosen.append(group)
    cells = torch.cat(chosen)
    return source.rows(cells, generator), cells
