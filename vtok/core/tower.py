"""What a method sees of the vision tower inside a vision-language model.

Shapes: V views (crops, tiles, frames) of B images, N tokens that enter a block, P of them in front of the patches, C width of a
token, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vtok.core.tokens import AttentionView


@dataclass(frozen=True)
class TowerFacts:
    """What a method may know of a vision tower, inside a vision-language model, whose blocks can be looked into.

    Attributes:
        depth: its blocks.
        has_cls: whether token 0 is a class token.
        num_prefix: tokens in front of the patches (class token, registers), P.
        feature_block: 0-based block whose output the model takes; the deepest, if it takes several.
        width: of a token, C.
        num_heads: query heads, H.
        head_dim: width of one head, D.
        num_patches: tokens behind the prefix at the size the tower was built for; 0 = not known.
        prefix_kept: whether the prefix stands among the features of an image (vision_feature_select_strategy="full").
    """

    depth: int
    has_cls: bool
    num_prefix: int
    feature_block: int
    width: int
    num_heads: int
    head_dim: int
    num_patches: int = 0
    prefix_kept: bool = False


@dataclass(frozen=True)
class TowerBlock:
    """What one block of the vision tower attended to, for all views (crops, tiles, frames) of B images.

    Attributes:
        num_prefix: tokens in front of the patches, P.
        valid: [V, N] bool, False = padding; `None` = all real.
        project: makes `view`, from what entered the block.
        only: the same for some of the V views.
        index: [V, N] int64, where each token stood among the `length` that entered the tower, prefix included; `None` = none
            has been merged, moved or dropped.
        length: tokens that entered the tower, prefix included; 0 = N.
        leaves: makes `output`; `None` = it was not kept.
    """

    num_prefix: int
    valid: Tensor | None
    project: Callable[[], AttentionView]
    only: Callable[[Sequence[int]], TowerBlock]
    index: Tensor | None = None
    length: int = 0
    leaves: Callable[[], Tensor] | None = None

    @property
    def output(self) -> Tensor:
        """[V, N, C]: what left the block, prefix included."""
        assert self.leaves is not None
        return self.leaves()

    @cached_property
    def view(self) -> AttentionView:
        """Queries, keys and values [V, H, N, D] of V = B times `views_per_image` views, those of an image one behind the other.

        N are the tokens that entered the block: prefix and patches, fewer where tokens were merged or dropped before.
        """
        return self.project()
