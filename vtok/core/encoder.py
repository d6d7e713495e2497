"""What a method sees of a vision encoder before any image, and the base of what decides inside one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtok.core.reduction import Plan
from vtok.core.tokens import AttentionView, Site, TokenState


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a tower before any image has been seen.

    Attributes:
        name: class name of the tower, for messages.
        depth: number of blocks.
        num_prefix: tokens at the front that are never reduced (CLS, distillation, registers).
        num_patches: patch tokens at the stated input size (units of patches, where they move in groups).
        grid: rows and columns of patches; rows x columns may differ from `num_patches` where no grid is known.
        has_cls: whether token 0 is a class token.
        width: of a token between blocks, C.
        head_dim: width of one attention head, D.
        num_heads: query heads, H.
        num_kv_heads: key and value heads; fewer under grouped-query attention.
        plain_softmax: whether attention is one softmax over q k^T (differential attention is not).
        blind_pool: why the pooling head can see neither sizes nor padding, or `None` if it can.
        blind_attention: why attention to the tokens, as it is set up, can see neither sizes nor padding, or `None` if it can.
        parts: patches of a token, each of which attends by itself; `head_dim` is that of all of them side by side.
        varies: whether every image comes at a size of its own, so that `num_patches` and `grid` are those of one among many.
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
    parts: int = 1
    varies: bool = False


class Reducer:
    """Base of a config resolved for one model: pure, stateless, frozen.

    Attributes:
        needs: which of "q", "k", "v" a plan looks at; nothing is caught for a plan that looks at the tokens alone.
        prop_attn: whether later attention must see token sizes.
        sizes: whether plans merge tokens and record how many patches each stands for.
        ragged: whether images of one batch may keep different numbers of tokens.
        exact: whether `count` is exact; False = an upper bound, the true number depends on the image.
        dynamic: why the shapes of its results depend on the images, and what can be done, for files of fixed shapes; "" = they
            do not.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sizes: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    prop_attn: bool = False

    @property
    def dynamic(self) -> str:
        return ""

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
