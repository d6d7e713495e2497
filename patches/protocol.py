"""What a backend describes: the anatomy of its blocks as data, its towers, and an `Adapter` that finds and installs them.

Shapes: B batch, N tokens, C width, H heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from vtok.config import ModelInfo
from vtok.core.tokens import Rope
from vtok.core.tracker import TokenTracker
from vtok.cost.encoder import TowerCost
from vtok.patches.module_swap import Mixin


class Projected(NamedTuple):
    """Queries, keys and values of an attention module: [B, H or Hk, N, D]; `k` before rotation, `q` and `k_rot` after."""

    q: Tensor
    k: Tensor
    k_rot: Tensor
    v: Tensor


@dataclass(frozen=True)
class TapSpec:
    """Where a hook finds q, k or v.

    Attributes:
        child: module of the attention (or of an unsplittable block) whose output is caught.
        layout: axes of what it returns: "bhnd", "bnhd" or "bn(hd)".
        part: for a fused projection, which columns to take, as a function of the module; `None` = all.
    """

    child: str
    layout: str = "bhnd"
    part: Callable[[Any], slice] | None = None


class Attend:
    """How one class of attention modules is called, looked into and priced.

    Attributes:
        taps: "q", "k", "v" -> where a hook finds them.
        takes_bias: whether `call` accepts an additive [B, 1, 1, N] mask; otherwise `project` and `output` are always used.
        splits: whether `project` and `output` exist, so that only some query rows can attend.
        softmax: whether probabilities are one softmax of q k^T.
        late: linear children that see kept query rows only (output projection, gate).
        weights: matrices that every token is multiplied with, kept as bare parameters instead of linear children.
    """

    taps: ClassVar[dict[str, TapSpec]] = {}
    takes_bias: ClassVar[bool] = True
    splits: ClassVar[bool] = True
    softmax: ClassVar[bool] = True
    late: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()

    def heads(self, attn: Any) -> tuple[int, int]:
        """(query heads H, head dim D)."""
        raise NotImplementedError

    def kv_heads(self, attn: Any) -> int:
        """Key and value heads, as a tap shows them."""
        return self.heads(attn)[0]

    def scale(self, attn: Any) -> float:
        """Factor on the logits."""
        raise NotImplementedError

    def dropout(self, attn: Any) -> float:
        """Share of the attention probabilities that is dropped in training."""
        drop = getattr(attn, "attn_drop", None)
        return drop.p if isinstance(drop, nn.Dropout) else 0.0

    def pair_macs(self, attn: Any) -> int:
        """MACs for one (query, key) pair over all heads: scores and weighted values."""
        num_heads, head_dim = self.heads(attn)
        return 2 * num_heads * head_dim

    def refuses_bias(self, attn: Any) -> str | None:
        """Why `call` cannot take an additive mask as it is set up now (its kernel knows none), or `None` if it can."""
        return None

    def call(self, attn: Any, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The module's own forward: [B, N, C] -> [B, N, C]."""
        return attn(h, **kwargs)

    def project(self, attn: Any, h: Tensor, rope: Rope | None) -> Projected:
        """Queries, keys and values of h [B, N, C]."""
        raise NotImplementedError

    def rotate(self, attn: Any, t: Tensor, rope: Rope) -> Tensor:
        """Applies rotary tables to queries or keys [B, H, N, D], prefix tokens left alone."""
        raise NotImplementedError

    def output(self, attn: Any, out: Tensor, h: Tensor) -> Tensor:
        """What follows the weighted values: [B, M, H D] -> [B, M, C]; h [B, M, C] are the rows that attended."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockSpec:
    """x = x + post1(attn(pre1(x))); x = x + post2(mlp(pre2(x))).

    `pre` and `post` name children: modules are called, tensors multiplied, missing or `None` ones skipped.

    Attributes:
        attn: child that attends; "" = the block itself (one fused projection, nothing between attention and MLP).
        args: positional parameters of the block's forward after x.
        mask: parameter under which block and attention take an additive mask.
        rope: parameter that carries rotary tables, if any.
        own_mask: makes the mask that the block would build for the original length, from (block, kwargs); takes out of kwargs
            what the attention does not know.
        passes_mask: whether the block's forward hands a mask on as it is; otherwise a block that needs one is always split.
        padding_mask: makes the mask that may mark padding, broadcastable to [B, H, N, N], from (block, kwargs); `None` = the
            block takes none. What the first block gets seeds the token state.
        seq_first: whether the block takes and returns [N, B, C].
        mixin: the class put in front of the block's own, where blocks are not called as the others are; `None` = the usual one.
    """

    attn: str
    pre1: tuple[str, ...] = ()
    post1: tuple[str, ...] = ()
    pre2: tuple[str, ...] = ()
    mlp: str = "mlp"
    post2: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    mask: str = "attn_mask"
    rope: str | None = None
    own_mask: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None
    seq_first: bool = False
    passes_mask: bool = True
    padding_mask: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None
    mixin: type[Any] | None = None

    @property
    def whole(self) -> bool:
        """True if the block cannot be split: reductions wait until its end."""
        return not self.attn

    def attention(self, block: nn.Module) -> nn.Module:
        return getattr(block, self.attn) if self.attn else block


@dataclass(frozen=True)
class Block:
    """One block of a tower with its description.

    Attributes:
        module: the block.
        spec: how it is built.
        attend: how its attention is.
        own_forward: the class of the block whose forward runs, if the description is that of a class it derives from.
        own_attention: the same of its attention.
    """

    module: nn.Module
    spec: BlockSpec
    attend: Attend
    own_forward: type | None = None
    own_attention: type | None = None

    @property
    def attention(self) -> nn.Module:
        return self.spec.attention(self.module)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks that one token sequence runs through.

    Attributes:
        path: name of the tower inside the patched model, "" = the model itself.
        module: the tower.
        blocks: in the order they run.
        num_prefix: tokens at the front that are never reduced.
        has_cls: whether token 0 is a class token.
        width: of a token between blocks, C.
        input_size: (channels, height, width) for which `grid` and costs are stated.
        grid: (rows, columns) of patches at that size.
        blind_pool: why the pooling head can see neither sizes nor padding, or `None`.
        blind_reader: why attention behind the tower, which reads its tokens, can see neither, or `None`.
        heads: modules of the patched model that follow the tower and run once an image (projection, classifier), for costs.
        averaged_by: the module around the tower whose own forward averages the tower's patches, if there is one.
        parts: see `ModelInfo`.
        varies: see `ModelInfo`.
    """

    path: str
    module: nn.Module
    blocks: tuple[Block, ...]
    num_prefix: int
    has_cls: bool
    width: int
    input_size: tuple[int, int, int]
    grid: tuple[int, int]
    blind_pool: str | None = None
    blind_reader: str | None = None
    heads: tuple[nn.Module, ...] = ()
    averaged_by: nn.Module | None = None
    parts: int = 1
    varies: bool = False

    @property
    def info(self) -> ModelInfo:
        first = self.blocks[0]
        num_heads, head_dim = first.attend.heads(first.attention)
        refusals = (b.attend.refuses_bias(b.attention) for b in self.blocks)
        return ModelInfo(
            name=type(self.module).__name__,
            depth=len(self.blocks),
            num_prefix=self.num_prefix,
            num_patches=self.grid[0] * self.grid[1],
            grid=self.grid,
            has_cls=self.has_cls,
            width=self.width,
            head_dim=head_dim,
            num_heads=num_heads,
            num_kv_heads=first.attend.kv_heads(first.attention),
            plain_softmax=all(b.attend.softmax for b in self.blocks),
            blind_pool=self.blind_pool,
            blind_attention=self.blind_reader or next((why for why in refusals if why), None),
            parts=self.parts,
            varies=self.varies,
        )


class Example(NamedTuple):
    """A tiny random model on which the contract tests run.

    Attributes:
        name: unique within the backend.
        build: makes it.
        input_size: (channels, height, width).
        since: release of the backend that first has it; "" = the oldest one supported.
        family: row of the support matrix; "" = the first word of the name.
    """

    name: str
    build: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    since: str = ""
    family: str = ""


class Adapter(Protocol):
    """One backend."""

    supported: str  # a sentence part that names the supported models, for refusals

    def towers(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sequence[Tower]:
        """The towers inside `model`, described for an input size (default: the one the model was built for).

        Raises:
            UnsupportedModelError: a tower is there but cannot be patched; the message says why. No tower: empty.
        """
        ...

    def attach(self, tower: Tower, run: TokenTracker) -> None:
        """Makes what follows the blocks see sizes and padding."""
        ...

    def cost(self, tower: Tower) -> TowerCost:
        """Closed-form MACs at the tower's input size."""
        ...

    def examples(self) -> Sequence[Example]:
        """One tiny model for every covered kind of block and head."""
        ...


def qualified_name(cls: type) -> str:
    """`package.module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def look_up(module: nn.Module, table: dict[str, Any]) -> Any | None:
    """The entry for a module's class or nearest base, by qualified name: nothing is imported to recognise it."""
    return next((table[name] for name in map(qualified_name, type(module).__mro__) if name in table), None)


def own_forward(module: nn.Module, table: dict[str, Any]) -> type | None:
    """The class whose forward a module runs, if `look_up` finds the entry of a class that this one derives from: what the table
    says need not hold for it. A forward that was only wrapped, as transformers wraps that of every class of layers, is none."""
    classes = [cls for cls in type(module).__mro__ if not issubclass(cls, Mixin)]
    known = next((cls for cls in classes if qualified_name(cls) in table), None)
    own = next((cls for cls in classes if "forward" in vars(cls)), None)
    if known is None or own is None or _inner(own) is _inner(known):
        return None
    return own


def _inner(cls: Any) -> Any:
    """The forward of a class without what transformers wraps around it. Others copy a signature with `functools.wraps`, too."""

    def theirs(function: Any) -> bool:
        return not str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("transformers.")

    return inspect.unwrap(cls.forward, stop=theirs)
