"""ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models (Ye, Gan, Ge, Zhang, Tang, CVPR 2025, arXiv:2412.00447).
In front of a few decoder layers a small module looks at the attention of the layer before, predicts two thresholds for each
sample, and drops the visual tokens whose redundancy score and spatial score both fall below their threshold. The "redundancy"
score is an importance: high means keep.

This file: scores, masks, gates; `atp_attention`: what reads attention or changes it; `atp_spec`, `atp_module`: what is learned,
saved and loaded; `atp_losses`: what it is trained with.

Neither the paper's text nor code of its authors was at hand. The equation numbers are those that two independent student
reproductions agree on; this is an implementation in the paper's spirit, **not a faithful reproduction**. Our interpretation,
each with the alternative that can be chosen instead:

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

import os
from dataclasses import dataclass
from typing import ClassVar

from vtok.config import MethodConfig, block_numbers
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.errors import ConfigError, UnsupportedModelError, shown

TRAINING = "python -m vtok.eval.training.atp --model FOLDER"


@dataclass(frozen=True)
class ATP(MethodConfig):
    """Config of ATP-LLaVA: in front of some decoder layers learned thresholds decide for each prompt which visual tokens stay.
    What is our interpretation, because neither the paper's text nor its code was at hand, is listed at the top of this file.

    It works on prompts with one image, on models that turn every image into the same grid of visual tokens; prompts without an
    image pass. Prompts of one batch keep different numbers. In training mode it drops tokens all the same, and the modules
    learn nothing: they are trained by the command below, or with `vtok.patches.decoder.soft_gates.softened`.

    Attributes:
        weights: file of trained modules, as `python -m vtok.eval.training.atp` or `ATPModules.save` writes it; needed. They
            serve the model that they were trained for; modules with `inputs="means"` also other grids.
        layers: 0-based decoder layers in front of which tokens leave; default: all that the modules were trained for (paper: 4,
            14, 24 of 32), others are refused.
        target_tokens: N_target, visual tokens on average over layers that training aimed at (paper: 144 of 576). It is fixed by
            training: a value here is only held against the file.
        min_tokens: visual tokens that every prompt keeps, whatever its thresholds: those of the highest redundancy score (whole
            number >= 0; default 1; not in the paper).
    """

    name: ClassVar[str] = "atp"

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

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        from vtok.methods.atp.modules import load
        from vtok.methods.atp.reducer import ATPReducer

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
