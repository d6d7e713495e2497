"""Hooks of a packed vision tower: fewer patches go in, and what comes out is put where the model expects it.

Features of units that left are `DROPPED`, by which the rest of a patched model knows them (`vtok.patches.hf_vlm.tower.bridge`).
If nothing leaves, nothing is touched.

Shapes: U units of all images, K units that stay, m patches of a unit, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok.core.prompt import VLMReducer
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.hooks import PrunerHook
from vtok.patches.decoder.pass_state import Pruner, TowerCall
from vtok.patches.hf_vlm.pixels import units
from vtok.patches.hf_vlm.tower.bridge import DROPPED
from vtok.patches.precision import full_precision


def install(model: Any, pruner: Pruner) -> None:
    """Hooks the vision tower of a model, one that `units.tower_of` finds."""
    tower = units.tower_of(model)
    assert tower is not None
    tower.register_forward_pre_hook(ShortenPatches(pruner), with_kwargs=True)
    tower.register_forward_hook(SpreadFeatures(pruner), always_call=True)


class ShortenPatches(PrunerHook):
    """In front of the tower: asks the method which units stay, and gives the tower those."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {**dict(zip(("hidden_states", "grid_thw"), args)), **kwargs}
        given = [name for name in units.GIVEN if named.get(name) is not None]
        if given:
            raise UnsupportedModelError(
                f"{', '.join(given)} of a caller say where patches of whole images are, of which some leave in front of the "
                f"patched {type(module).__name__}; leave them out: they follow from grid_thw"
            )
        pixels, grid = named["hidden_states"], named["grid_thw"]
        assert self.pruner.pixels is not None
        keep = kept_units(self.pruner.pixels, pixels, grid, module)
        whole = bool(keep.all())
        rows, changed = (None, {}) if whole else units.shortened(module, grid, keep)
        borders = (None if whole else changed["cu_seqlens"], changed.get("cu_window_seqlens"))
        self.pruner.watch(TowerCall(tuple(pixels.shape), grid, *borders))
        self.pruner.entered.append(None if whole else keep)
        return None if whole else ((), {**named, **changed, "hidden_states": pixels[rows]})


def kept_units(reducer: VLMReducer, pixels: Tensor, grid: Tensor, tower: nn.Module) -> Tensor:
    """[U] bool: the units that a method leaves, decided together for images and frames of one size.

    Args:
        reducer: of the method.
        pixels: [U m, values of a patch].
        grid: [images, 3].
        tower: that they are for.
    """
    sizes = units.frames_of(grid, int(tower.spatial_merge_size))  # type: ignore[arg-type]
    parts = pixels.detach().unflatten(0, (-1, units.unit_of(tower))).flatten(1).split([t * r * c for t, r, c in sizes])
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (_, rows, columns) in enumerate(sizes):
        alike.setdefault((rows, columns), []).append(i)
    kept: list[Tensor] = [parts[0]] * len(sizes)
    for size, numbers in alike.items():
        frames = torch.cat([parts[i].unflatten(0, (-1, *size)) for i in numbers])
        with torch.no_grad(), full_precision(pixels.device.type):
            stays = reducer.patches(frames)
        for i, part in zip(numbers, stays.split([sizes[i][0] for i in numbers])):
            kept[i] = part.flatten()
    return torch.cat(kept)


class SpreadFeatures(PrunerHook):
    """Behind the tower: features [K, D] -> [U, D], of the merger and of what goes to deeper layers of the LLM."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        keep = self.pruner.entered.pop() if self.pruner.entered else None
        if keep is None or output is None:
            return None
        if isinstance(output, tuple):
            raise UnsupportedModelError(
                f"a patched {type(module).__name__}, in front of which patches leave, returns an output with names; leave out "
                "return_dict=False"
            )
        output.pooler_output = _spread(output.pooler_output, keep)
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [_spread(x, keep) for x in deep]
        return output


def _spread(x: Tensor, keep: Tensor) -> Tensor:
    keep = keep.to(x.device)
    return x.new_full((len(keep), x.shape[1]), DROPPED).index_copy(0, keep.nonzero()[:, 0], x)
