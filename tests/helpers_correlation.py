"""Correlation-guided compression by the definition on pages cut into crops: loops over views and tokens, fed by what the
unpatched tower itself computes with eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vlm_zoo import build

import vtok
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import examples, find
from vtok.patches.hf_vlm.tower.taps import TowerTaps

CROPPING = [name for name, example in examples().items() if example.pages is not None]
BETA = 2
ALPHA = {**dict.fromkeys(CROPPING, 0.6), "InternVL": 0.42}  # patches of that tower are less alike


def cropping(name: str, kernel: str = "sdpa") -> Any:
    """A tiny model that cuts pages into up to four crops."""
    model = build(name, kernel)
    if name.startswith("LLaVA"):
        for config in (model.config, model.model.config):
            config.image_grid_pinpoints = [[16, 32], [32, 16], [32, 32]]
    return model


def pages(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts, the second padded on the left: a page of two crops, one without (not LLaVA), one of four."""
    make = examples()[name].pages
    assert make is not None
    return make(cropping(name), torch.Generator().manual_seed(seed))


def setting_of(name: str) -> dict[str, Any]:
    """Parameters under which `expected` says what stays."""
    return {"alpha": ALPHA.get(name, 0.6), "beta": BETA, "sampling": "topk"}


def chosen(
    name: str, values: dict[str, Tensor], model: Any = None, **setting: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(rows that stay, features, features before) of every image, as the patched model's hooks get them."""
    model = cropping(name) if model is None else model
    (vlm,) = find(model)
    reducer = vtok.Correlation(**{**setting_of(name), **setting}).build_vlm(vlm.info)
    taps = TowerTaps(reducer.tower_blocks)
    with torch.no_grad(), taps.on(vlm.tower):
        outputs = hf.encode(vlm.module, values, taps)
        whole = list(outputs["image"].pooler_output)
        found = hf.choose(vlm.module, outputs, reducer, vlm.family, values)
    lengths = [len(x) for x in whole]
    return list(found.rows["image"].split(lengths)), list(found.outputs["image"].pooler_output), whole


def columns(values: dict[str, Tensor], stays: list[Tensor]) -> Tensor:
    """[B, L] bool: columns of the prompt that stay, by the rows [n] bool that stay of every image."""
    alive = torch.ones_like(values["input_ids"], dtype=torch.bool)
    alive[values["input_ids"] == 119] = torch.cat(stays)
    return alive


def whole_pages(name: str) -> list[list[tuple[int, bool]]]:
    """Views of every image of `pages`, as the model parts features: (number within the page, whether it shows all of it)."""
    page = lambda crops, last: [(i, i == (crops if last else 0)) for i in range(crops + 1)]  # noqa: E731
    if name.startswith("LLaVA"):
        return [page(2, False), page(4, False)]
    if name == "InternVL":
        return [[view] for crops in (2, 0, 4) for view in page(crops, True)]
    return [page(2, True) + page(0, True), page(4, True)]


class Tower:
    """What the unpatched tower computes of all views [V, ...], in double precision.

    Attributes:
        low, deep: [V, H, N, N] attention probabilities.
        keys: [V, n, C] at the low block.
        prefix: tokens in front of the patches.
        valid: [V, n] bool, patches that are no padding.
        features: of every image.
    """

    def __init__(self, name: str, values: dict[str, Tensor], low: int = 0, deep: int = 1):
        model = cropping(name, "eager")
        (vlm,) = find(model)
        caught: dict[str, Tensor] = {}
        for number, what in ((low, "low"), (deep, "deep")):
            attention = vlm.tower.blocks[number].attention
            attention.register_forward_hook(lambda m, a, out, what=what: caught.__setitem__(what, out[1].double()))
        projection = vlm.tower.blocks[low].attention.k_proj
        projection.register_forward_hook(lambda m, a, out: caught.__setitem__("keys", out.double()))
        with torch.no_grad():
            output = hf.encode(vlm.module, values)["image"]
        self.model, self.prefix = model.model, vlm.tower.num_prefix
        self.has_cls, self.features = vlm.tower.has_cls, list(output.pooler_output)
        self.low, self.deep, self.keys = caught["low"], caught["deep"], caught["keys"][:, self.prefix :]
        self.valid = torch.ones(self.keys.shape[:2], dtype=torch.bool)
        mask = values.get("pixel_attention_mask")
        if mask is not None:
            real = (values["pixel_values"] != 0).any(-1).any(-1).any(-1)
            cells = mask[real].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).any(-1)
            self.valid = cells.flatten(1)

    def received(self, probs: Tensor, view: int) -> np.ndarray:
        """[n]: attention that patches get from the class token, or from everywhere."""
        if self.has_cls:
            return probs[view, :, 0, self.prefix :].mean(0).numpy()
        asks = self.valid[view]
        return probs[view][:, asks].mean(1).mean(0).numpy()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def choose_view(
    keys: Tensor, low: np.ndarray, deep: np.ndarray, members: list[list[int]], alpha: float, beta: float
) -> tuple[list[int], dict[int, int], list[float]]:
    """One view: (tokens that stay, dropped token -> the one it joins, weights of all tokens).

    Args:
        keys: [n, C] of all patches.
        low, deep: [n].
        members: patches of every token, padding left out; a token without any is none.
        alpha, beta: thresholds; `topk` sampling.
    """
    real = sorted(i for patches in members for i in patches)
    limit = round(beta * len(real)) if 0 < beta < 1 else beta
    redundant = {i: sum(_cosine(keys[i], keys[j]) > alpha for j in real if j != i) > limit for i in real}
    q1, q3 = np.percentile(deep[real], [25, 75])
    outlier = {i: deep[i] > q3 + 1.5 * (q3 - q1) for i in real}
    weight = [float(sum(low[i] for i in patches)) for patches in members]
    tokens = [t for t, patches in enumerate(members) if patches]
    if not tokens:
        return [], {}, weight
    count = sum(not all(redundant[i] for i in members[t]) for t in tokens)
    ranked = sorted(tokens, key=lambda t: -weight[t])
    stay = {*ranked[:count], *(t for t in tokens if any(outlier[i] for i in members[t]))} or {ranked[0]}
    metric = {t: sum(keys[i] / keys[i].norm() for i in members[t]) for t in tokens}
    joins = {t: max(sorted(stay), key=lambda s: _cosine(metric[t], metric[s])) for t in tokens if t not in stay}
    return sorted(stay), joins, weight


def members_of(
    name: str, tower: Tower, image: int, view: int, number: int, values: dict[str, Tensor]
) -> tuple[list[list[int]], list[int]]:
    """(patches of every token of a view, feature row of every token), by the model's own connector on numbered patches."""
    if name.startswith("LLaVA"):
        views, n = len(whole_pages(name)[image]), tower.keys.shape[1]
        ids = torch.arange(views * n).view(1, views, n, 1).float()
        options = {"vision_feature_select_strategy": "default"} if name == "LLaVA-NeXT" else {}
        newline = torch.full((1,), -1.0)
        packed, _ = tower.model.pack_image_features(
            list(ids), values["image_sizes"][image : image + 1], image_newline=newline, **options
        )
        rows = [(row, int(i) % n) for row, i in enumerate(packed[0][:, 0].tolist()) if i >= 0 and int(i) // n == number]
        return [[patch] for _, patch in rows], [row for row, _ in rows]
    side = round(tower.keys.shape[1] ** 0.5)
    ids = torch.arange(1, side * side + 1).view(1, side, side, 1).float()
    if name == "InternVL":
        merged = tower.model.pixel_shuffle(ids, scale_factor=0.5).flatten(1, 2)[0]
    else:
        merged = tower.model.connector.pixel_shuffle(ids.flatten(1, 2), 2)[0]
    members = [[int(i) - 1 for i in token if tower.valid[view, int(i) - 1]] for token in merged]
    return members, [number * len(members) + t for t in range(len(members))]


def expected(
    name: str, values: dict[str, Tensor], alpha: float, beta: float, aggregation: str = "nearest"
) -> tuple[list[Tensor], list[Tensor]]:
    """By the definition, for every image of `pages`: (rows that stay [L] bool, features [L, D] with what was folded in)."""
    tower = Tower(name, values)
    kept, features, view = [], [], 0
    for image, cut in enumerate(whole_pages(name)):
        x = tower.features[image].double()
        stays, changed = torch.zeros(len(x), dtype=torch.bool), x.clone()
        for number, (_, whole) in enumerate(cut):
            members, rows = members_of(name, tower, image, view, number, values)
            if whole:
                stays[rows] = True
            else:
                low, deep = (tower.received(probs, view) for probs in (tower.low, tower.deep))
                stay, joins, weight = choose_view(tower.keys[view], low, deep, members, alpha, beta)
                stays[[rows[t] for t in stay]] = True
                if aggregation == "nearest":
                    for t in stay:
                        mine = [t, *(d for d, s in joins.items() if s == t)]
                        total = sum(weight[m] for m in mine)
                        changed[rows[t]] = sum(weight[m] / total * x[rows[m]] for m in mine)
            view += 1
        if name.startswith("LLaVA"):
            first = tower.keys.shape[1]
            newline = (tower.features[image] == tower.model.image_newline).all(-1).nonzero()[:, 0].tolist()
            for end in newline:
                stays[end] = bool(stays[first:end].any())
                first = end + 1
        kept.append(stays)
        features.append(changed)
    return kept, features
