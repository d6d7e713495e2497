"""What is true of models without a row, worked out by hand: the unpatched LLM fed with the columns that stay."""

import copy

import pytest
import torch

import vtok
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find
from vtok.testing.generic_models import listed
from vtok.testing.trials import trial

LISTED = listed()
FAST = ("aya_vision", "mistral3", "glm4v", "qwen3_5", "qwen3_vl_moe", "exaone4_5")  # sliding, plain, M-RoPE, hybrid, DeepStack
KEEP = 0.5
SLOW = pytest.mark.slow
# Columns hidden in every layer are not what columns are that never entered:
BY_HAND = {
    **dict.fromkeys(
        ("glm5_next", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        "a recurrent state reads all columns",
    ),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), "convolutions run over neighbouring columns"),
    **dict.fromkeys(("inkling2", "inkling2_loop"), "convolutions, and distances counted in stored tokens"),
    "llama4": "chunks of attention begin every so many stored tokens",
    **dict.fromkeys(("dots3_note", "minimax_m3_vl"), "sparse attention chooses among stored tokens"),
}
HYBRIDS = (
    "lfm2_vl",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "qwen3_5",
    "qwen3_5_moe",
)
NUMBERED_ANEW = ("llama4", "minimax_m3_vl")  # attention within chunks, or to blocks that are found by positions
OWN_CACHE = ("dots3_note", "nemotron_h_omni")  # with a cache the unpatched models themselves say something else than without
CACHED_ALONE = ("ernie4_5_vl_moe",)  # generate(use_cache=False) of the unpatched model fails
OWN_NUMBERS = ("exaone4_5", "hyperclovax_vision_v2")  # generate() passes them no positions
FEW_TOKENS = ("gemma4",)  # two of an image at most
ON_FRAMES = ("evs", "fastvid", "vidcom2")
NEEDS_MORE = ("dart", "sparsevlm")  # visual tokens than these prompts have


def each(names, fast=()):
    """Parameters, all but the fast ones marked as slow; classes that this release lacks are left out."""
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in names if name in LISTED]


def chosen(model, values, method):
    """([B, L] bool: what a method leaves, by asking it about the images that the unpatched model encodes; their features)."""
    (vlm,) = find(model)
    reducer = vtok.METHODS.get(method)(keep=KEEP).build_vlm(vlm.info)
    with torch.no_grad():
        found = hf.choose(vlm.module, hf.encode(vlm.module, values), reducer, vlm.family, values)
    keep = hf.kept_columns(values["input_ids"], vlm.tokens, found.rows)
    assert keep is not None and not keep.all()
    return keep & (values["attention_mask"] == 1), found.outputs


def _row(given, b, at, compact):
    """Keywords of an LLM for the columns `at` of one row of what it was given, without a cache."""
    x, mask, position = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
    call = {**given, "use_cache": False, "cache": None, "attention_mask": torch.ones(1, len(at), dtype=torch.long)}
    if isinstance(mask, dict):
        call["attention_mask"] = {kind: m if m is None else m[b : b + 1, :, at][..., at] for kind, m in mask.items()}
    elif mask is not None and mask.ndim == 4:
        call["attention_mask"] = mask[b : b + 1, :, at][..., at]
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and name != "attention_mask" and value.shape[:2] == x.shape[:2]:
            call[name] = value[b : b + 1, at]
    position = torch.arange(x.shape[1])[None] if position is None else position
    position = position.expand(*position.shape[:-2], len(x), -1)[..., b : b + 1, at]
    call["position_ids"] = torch.arange(len(at))[None] if compact else position
    for planes, places in (("deepstack_visual_embeds", "visual_pos_masks"), ("deepstack_features", "vision_mask")):
        deep = given.get(planes)
        if deep is not None:
            here = torch.zeros(x.shape[:2], dtype=torch.bool)
            here[b, at] = True
            left = here[given[places].reshape(here.shape)]
            call[planes] = {k: d[left] for k, d in deep.items()} if isinstance(deep, dict) else [d[left] for d in deep]
    return call


def by_hand(model, values, keep, features, compact=False):
    """Logits [B, V] of the last column: the unpatched model, whose LLM is fed, row by row, with the columns that stay of what
    it would be given. Everything but the cache goes along, positions as they were, or counted anew."""
    (vlm,) = find(model)
    rest = {name: value for name, value in values.items() if not name.startswith("pixel_values")}
    rows = []
    for b, stays in enumerate(keep):
        at = stays.nonzero()[:, 0]
        handle = vlm.text.register_forward_pre_hook(
            lambda m, args, kwargs, b=b, at=at: (args, _row(kwargs, b, at, compact)), with_kwargs=True
        )
        with torch.no_grad():
            rows.append(model(**rest, mm_encoder_outputs=copy.copy(features), use_cache=False).logits[0, -1])
        handle.remove()
    return torch.stack(rows)


def by_hand_between(model, values, layer, keep, into=None):
    """Logits [B, V] of the last column: the unpatched model, row by row and without padding, whose layers from `layer` on are
    handed the columns that stay [B, L] of what reaches them, without a cache. `into` [B, L]: the column that each one is
    averaged into first, itself included, -1 = none."""
    (vlm,) = find(model)
    rows = []
    for b in range(len(keep)):
        at = values["attention_mask"][b].nonzero()[:, 0]
        left = keep[b, at].nonzero()[:, 0]
        target = None if into is None else torch.cat([into[b], torch.full((len(keep[b]) - len(into[b]),), -1)])[at]

        def narrow(module, args, kwargs, at=at, left=left, target=target, first=vlm.text.layers[layer]):
            (x, *more), call = args, {**kwargs, "attention_mask": None}
            if module is first and target is not None:
                alike = target == at[:, None]  # [columns, columns that go into each]
                mean = (alike.to(x.dtype) @ x[0]) / alike.sum(1, keepdim=True).clamp_min(1)
                x = torch.where(alike.any(1, keepdim=True), mean, x[0])[None]
            for name in ("position_embeddings", "position_ids"):
                value = call.get(name)
                call[name] = tuple(t[..., left, :] for t in value) if isinstance(value, tuple) else value
            return ((x[:, left] if module is first else x, *more), {**call, "position_ids": None})

        handles = [block.register_forward_pre_hook(narrow, with_kwargs=True) for block in vlm.text.layers[layer:]]
        handles.append(
            vlm.text.register_forward_pre_hook(
                lambda m, args, kwargs, b=b, at=at: (args, _row(kwargs, b, at, False)), with_kwargs=True
            )
        )
        with torch.no_grad():
            rows.append(model(**{name: copy.copy(value) for name, value in values.items()}, use_cache=False).logits[0, -1])
        for handle in handles:
            handle.remove()
    return torch.stack(rows)


def longer(values, ids):
    """Inputs with text behind them: [B, T] ids."""
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more |= {name: torch.zeros_like(ids).to(x.dtype) for name, x in values.items() if "type_ids" in name}
    return {name: torch.cat([x, more[name]], 1) if name in more else copy.copy(x) for name, x in values.items()}


def generate(model, values, **kwargs):
    values = {key: copy.copy(value) for key, value in values.items()}
    out = model.generate(
        **values, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return torch.stack(out.logits, 1)


def patched(model, method):
    """With parameters that leave a tiny prompt something, at layers that the model allows."""
    (vlm,) = find(model)
    refused = None
    for extra in ({}, *vtok.METHODS.get(method).alternatives(vlm.info)):
        try:
            return vtok.patch(model, method, **{**trial(method).prompt, **extra})
        except vtok.UnsupportedModelError as error:
            refused = refused or error
    raise refused


def close(found, expected, times=1):
    error, scale = (found - expected).abs().max(), max(1.0, expected.abs().max())
    assert error <= times * 1e-5 * scale, (error, scale)
