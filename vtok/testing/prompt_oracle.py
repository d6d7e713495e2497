"""The oracle of patched vision-language models: the unpatched model reads the whole prompt, and an explicit mask in every
decoder layer hides what the patched one dropped. Image features are those that the patched pass used.

Shapes: B rows, L columns of the prompt.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import vtok
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.kv_cache import cache_in
from vtok.patches.decoder.masks import stored_in
from vtok.patches.decoder.pass_state import Counts, Pruner
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.examples import VLMExample
from vtok.patches.hf_vlm.families import VLM, find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.patches.hf_vlm.tower import bridge as vlm_tower
from vtok.testing.encoder_oracle import Evidence
from vtok.testing.tiny import vlm_prompts

TOLERANCE = 1e-5  # of the largest logit, in float32
NOTHING = "no token was taken away"
GONE = ("pixel_values", "pixel_values_videos")


def check_prompts(model: Any, values: dict[str, Tensor], steps: int = 0) -> Evidence:
    """Runs a patched vision-language model on two prompts, unpatches it, and compares: do tokens of each go down, and does
    removing them equal masking them?

    Args:
        model: patched, with its language head; unpatched afterwards if tokens went down.
        values: as a processor makes them, with pixels.
        steps: greedy steps of generate(), with a cache, that are compared as well.
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
        answer = greedy(model, values, steps) if steps else None
        vtok.unpatch(model)
        rest = {name: value for name, value in values.items() if name not in GONE}
        with MaskedPrompt(model, alive, folds(last)):
            expected = model(**rest, mm_encoder_outputs=features, use_cache=False).logits
            wanted = greedy(model, {**rest, "mm_encoder_outputs": features}, steps) if steps else None
    stays = alive[len(vlm.text.layers) - 1] & last.real  # a dropped column has no output of its own
    differences = {"masked": _distance(found[stays], expected[stays])}
    if answer is not None and wanted is not None:
        differences["generated"] = _distance(answer[1], wanted[1])
    wrong = [f"{name} replay differs by {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE]
    if answer is not None and wanted is not None and not torch.equal(answer[0], wanted[0]):
        wrong.append("other words are generated than by the masked replay")
    return Evidence(tokens, differences, "; ".join(wrong) or None)


def check_any_prompts(model: Any, example: VLMExample, steps: int = 0) -> Evidence:
    """What `check_prompts` finds on the first kind of prompts that a patched method takes, and on which it acts.

    Args:
        model: patched, made from `example`.
        example: has the prompts.
        steps: see `check_prompts`.

    Raises:
        UnsupportedModelError: the method takes none of them.
    """
    found, refusal = None, None
    for kind, values in vlm_prompts(example, model):
        try:
            found = check_prompts(model, values, steps)._replace(prompts=kind)
        except UnsupportedModelError as error:
            refusal = refusal or error
            continue
        if found.fault != NOTHING:
            break
    if found is None and refusal is not None:
        raise refusal
    assert found is not None
    return found


def greedy(model: Any, values: Mapping[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """(new tokens [B, steps], their logits [B, steps, V]) of generate()."""
    out = model.generate(
        **{name: copy.copy(value) for name, value in values.items()},
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, values["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


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
    outputs = hf.choose(vlm.module, outputs, pruner.features, vlm.family, values, pruner.has_dropped_tokens).outputs
    for output in outputs.values() if pruner.has_dropped_tokens else ():
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


class MaskedPrompt:
    """The unpatched model on the whole prompt, with an explicit 4-D mask in every layer that hides dropped columns; with or
    without a cache, for any number of beams.

    Args:
        model: not patched.
        alive: decoder layer -> [B, L] bool.
        into: decoder layer -> [B, L] int64, column that each column of the prompt is averaged into in front of it, -1 = none.
    """

    def __init__(self, model: Any, alive: dict[int, Tensor], into: dict[int, Tensor] | None = None):
        self.into = into or {}
        self.model, self.alive, self.handles = model, alive, list[Any]()
        self.text = find(model)[0].text
        self.layers, self.shape = self.text.layers, (0, 0)

    def __enter__(self) -> MaskedPrompt:
        self.handles = [self.text.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self.handles += [
            layer.register_forward_pre_hook(functools.partial(self._hook, i), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        self.shape = (x.shape[0], x.shape[1])

    def _hook(self, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, mask, cache = args[0], kwargs.get("attention_mask"), cache_in(kwargs)
        alive = self.alive[i]
        if i in self.into and x.shape[1] == self.into[i].shape[1]:  # the prompt is read
            x = _averaged(x, self.into[i].repeat_interleave(len(x) // len(self.into[i]), 0))
            args = (x, *args[1:])
        batch = self.shape[0]
        if len(alive) != batch:
            alive = alive.repeat_interleave(batch // len(alive), 0)
        several = x.ndim == 4 and x.shape[1:3] == self.shape  # hidden states, of Gemma 3n
        queries, stored = x.shape[2 if several else 1], stored_in(module, i)
        past = 0 if cache is None else int(cache.get_seq_length(stored))
        if stored != i and cache is not None:  # of another layer, which holds this pass already, and may hold more of it
            past -= queries
        keys = past + queries if mask is None else mask.shape[-1]
        held = past + queries if cache is None or stored != i else cache.get_mask_sizes(queries, i)[0]
        assert mask is None or keys == held or stored != i
        first = past + queries - keys if cache is not None and cache.is_sliding[stored] and keys < past + queries else 0
        column = torch.arange(first, first + keys)
        alive = torch.cat([alive, alive.new_ones(batch, max(first + keys - alive.shape[1], 0))], 1)[:, column]
        asks = torch.arange(past, past + queries)
        causal = column <= asks[:, None]
        if mask is None:
            mask = causal[None, None].expand(batch, 1, -1, -1)
        hidden = ~(alive[:, None, None] | (column == asks[:, None]))
        mask = mask.expand(batch, -1, -1, -1)
        off = torch.finfo(x.dtype).min
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
            if module.self_attn.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, off)
        else:
            mask = mask.masked_fill(hidden, off)
        return args, {**kwargs, "attention_mask": mask}


def _averaged(x: Tensor, into: Tensor) -> Tensor:
    """Every column that others are folded into becomes their mean, one by one."""
    out = x.clone()
    for b, row in enumerate(into.tolist()):
        for target in set(row) - {-1}:
            out[b, target] = x[b, [i for i, t in enumerate(row) if t == target]].mean(0)
    return out
