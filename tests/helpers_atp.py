"""Ragged prompts with an image, and modules whose thresholds differ between samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from strategies import generator, normal
from torch import Tensor

from vtok.core.prompt import Layout
from vtok.methods.atp import Slots
from vtok.methods.atp.attention import CausalAttention
from vtok.methods.atp.modules import ATPModules
from vtok.methods.atp.spec import ATPSpec

SCALE = 0.5
GRID = (3, 4)
SLOTS = GRID[0] * GRID[1]


class Sample(NamedTuple):
    """Text tokens in front of the image, whether there is one, text tokens behind it."""

    before: int
    image: bool
    behind: int


def _sample(before: int, image: bool, behind: int) -> Sample:
    return Sample(before, image, behind) if image or before + behind else Sample(1, image, behind)


samples = st.builds(_sample, st.integers(0, 3), st.sampled_from([True, True, True, False]), st.integers(0, 4))
batches = st.lists(samples, min_size=1, max_size=3)


class Prompts(NamedTuple):
    """q [B, 4, N, 3], k [B, 2, N, 3] and their slots."""

    q: Tensor
    k: Tensor
    slots: Slots

    def attention(self, gate: Tensor | None = None) -> CausalAttention:
        return CausalAttention(self.q, self.k, self.slots.real, SCALE, gate)


def prompts(batch: list[Sample], seed: int, padding: int = 0) -> Prompts:
    """The samples, padded on the left to the longest and by `padding` more; a sample's numbers depend on its place in the
    batch alone, and padding holds NaN."""
    lengths = [s.before + SLOTS * s.image + s.behind for s in batch]
    n = max(lengths) + padding
    q, k = (torch.full((len(batch), heads, n, 3), float("nan"), dtype=torch.float64) for heads in (4, 2))
    visual, real = torch.zeros(len(batch), n, dtype=torch.bool), torch.zeros(len(batch), n, dtype=torch.bool)
    for b, (sample, length) in enumerate(zip(batch, lengths)):
        start = n - length
        q[b, :, start:], k[b, :, start:] = 2 * normal(seed + b, 4, length, 3), normal(seed + 10 + b, 2, length, 3)
        real[b, start:] = True
        visual[b, start + sample.before : n - sample.behind] = sample.image
    return Prompts(q, k, Slots.of(Layout.whole(visual, real), SLOTS))


def alone(p: Prompts, b: int) -> Prompts:
    """One sample without its padding."""
    real = p.slots.real[b]
    slots = Slots(*(t[b : b + 1, real] for t in p.slots[:3]))
    return Prompts(p.q[b : b + 1, :, real], p.k[b : b + 1, :, real], slots)


def compact(p: Prompts, keep: Tensor) -> tuple[Prompts, Tensor]:
    """What is left of a batch of one, and its columns."""
    rows = keep[0].nonzero()[:, 0]
    return Prompts(p.q[:, :, rows], p.k[:, :, rows], p.slots.take(rows[None])), rows


def modules(seed: int = 0, dtype: torch.dtype = torch.float64, **spec: Any) -> ATPModules:
    """Modules in front of layers 1 and 2, thresholds around 0.5 that follow the scores."""
    made = ATPModules(ATPSpec(**{"depth": 3, "width": 12, "grid": GRID, "layers": (1, 2), "hidden": 6, **spec})).to(dtype)
    rng = generator(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return made
