"""easy-VQA in small, as the trainings of reference models read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vtok.eval.models.easyvqa import CLASSES


def write_small(home: Path, count: int, grey: int, asked: Callable[[int, str, str], list[list[str]]]) -> Path:
    """Writes `count` pictures a split, number n of class n modulo 24, all of one grey value; returns the folder.

    Args:
        home: the folder.
        count: pictures a split.
        grey: number n is n times as bright.
        asked: (number, colour, shape) -> questions about a picture with their answers.
    """
    for split in ("train", "test"):
        (home / split / "images").mkdir(parents=True)
        questions: list[list[str | int]] = []
        for number in range(count):
            colour, shape = CLASSES[number % len(CLASSES)].split()
            pixels = np.full((64, 64, 3), number * grey, dtype=np.uint8)
            Image.fromarray(pixels).save(home / split / "images" / f"{number}.png")
            questions += [[*question, number] for question in asked(number, colour, shape)]
        (home / split / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    return home


def naming(colour: str, shape: str) -> list[list[str]]:
    """The two questions that name a picture's class."""
    return [["what shape is present?", shape], ["what color is the shape?", colour]]
