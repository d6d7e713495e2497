"""The one way in which pictures are opened, whatever asks for them: upright, in 8 bits, and named where they cannot be read.

Also which files of a folder count: what systems and archivers leave behind (`.DS_Store`, `._name`, `__MACOSX/`,
`.ipynb_checkpoints/`) does not, and what a file of questions names lies in the folder of the pictures.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vtok.errors import ConfigError, brief
from vtok.reading import is_folder

EXTENSIONS = (".jpg", ".jpeg", ".png")
LONGEST = 256  # a picture may be so many times as long as wide: no preprocessing is made for others
_ORIENTATION = 0x0112  # EXIF's number of it
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose pixels Pillow may give as "I" although they have 16 bits


def open_picture(source: Any, mode: str = "RGB", name: str = "") -> Any:
    """A PIL image in 8 bits, turned as its EXIF orientation says, all pixels read.

    Args:
        source: path, the bytes of a file, an open binary file, or a PIL image.
        mode: "RGB" or "L".
        name: of the picture in messages; "" = its path.

    Raises:
        ConfigError: there is no such file, or nothing in it that can be read as a picture; the message has the name.
    """
    path = isinstance(source, (str, os.PathLike))
    name = brief(name or os.fspath(source) or "''" if path else name or "the picture")
    if path and not os.path.isfile(source):
        raise ConfigError(f"{name} is no file" if os.path.exists(source) else f"{name} does not exist; name an image file")
    try:
        if isinstance(source, Image.Image):
            return _plain(source, mode)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return _plain(opened, mode)
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
        raise ConfigError(f"{name} cannot be read as an image: {_words(error)}") from error


def _plain(image: Any, mode: str) -> Any:
    """The picture upright, in 8 bits, in a mode."""
    kind = image.format
    check_shape(image)
    image.load()  # a truncated file fails here
    return _eight_bits(_upright(image), kind).convert(mode)


def shrink(picture: Any, factor: int) -> Any:
    """The picture with both sides divided by a factor, rounded down, by Pillow's bicubic filter: image downsampling as
    VTC-Bench has it (arXiv:2510.07143), without its detour over JPEG."""
    wide, high = picture.size
    return picture.resize((max(1, wide // factor), max(1, high // factor)), Image.Resampling.BICUBIC)


def check_shape(picture: Any, name: str = "") -> None:
    """Raises `ConfigError` for a PIL image whose sides no preprocessing is made for: one is more than `LONGEST` times the
    other, or there are no pixels. Anything else is passed over."""
    size = getattr(picture, "size", None)
    if not isinstance(size, tuple) or len(size) != 2:
        return
    short, long = sorted(size)
    if short < 1 or long > LONGEST * short:
        raise ConfigError(
            f"{name or 'the picture'} has {size[0]:,} x {size[1]:,} pixels: one side is more than {LONGEST} times the other, "
            "and scaled to a model's input it would fill the memory; cut it"
        )


def _upright(image: Any) -> Any:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # a picture with damaged EXIF data shows all the same
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _eight_bits(image: Any, kind: str | None) -> Any:
    """Greys of 16 bits scaled: Pillow's own conversion cuts them off at 255. Raises for pixels whose range is not known."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BITS):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = "32-bit whole" if image.mode == "I" else "floating-point"
        raise ConfigError(f"its pixels are {what} numbers, whose range is not known; save it with 8 or 16 bits")
    return image


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, (ConfigError, OSError)) else f"{type(error).__name__}: {error}"


def hidden(name: str) -> bool:
    """Whether a file or folder of this name was left behind by a system or an archiver."""
    return name.startswith(".") or name == "__MACOSX"


def visible(path: Path, root: Path) -> bool:
    """Whether a file below a folder is one that somebody put there: no part of its path is hidden."""
    return not any(hidden(part) for part in path.relative_to(root).parts)


def find_files(root: Path, pattern: str = "*", deep: bool = True) -> list[Path]:
    """Visible files of a folder (`deep` = at any depth) by a pattern of names, with `*`, sorted; none where there is none."""
    if not is_folder(root):
        return []
    return sorted(path for path in (root.rglob(pattern) if deep else root.glob(pattern)) if visible(path, root))


def find_pictures(root: Path) -> Iterator[Path]:
    """Visible files with an image's extension, at any depth, sorted."""
    return (path for path in find_files(root) if path.suffix.lower() in EXTENSIONS)


def leaves(name: str) -> bool:
    """Whether a relative name leads out of the folder that it is meant for, or is absolute."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def within(root: Path, path: Path) -> bool:
    """Whether a file lies in a folder once links are followed."""
    return path.resolve().is_relative_to(root.resolve())


def digest(source: Any) -> str:
    """Hash of what a picture is: of the bytes of a file, or of the pixels of a PIL image or array. Raises `ConfigError`: the
    file cannot be read."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(source, bytes):
        found.update(source)
    elif isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror or error}") from error
    else:
        pixels = np.asarray(source)
        palette = source.getpalette() if hasattr(source, "getpalette") else None
        found.update(repr((pixels.dtype, pixels.shape, getattr(source, "mode", ""), palette)).encode())
        found.update(pixels.tobytes())
    return found.hexdigest()
