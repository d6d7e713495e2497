"""Pictures that no model can be shown: so long and narrow that scaling their short side to a model's input takes gigabytes."""

from __future__ import annotations

from typing import Any

from vtok.errors import ConfigError

LONGEST = 256  # times as long as wide


def check_shape(picture: Any, name: str = "") -> None:
    """Raises for a picture whose sides no preprocessing is made for.

    Args:
        picture: PIL image; anything else is passed over.
        name: of the picture, for the message.

    Raises:
        ConfigError: one side is more than `LONGEST` times the other, or there are no pixels.
    """
    size = getattr(picture, "size", None)
    if not isinstance(size, tuple) or len(size) != 2:
        return
    short, long = sorted(size)
    if short < 1 or long > LONGEST * short:
        raise ConfigError(
            f"{name or 'the picture'} has {size[0]:,} x {size[1]:,} pixels: one side is more than {LONGEST} times the other, "
            "and scaled to a model's input it would fill the memory; cut it"
        )
