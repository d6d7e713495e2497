"""Configs of methods, schedules over blocks, and checks of what users write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vtok.capabilities import EncoderMethod, Info, PromptMethod
from vtok.config.numbers import BITS, countable, native
from vtok.config.renamed import RenamedMethods
from vtok.core.encoder import ModelInfo, Reducer
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "MethodConfig",
    "ModelInfo",
    "Reducer",
    "Schedule",
    "block_indices",
    "block_numbers",
    "flag",
    "fraction",
    "require_cls",
    "require_softmax",
    "whole",
]


@dataclass(frozen=True)
class MethodConfig(RenamedMethods):
    """Base of all method configs: frozen, comparable, with a JSON form.

    A subclass documents each field with the paper's symbol, unit, default and range; it is the value a user may pass to
    `vtok.patch` in place of a name and keywords. What it can do is which interfaces of `vtok.capabilities` it implements: at
    least `build` (inside vision encoders) or `build_vlm` (on prompts of vision-language models).

    Attributes:
        name: of the method.
        merges: inside an encoder, every token that goes is folded into one that stays: none is dropped.
        set_by_budget: parameters that a FLOPs budget sets: given beside a budget they are refused.
        default_flops: share of the blocks' FLOPs that is taken when `needs_budget()`.
        no_budget: why no FLOPs budget can set it, behind its name; "" = the usual words.
        image_only: parameters under which it decides from an image alone, before the LLM: what `vtok.serving` can serve of it.
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = False
    set_by_budget: ClassVar[tuple[str, ...]] = ()
    default_flops: ClassVar[float | None] = None
    no_budget: ClassVar[str] = ""
    image_only: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        """Numbers of NumPy and of torch become Python's; a method that checks its fields calls this first.

        Raises:
            ConfigError: a whole number that is larger than anything that can be counted.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (found := native(value)) is not value:
                object.__setattr__(self, field.name, found)
            if not countable(found):
                raise ConfigError(f"{field.name} takes whole numbers up to 2^{BITS}, got {shown(value)}")

    @classmethod
    def for_encoders(cls) -> bool:
        """Whether the method acts inside vision encoders."""
        return issubclass(cls, EncoderMethod)

    @classmethod
    def for_vlms(cls) -> bool:
        """Whether the method acts on the visual tokens of vision-language models."""
        return issubclass(cls, PromptMethod)

    @property
    def in_tower(self) -> bool:
        """Whether, on a vision-language model, it acts in its vision tower."""
        return self.for_encoders() and not self.for_vlms()

    def resolved(self, info: ModelInfo) -> Self:
        """The same config with defaults that depend on the model written out, as `info`, `plan` and saved files show it."""
        return self

    @property
    def preset_positions(self) -> str | None:
        """Positions of tokens behind dropped ones that a preset of the method stands for, where a caller names none: one of
        `vtok.core.prompt.POSITIONS`, or `None`."""
        return None

    def needs_budget(self) -> bool:
        """True when no knob is set and the default operating point is a share of FLOPs (`default_flops`)."""
        return False

    def advice(self) -> str:
        """What was measured against this setting of the method, in a sentence that plans end with; "" if nothing was."""
        return ""

    def knob(self) -> dict[str, Any]:
        """The parameters that a FLOPs budget has set, as plain values."""
        return {name: _plain(value) for name in self.set_by_budget if (value := getattr(self, name)) is not None}

    @classmethod
    def alternatives(cls, info: Info) -> Sequence[Mapping[str, Any]]:
        """Parameters with which the method works where its default refuses a model, in the order to try.

        A method for encoders is asked for vision-language models, too, in whose towers it acts.
        """
        return ()

    @classmethod
    def variants(cls, info: Info, **params: Any) -> Iterator[tuple[dict[str, Any], Self]]:
        """(what is passed in addition, config): as asked for, then with each of the method's `alternatives` for a model."""
        refused = isinstance(info, ModelInfo) and not cls.for_encoders()  # whatever is passed
        for extra in ({}, *(() if refused else cls.alternatives(info))):
            yield dict(extra), cls.create(**{**params, **extra})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; `from_dict` restores an equal config."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": self.name, **fields}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds a config from plain values.

        Raises:
            UnknownNameError: a key is not a parameter of this method.
        """
        return cls.create(**{k: v for k, v in values.items() if k != "method"})

    @classmethod
    def create(cls, **params: Any) -> Self:
        """The constructor with a better message for unknown parameters."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in params:
            if key not in known:
                raise unknown(f"parameter of {cls.name}", key, known)
        return cls(**params)

    def given(self) -> dict[str, Any]:
        """Parameters that were set to something else than their defaults, as plain values."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value is not None and value != defaults[name]}

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_plain()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Schedule:
    """A number for every block: one constant, one per block, or a line.

    Attributes:
        kind: "constant", "per_block" or "linear".
        values: the constant; the numbers; or (mean, inflect) of a line.
    """

    kind: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, value: Any, name: str, integer: bool = False) -> Schedule:
        """Reads what a user may write.

        Args:
            value: a number; a list (one number a block); a tuple or mapping (r, inflect), which is ToMe's notation for a line
                from `r (1 - inflect)` to `r (1 + inflect)`: inflect = -1 falls from 2r to 0, +1 rises.
            name: of the parameter, for messages.
            integer: whether only whole numbers make sense.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, dict):
            if set(value) != {"r", "inflect"}:
                raise ConfigError(f"{name} as a mapping takes the keys r and inflect, got {sorted(value)}")
            value = (value["r"], value["inflect"])
        if isinstance(value, bool) or not isinstance(value, (int, float, list, tuple)):
            raise ConfigError(f"{name} must be a number, a list with one number a block, or (r, inflect); got {shown(value)}")
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ConfigError(f"{name} as a tuple is (r, inflect); for one number a block pass a list, got {shown(value)}")
            for number in value:
                if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                    raise ConfigError(f"{name}=(r, inflect) takes two numbers, got {shown(value)}")
            if not integer:
                raise ConfigError(
                    f"{name} is a number or a list; (r, inflect) is a schedule of token counts, got {shown(value)}"
                )
            if value[0] < 0 or abs(value[1]) > 1:
                raise ConfigError(f"{name}=(r, inflect) takes r >= 0 and inflect in [-1, 1], got {shown(value)}")
            return cls("linear", (float(value[0]), float(value[1])))
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if integer and (isinstance(number, bool) or not isinstance(number, int)):
                raise ConfigError(f"{name} counts tokens and must be whole, got {shown(number)}")
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ConfigError(f"{name} must hold numbers, got {shown(number)}")
        return cls("per_block" if isinstance(value, list) else "constant", tuple(numbers))

    def to_plain(self) -> Any:
        if self.kind == "linear":
            return {"r": self.values[0], "inflect": self.values[1]}
        return self.values[0] if self.kind == "constant" else list(self.values)

    def resolve(self, depth: int, name: str, pad: float) -> tuple[float, ...]:
        """The number of every block; a list shorter than the depth goes on with `pad`.

        Raises:
            ConfigError: the list is longer than the model is deep.
        """
        if self.kind == "constant":
            return self.values * depth
        if self.kind == "per_block":
            if len(self.values) > depth:
                raise ConfigError(f"{name} lists {len(self.values)} blocks, the model has {depth}")
            return self.values + (pad,) * (depth - len(self.values))
        mean, inflect = self.values
        if depth == 1:
            return (int(mean),)
        low = int(mean * (1 - inflect))  # truncation as in ToMe's own schedule: (8, -1) over 12 blocks removes 91, not 96
        step = (2 * mean - low - low) / (depth - 1)
        return tuple(int(low + step * i) for i in range(depth))

    def __str__(self) -> str:
        return str(tuple(self.values) if self.kind == "linear" else self.to_plain())


def fraction(value: Any, name: str) -> float:
    """Checks that a value lies in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name} is a fraction in (0, 1], got {shown(value)}")
    return float(value)


def whole(value: Any, name: str, least: int | None = None) -> None:
    """Checks that a value is a whole number, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ConfigError(f"{name} must be a whole number{'' if least is None else f' >= {least}'}, got {shown(value)}")


def block_numbers(layers: Any) -> tuple[int, ...]:
    """Checks that `layers` lists whole numbers."""
    listed = isinstance(layers, Iterable) and not isinstance(layers, (str, dict))
    numbers = tuple(layers) if listed else ()
    if not listed or any(isinstance(i, bool) or not isinstance(i, int) for i in numbers):
        raise ConfigError(f"layers is a list of block numbers such as [3, 6, 9], got {shown(layers)}")
    return numbers


def flag(value: Any, name: str) -> None:
    """Checks that a value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is True or False, got {shown(value)}")


def block_indices(layers: Iterable[int] | None, default: Iterable[int], depth: int) -> tuple[int, ...]:
    """Sorted, distinct 0-based block numbers; negative ones count from the end."""
    chosen = sorted({i + depth if i < 0 else i for i in (default if layers is None else layers)})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < depth:
        wrong = chosen[-1] if chosen[-1] >= depth else chosen[0] - depth
        raise ConfigError(f"layers names block {wrong}, the model has blocks 0 to {depth - 1}")
    return tuple(chosen)


def require_cls(info: ModelInfo, method: str, instead: str) -> None:
    """Raises unless the model has a class token; `instead` says what to pass on a model without."""
    if not info.has_cls:
        raise UnsupportedModelError(f"{method} reads the attention of a class token and {info.name} has none; {instead}")


def require_softmax(info: ModelInfo, method: str) -> None:
    """Raises if attention probabilities are not one softmax."""
    if not info.plain_softmax:
        raise UnsupportedModelError(
            f"{method} needs attention probabilities; in {info.name} they are a difference of two softmaxes"
        )
