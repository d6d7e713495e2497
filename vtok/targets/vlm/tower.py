"""Methods inside the vision tower of a vision-language model: chosen, checked, installed, described."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vtok.capabilities import candidates
from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo, VLMReducer
from vtok.core.tokens import Place, Site
from vtok.errors import ConfigError, UnsupportedModelError
from vtok.patches.block import check
from vtok.patches.decoder.pass_state import Pruner
from vtok.patches.hf_packed.adapter import sized
from vtok.patches.hf_vlm.families import VLM
from vtok.patches.hf_vlm.install import pruner_of
from vtok.patches.hf_vlm.pixels import hooks as pixel_hooks
from vtok.patches.hf_vlm.tower import bridge as vlm_tower
from vtok.patches.hf_vlm.tower.bridge import TowerBridge
from vtok.patches.protocol import Tower
from vtok.patches.transaction import all_or_nothing, to_the_end
from vtok.reports.results import TowerInfo
from vtok.targets.encoder import ResolvedMethods, install, resolve
from vtok.targets.last_pass import tower_info
from vtok.targets.lifecycle import unpatch
from vtok.targets.resolve import run_of
from vtok.targets.vlm.sites import prompt_methods

PATCHES = str(Site(Place.PATCHES, 0))
ON_GRID = (
    "what follows the vision tower needs every patch at its place, so that merged tokens are put back on the grid: the tower "
    "gets cheaper, the prompt keeps its length"
)


def resolve_in_tower(vlm: VLM, configs: tuple[MethodConfig, ...]) -> ResolvedMethods:
    """Methods for the vision tower, with every number chosen."""
    names, info = " + ".join(config.name for config in configs), vlm.info
    tower, joint = _tower(vlm, names), vlm.joint()
    dropping = [] if joint.connector else [config.name for config in configs if not config.merges]
    try:
        resolved = resolve(vlm.adapter, tower, configs, None, None)
    except UnsupportedModelError:
        if not dropping:
            raise
        resolved = None
    if resolved is not None and not resolved.steps:
        return resolved
    if dropping or resolved is None:
        raise UnsupportedModelError(
            f"{' + '.join(dropping)} drops tokens inside the vision tower, but what follows it in {info.name} needs every "
            "patch at its place in the grid; choose a method that merges (pitome, tome), whose tokens are put back on the "
            f"grid, or one that acts on the prompt: {', '.join(prompt_methods(info))}"
        )
    check(tower, resolved.steps)
    first = min(resolved.steps)
    if first >= joint.state:
        raise ConfigError(
            f"{names} reduces tokens from block {first} of the vision tower on, but {info.name} takes what leaves block "
            f"{joint.state - 1}: nothing would change; name earlier blocks"
        )
    return resolved


def _tower(vlm: VLM, names: str) -> Tower:
    """The vision tower, for methods that act inside it."""
    if vlm.tower is None:
        raise UnsupportedModelError(
            f"{names} reduces tokens inside the vision tower, and that of {vlm.info.name} cannot be patched: "
            f"{vlm.info.no_tower}; methods that act on its prompts: {', '.join(prompt_methods(vlm.info))}"
        )
    return vlm.tower


def budget_candidates(vlm: VLM, config: MethodConfig) -> Sequence[MethodConfig]:
    """A method from its mildest setting to its strongest, in the vision tower or on the prompt: what a budget chooses from."""
    return candidates(config, _tower(vlm, config.name).info if config.in_tower else vlm.info)


def check_readable(features: VLMReducer, info: VLMInfo, tower: ResolvedMethods, joint: TowerBridge) -> None:
    """Raises if a method looks at patches of the vision tower that methods inside it have merged or dropped by then."""
    blocks, first = features.tower_blocks, min(tower.steps)
    if blocks and not features.reads_reduced and (joint.connector or max(blocks) > first):
        names = " + ".join(config.name for config in tower.configs)
        raise ConfigError(
            f"a method on the prompt compares all patches that block {max(blocks)} of the vision tower of {info.name} sees, "
            f"but {names} reduces them from block {first} on; use one of the two, or another method on the prompt"
        )


def install_tower(vlm: VLM, pruner: Pruner) -> None:
    """Installs the part of a resolved patch that acts in the vision tower or in front of it, if there is one."""
    if pruner.pixels is not None:
        pixel_hooks.install(vlm.module, pruner)
    if pruner.joint is None:
        return
    assert vlm.tower is not None
    grid = not pruner.joint.connector
    run = install(vlm.adapter, vlm.tower, replace(pruner.tower, trace=pruner.trace or pruner.joint.traces), spare=grid)
    vlm_tower.install(vlm.module, vlm.tower.module, pruner.joint, run)


def place(config: MethodConfig, pruner: Pruner) -> str:
    """Where a method acts, in words."""
    if not config.in_tower:
        first = pruner.pixels is not None and config == getattr(pruner.pixels, "config", None)
        return f"{PATCHES}: tower and prompt get shorter" if first else "on the prompt"
    if pruner.has_dropped_tokens:
        return "in the vision tower: the prompt gets shorter too"
    return "in the vision tower alone: merged tokens are put back on the grid, the prompt keeps its length"


def describe_tower(vlm: VLM) -> TowerInfo | None:
    """What is patched into the vision tower of a model and what became of the last images; `None` if it is as it was."""
    run = None if vlm.tower is None else run_of(vlm.tower.module)
    if run is None or vlm.tower is None:
        return None
    pruner = pruner_of(vlm)
    found = tower_info(vlm.adapter, _as_seen(vlm, pruner), run, None)
    notes = (*found.notes, f"note: {ON_GRID}") if pruner is not None and not pruner.has_dropped_tokens else found.notes
    return replace(found, path=".".join(part for part in (vlm.path, found.path) if part), notes=notes)


def _as_seen(vlm: VLM, pruner: Pruner | None) -> Tower:
    """The tower, described for the images of the last prompt where they were all alike, and might have been of any size."""
    assert vlm.tower is not None
    calls = () if pruner is None or pruner.last is None or not vlm.packed else pruner.last.calls
    sizes = {(rows, columns) for call in calls if call.grid is not None for _, rows, columns in call.grid.tolist()}
    if len(sizes) != 1:
        return vlm.tower
    (size,), merge = sizes, vlm.tower.module.config.spatial_merge_size  # type: ignore[union-attr]
    return sized(vlm.tower, (size[0] // merge, size[1] // merge))


@contextmanager
def tower_patched(vlm: VLM, pruner: Pruner) -> Iterator[None]:
    """The vision tower is patched for a while."""
    try:
        all_or_nothing(vlm.module, lambda: install_tower(vlm, pruner))
        yield
    finally:
        if pruner.joint is not None or pruner.pixels is not None:
            to_the_end(lambda: unpatch(vlm.module))
