"""The support matrix of vision-language models that no row describes: which methods act on each, as `vtok.supports` says.

That what is not refused is right is shown by tests, for every class and method: tests/vlm/test_vlm_generic.py.
"""

from __future__ import annotations

import re

import vtok
from vtok.patches.hf_vlm.families import find
from vtok.targets.vlm.sites import prompt_methods
from vtok.testing.generic_models import CLASSES, empty, listed

BEGIN, END = "<!-- generic matrix: `vtok matrix --generic` -->", "<!-- end of the generic matrix -->"
GENERIC, NAMED = "generic", "at layers that are named; by default "
Answers = dict[str, dict[str, str | None]]  # class -> method -> why not (by default, behind `NAMED`); `None` = it acts on that


def answers() -> Answers:
    """Of every class that the installed transformers has, in alphabetical order; names of its parts are not in the reasons."""
    return {name: _of(name) for name in sorted(CLASSES) if name in listed()}


def _of(name: str) -> dict[str, str | None]:
    model = empty(name)
    (vlm,) = find(model)
    found, able = vtok.supports(model).methods, prompt_methods(vlm.info)
    plain = {method: None if why is None else _plain(why, method, vlm.info.name) for method, why in found.items()}
    return {method: NAMED + why if why is not None and method in able else why for method, why in plain.items()}


def _plain(why: str, method: str, model: str) -> str:
    """A reason without what is different from model to model and from method to method."""
    for pattern, word in (
        (rf"^{method} ", ""),
        (rf"\b{model}\b", "the model"),
        (r"its LLM, transformers\.[\w.]+, is", "its LLM is"),
        (r"in front of decoder layer \d+", "between decoder layers"),
        (r"; (for images )?choose another method, such as \w+", ""),
        (r"; methods that shorten its prompt before the LLM work", ""),
    ):
        why = re.sub(pattern, word, why)
    return why


def _acts(why: str | None) -> bool:
    return why is None or why.startswith(NAMED)


def markdown(found: Answers) -> str:
    """A table of classes and methods, with reasons as numbered notes; methods that act on none of them are named below it."""
    methods = [m for m in next(iter(found.values())) if any(_acts(cells[m]) for cells in found.values())]
    notes: list[str] = []

    def cell(why: str | None) -> str:
        if why is None:
            return GENERIC
        if why not in notes:
            notes.append(why)
        return f"{GENERIC if why.startswith(NAMED) else 'no'} <sup>{notes.index(why) + 1}</sup>"

    rows = [f"| {name} | {' | '.join(cell(cells[m]) for m in methods)} |" for name, cells in found.items()]
    table = [f"| class | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}", *rows]
    listing = [f"{i}. {note}." for i, note in enumerate(notes, 1)]
    others = [m for m in next(iter(found.values())) if m not in methods]
    acts = sum(_acts(why) for cells in found.values() for why in cells.values())
    ends = [
        f"On none of them: {', '.join(others)}, which need the row of a family, or a deeper tower than these have.",
        f"**{len(found)} classes x {len(methods) + len(others)} methods: {acts} cells generic.**",
    ]
    return "\n\n".join(["\n".join(table), "\n".join(listing), *ends])
