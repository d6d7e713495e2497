"""The bundled Fashion-MNIST images as a data set of the classification task."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtok.eval.tasks.image_folder import CheckedImages

FASHION = "fashion-mnist"


def open_fashion(num_samples: int | None = None, split: str = "test") -> CheckedImages:
    """Grey images of 28 x 28 pixels with ten classes.

    Args:
        num_samples: evenly spaced images to take; `None` = all.
        split: `"test"` (10,000 images) or `"calibration"` (1,000, kept out of training and test).
    """
    from vtok.eval.models.reference import load_reference_images

    images, labels = load_reference_images(split)
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
