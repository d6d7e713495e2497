"""ToDRE by loops from the paper's equations: what should stay in tiny vision-language models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vlm_zoo import EXAMPLES, MaskOracle, build, generate, text_model, tower_probs, visual

from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import find

Values = dict[str, Tensor]
KEEP = 0.3


def kernel_of(name: str) -> str:
    """The attention implementation that a family is tested with."""
    return EXAMPLES[name].kernels[-1]


def _first_token(name: str, x: Tensor, maps: Any, i: int, views: list[int]) -> int:
    """Class attention where the tower has a class token, among the thumbnail's tokens; else the token nearest to the mean."""
    if name.startswith("LLaVA-NeXT") or (name.startswith("LLaVA") and "One" not in name):
        return int(maps[sum(views[:i])].argmax())  # the first view of an image; its 16 tokens come first
    if name == "InternVL":  # 8 x 8 patches, of which 2 x 2 become a token
        patches = maps[i].view(8, 8)
        sums = [patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum() for r in range(4) for c in range(4)]
        return int(torch.stack(sums).argmax())
    mean = x.mean(0)
    return int(torch.stack([(row - mean).square().sum() for row in x]).argmin())


def diverse(x: Tensor, first: int, count: int) -> list[int]:
    """Algorithm 1, every step from scratch."""
    unit = x / x.norm(dim=1, keepdim=True)
    taken = [first]
    while len(taken) < count:
        sums = [math.inf if i in taken else float(sum(unit[i] @ unit[j] for j in taken)) for i in range(len(x))]
        taken.append(min(range(len(x)), key=sums.__getitem__))
    return taken


def alive_of(name: str, values: Values, keep: float = KEEP) -> Tensor:
    """[B, L] bool: what stage 1 leaves of every image."""
    model = build(name, kernel_of(name))
    (vlm,) = find(model)
    with torch.no_grad():
        outputs = hf.encode(vlm.module, values)
    probs = {} if vlm.info.tower is None or not vlm.info.tower.has_cls else tower_probs(name, values)
    stays = torch.ones_like(values["input_ids"], dtype=torch.bool)
    for modality, output in outputs.items():
        maps, views = None, []
        if modality in probs:
            maps = probs[modality][vlm.info.tower.feature_block][:, :, 0, 1:].mean(1)
            views = [len(maps) // len(output.pooler_output)] * len(output.pooler_output)
        rows = []
        for i, x in enumerate(output.pooler_output):
            row = torch.zeros(len(x), dtype=torch.bool)
            row[diverse(x, _first_token(name, x, maps, i, views), max(1, round(keep * len(x))))] = True
            rows.append(row)
        stays[values["input_ids"] == vlm.tokens[modality]] = torch.cat(rows)
    return stays


def ratios(name: str, values: Values, alive: Tensor, layer: int) -> list[list[float]]:
    """[B]: both ratios of eq. 8 in one layer of the whole prompt, from eager attention under the layer's own mask."""
    model, kept = build(name, "eager"), []
    seen, real = visual(model, values["input_ids"]), values["attention_mask"].bool()
    hook = text_model(model).layers[layer].self_attn.register_forward_hook(lambda m, a, out: kept.append(out[1]))
    with MaskOracle(model, dict.fromkeys(range(4), alive)):
        generate(model, values, steps=1)
    hook.remove()
    probs = kept[0].mean(1)  # [B, L, L]
    text = real & ~seen & (seen.cumsum(1) > 0)
    image = seen & alive & real
    found = []
    for b in range(len(probs)):
        sums = [probs[b][q][:, k].sum() / probs[b][q][:, alive[b] & real[b]].sum() for q, k in _pairs(text[b], image[b])]
        found.append([float(s) for s in sums])
    return found


def _pairs(text: Tensor, image: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (text, image), (image, text)


def row_of(name: str, values: Values, b: int) -> Values:
    """One prompt of a batch by itself, without padding."""
    real = values["attention_mask"][b].bool()
    one = {
        k: v[b : b + 1, real]
        for k, v in values.items()
        if k in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    if name == "Qwen2.5-VL":
        sizes = values["image_grid_thw"].prod(1)
        images, patches = ((0, 2), (0, int(sizes[:2].sum()))) if b == 0 else ((2, 3), (int(sizes[:2].sum()), None))
        one["image_grid_thw"] = values["image_grid_thw"][slice(*images)]
        one["pixel_values"] = values["pixel_values"][slice(*patches)]
        return one
    shared = len(values["pixel_values"]) == 2  # one entry a prompt
    images = slice(b, b + 1) if shared else (slice(0, 2) if b == 0 else slice(2, 3))
    for key in ("pixel_values", "image_sizes"):
        if key in values:
            one[key] = values[key][images]
    return one
