"""DART: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (Wen et al., EMNLP 2025). In
front of one early decoder layer a few pivots are taken, tokens with large keys; each pivot keeps the visual tokens that are
least like it, and the others, which repeat something, leave.

Written from a description of the authors' program; it reproduces that program's choices (`tests/golden`). What differs:

* Pivots are visited as they rank, visual ones first (`order="list"`). The program iterates over a Python set of their
  positions, whose order is an accident of hashing; `preset="official"` goes through them in that order, which costs one host
  synchronisation. The two keep nearly the same tokens (96 % on the larger golden file).
* Every prompt of a batch decides for itself; the program takes one at a time. All images of a prompt are one pool.
* Where fewer tokens are left than a pivot may pick, it picks those. Where fewer text tokens stand behind the image than text
  pivots are asked for, the first visual pivot picks in their place, so that counts do not depend on the text.
* Equal similarities: the token in front wins; in the program it is undefined.

How many stay follows from the picks, as in the program: pivots + picks, and each pivot picks as many; "128" leaves 132. Hidden
states are compared behind the LLM's last norm, as in the program. No attention is computed: keys of one layer, no queries.
Positions are kept, as in the program.

Shapes: B prompts, L columns in front of the layer, P pivots, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtok.config import whole
from vtok.core.prompt import LayerAttention, Layout, VLMInfo
from vtok.core.tokens import Site, at_least_fp32
from vtok.errors import ConfigError, unknown
from vtok.methods.in_llm.one_layer import OneLayer, OneLayerReducer
from vtok.methods.preset import Official
from vtok.ops.rows import take_rows
from vtok.ops.selection import largest

if TYPE_CHECKING:
    pass

ORDERS = ("list", "set")
_EPS = 1e-8  # shortest length in a cosine


@dataclass(frozen=True)
class DART(Official, OneLayer):
    """Config of DART.

    Attributes:
        keep: share of a prompt's visual tokens n that pivots pick (1 - R of the program; (0, 1], default 0.222, its value for
            Qwen-VL): each picks floor(n keep / P), and the visual pivots stay besides. 1.0 is an exact no-op.
        keep_tokens: the same as a count (program: M, 128 for LLaVA-1.5, 320 for LLaVA-NeXT; whole number >= 1): each pivot
            picks floor(min(M, n - visual pivots) / P). Give one of the two.
        layer: K, 0-based decoder layer in front of which tokens leave; keys and output of layer K - 1 decide (whole
            number >= 1, default 2).
        visual_pivots: visual tokens of largest key norm that pick (whole number >= 1, default 4).
        text_pivots: the same of the text behind the image (whole number >= 0, default 4).
        order: how pivots are visited: `"list"`, visual ones before text, each by falling norm; `"set"`, as a Python set of
            their positions in front of the layer would give them.
        preset: `"official"` sets `order="set"`; positions are kept, as always.
    """

    name: ClassVar[str] = "dart"
    default_keep: ClassVar[float | None] = 0.222
    official_positions: ClassVar[str] = "original"

    visual_pivots: int = 4
    text_pivots: int = 4
    order: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.visual_pivots, "visual_pivots", 1)
        whole(self.text_pivots, "text_pivots", 0)
        if self.preset is not None and self.order == "list":
            raise ConfigError('preset "official" visits pivots in the order of a set; drop order="list" or the preset')
        if self.order is not None and self.order not in ORDERS:
            raise unknown("order", str(self.order), ORDERS)

    @property
    def visits(self) -> str:
        """The order that holds."""
        return self.order or ("set" if self.preset else "list")

    @property
    def pivots(self) -> int:
        """P, visual and text pivots."""
        return self.visual_pivots + self.text_pivots

    def picks(self, n: int) -> int:
        """Tokens that each pivot picks of n, as long as there are enough."""
        if self.keep_tokens is not None:
            return max(0, min(self.keep_tokens, n - self.visual_pivots)) // self.pivots
        assert self.keep is not None
        return math.floor(n * self.keep / self.pivots)

    def count(self, n: int) -> int:
        return min(n, self.visual_pivots + self.picks(n) * self.pivots)

    def build_vlm(self, info: VLMInfo) -> DARTReducer:
        return DARTReducer(self, info)


def key_norms(keys: Tensor) -> Tensor:
    """[B, L]: sum of the absolute values of each column's keys [B, Hk, L, D], over heads and channels, in at least fp32.

    Key heads that several query heads share may stand once: repetition scales all norms alike.
    """
    return at_least_fp32(keys).abs().sum((1, 3))


def choose_pivots(norm: Tensor, visual: Tensor, text: Tensor, config: DART) -> tuple[Tensor, Tensor]:
    """The tokens of largest norm, visual ones before text, each by falling norm (of equal norms the first).

    Args:
        norm: [B, L].
        visual: [B, L] bool.
        text: [B, L] bool, behind the image.
        config: says how many.

    Returns:
        (places [B, P] int64; [B, P] bool, False where there are fewer such tokens: the first pivot stands there again).
    """
    low = torch.finfo(norm.dtype).min
    places, found = [], []
    for kind, count in ((visual, config.visual_pivots), (text, config.text_pivots)):
        score = norm.masked_fill(~kind, low)
        order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        if order.shape[1] < count:  # a prompt of fewer columns than pivots
            order = torch.cat([order, order[:, :1].expand(-1, count - order.shape[1])], 1)
        places.append(order)
        found.append(torch.arange(count, device=norm.device) < kind.sum(1, keepdim=True))
    place, real = torch.cat(places, 1), torch.cat(found, 1)
    return place.where(real, place[:, :1]), real


def visiting_order(place: Tensor, real: Tensor) -> Tensor:
    """[B, P] int64, which pivot comes first, second, ..: those that are real as a set gives them, then the others."""
    rows = []
    for places, there in zip(place.tolist(), real.tolist()):
        at = {p: i for i, (p, yes) in enumerate(zip(places, there)) if yes}
        order = [at[p] for p in set(list(at))]  # noqa: C414  # of a list: made of a mapping, a set may be laid out otherwise
        rows.append([*order, *(i for i, yes in enumerate(there) if not yes)])
    return torch.tensor(rows, device=place.device)


def least_alike(hidden: Tensor, pool: Tensor, place: Tensor, picks: Tensor) -> Tensor:
    """Every pivot in turn takes, out of what is left of the pool, the tokens of lowest cosine to it.

    Args:
        hidden: [B, L, D], compared in at least fp32.
        pool: [B, L] bool, visual tokens that are no pivots.
        place: [B, P] int64, pivots in the order of their turns.
        picks: [B] int64, tokens that each takes, or all that are left.

    Returns:
        [B, L] bool, what was taken; of equal cosines the first tokens.
    """
    x = at_least_fp32(hidden)
    x = x / x.norm(dim=2, keepdim=True).clamp_min(_EPS)
    cosine = take_rows(x, place) @ x.transpose(1, 2)  # [B, P, L]
    taken = torch.zeros_like(pool)
    for row in cosine.unbind(1):
        taken = taken | largest(-row, picks, pool & ~taken)
    return taken


def dart_select(hidden: Tensor, keys: Tensor, layout: Layout, config: DART) -> Tensor:
    """Which visual tokens go on.

    Args:
        hidden: [B, L, D], output of layer K - 1 behind the LLM's last norm.
        keys: [B, Hk, L, d] of layer K - 1, rotated.
        layout: of the L columns.
        config: of the method.

    Returns:
        [B, L] bool.
    """
    visual = layout.visual
    place, real = choose_pivots(key_norms(keys), visual, layout.after_image, config)
    if config.visits == "set":
        start = layout.real.int().argmax(1, keepdim=True)  # a set orders numbers as they are: those of the prompt alone
        place = place.gather(1, visiting_order(place - start, real))
    own = torch.zeros_like(visual).scatter(1, place, True) & visual
    n = visual.sum(1)
    if config.keep_tokens is not None:
        picks = (n - config.visual_pivots).clamp(0, config.keep_tokens) // config.pivots
    else:
        assert config.keep is not None
        picks = (n.double() * config.keep / config.pivots).floor().long()
    return own | least_alike(hidden, visual & ~own, place, picks)


@dataclass(frozen=True)
class DARTReducer(OneLayerReducer):
    """DART for one model.

    Attributes:
        config: of the method.
        info: of the model.
    """

    config: DART

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        assert attention is not None and attention.final_norm is not None
        return dart_select(attention.final_norm(x), attention.k, layout, self.config)

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        length = visual + text
        return self.info.probe_macs(0, length) + self.config.pivots * length * self.info.width
