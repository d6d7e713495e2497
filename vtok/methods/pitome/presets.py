"""What PiToMe's authors run for each family of models, where that differs from the paper: a table.

Read off their public code (hchautran/PiToMe at 550b5de). The DeiT and MAE rows are tested on golden arrays of whole models, the
others block by block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtok.core.tokens import Place

ENERGY, SORTED_BSM, BSM = "energy", "sorted_bsm", "bsm"  # ways to match, see `Preset`
KEYS, HIDDEN = "keys", "hidden"  # what is compared: keys, averaged over heads; the hidden states that are about to merge
METRICS = (KEYS, HIDDEN)
# which blocks protect isolated tokens -> matching of the first half of the blocks (rounded up) and of the rest
PROTECT = {"all": (ENERGY, ENERGY), "late": (SORTED_BSM, ENERGY), "none": (SORTED_BSM, SORTED_BSM)}


@dataclass(frozen=True)
class Preset:
    """Settings of one family.

    Matching is "energy" (the paper's: high energies merge, low ones are protected), "sorted_bsm" (ToMe's matching on the
    patches sorted by energy, none protected) or "bsm" (plain ToMe matching; the share is taken of all tokens, CLS counted).

    Attributes:
        margin: m of block i of L is `margin (1 - i / L)`.
        first: matching of the first blocks.
        rest: matching of the blocks from `turn` on.
        turn: block that is the first of the rest, whatever the depth; `None` = half of the depth, rounded up.
        metric: "keys" or "hidden".
        place: where tokens merge.
        use_size: False takes plain means and records no sizes, so nothing that follows can weigh them.
        prop_attn: proportional attention.
    """

    margin: float
    first: str = ENERGY
    rest: str = ENERGY
    turn: int | None = None
    metric: str = HIDDEN
    place: Place = Place.BLOCK_MID
    use_size: bool = True
    prop_attn: bool = False

    def matching(self, depth: int) -> tuple[str, ...]:
        """How each block matches."""
        turn = math.ceil(depth / 2) if self.turn is None else self.turn
        return tuple(self.first if i < turn else self.rest for i in range(depth))


PAPER = Preset(0.9, metric=KEYS, prop_attn=True)
PRESETS = {
    "official_deit": Preset(0.75, first=SORTED_BSM, metric=KEYS),
    "official_mae": Preset(0.75, rest=SORTED_BSM, metric=KEYS),
    "official_clip": Preset(0.95),
    "official_blip": Preset(0.9),
    "official_llava": Preset(0.9, first=BSM, turn=13, place=Place.BLOCK_END, use_size=False),
}
