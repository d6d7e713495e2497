"""What methods share whose one knob is how many visual tokens stay: a share of them, or a count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtok.config import MethodConfig, fraction, whole
from vtok.core.prompt import ImageFeatures, View, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError
from vtok.ops.selection import kept_tokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class KeptShare(MethodConfig):
    """Fields of a method that keeps a share of the visual tokens, or a number of them.

    Attributes:
        keep: share that stays ((0, 1]), rounded to whole tokens, halves to the even number; at least one stays. 1.0 is an exact
            no-op.
        keep_tokens: the same as a count (whole number >= 1); where there are fewer, all stay. Give one of the two.
    """

    set_by_budget: ClassVar[tuple[str, ...]] = ("keep", "keep_tokens")
    default_keep: ClassVar[
        float | None
    ]  # share that stays where neither is given; `None` = the method's own rule says how many

    keep: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep_tokens is not None:
            raise ConfigError(f"give keep or keep_tokens, not both (got {self.keep} and {self.keep_tokens})")
        if self.keep is None and self.keep_tokens is None and self.default_keep is not None:
            object.__setattr__(self, "keep", self.default_keep)
        if self.keep is not None:
            fraction(self.keep, "keep")
        if self.keep_tokens is not None:
            whole(self.keep_tokens, "keep_tokens", 1)

    @property
    def idle(self) -> bool:
        """Whether every token stays, whatever their number."""
        return self.keep == 1

    def count(self, n: int) -> int:
        """Tokens that stay of n."""
        return kept_tokens(n, self.keep, self.keep_tokens)

    def budget_candidates(self, info: VLMInfo) -> Sequence[Self]:
        return [self.replace(keep=(1000 - step) / 1000, keep_tokens=None) for step in range(1000)]


@dataclass(frozen=True)
class FeatureChoice(VLMReducer):
    """Keeps some of the visual tokens of every image before the LLM, each image by itself.

    Attributes:
        config: of the method.
        info: of the model.
    """

    exact: ClassVar[bool] = True

    config: KeptShare
    info: VLMInfo

    def choose(self, images: ImageFeatures, count: int) -> Tensor:
        """[B, count] int64: the tokens that stay, in any order. count: at least one, less than there are."""
        raise NotImplementedError

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.config.idle else (Site(Place.IMAGE_FEATURES, 0),)

    def features(self, images: ImageFeatures) -> Plan | None:
        n = images.tokens.shape[1]
        count = self.config.count(n)
        return None if count == n else Plan(self.choose(images, count).sort(1).values)

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        return self.config.count(n)
