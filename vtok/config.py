"""Configs of methods, schedules over blocks, and the facts about a model that turn a config into a reducer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vtok.core.prompt import ImageFeatures, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.search_space import Point, Space
from vtok.core.tokens import AttentionView, Site, TokenState
from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.plain import BITS, countable, native

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a tower before any image has been seen.

    Attributes:
        name: class name of the tower, for messages.
        depth: number of blocks.
        num_prefix: tokens at the front that are never reduced (CLS, distillation, registers).
        num_patches: patch tokens at the stated input size.
        grid: rows and columns of patches; rows x columns may differ from `num_patches` where no grid is known.
        has_cls: whether token 0 is a class token.
        width: of a token between blocks, C.
        head_dim: width of one attention head, D.
        num_heads: query heads, H.
        num_kv_heads: key and value heads; fewer under grouped-query attention.
        plain_softmax: whether attention is one softmax over q k^T (differential attention is not).
        blind_pool: why the pooling head can see neither sizes nor padding, or `None` if it can.
        blind_attention: why attention to the tokens, as it is set up, can see neither sizes nor padding, or `None` if it can.
    """

    name: str
    depth: int
    num_prefix: int
    num_patches: int
    grid: tuple[int, int]
    has_cls: bool
    width: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    plain_softmax: bool = True
    blind_pool: str | None = None
    blind_attention: str | None = None


class Reducer:
    """Base of a config resolved for one model: pure, stateless, frozen.

    Attributes:
        needs: which of "q", "k", "v" a plan looks at; nothing is caught for a plan that looks at the tokens alone.
        prop_attn: whether later attention must see token sizes.
        sizes: whether plans merge tokens and record how many patches each stands for.
        ragged: whether images of one batch may keep different numbers of tokens.
        exact: whether `count` is exact; False = an upper bound, the true number depends on the image.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sizes: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    prop_attn: bool = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where tokens are reduced; sites that would change nothing are left out, so 1.0 and r=0 cost nothing."""
        raise NotImplementedError

    def plan(self, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        """Decides; `None` = leave the tokens as they are. x [B, N, C]: the tokens that the plan will be applied to."""
        raise NotImplementedError

    def attention(self, state: TokenState, view: AttentionView, rows: Tensor | None) -> Tensor | None:
        """Attention output [B, H, M, D] of the kept query rows, at a BLOCK_PRE site; `None` = the model's own attention.

        `state` is that of the N tokens before the plan, `rows` [B, M] the plan's kept rows (`None` = all).
        """
        return None

    def count(self, at: Site, n: int, num_prefix: int) -> int:
        """Tokens after this site when `n` (prefix included) arrive."""
        raise NotImplementedError

    def macs(self, at: Site, n: int, num_prefix: int) -> int:
        """Multiply-accumulates of the matrix products that deciding costs, per image."""
        return 0


@dataclass(frozen=True)
class MethodConfig:
    """Base of all method configs: frozen, comparable, with a JSON form.

    A subclass documents each field with the paper's symbol, unit, default and range; it is the value a user may pass to
    `vtok.patch` in place of a name and keywords.
    """

    name: ClassVar[str]
    default_flops: ClassVar[float | None] = None  # share of the blocks' FLOPs taken when `needs_budget()`
    merges: ClassVar[bool] = False  # inside an encoder, every token that goes is folded into one that stays: none is dropped
    set_by_budget: ClassVar[tuple[str, ...]] = ()  # parameters that `ladder` replaces: given beside a budget they are refused
    # Under these parameters several blocks of a tiny model (64 patches, 4 blocks) lose tokens: what the support matrix and the
    # contract tests run. Empty = the defaults do.
    trial: ClassVar[Mapping[str, Any]] = {}
    # Parameters to pass where a model lacks what the default needs, in the order to try: "works on request".
    substitutes: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    # The same as `trial` for tiny vision-language models (16 visual tokens an image, 2 tower blocks, 4 decoder layers).
    trial_vlm: ClassVar[Mapping[str, Any]] = {}
    # Parameters under which it decides from an image alone, before the LLM: what `vtok.serving` can serve of it.
    image_only: ClassVar[Mapping[str, Any]] = {}
    remark_vlm: ClassVar[str] = ""  # on `substitutes_vlm`, for readers of the support matrix: a sentence, without its stop

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

    def build(self, info: ModelInfo) -> Reducer:
        """Resolves the config for a model.

        Raises:
            UnsupportedModelError: the model lacks what the method needs, or the method acts on vision-language models alone.
            ConfigError: a value does not fit the model.
        """
        raise UnsupportedModelError(
            f"{self.name} drops visual tokens from the prompts of vision-language models; {info.name} is a vision encoder"
        )

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        """Resolves the config for a vision-language model; a method that acts on visual tokens before or in the LLM has it.

        Raises:
            UnsupportedModelError: the method acts inside vision encoders only, or the model lacks what it needs.
            ConfigError: a value does not fit the model.
        """
        raise UnsupportedModelError(
            f"{self.name} reduces tokens inside vision encoders; it does not act on prompts of vision-language models such as "
            f"{info.name}"
        )

    @property
    def calibrates(self) -> bool:
        """Whether the config still lacks a number that `calibrated` finds."""
        return False

    def calibrated(self, info: VLMInfo, observe: Callable[[Sequence[int]], Iterable[ImageFeatures]]) -> Self:
        """The same config with numbers found on a few inputs of a vision-language model.

        Args:
            info: of the model.
            observe: blocks of the vision tower (0-based) -> image features of the inputs, with what these blocks attended to.
        """
        raise ConfigError(f"{self.name} has nothing to calibrate: leave calibration out")

    @classmethod
    def for_encoders(cls) -> bool:
        """Whether the method acts inside vision encoders."""
        return cls.build is not MethodConfig.build

    @classmethod
    def for_vlms(cls) -> bool:
        """Whether the method acts on the visual tokens of vision-language models."""
        return cls.build_vlm is not MethodConfig.build_vlm

    def resolved(self, info: ModelInfo) -> Self:
        """The same config with defaults that depend on the model written out, as `info`, `plan` and saved files show it."""
        return self

    def needs_budget(self) -> bool:
        """True when no knob is set and the default operating point is a share of FLOPs (`default_flops`)."""
        return False

    def ladder(self, info: ModelInfo) -> Sequence[Self]:
        """The same method from the mildest setting (a no-op) to the strongest: what a FLOPs budget chooses from."""
        raise ConfigError(f"{self.name} has no single knob that a FLOPs budget could set")

    def ladder_vlm(self, info: VLMInfo) -> Sequence[Self]:
        """The same for a vision-language model."""
        raise ConfigError(f"{self.name} has no single knob that a FLOPs budget for a vision-language model could set")

    def knob(self) -> dict[str, Any]:
        """The parameters that `ladder` varies."""
        return {}

    def search_space(self, info: ModelInfo) -> Space:
        """What a search over schedules may vary on a model; empty if nothing is left, because it was given."""
        raise ConfigError(f"{self.name} has no schedule inside vision encoders that could be searched")

    def ladder_at(self, info: ModelInfo, point: Point) -> Sequence[Self]:
        """As `ladder`, for the shape of schedule that a point of the search space describes."""
        raise NotImplementedError

    def search_space_vlm(self, info: VLMInfo) -> Space:
        """The same for a vision-language model."""
        raise ConfigError(f"{self.name} has no schedule on vision-language models that could be searched")

    def ladder_at_vlm(self, info: VLMInfo, point: Point) -> Sequence[Self]:
        """The same for a vision-language model."""
        raise NotImplementedError

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

    @classmethod
    def variants(cls, **params: Any) -> Iterator[tuple[dict[str, Any], Self]]:
        """(what is passed in addition, config): as asked for, then with each of the method's `substitutes`."""
        for extra in ({}, *cls.substitutes):
            yield dict(extra), cls.create(**{**params, **extra})

    @classmethod
    def substitutes_vlm(cls, info: VLMInfo, folder: str) -> Sequence[Mapping[str, Any]]:
        """`substitutes` for a tiny vision-language model; files that they name are written into `folder`."""
        return cls.substitutes

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
