"""What a method sees of a vision tower that an engine runs: made of the queries, keys and values of one block.

Shapes: V views, N tokens that entered the block, P of them in front of the patches, H heads, D head width, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtok.core.tokens import AttentionView
from vtok.core.tower import TowerBlock


def block_of(qkv: Tensor, heads: int, scale: float, num_prefix: int, output: Tensor | None = None) -> TowerBlock:
    """A view of one block whose queries, keys and values come out of one projection, as many heads of each.

    Args:
        qkv: [V, N, 3 H D], queries, keys, values, biases included.
        heads: H.
        scale: factor on the logits.
        num_prefix: P (class token, registers).
        output: [V, N, C], what left the block; `None` = not kept.
    """

    def view() -> AttentionView:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        return AttentionView(q, k, k, v, scale, None)

    def only(views: Sequence[int]) -> TowerBlock:
        rows = list(views)
        return block_of(qkv[rows], heads, scale, num_prefix, None if output is None else output[rows])

    def left() -> Tensor:
        assert output is not None
        return output

    return TowerBlock(num_prefix, None, view, only, leaves=None if output is None else left)
