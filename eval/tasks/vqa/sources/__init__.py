"""Where a task of questions finds its files, and what its functions take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vtok.eval.tasks.vqa.data import Question
from vtok.reading import is_file

SHORT = "\nAnswer the question using a single word or phrase."  # what lmms-eval puts behind most questions
Score = Callable[[str, Question], float]
Write = Callable[[Path, str, Sequence[Question], Sequence[str]], None]


class Sources(NamedTuple):
    """Where a task finds its files.

    Attributes:
        data: folder, or one file.
        questions, annotations, images, ocr, split, frames: see `VQAOptions`.
    """

    data: str
    questions: str = ""
    annotations: str = ""
    images: str = ""
    ocr: str = ""
    split: str = ""
    frames: int = 16

    @property
    def folder(self) -> Path:
        return Path(self.data)

    @property
    def one_file(self) -> str:
        """The file with the questions, if it was named; else ""."""
        return self.questions or (self.data if is_file(self.data) else "")

    @property
    def image_folder(self) -> Path:
        """Of the images, which lie in it at any depth."""
        return Path(self.images) if self.images else self.folder
