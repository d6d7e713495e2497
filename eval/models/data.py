"""Reading image sets: Fashion-MNIST in its original IDX files, wherever they come from.

Shapes: S images, `images [S, 1, 28, 28]` uint8, `labels [S]` int64.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.writing import write

# Mean and standard deviation of the 60,000 training images, pixels scaled to [0, 1].
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_IDX_UINT8 = 0x08


def cache_dir() -> Path:
    """Folder for downloads and training checkpoints, outside any checkout (`VTOK_CACHE`, else `~/.cache/vtok`)."""
    return Path(os.environ.get("VTOK_CACHE", Path.home() / ".cache" / "vtok"))


def read_idx(path: Path) -> Tensor:
    """One IDX file of unsigned bytes, gzipped or not, as a uint8 tensor with the shape that its header states.

    IDX is a 4-byte magic (0, 0, type, number of dimensions), one big-endian int32 a dimension, data. Raises `ValueError` if the
    file is not IDX, holds another type, or is shorter or longer than its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _IDX_UINT8:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (first bytes: {raw[:4].hex()})")
    ndim = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[4 + 4 * ndim :]
    expected = torch.Size(shape).numel()
    if data.numel() != expected:
        raise ValueError(f"{path}: the header promises {shape} = {expected} bytes, the file holds {data.numel()}")
    return data.reshape(shape)


def write_idx(path: Path, data: Tensor) -> None:
    """Writes a uint8 tensor as a gzipped IDX file (the inverse of `read_idx`), the same bytes every time."""
    header = bytes([0, 0, _IDX_UINT8, data.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in data.shape)
    write_gzip(path, header + data.contiguous().numpy().tobytes())


def write_gzip(path: Path, data: bytes) -> None:
    """Writes a compressed file, the same bytes with every release of Python."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(data)
    write(path, packed.getvalue())


def load_fashion_mnist(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, MIT): (images [S, 1, 28, 28] uint8, labels [S] int64).

    Args:
        split: `"train"` (60,000 images) or `"t10k"` (10,000 test images).
        folder: where the four `*-ubyte.gz` files lie; `None` takes the Debian package `dataset-fashion-mnist` if it is
            installed, else lets torchvision download the set into `cache_dir()`.

    Raises:
        FileNotFoundError: `folder` lacks the files.
    """
    if folder is None:
        folder = DEBIAN_FOLDER
        if not folder.is_dir():
            from torchvision.datasets import FashionMNIST

            folder = Path(FashionMNIST(str(cache_dir()), download=True).raw_folder)
    images, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    for path in (images, labels):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; install Debian's dataset-fashion-mnist or name another folder")
    return read_idx(images).unsqueeze(1), read_idx(labels).long()


def stack_pixels(images: Sequence[Any]) -> Tensor:
    """RGB images of PIL, all of one size -> [B, 3, H, W] uint8."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels [.., 28, 28] -> zero mean, unit variance in `dtype` (statistics of the training set)."""
    return (images.to(dtype) / 255 - FASHION_MEAN) / FASHION_STD
