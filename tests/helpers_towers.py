"""Methods inside the vision towers of tiny vision-language models, and their oracle: the tower patched by itself (the encoder
adapter, which has tests of its own), the connector run by hand, and an explicit mask over the whole prompt of the unpatched
model that hides the patches that no token stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vlm_zoo import MaskOracle, build, generate, visual

import vtok
from vtok.config import MethodConfig
from vtok.patches.hf_vlm.families import find
from vtok.targets.resolve import run_of

Values = dict[str, Tensor]
TOKENWISE = ["LLaVA-1.5", "PaliGemma"]
METHODS = {
    "tome": vtok.ToMe(r=3),
    "pitome": vtok.PiToMe(ratio=0.75),
    "official_llava": vtok.PiToMe(preset="official_llava", ratio=0.8),
    "uniform": vtok.UniformGrid(keep=0.8, layers=[0, 1]),
    "ats": vtok.ATS(keep=0.6, layers=[0, 1], query="mean"),
    "zero_tprune": vtok.ZeroTPrune(layers=[0, 1], retain=0.7, cls_init="uniform"),
}


def deep(name: str, layer: Any = -1, strategy: str | None = None, seed: int = 3) -> Any:
    """An example whose tower has four blocks; features from `layer`."""
    model = build(name)
    tower = model.model.vision_tower
    torch.manual_seed(seed)
    blocks = tower.encoder.layers
    for _ in range(2):
        block = copy.deepcopy(blocks[0])
        for p in block.parameters():
            p.data += 0.1 * torch.randn_like(p)
        blocks.append(block)
    tower.config.num_hidden_layers = model.config.vision_config.num_hidden_layers = 4
    if name != "PaliGemma":
        model.config.vision_feature_layer = layer
        model.config.vision_feature_select_strategy = strategy or "default"
    return model.eval()


def tower_of(model: Any) -> Any:
    """The vision tower of a model."""
    (vlm,) = find(model)
    return vlm.tower.module


def left_by(model: Any, values: Values, method: MethodConfig) -> tuple[Tensor, Tensor]:
    """(features [I, n, D] with zeros where no token is, alive [I, n] bool), by the tower patched alone."""
    tower, config = tower_of(model), model.config
    skip = int(getattr(config, "vision_feature_select_strategy", None) == "default")
    vtok.patch(tower, method)
    with torch.no_grad():
        out = tower(values["pixel_values"], output_hidden_states=True)
        layer = getattr(config, "vision_feature_layer", None)
        x = out.last_hidden_state if layer is None else out.hidden_states[layer]
        x = model.model.multi_modal_projector(x[:, skip:])
    states = run_of(tower).current.states
    state = states[-1 if layer is None else layer]
    n = state.length - skip
    features, alive = torch.zeros(len(x), n, x.shape[2]), torch.zeros(len(x), n, dtype=torch.bool)
    for image in range(len(x)):
        for row in range(x.shape[1]):
            if state.keep is None or state.keep[image, row + skip]:
                patch = row if state.index is None else int(state.index[image, row + skip]) - skip
                assert not alive[image, patch], "two tokens at one patch"
                features[image, patch], alive[image, patch] = x[image, row], True
    vtok.unpatch(tower)
    return features, alive


def encoded(model: Any, values: Values, features: Tensor) -> dict[str, Any]:
    """What generate() takes in place of pixels."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    images = features if hasattr(model.config, "projection_dim") else list(features)
    rest = {k: v for k, v in values.items() if k != "pixel_values"}
    return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}}


def columns(model: Any, values: Values, alive: Tensor) -> Tensor:
    """[B, L] bool: columns of the prompt that stay. alive [I, n] bool."""
    keep = torch.ones_like(values["input_ids"], dtype=torch.bool)
    keep[visual(model, values["input_ids"])] = alive.flatten()
    return keep


def oracle(model: Any, values: Values, features: Tensor, alive: Any, call: Callable[..., Any] = generate) -> Any:
    """What the whole prompt gives under a mask. alive: [I, n] for all layers, or a mapping: decoder layer -> [B, L]."""
    layers = alive if isinstance(alive, dict) else dict.fromkeys(range(4), columns(model, values, alive))
    with MaskOracle(model, layers):
        return call(model, encoded(model, values, features))


def note_input(entered: list[Tensor], module: Any, args: Any) -> None:
    """Pre-forward hook that keeps what enters a module."""
    entered.append(args[0].clone())
