"""`Target`: what `patch` acts on, whichever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import nn

from vtok.config import MethodConfig, ModelInfo
from vtok.core.prompt import VLMInfo
from vtok.errors import UnsupportedModelError
from vtok.reports.prompt import PromptPlan
from vtok.reports.results import Info, PlanReport
from vtok.targets.resolve import Size


class Request(NamedTuple):
    """What a caller of `vtok.patch` or `vtok.plan` asks for besides methods; see there."""

    flops: float | None = None
    input_size: Size | None = None
    calibration: Any = None
    trace: bool = False
    positions: str | None = None
    prompt: Any = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Layers:
    """What a target consists of, for `vtok.supports`.

    Attributes:
        path: name inside the model, "" = the model itself.
        name: class name.
        modules: its blocks or decoder layers, in the order they run.
        kinds: class names of these, as they are unpatched.
    """

    path: str
    name: str
    modules: tuple[nn.Module, ...]
    kinds: tuple[str, ...]


class Target(ABC):
    """One thing that methods act on: a vision encoder, or a vision-language model with its tower, connector and LLM.

    `resolve` makes every check and changes nothing; what it returns is opaque to callers, apart from `configs` and `trace`, and
    is what `install` takes.

    Attributes:
        reads_prompts: whether it reads prompts of text and visual tokens, for which costs are stated.
    """

    reads_prompts: ClassVar[bool] = False

    @property
    @abstractmethod
    def info(self) -> ModelInfo | VLMInfo:
        """What methods may know of it."""

    @property
    @abstractmethod
    def layers(self) -> Layers:
        """Its blocks or decoder layers."""

    @abstractmethod
    def resolve(self, configs: tuple[MethodConfig, ...], request: Request) -> Any:
        """Methods with every number chosen, checked against this target.

        Raises:
            ConfigError: a value makes no sense here, or a budget cannot be met.
            UnsupportedModelError: a method cannot act here.
        """

    @abstractmethod
    def install(self, resolved: Any) -> None:
        """Patches what `resolve` returned; the model must not be patched."""

    @abstractmethod
    def installed(self) -> Any | None:
        """What is patched, as `resolve` returned it; `None` = nothing."""

    @abstractmethod
    def plan(self, configs: tuple[MethodConfig, ...], request: Request) -> PlanReport | PromptPlan:
        """What methods would do; see `vtok.plan`. Errors are those of `resolve`."""

    @abstractmethod
    def describe(self, kernels: Sequence[str] | None = None) -> Info:
        """What is patched and what the last forward pass of this thread did.

        Args:
            kernels: attention kernel of each of `layers.modules`, if they were looked for.
        """

    def place(self, configs: tuple[MethodConfig, ...], resolved: Any) -> str:
        """Where methods act, in words; "" = where a vision encoder's methods always do."""
        return ""

    def warnings(self, resolved: Any) -> Sequence[str]:
        """What a user should be told when it is installed to stay."""
        return ()

    def shortened_inputs(
        self, inputs: Mapping[str, Any], configs: tuple[MethodConfig, ...], request: Request, pad: int | None
    ) -> dict[str, Any]:
        """See `vtok.prune_inputs`."""
        raise UnsupportedModelError(
            f"prune_inputs takes one vision-language model with its language head; {self.layers.name} is a vision encoder"
        )
