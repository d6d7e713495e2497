"""Prompts with one image for tiny vision-language models, modules for them, and what ATP keeps there, found out slowly."""

from __future__ import annotations

from typing import Any

import helpers_atp
import torch
from torch import Tensor
from vlm_zoo import MaskOracle, visual

from vtok.methods.atp import min_max, spatial_scores
from vtok.methods.atp.modules import ATPModules
from vtok.patches.hf_vlm.examples import IMAGE, PAD
from vtok.patches.hf_vlm.families import find

GRID = (4, 4)
LAYERS = (1, 2, 3)


def modules(seed: int = 0, **spec: Any) -> ATPModules:
    """For the models of four layers, whose decisions differ between prompts and layers."""
    given = {"depth": 4, "width": 64, "grid": GRID, "layers": LAYERS, "strides": (2, 4), **spec}
    return helpers_atp.modules(seed, torch.float32, **given).eval()


def saved(folder: Any, seed: int = 0, **spec: Any) -> str:
    """The path of a file that holds them."""
    path = folder / "atp.safetensors"
    modules(seed, **spec).save(path)
    return str(path)


def prompts(batch: int = 2, seed: int = 0, images: tuple[int, ...] | None = None, size: int = 16) -> dict[str, Tensor]:
    """Prompts of different length, padded on the left; `images`: how many each has (default: one)."""
    generator = torch.Generator().manual_seed(seed)
    images = (1,) * batch if images is None else images
    rows = []
    for number, count in enumerate(images):
        words = torch.randint(3, 110, (9 + 2 * (len(images) - number),), generator=generator).tolist()
        rows.append([1, *words[:2], *([IMAGE] * 16 * count), *words[2:]])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(sum(images), 3, size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def decided(model: Any, values: dict[str, Tensor], made: ATPModules) -> dict[int, Tensor]:
    """Decoder layer -> [B, L] bool: what is alive in it. Layer by layer, each time the whole prompt under an explicit mask,
    scores from the attention that eager kernels return, one prompt at a time.

    Args:
        model: unpatched, with eager attention.
        values: prompts with one image each.
        made: modules that compare min-max scaled probabilities and read grids.
    """
    (vlm,) = find(model)
    seen, real = visual(model, values["input_ids"]), values["attention_mask"] == 1
    alive = {i: torch.ones_like(seen) for i in range(vlm.info.depth)}
    for layer in made.spec.sites:
        with torch.no_grad(), MaskOracle(model, alive):
            attention = model(**values, output_attentions=True).attentions[layer - 1]
        for row in range(len(seen)):
            here = (seen[row] & alive[layer - 1][row]).nonzero()[:, 0]
            first = int(seen[row].nonzero()[0])
            text = [c for c in range(int(seen[row].nonzero()[-1]) + 1, seen.shape[1]) if real[row, c]]
            mean = attention[row].mean(0)  # [L, L]
            grids = []
            for asking in (here, torch.tensor(text)):
                score = mean[asking][:, here].mean(0)
                scaled = min_max(score[None], torch.ones(1, len(here), dtype=torch.bool))[0]
                grids.append(torch.zeros(16).scatter(0, here - first, scaled))
            theta_r, theta_s = (float(t.detach()) for t in made.head(layer)(torch.cat(grids)[None]))
            spatial = spatial_scores(GRID, made.spec.strides)
            kept = [c for c in here.tolist() if sum(g[c - first] for g in grids) / 2 > theta_r or spatial[c - first] > theta_s]
            for later in range(layer, vlm.info.depth):
                alive[later][row] = ~seen[row]
                alive[later][row, kept] = True
    return alive
