"""Scores, masks and gates of ATP-LLaVA; what they mean and where they come from is said in `config`.

Shapes: B samples, N tokens of the sequence, G visual tokens before any pruning (grid slots).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.core.prompt import Layout
from vtok.errors import ConfigError, UnsupportedModelError, shown


class Slots(NamedTuple):
    """What ATP needs to know of the columns of a decoder's sequence.

    Attributes:
        slot: [B, N] int64, place of a visual token in the row-major grid of its image (0 .. G-1), -1 elsewhere.
        text: [B, N] bool, text whose queries make the cross score: behind the image, without answers.
        real: [B, N] bool, False = padding.
        alive: [B, N] bool, False at visual tokens that an earlier module decided against and that are still there because
            nothing is removed in training; `None` = all alive.
    """

    slot: Tensor
    text: Tensor
    real: Tensor
    alive: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, num_slots: int, answer: Tensor | None = None) -> Slots:
        """From the layout of a sequence, whole or pruned: a token keeps its slot. Synchronises with the host once.

        Args:
            layout: of the N columns; visual tokens of a prompt come in raster order.
            num_slots: G; every prompt has as many visual tokens, or none.
            answer: [B, N] bool, tokens of the answer: as queries they would leak what inference does not have.

        Raises:
            UnsupportedModelError: a prompt has another number of visual tokens (several images, or another resolution).
        """
        found = sorted(set(layout.before.sum(-1).tolist()) - {0, num_slots})
        if found:
            raise UnsupportedModelError(
                f"atp needs one image of {num_slots} visual tokens in a prompt, or none; found {found[0]}. Several images, "
                "tiles and variable resolution have no fixed grid: use another method"
            )
        last = (layout.before.cumsum(-1) == num_slots).int().argmax(-1, keepdim=True)  # where the image ends
        behind = (layout.column > last) & layout.before.any(-1, keepdim=True)
        text = layout.text & behind if answer is None else layout.text & behind & ~answer
        return cls(layout.number, text, layout.real)

    @property
    def image(self) -> Tensor:
        """[B, N] bool: visual tokens, whether alive or not."""
        return self.slot >= 0

    @property
    def visual(self) -> Tensor:
        """[B, N] bool: visual tokens that are alive."""
        return self.image if self.alive is None else self.image & self.alive

    def take(self, rows: Tensor, valid: Tensor | None = None) -> Slots:
        """The same of the columns `rows` [B, M]; `valid` [B, M] bool, False = padding."""
        slot, text, real = (t.gather(1, rows) for t in (self.slot, self.text, self.real))
        if valid is not None:
            slot, text, real = slot.where(valid, -1), text & valid, real & valid
        return Slots(slot, text, real, None if self.alive is None else self.alive.gather(1, rows))


def min_max(score: Tensor, among: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - min) / (max - min + eps) over the tokens `among` [B, N] of each sample; 0 elsewhere."""
    low = score.masked_fill(~among, float("inf")).amin(-1, keepdim=True)
    high = score.masked_fill(~among, float("-inf")).amax(-1, keepdim=True)
    nobody = ~among.any(-1, keepdim=True)
    low, high = low.masked_fill(nobody, 0), high.masked_fill(nobody, 0)
    return ((score - low) / (high - low + eps)).masked_fill(~among, 0)


def redundancy(self_score: Tensor, cross: Tensor) -> Tensor:
    """S_redundant = (S_self + S_cross) / 2: high = keep."""
    return (self_score + cross) / 2


def check_strides(strides: Sequence[int]) -> tuple[int, ...]:
    """The strides from fine to coarse.

    Raises:
        ConfigError: they are no whole numbers >= 1, or one does not divide the next, so that the grids would not nest.
    """
    if isinstance(strides, str) or not isinstance(strides, Sequence) or not strides or any(_not_whole(s) for s in strides):
        raise ConfigError(f"strides lists whole numbers >= 1 such as (2, 4), got {shown(strides)}")
    ordered = tuple(sorted(set(strides)))
    for fine, coarse in itertools.pairwise(ordered):
        if coarse % fine:
            raise ConfigError(f"grids nest only if strides divide each other; {fine} does not divide {coarse}")
    return ordered


def _not_whole(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int) or value < 1


def spatial_scores(
    grid: tuple[int, int],
    strides: Sequence[int] = (2, 4),
    lambda_sample: float = 3.0,
    unsampled: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """S_spatial (Eq. 5): 1 - R_s lambda_sample in a uniform grid of rate R_s, from the coarsest grid that holds a token.

    Strides (2, 4) score 0.8125 in the grid of every fourth row and column, 0.25 in the rest of every second one, else 0: of
    24 x 24 tokens a threshold above 0.8125 keeps none, one above 0.25 keeps 36, one above 0 keeps 144.

    Args:
        grid: rows and columns of visual tokens.
        strides: t of grids of rate R_s = 1 / t^2, each starting at the top left token; each divides the next.
        lambda_sample: how much a dense grid costs (3.0 in both reproductions).
        unsampled: score of tokens in no grid, and the lowest score of any.
        dtype, device: of the result.

    Returns:
        [rows x columns], row-major.
    """
    score = torch.full(grid, unsampled, dtype=dtype, device=device)
    for stride in check_strides(strides):
        score[::stride, ::stride] = max(1 - lambda_sample / stride**2, unsampled)
    return score.flatten()


def to_grid(score: Tensor, slots: Slots, num_slots: int) -> Tensor:
    """Scores [B, N] of visual tokens in their slots [B, G]; 0 where a token is gone."""
    spare = slots.slot.where(slots.visual, num_slots)  # collects what is not visual
    return score.new_zeros(score.shape[0], num_slots + 1).scatter(1, spare, score)[:, :num_slots]


def hard_mask(redundant: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
    """What inference keeps: S_redundant > theta_r or S_spatial > theta_s. [.., n], [.., n], [..], [..] -> [.., n] bool."""
    return (redundant > theta_r[..., None]) | (spatial > theta_s[..., None])


def soft_masks(
    redundant: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """M_r and M_s (Eq. 9 and 10), sigmoid((S - theta) T), and M, the larger of them (Eq. 11), each [.., n].

    M > 0.5 where `hard_mask` holds. A high T (the reproductions take 10 and 100) is closer to 0 or 1, but its gradient
    vanishes beyond |S - theta| of about 5 / T.
    """
    m_r = ((redundant - theta_r[..., None]) * temperature).sigmoid()
    m_s = ((spatial - theta_s[..., None]) * temperature).sigmoid()
    return m_r, m_s, torch.maximum(m_r, m_s)


def next_gate(soft: Tensor, slots: Slots, gate: Tensor | None = None) -> Tensor:
    """The gate behind a module: 1 at text, gate times soft mask at visual tokens, 0 at those not alive.

    Args:
        soft: [B, N], M of the module.
        slots: in front of the module.
        gate: [B, N], of earlier modules; `None` = none.
    """
    soft = soft if gate is None else gate * soft
    return soft.masked_fill(~slots.visual, 0).masked_fill(~slots.image, 1)
