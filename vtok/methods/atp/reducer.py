"""ATP-LLaVA (Ye et al., CVPR 2025) between the decoder layers of a vision-language model: hard decisions for inference, soft
gates for training. See `vtok.methods.atp` for what is known of the paper and what is our interpretation.

Shapes: B prompts, L columns of the sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtok.core.prompt import LayerAttention, Layout, VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.methods.atp.attention import gate_bias
from vtok.methods.atp.losses import ATPLosses, atp_loss, average_tokens, token_counts
from vtok.methods.atp.modules import ATPModules, Decision
from vtok.methods.atp.scores import Slots


@dataclass(frozen=True)
class ATPReducer(VLMReducer):
    """Trained modules on one model.

    Attributes:
        modules: one head for each layer they were trained for; they stay outside the model.
        layers: those that are used.
        info: of the model.
        min_tokens: visual tokens that every prompt keeps.
    """

    modules: ATPModules = field(compare=False)
    layers: tuple[int, ...]
    info: VLMInfo
    min_tokens: int = 1
    _elsewhere: dict[torch.device, ATPModules] = field(default_factory=dict, compare=False, repr=False)
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.DECODER_IN, layer) for layer in self.layers)

    def probe(self, at: Site) -> int:
        return at.index - 1

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        return self.decide(layout, attention, at).keep

    def decide(self, layout: Layout, attention: LayerAttention | None, at: Site) -> Decision:
        """Thresholds, scores and what they keep, in front of a decoder layer."""
        assert attention is not None
        assert self.info.grid is not None
        rows, columns = self.info.grid
        modules = self._on(layout.visual.device)
        slots = Slots.of(layout, rows * columns)
        scores = modules.scores(attention, slots)
        return modules(at.index, *scores, slots, grid=self.info.grid, at_least=self.min_tokens)

    def layer_macs(self, at: Site, visual: int, text: int, entered: int) -> int:
        return self.info.probe_macs(visual + text, visual + text) + self.modules.head(at.index).macs

    def _on(self, device: torch.device) -> ATPModules:
        """The modules on a device: a model may be moved after it was patched, or lie on several."""
        if next(self.modules.parameters()).device == device:
            return self.modules
        if device not in self._elsewhere:
            self._elsewhere[device] = copy.deepcopy(self.modules).to(device)
        return self._elsewhere[device]


class SoftATP:
    """One forward pass of a model in training form: nothing leaves, visual tokens that a module would drop are attended less.

    Pass it to `vtok.patches.decoder.soft_gates.softened`; afterwards it holds what every module decided. Scores are read
    without gradient: what learns are the thresholds, and the model if it is not frozen, through the attention that gates
    change.

    Args:
        modules: to train; on the device of the model.
        temperature: T of the soft masks.
        answer: [B, L] bool, tokens of the answer: they ask for nothing in the cross score, as inference has none.
        min_tokens: as in inference.

    Attributes:
        decisions: layer -> decision, in order.
        slots: layer -> what stood in front of its module.
    """

    def __init__(self, modules: ATPModules, temperature: float, answer: Tensor | None = None, min_tokens: int = 1):
        self.modules, self.temperature, self.answer, self.min_tokens = modules, temperature, answer, min_tokens
        self.decisions: dict[int, Decision] = {}
        self.slots: dict[int, Slots] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers in front of which a module stands."""
        return self.modules.spec.sites

    def bias(self, layer: int, layout: Layout, attention: LayerAttention, dtype: torch.dtype) -> Tensor:
        """[B, 1, L, L]: what to add to the logits of this layer and those behind it, until the next module."""
        slots, gate = Slots.of(layout, self.modules.spec.num_slots, self.answer), None
        if self.decisions:
            before = self.decisions[max(self.decisions)]
            slots, gate = slots._replace(alive=before.keep), before.gate
        with torch.no_grad():
            scores = self.modules.scores(attention, slots)
        made = self.modules(layer, *scores, slots, gate, self.temperature, at_least=self.min_tokens)
        self.decisions[layer], self.slots[layer] = made, slots
        assert made.gate is not None
        return gate_bias(made.gate, dtype)

    @property
    def counts(self) -> Tensor:
        """[B, M]: soft counts of visual tokens behind every module, differentiable."""
        gates = [(d.gate, self.slots[layer]) for layer, d in self.decisions.items()]
        return torch.stack([token_counts(gate, slots) for gate, slots in gates if gate is not None], -1)

    @property
    def hard_counts(self) -> Tensor:
        """[B, M]: visual tokens that would be left behind every module."""
        return torch.stack([token_counts(d.keep, self.slots[layer]) for layer, d in self.decisions.items()], -1)

    @property
    def total(self) -> Tensor:
        """[B]: visual tokens in front of the first module."""
        return self.slots[self.layers[0]].image.sum(-1)

    def hard_average(self, over: str = "layers") -> Tensor:
        """Scalar: what the average of the target loss would be with hard decisions."""
        spec, some = self.modules.spec, self.total > 0
        return average_tokens(self.hard_counts[some].float(), spec.sites, self.total[some], spec.depth, over).mean()

    def losses(self, **settings: float | bool | str) -> ATPLosses:
        """See `atp_loss`, whose keywords these are."""
        spec = self.modules.spec
        return atp_loss(self.counts, spec.sites, self.total, spec.depth, **settings)  # type: ignore[arg-type]
