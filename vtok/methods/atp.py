"""ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models (Ye, Gan, Ge, Zhang, Tang, CVPR 2025, arXiv:2412.00447).
In front of a few decoder layers a small module looks at the attention of the layer before, predicts two thresholds for each
sample, and drops the visual tokens whose redundancy score and spatial score both fall below their threshold. The "redundancy"
score is an importance: high means keep. This file: scores, masks, gates; `atp_attention`: what reads attention or changes it;
`atp_spec`, `atp_module`: what is learned, saved and loaded; `atp_losses`: what it is trained with.

Neither the paper's text nor code of its authors was at hand. The equation numbers are those that two independent student
reproductions agree on; this is an implementation in the paper's spirit, **not a faithful reproduction**. Readings of ours, each
with the alternative that can be chosen instead:

* The self score averages softmax probabilities over heads and all visual queries (`self_score="probs"`). One reproduction
  averages logits without the causal mask (`"logits"`); `"debiased"`, which is in neither, averages over the queries that can
  see the token, because a causal decoder otherwise scores early tokens higher.
* Scores are scaled to [0, 1] in every sample (`min_max`; `minmax=False` leaves them). Neither reproduction does it, but an
  averaged probability is about 1 / N, out of reach of a threshold that is a sigmoid.
* The spatial score nests uniform grids, so that one threshold chooses a rate (`spatial_scores`). The reproductions use one
  grid, which `strides=(2,)` gives, and score the other tokens 0 or -100 (`unsampled`).
* The thresholds read the scores put back on the full grid of visual tokens, 0 where a token is gone (`to_grid`), so that the
  input keeps its size after pruning. One reproduction reads the two means instead (`inputs="means"`).
* In training a token's gate multiplies the attention that it receives, rows are renormalised and nobody is hidden from itself
  (as in DynamicViT, Rao et al., NeurIPS 2021); gates of several modules multiply. A 0/1 gate then equals pruning exactly. A
  token that a module decides against is gone for the modules behind it (score 0, gate 0), as it will be in inference.

Shapes: B samples, N tokens of the sequence, G visual tokens before any pruning (grid slots). Everything works on batches with
padding on the left, unequal numbers of visual tokens, and samples without any.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.config import MethodConfig, block_numbers
from vtok.errors import ConfigError, UnsupportedModelError, shown
from vtok.prompt import Layout, VLMInfo, VLMReducer

TRAINING = "python -m vtok.eval.train_atp --model FOLDER"


@dataclass(frozen=True)
class ATP(MethodConfig):
    """Config of ATP-LLaVA: in front of some decoder layers learned thresholds decide for each prompt which visual tokens stay.
    What is a reading of ours, because neither the paper's text nor its code was at hand, is listed at the top of this file.

    It works on prompts with one image, on models that turn every image into the same grid of visual tokens; prompts without an
    image pass. Prompts of one batch keep different numbers. In training mode it drops tokens all the same, and the modules
    learn nothing: they are trained by the command below, or with `vtok.patches.decoder_soft.softened`.

    Attributes:
        weights: file of trained modules, as `python -m vtok.eval.train_atp` or `ATPModules.save` writes it; needed. They serve
            the model that they were trained for; modules with `inputs="means"` also other grids.
        layers: 0-based decoder layers in front of which tokens leave; default: all that the modules were trained for (paper: 4,
            14, 24 of 32), others are refused.
        target_tokens: N_target, visual tokens on average over layers that training aimed at (paper: 144 of 576). It is fixed by
            training: a value here is only held against the file.
        min_tokens: visual tokens that every prompt keeps, whatever its thresholds: those of the highest redundancy score (whole
            number >= 0; default 1; not in the paper).
    """

    name: ClassVar[str] = "atp"
    remark_vlm: ClassVar[str] = (
        "Here the modules are random, nobody trained them: the cell shows that tokens go down and are dropped exactly, not "
        "that the right ones are"
    )

    weights: str | None = None
    layers: tuple[int, ...] | None = None
    target_tokens: float | None = None
    min_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            if not isinstance(self.weights, (str, os.PathLike)):
                raise ConfigError(f"weights is the path of a safetensors file, got {shown(self.weights)}")
            object.__setattr__(self, "weights", os.fspath(self.weights))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(block_numbers(self.layers)))))
        target = self.target_tokens
        if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float)) or not target > 0):
            raise ConfigError(f"target_tokens must be a number > 0, got {shown(target)}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ConfigError(f"min_tokens is a whole number >= 0, got {shown(self.min_tokens)}")

    @classmethod
    def substitutes_vlm(cls, info: VLMInfo, folder: str) -> Sequence[Mapping[str, Any]]:
        """Modules that nobody trained: random, they drop some tokens and keep others."""
        from vtok.methods.atp_module import ATPModules
        from vtok.methods.atp_spec import ATPSpec

        layers = tuple(range(max(1, info.first_layer), info.depth))
        made = ATPModules(ATPSpec(depth=info.depth, width=info.width, grid=info.grid or (1, 1), layers=layers, hidden=6))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=generator))
        path = os.path.join(folder, "untrained.safetensors")
        made.save(path)
        return ({"weights": path},)

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        from vtok.methods.atp_module import load
        from vtok.methods.atp_reducer import ATPReducer

        if self.weights is None:
            raise ConfigError(
                f"atp needs modules that were trained for this {info.name}: `{TRAINING}` trains them; pass the file that it "
                "writes as weights"
            )
        if info.grid is None:
            raise UnsupportedModelError(
                f"atp needs the same grid of visual tokens for every image, but those of {info.name} depend on the image "
                "(tiles or variable resolution); use another method"
            )
        modules = load(self.weights, info.depth, info.width, info.grid)
        spec = modules.spec
        layers = spec.sites if self.layers is None else self.layers
        missing = [layer for layer in layers if layer not in spec.sites]
        if missing:
            raise ConfigError(
                f"layers names decoder layer {missing[0]}, but the modules in {self.weights} were trained for the layers "
                f"{', '.join(map(str, spec.sites))}; choose among these, or train others: `{TRAINING} --layers ...`"
            )
        if self.target_tokens is not None and self.target_tokens != spec.target_tokens:
            raise ConfigError(
                f"target_tokens={self.target_tokens:g}, but the modules in {self.weights} were trained for "
                f"{spec.target_tokens}; thresholds are learned: leave target_tokens out, or train: `{TRAINING} --target ...`"
            )
        return ATPReducer(modules, layers, info, self.min_tokens)


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
