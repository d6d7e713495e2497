"""The learned part of ATP-LLaVA (Ye et al., CVPR 2025): a small network in front of some decoder layers that predicts the
thresholds of each sample. It lives outside the decoder, whose weights and state_dict it never touches, and is saved on its own.
See `vtok.methods.atp` for what is known of the paper and what is our interpretation.

Shapes: B samples, N tokens of the sequence, G visual tokens before any pruning (grid slots).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vtok.errors import ConfigError, MissingExtraError, UnknownNameError, shown
from vtok.methods.atp import scores as atp
from vtok.methods.atp.attention import Attention, attention_scores, debiased, full_precision, self_logits
from vtok.methods.atp.scores import Slots
from vtok.methods.atp.spec import ATPSpec
from vtok.writing import write

_HEADER, _FORMAT = "vtok.atp", 1


class Decision(NamedTuple):
    """What one module decided.

    Attributes:
        keep: [B, N] bool, True at the real tokens that stay (text always).
        gate: [B, N], soft mask of this and all earlier modules, 1 at text; `None` unless a temperature was given.
        theta_r, theta_s: [B], thresholds of the redundancy and the spatial score.
        redundant: [B, N], the redundancy score, 0 outside the visual tokens alive.
    """

    keep: Tensor
    gate: Tensor | None
    theta_r: Tensor
    theta_s: Tensor
    redundant: Tensor


class ThresholdHead(nn.Module):
    """Scores to thresholds: z = ReLU(W x + b) (Eq. 6), theta = sigmoid(w z + b) of the redundancy and of the spatial score
    (Eq. 7 and 8).

    The two last layers start at zero, so that untrained thresholds are 0.5 whatever the scores.
    """

    def __init__(self, num_inputs: int, hidden: int):
        super().__init__()
        self.fc = nn.Linear(num_inputs, hidden)
        self.redundant = nn.Linear(hidden, 1)
        self.spatial = nn.Linear(hidden, 1)
        for head in (self.redundant, self.spatial):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one prediction."""
        return self.fc.weight.numel() + self.redundant.weight.numel() + self.spatial.weight.numel()

    def features(self, x: Tensor) -> Tensor:
        """z: [B, num_inputs] -> [B, hidden]."""
        return self.fc(x).relu()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, num_inputs] -> (theta_r [B], theta_s [B])."""
        z = self.features(x)
        return self.redundant(z).squeeze(-1).sigmoid(), self.spatial(z).squeeze(-1).sigmoid()


class ATPModules(nn.Module):
    """One `ThresholdHead` for each of `spec.layers`."""

    def __init__(self, spec: ATPSpec):
        super().__init__()
        self.spec = spec
        self.heads = nn.ModuleDict({str(layer): ThresholdHead(spec.num_inputs, spec.hidden) for layer in spec.sites})

    def head(self, layer: int) -> ThresholdHead:
        """The head in front of a decoder layer."""
        if layer not in self.spec.sites:
            raise ConfigError(f"these ATP modules stand in front of the decoder layers {self.spec.sites}, not {layer}")
        head = self.heads[str(layer)]
        assert isinstance(head, ThresholdHead)
        return head

    def scores(self, attention: Attention, slots: Slots, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Raw S_self and S_cross [B, N] from the attention of the layer before; see `attention_scores`."""
        self_score, cross = attention_scores(attention, slots, rows)
        if self.spec.self_score == "debiased":
            self_score = debiased(self_score, slots)
        elif self.spec.self_score == "logits":
            every = torch.arange(cross.shape[1], device=cross.device).expand(cross.shape)
            self_score = self_logits(attention.q(every), attention.k, slots, attention.scale)
        return self_score, cross

    def thresholds(self, layer: int, self_score: Tensor, cross: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """(theta_r [B], theta_s [B]) from scores [B, N] that are scaled already."""
        head = self.head(layer)
        if self.spec.inputs == "grid":
            x = torch.cat([atp.to_grid(s, slots, self.spec.num_slots) for s in (self_score, cross)], -1)
        else:
            count = slots.visual.sum(-1).clamp_min(1)
            x = torch.stack([(s * slots.visual).sum(-1) / count for s in (self_score, cross)], -1)
        with full_precision(x.device):
            theta_r, theta_s = head(x.to(head.fc.weight.dtype))
        return theta_r.to(self_score.dtype), theta_s.to(self_score.dtype)

    def forward(
        self,
        layer: int,
        self_score: Tensor,
        cross: Tensor,
        slots: Slots,
        gate: Tensor | None = None,
        temperature: float | None = None,
        grid: tuple[int, int] | None = None,
        at_least: int = 0,
    ) -> Decision:
        """Decides in front of a decoder layer.

        For inference leave out `gate` and `temperature` and remove what is not kept. For training give a temperature, add
        `gate_bias(decision.gate)` to the logits of this and all later layers, and hand the next module
        `slots._replace(alive=decision.keep)` and the gate.

        Args:
            layer: 0-based.
            self_score, cross: [B, N] raw, in at least fp32, from `scores`.
            slots: what the columns hold.
            gate: [B, N], of earlier modules.
            temperature: T of the soft masks (10 and 100 in the reproductions); `None` = hard decisions alone.
            grid: rows and columns if they differ from the spec's (`inputs="means"` only).
            at_least: visual tokens that stay whatever the thresholds are: those of the highest redundancy score, the first of
                equal ones.
        """
        visual = slots.visual
        if self.spec.minmax:
            self_score, cross = atp.min_max(self_score, visual), atp.min_max(cross, visual)
        redundant = atp.redundancy(self_score, cross)
        theta_r, theta_s = self.thresholds(layer, self_score, cross, slots)
        spatial = self.spatial(slots, redundant, grid)
        passed = atp.hard_mask(redundant, spatial, theta_r, theta_s)
        if at_least:
            passed = passed | _highest(redundant, visual, passed & visual, at_least)
        keep = slots.real & (~slots.image | (visual & passed))
        if temperature is not None:
            soft = atp.soft_masks(redundant, spatial, theta_r, theta_s, temperature)[2]
            gate = atp.next_gate(soft, slots, gate)
        return Decision(keep, gate, theta_r, theta_s, redundant)

    def spatial(self, slots: Slots, like: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Spatial scores [B, N] of the columns; what stands outside the visual tokens has no meaning."""
        spec = self.spec
        spec.check(grid=grid)
        scores = atp.spatial_scores(
            grid or spec.grid, spec.strides, spec.lambda_sample, spec.unsampled, dtype=like.dtype, device=like.device
        )
        return scores[slots.slot.clamp_min(0)]

    def save(self, path: str | os.PathLike) -> None:
        """Writes parameters and spec to one safetensors file.

        Raises:
            MissingExtraError: safetensors is not installed.
            ConfigError: the folder does not exist, or the file cannot be written there.
        """
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise MissingExtraError("safetensors", "transformers") from error
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {Path(path).parent} does not exist")
        header = json.dumps({"format": _FORMAT, **self.spec.to_dict()})
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        write(path, save(tensors, metadata={_HEADER: header}))


def _highest(score: Tensor, among: Tensor, passed: Tensor, at_least: int) -> Tensor:
    """[B, N] bool: the tokens of the highest score, in samples where fewer than `at_least` passed."""
    best = score.masked_fill(~among, float("-inf")).argsort(dim=-1, descending=True, stable=True)[:, :at_least]
    return torch.zeros_like(among).scatter(1, best, True) & (passed.sum(-1, keepdim=True) < at_least)


def load(
    path: str | os.PathLike,
    depth: int | None = None,
    width: int | None = None,
    grid: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> ATPModules:
    """Reads modules that `ATPModules.save` wrote, in eval mode and the dtype they were saved in.

    Args:
        path: of the file.
        depth, width, grid: of the model that is to use them, see `ATPSpec.check`; `None` = not asked.
        device: where to put them.

    Raises:
        MissingExtraError: safetensors is not installed.
        ConfigError: the file is missing, is something else, is damaged, or was made for another model.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "transformers") from error
    if not Path(path).is_file():
        raise ConfigError(f"{path} does not exist; ATP modules are trained for a model and written by ATPModules.save")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from error
    try:
        spec = _read_header(header)
        spec.check(depth, width, grid)
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{path}: {error}") from error
    with torch.device("meta"):  # every parameter comes from the file
        modules = ATPModules(spec)
    try:
        modules.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path}: the parameters do not fit the header: {error}") from error
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise ConfigError(
            f"{path}: {len(broken)} of {len(tensors)} parameters hold NaN or infinity ({broken[0]}), as after a training run "
            "that diverged; train the modules again"
        )
    return modules.to(device).eval()


def _read_header(header: str | None) -> ATPSpec:
    if header is None:
        raise ConfigError("holds no ATP modules (its header does not describe any); pass a file written by ATPModules.save")
    try:
        values = json.loads(header)
    except json.JSONDecodeError as error:
        raise ConfigError(f"damaged header: {error}") from error
    found = values.pop("format", None) if isinstance(values, dict) else type(values).__name__
    if found != _FORMAT:
        raise ConfigError(f"expected ATP modules of format {_FORMAT}, found {shown(found)}; another version of vtok wrote them")
    return ATPSpec.from_dict(values)
