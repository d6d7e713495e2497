"""What a patched vision-language model would make of a stated prompt, and what it made of the last one it read."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from vtok.core.prompt import View
from vtok.cost.encoder import Estimate
from vtok.cost.prefill import Prompt, PromptEstimate, StatedImage, VisionCost, mean_estimate, prompt_estimate
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder.pass_state import Counts, Pruner
from vtok.patches.hf_packed.adapter import sized
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import pruner_of
from vtok.patches.hf_vlm.macs import features_left, llm_cost, patches_left, stated_calls, stated_image, vision_cost
from vtok.patches.hf_vlm.pixels import units
from vtok.patches.hf_vlm.pixels.costs import added, left_cost
from vtok.reports.results import PromptInfo, PromptRow
from vtok.targets.encoder import estimate_cost
from vtok.targets.last_pass import rows_of, tower_info
from vtok.targets.resolve import run_of
from vtok.targets.vlm.resolve import POSITIONS
from vtok.targets.vlm.tower import PATCHES


def planned(model: nn.Module, vlm: VLM, pruner: Pruner, prompt: Prompt) -> PromptEstimate:
    """Costs of one stated prompt, before anything runs.

    Args:
        model: holds the vision-language model and its language head.
        vlm: the model, described.
        pruner: methods, resolved for it.
        prompt: what is read.

    Raises:
        ConfigError, UnsupportedModelError: see `stated_image`.
    """
    image = stated_image(vlm, prompt.input_size)
    calls, inside = stated_calls(vlm, image, prompt.images), _tower_estimate(vlm, pruner, image)
    base = vision_cost(vlm, calls)
    vision = base if inside is None else vision_cost(vlm, calls, inside, pruner.joint, pruner.tower.steps)
    left, layout = patches_left(vlm, inside, pruner.joint), image.layout
    if left is not None and features_left(vlm, left) < image.tokens:  # methods see what the tower left as one row
        layout = (View(0, 1, features_left(vlm, left)),)
    stays, selection, chooser = layout[-1].stop, 0, pruner.features
    exact = pruner.pixels is None or pruner.pixels.exact
    if chooser is not None:
        selection, exact = chooser.feature_macs(stays, layout), exact and chooser.exact
        stays = chooser.feature_count(stays, layout)
    visual, tokens, reductions = prompt.images * stays, [], {}
    entered = visual
    for layer in range(vlm.info.depth):
        if layer in pruner.layers:
            site, reducer = pruner.layers[layer]
            reductions[layer] = float(reducer.layer_macs(site, visual, prompt.text_tokens, entered))
            visual, exact = reducer.layer_count(site, visual, entered), exact and reducer.exact
        entered = visual if layer == 0 else entered
        tokens.append((float(visual + prompt.text_tokens), float(visual)))
    whole = float(prompt.images * image.tokens + prompt.text_tokens)
    return prompt_estimate(
        llm_cost(model, vlm), whole, tokens, reductions, vision, base, float(prompt.images * selection), exact
    )


def _tower_estimate(vlm: VLM, pruner: Pruner, image: StatedImage) -> Estimate | None:
    """What one view of a patched tower will cost; `None` = it is not patched."""
    if pruner.joint is None:
        return None
    assert vlm.tower is not None
    tower = sized(vlm.tower, (image.layout[0].rows, image.layout[0].columns)) if vlm.packed else vlm.tower
    return estimate_cost(vlm.adapter, tower, pruner.tower.steps)


def measured(
    model: nn.Module, vlm: VLM, pruner: Pruner, counts: Counts
) -> tuple[PromptEstimate, PromptEstimate | None, tuple[str, ...]]:
    """(costs per prompt of the last batch as computed, what its prompts cost alone on average if rows were padded, notes)."""
    batch, depth = len(counts.visual), vlm.info.depth
    llm = llm_cost(model, vlm)
    vision, base, notes = _vision(vlm, pruner, counts)
    chooser, selection = pruner.features, 0.0
    if chooser is not None:
        selection = sum(images * chooser.feature_macs(n, views, kind) for kind, views, n, images in counts.layouts) / batch
    widths, kept = _widths(depth, counts)
    texts = (counts.real & ~counts.visual).sum(1).tolist()

    def cost(total: list[int], visual: list[int]) -> PromptEstimate:
        """Of the whole prompt (first), then of what enters each layer."""
        reductions = {
            layer: float(reducer.layer_macs(site, visual[layer], total[layer] - visual[layer], visual[1]))
            for layer, (site, reducer) in pruner.layers.items()
        }
        tokens = [(float(n), float(v)) for n, v in zip(total[1:], visual[1:])]
        return prompt_estimate(llm, float(total[0]), tokens, reductions, vision, base, selection)

    computed = cost(widths, [max(rows) for rows in kept])
    layers = tuple(replace(row, visual=sum(rows) / batch) for row, rows in zip(computed.layers, kept[1:]))
    own = [[rows[i] for rows in kept] for i in range(batch)]
    totals = [[visual + texts[i] for visual in own[i]] for i in range(batch)]
    padded = any(total != widths for total in totals)
    alone = mean_estimate([cost(total, visual) for total, visual in zip(totals, own)]) if padded else None
    return replace(computed, layers=layers), alone, notes


def _widths(depth: int, counts: Counts) -> tuple[list[int], list[list[int]]]:
    """(columns of the prompt, then those that enter each decoder layer, padding included; visual tokens of each row there)."""
    widths, kept = [counts.visual.shape[1]], [[int(n) for n in counts.visual.sum(1).tolist()]]
    for layer in range(depth):
        stage = counts.stages.get(layer)
        widths.append(widths[-1] if stage is None else stage.column.shape[1])
        kept.append(kept[-1] if stage is None else visual_left(counts.visual, stage.column))
    return widths, kept


def visual_left(visual: Tensor, column: Tensor) -> list[int]:
    """Visual tokens of every row among slots that hold the columns [B, M] of the prompt. visual [B, L] bool."""
    here = visual.gather(1, column.clamp_min(0)) & (column >= 0)
    return [int(n) for n in here.sum(1).tolist()]


def _vision(vlm: VLM, pruner: Pruner, counts: Counts) -> tuple[VisionCost | None, VisionCost | None, tuple[str, ...]]:
    """(the vision side per prompt, the same unpatched, what a user should know of it)."""
    missing = "note: the images were encoded before this prompt was read; tower and connector are not in these costs"
    if not counts.calls:
        return None, None, (missing,)
    rows, seen, steps, frames = len(counts.visual), None, {}, None
    if pruner.joint is not None:
        assert vlm.tower is not None
        steps, run = pruner.tower.steps, run_of(vlm.tower.module)
        seen = tower_info(vlm.adapter, vlm.tower, run, None).estimate
        inexact = any(not reducer.exact for _, reducer in steps.values())
        frames = rows_of(run) if run is not None and vlm.packed and inexact else None
    try:
        base = vision_cost(vlm, counts.calls).divided(rows)
    except UnsupportedModelError as error:
        return None, None, (f"note: {error}",)
    if pruner.pixels is not None:
        unit_tower = units.tower_of(vlm.module)
        left = added([left_cost(unit_tower, vision_cost(vlm, [call]), call) for call in counts.calls])
        return left.divided(rows), base, ()
    return (base if seen is None else vision_cost(vlm, counts.calls, seen, pruner.joint, steps, frames).divided(rows)), base, ()


def describe(model: nn.Module, vlm: VLM) -> PromptInfo:
    """What is patched into a model and what became of the last prompt of this thread."""
    pruner = pruner_of(vlm)
    name = type(vlm.module).__name__
    if pruner is None:
        return PromptInfo(vlm.path, name, ())
    positions, last = POSITIONS[int(pruner.compact)], pruner.last
    if last is None:
        return PromptInfo(vlm.path, name, pruner.configs, positions, budget=pruner.budget, shortened=pruner.shortens)
    entered = visual = tuple(last.visual.sum(1).tolist())
    rows: list[PromptRow] = []
    if last.alive is not None:
        left = tuple((last.visual & last.alive).sum(1).tolist())
        rows.append(PromptRow("vision tower" if pruner.pixels is None else PATCHES, entered, left))
        entered = left
    for layer, stage in sorted(last.stages.items()):
        if layer == 0 and pruner.features is None and 0 not in pruner.layers:
            continue  # what left the tower is all that enters the LLM
        left = tuple(visual_left(last.visual, stage.column))
        rows.append(PromptRow("before the LLM" if layer == 0 else f"decoder layer {layer}", entered, left))
        entered = left
    text = tuple((last.real & ~last.visual).sum(1).tolist())
    if vlm.family.generic:
        notes: tuple[str, ...] = (f"note: what {vlm.info.name} costs is not known in closed form",)
        cost = mean = None
    else:
        cost, mean, notes = measured(model, vlm, pruner, last)
    return PromptInfo(
        vlm.path,
        name,
        pruner.configs,
        POSITIONS[int(pruner.compact)],
        tuple(rows),
        text,
        visual,
        cost,
        mean,
        pruner.budget,
        notes,
    )
