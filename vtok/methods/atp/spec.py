"""What modules of ATP-LLaVA (Ye et al., CVPR 2025) are built for: places in a decoder, its size, the readings they follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtok.config import block_numbers, flag
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.methods.atp.attention import SELF_SCORES
from vtok.methods.atp.scores import check_strides

if TYPE_CHECKING:
    from typing_extensions import Self

PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32
INPUTS = ("grid", "means")


def scaled_layers(depth: int) -> tuple[int, ...]:
    """The paper's decoder layers 4, 14, 24 of 32 (0-based, modules in front of them), scaled to another depth.

    Fewer than three where a decoder has less than four layers; never layer 0, which no attention precedes.

    Raises:
        UnsupportedModelError: there is no layer to read and one behind it.
    """
    if depth < 2:
        raise UnsupportedModelError(f"atp prunes in front of a decoder layer that has another before it; found {depth} layers")
    scaled = (math.floor(layer * depth / PAPER_DEPTH + 0.5) for layer in PAPER_LAYERS)
    return tuple(sorted({min(max(layer, 1), depth - 1) for layer in scaled}))


@dataclass(frozen=True)
class ATPSpec:
    """What modules were built and trained for; written into their file, and held against the model that is to use them.

    Attributes:
        depth: layers of the decoder.
        width: hidden size of the decoder.
        grid: rows and columns of visual tokens (24 x 24 in LLaVA-1.5).
        layers: 0-based decoder layers that a module stands in front of (default: 4, 14, 24 of 32, scaled to the depth).
        hidden: width of the modules' hidden layer.
        inputs: what the thresholds read: `"grid"`, both scores of every grid slot, or `"means"`, the means of both over the
            tokens alive, which works on any grid.
        self_score: `"probs"`, `"debiased"` or `"logits"`, see `vtok.methods.atp`.
        minmax: whether scores are scaled to [0, 1] in every sample.
        strides: of the nested spatial grids.
        lambda_sample: see `spatial_scores` (3.0).
        unsampled: spatial score outside the grids.
        target_tokens: the average that training aimed at, tokens; `None` = not said. For information.
    """

    depth: int
    width: int
    grid: tuple[int, int]
    layers: tuple[int, ...] | None = None
    hidden: int = 256
    inputs: str = "grid"
    self_score: str = "probs"
    minmax: bool = True
    strides: tuple[int, ...] = (2, 4)
    lambda_sample: float = 3.0
    unsampled: float = 0.0
    target_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "width", "hidden"):
            _whole(getattr(self, name), name)
        if not isinstance(self.grid, Sequence) or len(self.grid) != 2:
            raise ConfigError(f"grid is (rows, columns) of visual tokens, got {shown(self.grid)}")
        object.__setattr__(self, "grid", tuple(_whole(size, "grid") for size in self.grid))
        layers = scaled_layers(self.depth) if self.layers is None else block_numbers(self.layers)
        if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] < self.depth:
            raise ConfigError(
                f"layers must rise within 1 to {self.depth - 1}, got {layers}; a module reads the attention of the layer before"
            )
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "strides", check_strides(self.strides))
        for name, allowed in (("inputs", INPUTS), ("self_score", SELF_SCORES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        flag(self.minmax, "minmax")
        _number(self.lambda_sample, "lambda_sample", positive=True)
        _number(self.unsampled, "unsampled", positive=False)
        if self.target_tokens is not None:
            _number(self.target_tokens, "target_tokens", positive=True)

    @property
    def num_slots(self) -> int:
        """G."""
        return self.grid[0] * self.grid[1]

    @property
    def sites(self) -> tuple[int, ...]:
        """The resolved `layers`."""
        assert self.layers is not None
        return self.layers

    @property
    def num_inputs(self) -> int:
        """Width of what a module reads."""
        return 2 * self.num_slots if self.inputs == "grid" else 2

    def check(self, depth: int | None = None, width: int | None = None, grid: tuple[int, int] | None = None) -> None:
        """Refuses a model that the modules were not trained for; `None` = not asked.

        Raises:
            ConfigError: another depth or width; another grid, unless the thresholds read means.
        """
        for name, what, found in (("depth", "decoder layers", depth), ("width", "hidden units", width)):
            if found is not None and found != getattr(self, name):
                raise ConfigError(
                    f"these ATP modules were trained for a decoder of {getattr(self, name)} {what}, this model has {found}; "
                    "thresholds do not carry over: train modules for this model"
                )
        if grid is not None and self.inputs == "grid" and tuple(grid) != self.grid:
            raise ConfigError(
                f"these ATP modules were trained for {self.grid[0]} x {self.grid[1]} visual tokens, this model has "
                f"{grid[0]} x {grid[1]}; train modules for this model, or modules with inputs='means', which take any grid"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` restores an equal spec."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise unknown("entry of an ATP file", key, known)
        missing = sorted({"depth", "width", "grid"} - set(values))
        if missing:
            raise ConfigError(f"an ATP file says depth, width and grid; missing: {', '.join(missing)}")
        return cls(**values)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} takes whole numbers >= 1, got {shown(value)}")
    return value


def _number(value: Any, name: str, positive: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and value <= 0):
        raise ConfigError(f"{name} must be a number{' > 0' if positive else ''}, got {shown(value)}")
