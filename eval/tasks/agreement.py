"""How far the features of a patched encoder, and the saliency maps that a frozen head draws from them, move.

Needs no labels, and tells methods apart on a few dozen pictures. The dense part asks what a user of `vtok.unmerge` gets:
features are put back on the grid of patches, a dropped patch takes those of the nearest one that stayed, and the head sees the
result.

Shapes: b images, M tokens that leave, n patches on a grid, D features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vtok
from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.settings import Setting, backend, dtype_of, evaluating, to_device, weight_sharing_copy
from vtok.eval.common.statistics import FEWEST, Z95, clustered_mean_stderr
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.dinov2 import Saliency, load_saliency
from vtok.eval.tasks.encoders import Passes, Progress, described
from vtok.eval.tasks.imagenet import load_named
from vtok.eval.tasks.pictures import NAMES, is_bundled, open_pictures, origin
from vtok.eval.tasks.timm_pipeline import Options, create_loader, data_config

METRICS = ("cosine", "map_mae", "map_rank")
_EVERY = 4  # pixels between those that are ranked


def evaluate(
    model: str | nn.Module,
    data_dir: str | os.PathLike,
    settings: Sequence[Any] = (None,),
    options: Options | None = None,
    progress: Progress | None = None,
    memory: BaselineCache[tuple[Tensor, Tensor]] | None = None,
) -> list[dict[str, Any]]:
    """Agreement with the unpatched model, picture by picture; see `vtok.eval.tasks` for what all tasks share.

    Args:
        model: `"reference-dinov2"`, or that model.
        data_dir: bundled pictures, see `vtok.eval.tasks.pictures`.
        settings, progress: see there.
        options: of the classification task; batch size, number of pictures, type and device are looked at.
        memory: see `vtok.eval.tasks.encoders.show`.

    Returns:
        Records whose `metrics` are `cosine` of the class token's features, and of saliency maps the mean absolute difference
        `map_mae` of values in [0, 1] and the rank correlation `map_rank` (Spearman's, over pixels), crops of one photograph
        taken together; `per_image` holds them picture by picture, `cluster` says which go together.
    """
    options, data_name = options or Options(), os.fspath(data_dir)
    if not is_bundled(data_name):
        raise ConfigError(f"agreement is measured on bundled pictures: {', '.join(NAMES)}; got {data_name}")
    chosen, memory = [Setting.of(value) for value in settings], memory or BaselineCache()
    net = load_named(model, options) if isinstance(model, str) else model
    with evaluating(net):
        base = to_device(net, dtype_of(options.model_dtype), current().device(options.device))
        first, config = next(base.parameters()), data_config(base, options)
        data, head = open_pictures(data_name, options.num_samples), load_saliency().to(first.device)
        size = config["input_size"]
        found = [Passes[Tensor](setting.apply(weight_sharing_copy(base), size, trace=True), setting) for setting in chosen]
        done = 0
        with torch.inference_mode():
            for number, batch in enumerate(create_loader(data, config, options)):
                x = batch.images.to(first.device, first.dtype)
                if number not in memory.outputs:
                    memory.outputs[number] = _seen(base, x, head)
                for one in found:
                    plain = one.setting.method is None
                    seen = memory.outputs[number] if plain else _seen(one.model, x, head)
                    one.add(_compared(seen, memory.outputs[number]), one.passed(size), len(x))
                done += len(x)
                if progress is not None:
                    progress(done, len(data))
    whole = [origin(data.filename(row)) for row in range(len(data))]
    cluster = np.unique(whole, return_inverse=True)[1]
    about = {
        "model": model if isinstance(model, str) else type(net).__name__,
        "task": "agreement",
        "backend": backend(net),
        "dataset": data_name,
        "cluster": cluster.tolist(),
        "primary": METRICS[0],
        "percent": False,
        "notes": [],
    }
    common, records = described(base, size, len(data), [], options) | about, []
    del common["split"], common["param_count"]  # of these records they were never part
    common["dtype"] = str(next(base.parameters()).dtype).removeprefix("torch.")  # there is no autocast here
    for one in found:
        columns = torch.cat(one.results).cpu().double().numpy().T
        each = dict(zip(METRICS, columns))
        per_image = {name: np.round(values, 6).tolist() for name, values in each.items()}
        records.append(common | one.fields() | {"metrics": _metrics(each, cluster), "per_image": per_image})
    return records


def _seen(model: Any, x: Tensor, head: Saliency) -> tuple[Tensor, Tensor]:
    """(features of the class token [b, D], saliency maps [b, H, W]), fp32."""
    tokens = model.forward_features(x).float()
    if not vtok.info(model).patched:
        return tokens[:, 0], head(tokens[:, 1:])
    p = model.num_prefix_tokens
    grid, there = (vtok.unmerge(model, one)[:, p:] for one in (tokens, torch.ones_like(tokens[:, :, :1])))
    return tokens[:, 0], head(nearest_kept(grid, there[:, :, 0] > 0))


def nearest_kept(grid: Tensor, there: Tensor) -> Tensor:
    """Dropped patches with the features of the nearest patch that stayed, the first in raster order where several are as near.

    Args:
        grid: [b, n, D] in raster order, n a square.
        there: [b, n] bool, False = dropped; one patch of every image stayed.
    """
    side = round(grid.shape[1] ** 0.5)
    place = torch.cartesian_prod(*(torch.arange(side, device=grid.device, dtype=torch.float32),) * 2)
    distance = torch.cdist(place, place)[None].masked_fill(~there[:, None], float("inf"))
    return grid.gather(1, distance.argmin(-1)[..., None].expand_as(grid))


def _compared(one: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> Tensor:
    """[b, 3]: the metrics of every picture."""
    cosine = torch.cosine_similarity(one[0], base[0])
    ranks = [maps[:, ::_EVERY, ::_EVERY].flatten(1).argsort(-1).argsort(-1).double() for maps in (one[1], base[1])]
    first, second = (r - r.mean(-1, keepdim=True) for r in ranks)
    rank = torch.cosine_similarity(first, second)
    return torch.stack([cosine, (one[1] - base[1]).abs().mean((1, 2)), rank.float()], 1)


def _metrics(each: Mapping[str, np.ndarray], cluster: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in each.items():
        mean, error = clustered_mean_stderr(values, cluster)
        known = cluster.max() + 1 >= FEWEST and error > 0
        found |= {
            name: mean,
            f"{name}_stderr": error,
            f"{name}_ci": [mean - Z95 * error, mean + Z95 * error] if known else None,
        }
    return found
