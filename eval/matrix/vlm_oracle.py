"""The oracle of patched vision-language models: the unpatched model reads the whole prompt, and an explicit mask in every
decoder layer hides what the patched one dropped. Image features are those that the patched pass used.

Shapes: B rows, L columns of the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import vtok
from vtok.core.reduction import folded
from vtok.errors import StateError
from vtok.eval.matrix.encoder import Evidence
from vtok.patches.decoder.pass_state import Counts, Pruner
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm import tower_bridge as vlm_tower
from vtok.patches.hf_vlm.families import VLM, find
from vtok.patches.hf_vlm.install import pruner_of

TOLERANCE = 1e-5  # of the largest logit, in float32
NOTHING = "no token was taken away"
GONE = ("pixel_values", "pixel_values_videos")


def check_prompts(model: Any, values: dict[str, Tensor]) -> Evidence:
    """Runs a patched vision-language model on two prompts, unpatches it, and compares: do tokens of each go down, and does
    removing them equal masking them?

    Args:
        model: patched, with its language head.
        values: as a processor makes them, with pixels.
    """
    (vlm,) = find(model)
    pruner = pruner_of(vlm)
    assert pruner is not None
    with torch.no_grad():
        found = model(**values, use_cache=False).logits
        last = pruner.last
        info = vtok.info(model)
        tokens = _tokens(info, pruner, last)
        if last is None or not tokens or any(left >= entered for entered, left in tokens):
            return Evidence(tokens, fault=NOTHING)
        features, alive = _features(vlm, pruner, values), _alive(last, len(vlm.text.layers))
        vtok.unpatch(model)
        rest = {name: value for name, value in values.items() if name not in GONE}
        with Masked(vlm, alive, folds(last)):
            expected = model(**rest, mm_encoder_outputs=features, use_cache=False).logits
    stays = alive[len(vlm.text.layers) - 1] & last.real  # a dropped column has no output of its own
    difference = float((found - expected)[stays].abs().max() / expected[stays].abs().max())
    fault = None if difference <= TOLERANCE else f"masked replay differs by {difference:.1e}"
    return Evidence(tokens, {"masked": difference}, fault)


def _tokens(info: Any, pruner: Pruner, last: Counts | None) -> tuple[tuple[float, float], ...]:
    """(visual tokens that entered, that left) of every prompt; of the vision tower where prompts keep their length."""
    if not pruner.shortens:
        return tuple((float(t.blocks[0].tokens_in), float(t.blocks[-1].mean_tokens)) for t in info.towers if t.blocks)
    rows = info.prompts[0].rows
    if last is None or not rows:
        return ()
    return tuple((float(a), float(b)) for a, b in zip(rows[0].tokens_in, rows[-1].tokens_out))


def _features(vlm: VLM, pruner: Pruner, values: Mapping[str, Any]) -> dict[str, Any]:
    """The image features of the patched model, chosen ones with what was folded into them; zeros where the tower left none."""
    outputs = hf.encode(vlm.module, values)
    outputs = hf.choose(vlm.module, outputs, pruner.features, vlm.family, values, pruner.holed).outputs
    for output in outputs.values():
        whole = [x.masked_fill(vlm_tower.holes(x)[:, None], 0.0) for x in output.pooler_output]
        output.pooler_output = torch.stack(whole) if isinstance(output.pooler_output, Tensor) else whole
    return outputs


def _alive(last: Counts, depth: int) -> dict[int, Tensor]:
    """Decoder layer -> [B, L] bool: columns that enter its attention, padding included."""
    result, alive = {}, torch.ones_like(last.real)
    length = alive.shape[1]
    for layer in range(depth):
        stage = last.stages.get(layer)
        if stage is not None:
            there = torch.zeros(len(alive), length + 1, dtype=torch.bool)
            there.scatter_(1, stage.column.where(stage.column >= 0, length), True)
            alive = there[:, :length] | ~last.real
        result[layer] = alive
    return result


def folds(last: Counts) -> dict[int, Tensor]:
    """Decoder layer -> [B, L] int64: the column that each column was averaged into in front of it, -1 = none."""
    return {layer: stage.into for layer, stage in last.stages.items() if stage.into is not None}


class Masked:
    """Hides columns from the decoder layers of an unpatched model, for passes without a cache; what was folded is averaged.

    Args:
        vlm: the model.
        alive: decoder layer -> [B, L] bool.
        into: see `folds`.
    """

    def __init__(self, vlm: VLM, alive: Mapping[int, Tensor], into: Mapping[int, Tensor]):
        self.layers, self.alive, self.into = vlm.text.layers, alive, into

    def __enter__(self) -> None:
        hook = functools.partial
        self.handles = [
            layer.register_forward_pre_hook(hook(self._hide, i), with_kwargs=True) for i, layer in enumerate(self.layers)
        ]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _hide(self, i: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        if i in self.into:
            x = folded(x, self.into[i])
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        mask, length = kwargs.get("attention_mask"), x.shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask.shape[-2:] != (length, length):
            raise StateError(f"the mask of decoder layer {i} is {list(mask.shape)}, the sequence has {length} columns")
        mask = mask.expand(len(x), -1, -1, -1)
        hidden = ~(self.alive[i][:, None, None] | torch.eye(length, dtype=torch.bool))
        off = torch.finfo(x.dtype).min
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
            if layer.self_attn.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, off)
        else:
            mask = mask.masked_fill(hidden, off)
        return args, {**kwargs, "attention_mask": mask}
