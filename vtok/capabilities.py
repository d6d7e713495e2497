"""What a method can do: small interfaces, each a method or two of its config. A config has a capability by defining them.

A config that has `build` acts inside vision encoders, also in those of vision-language models; one that has `build_vlm` acts on
the visual tokens of their prompts; one may have both, and then acts on the prompt of a vision-language model, unless its
parameters name places in the tower (`MethodConfig.in_tower`). Whatever else a config offers is asked for by the functions at
the end of this file, which say in a sentence what a method lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from vtok.core.encoder import ModelInfo, Reducer
from vtok.core.prompt import ImageFeatures, VLMInfo, VLMReducer
from vtok.core.search_space import Point, Space
from vtok.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from typing_extensions import Self

Info: TypeAlias = ModelInfo | VLMInfo  # of what a method acts on; methods of one kind are given theirs alone


@runtime_checkable
class EncoderMethod(Protocol):
    """Acts inside vision encoders."""

    def build(self, info: ModelInfo) -> Reducer:
        """Resolves the config for a vision encoder.

        Raises:
            UnsupportedModelError: the model lacks what the method needs.
            ConfigError: a value does not fit the model.
        """
        ...


@runtime_checkable
class PromptMethod(Protocol):
    """Acts on the visual tokens of vision-language models, before the LLM or between its layers."""

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        """Resolves the config for a vision-language model; errors as in `EncoderMethod`."""
        ...


@runtime_checkable
class HasBudget(Protocol):
    """Has settings among which a FLOPs budget chooses."""

    def budget_candidates(self, info: Any) -> Sequence[Self]:
        """The same method from its mildest setting, a no-op, to its strongest; FLOPs fall along them. info: `Info`."""
        ...


@runtime_checkable
class HasSearchSpace(Protocol):
    """Has a schedule that a search may vary."""

    def search_space(self, info: Any) -> Space:
        """What may vary on a model (`Info`); empty if nothing is left, because it was given.

        Raises:
            ConfigError: nothing may on a model of this kind.
        """
        ...

    def candidates_at(self, info: Any, point: Point) -> Sequence[Self]:
        """As `budget_candidates`, for the shape of schedule that a point of the search space describes."""
        ...


@runtime_checkable
class Calibrates(Protocol):
    """May lack a number that is found on a few inputs of a vision-language model."""

    @property
    def calibrates(self) -> bool:
        """Whether the number is still to be found."""
        ...

    def calibrated(self, info: VLMInfo, observe: Callable[[Sequence[int]], Iterable[ImageFeatures]]) -> Any:
        """The same config with the number.

        Args:
            info: of the model.
            observe: blocks of the vision tower (0-based) -> image features of the inputs, with what these blocks attended to.
        """
        ...


class Named(Protocol):
    """A config, as far as messages go."""

    @property
    def name(self) -> str: ...


def encoder_reducer(config: Named, info: ModelInfo) -> Reducer:
    """A config resolved for a vision encoder.

    Raises:
        UnsupportedModelError: the method acts elsewhere, or the model lacks what it needs.
        ConfigError: a value does not fit the model.
    """
    if isinstance(config, EncoderMethod):
        return config.build(info)
    raise UnsupportedModelError(
        f"{config.name} drops visual tokens from the prompts of vision-language models; {info.name} is a vision encoder"
        if isinstance(config, PromptMethod)
        else _nowhere(config)
    )


def prompt_reducer(config: Named, info: VLMInfo) -> VLMReducer:
    """A config resolved for the prompts of a vision-language model. Errors are those of `encoder_reducer`."""
    if isinstance(config, PromptMethod):
        return config.build_vlm(info)
    raise UnsupportedModelError(
        f"{config.name} reduces tokens inside vision encoders; it does not act on prompts of vision-language models such as "
        f"{info.name}"
        if isinstance(config, EncoderMethod)
        else _nowhere(config)
    )


def _nowhere(config: Named) -> str:
    return (
        f"{config.name} acts nowhere: {type(config).__name__} defines neither build (inside vision encoders) nor build_vlm (on "
        "prompts of vision-language models)"
    )


def _acts_on(config: Named, info: Info) -> bool:
    return isinstance(config, EncoderMethod if isinstance(info, ModelInfo) else PromptMethod)


def candidates(config: Named, info: Info) -> Sequence[Any]:
    """A method's settings from the mildest to the strongest, for a vision encoder or for prompts.

    Raises:
        ConfigError: no FLOPs budget can set the method there.
    """
    if isinstance(config, HasBudget) and _acts_on(config, info):
        return config.budget_candidates(info)
    where = "" if isinstance(info, ModelInfo) else " for a vision-language model"
    why = getattr(config, "no_budget", "") or f"has no single knob that a FLOPs budget{where} could set"
    raise ConfigError(f"{config.name} {why}")


def search_space(config: Named, info: Info) -> Space:
    """What a search may vary of a method on a vision encoder or on prompts; empty if it was given.

    Raises:
        ConfigError: nothing may.
    """
    if isinstance(config, HasSearchSpace) and _acts_on(config, info):
        return config.search_space(info)
    raise no_schedule(config, info)


def candidates_at(config: Named, info: Info, point: Point) -> Sequence[Any]:
    """As `candidates`, for the shape of schedule that a point of `search_space` describes."""
    if isinstance(config, HasSearchSpace) and _acts_on(config, info):
        return config.candidates_at(info, point)
    raise no_schedule(config, info)


def no_schedule(config: Named, info: Info) -> ConfigError:
    """What is said of a method without a schedule there."""
    where = "inside vision encoders" if isinstance(info, ModelInfo) else "on vision-language models"
    return ConfigError(f"{config.name} has no schedule {where} that could be searched")


def to_calibrate(config: Named) -> Calibrates | None:
    """The config, if it still lacks a number that calibration finds."""
    return config if isinstance(config, Calibrates) and config.calibrates else None
