"""What methods share whose authors' program can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vtok.config import MethodConfig
from vtok.errors import unknown

PRESETS = ("official",)


@dataclass(frozen=True)
class Official(MethodConfig):
    """A method that may do as the program of its authors does.

    Attributes:
        preset: `"official"`: the program's choice and order as far as a batch gives what its images give one by one, and its
            positions (`official_positions`) unless `positions` is given; what that changes, the method says.
        official_positions: of tokens behind dropped ones in the program: "original", or "compact", numbered anew. Models whose
            visual tokens have positions in time, height and width (Qwen-VL) keep the originals, as programs for them do.
    """

    official_positions: ClassVar[str] = "compact"

    preset: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_preset()

    def check_preset(self) -> None:
        """Raises unless the preset is one of `PRESETS`, or none."""
        if self.preset is not None and self.preset not in PRESETS:
            raise unknown("preset", str(self.preset), PRESETS)

    @property
    def official(self) -> bool:
        """Whether the program's way is asked for."""
        return self.preset == "official"

    @property
    def preset_positions(self) -> str | None:
        return self.official_positions if self.official else None
