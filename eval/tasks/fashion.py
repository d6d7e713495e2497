"""The bundled Fashion-MNIST images as a data set of the classification task."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from vtok.eval.tasks.image_folder import CheckedImages

FASHION = "fashion-mnist"
IN_ORDER = {
    "fashion-mnist/test": "test",
    "fashion-mnist/calibration": "calibration",
}  # data named so are taken from the first on
CALIBRATION = 128  # images of "fashion-mnist/calibration"


def is_fashion(data: str) -> bool:
    """Whether a name stands for the bundled images."""
    return data == FASHION or data in IN_ORDER


def rows_of(data: str, count: int | None) -> list[int]:
    """Which test images so many samples (`None` = all) are: the first ones, or evenly spaced ones, as the name says."""
    total = len(fashion_labels())
    taken = total if count is None else min(count, total)
    return list(range(taken)) if data in IN_ORDER else [i * total // taken for i in range(taken)]


@cache
def fashion_labels() -> np.ndarray:
    """[10,000] classes of the test images."""
    from vtok.eval.models.reference import load_reference_images

    return load_reference_images("test")[1].numpy()


def open_fashion(num_samples: int | None = None, data: str = FASHION, split: str = "test") -> CheckedImages:
    """Grey images of 28 x 28 pixels, ten classes; of `"fashion-mnist"` also the split "calibration", which is in no test."""
    from vtok.eval.models.reference import load_reference_images

    images, labels = load_reference_images(IN_ORDER.get(data, split))
    if data in IN_ORDER:
        most = len(labels) if IN_ORDER[data] == "test" else CALIBRATION
        images, labels = images[: min(most, num_samples or most)], labels[: min(most, num_samples or most)]
    return CheckedImages(_Pairs(images[:, 0].numpy(), labels.tolist()), "L", num_samples)


class _Pairs:
    """[S, H, W] pixels and S labels as (PIL image, label), made when they are asked for."""

    def __init__(self, pixels: np.ndarray, labels: list[int]):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.pixels[row]), self.labels[row]
