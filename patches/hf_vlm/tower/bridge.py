"""What stands between a vision tower that yields fewer tokens and the rest of a vision-language model.

Where the connector works token by token, it gets the tokens that are left, and its output is put back to as many rows as the
model's own checks expect: every token at the patch that it stands for, in raster order (merging scrambles), `DROPPED` at all
others. The rows of `DROPPED` leave the prompt before the LLM, also where a caller puts features into inputs_embeds. Features
say
themselves where they are missing, so that whatever is done with them between encoding and reading the prompt (repeating them
for beams, moving, casting, scaling) needs no care; callers of get_image_features see finite numbers, next to nothing.

A tower that reads all images as one sequence hands its units to the connector, which is the merger at its end; what it taps on
the way for deeper layers of the LLM is put back at the same places: the mean of what the members of a unit were there.

Where the connector needs the grid, every patch gets the features of the token it ended in, before anybody sees them.

Shapes: V images as the tower takes them (crops, tiles, frames), N tokens that are left, N0 tokens that entered block 0,
n visual tokens of an image, C and D widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vtok.core.reduction import unmerge
from vtok.core.tokens import TokenState, at_least_fp32
from vtok.core.tower import TowerFacts
from vtok.core.tracker import TokenTracker
from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.hf_packed import units
from vtok.patches.module_swap import Hook
from vtok.patches.protocol import Tower

DROPPED = 2.0**-10  # in every dimension: no feature and no word is that, and every floating-point type holds it exactly


@dataclass(frozen=True)
class TowerBridge:
    """How the model takes what its tower yields.

    Attributes:
        connector: path of the module that works token by token; "" = the grid is needed.
        state: number of the token state of the features: 0 = what entered block 0, i + 1 = what left block i.
        skip: tokens at the front that the model leaves out (the class token).
        packed: whether the tower reads all images as one sequence of units.
        taps: paths of connectors for what deeper layers of the LLM take -> number of the state that they see.
    """

    connector: str
    state: int
    skip: int
    packed: bool = False
    taps: Mapping[str, int] = field(default_factory=dict)

    @property
    def traces(self) -> bool:
        """Whether it must be known which token each patch ended in."""
        return not self.connector or bool(self.taps)


def packed_bridge(tower: Tower) -> TowerBridge:
    """Of a tower that reads all images as one sequence: the merger at its end, and those of blocks that it taps."""
    deep = getattr(tower.module, "deepstack_visual_indexes", ())
    taps = {f"{tower.path}.deepstack_merger_list.{i}": block + 1 for i, block in enumerate(deep)}
    return TowerBridge(f"{tower.path}.merger", len(tower.blocks), 0, packed=True, taps=taps)


def feature_block(vision_feature_layer: int | Sequence[int], depth: int) -> int:
    """0-based block of the vision tower that the features come from.

    Args:
        vision_feature_layer: index into the tower's hidden states, embeddings first (LLaVA: -2); of several the deepest counts.
        depth: blocks of the tower.

    Raises:
        UnsupportedModelError: the features are the embeddings, or no such layer exists.
    """
    layers = list(vision_feature_layer) if isinstance(vision_feature_layer, Sequence) else [vision_feature_layer]
    block = max((layer + depth if layer < 0 else layer - 1 for layer in layers), default=-1)
    if not 0 <= block < depth:
        raise UnsupportedModelError(
            f"vision_feature_layer={vision_feature_layer} is the output of no block; the vision tower has {depth}"
        )
    return block


def facts_of(tower: Tower, block: int, prefix_kept: bool) -> TowerFacts:
    """What methods may know of a tower whose features leave a block; for `prefix_kept` see `TowerFacts`."""
    info = tower.info
    sizes = info.width, info.num_heads, info.head_dim, info.num_patches
    return TowerFacts(info.depth, info.has_cls, info.num_prefix, block, *sizes, prefix_kept)


def install(model: Any, tower: nn.Module, joint: TowerBridge, run: TokenTracker) -> None:
    """Hooks the tower and what follows it.

    Args:
        model: without its language head.
        tower: its vision tower, patched.
        joint: of these two.
        run: of the tower.
    """
    if joint.packed:
        for path, state in joint.taps.items():
            model.get_submodule(path).register_forward_hook(SpreadToMembers(run, state))
        model.get_submodule(joint.connector).register_forward_hook(UnitsToGrid(run, joint.state))
        if joint.taps:
            tower.register_forward_hook(TapsToGrid(run, joint.state))
    elif joint.connector:
        model.get_submodule(joint.connector).register_forward_hook(ScatterToGrid(run, joint))
    else:
        tower.register_forward_hook(UnmergeToGrid(run))


def holes(features: Tensor) -> Tensor:
    """[...] bool: rows of features [..., D] that the tower left empty: all entries alike, and not zero, as a word's may be."""
    first = features[..., :1]
    return (features == first).all(-1) & (first[..., 0] != 0)


class ScatterToGrid(Hook):
    """Forward hook of a connector that works token by token: [V, N - skip, D] -> [V, n, D]."""

    def __init__(self, run: TokenTracker, joint: TowerBridge):
        self.run, self.joint = run, joint

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        state, skip = self.run.current.states[self.joint.state], self.joint.skip
        if state is None or state.index is None:
            return None
        state = state.on(output.device)
        assert state.index is not None
        rows = state.index[:, skip:] - skip
        if output.shape[:2] != rows.shape:
            raise StateError(
                f"the connector got [images, tokens] = {list(output.shape[:2])}, but layer {self.joint.state} of the patched "
                f"vision tower left {list(rows.shape)}; another vision_feature_layer or vision_feature_select_strategy than "
                "the config's cannot be passed to a patched model: set it in the config, then patch"
            )
        count = state.length - skip
        if state.keep is not None:  # padding is written to a row of its own
            rows = rows.where(state.keep[:, skip:], count)
        out = output.new_full((rows.shape[0], count + 1, output.shape[2]), DROPPED)
        return out.scatter(1, rows[..., None].expand_as(output), output)[:, :count]


class UnitsToGrid(Hook):
    """Forward hook of the merger of a packed tower: [L, D], one row a unit -> [L0, D]."""

    def __init__(self, run: TokenTracker, state: int):
        self.run, self.state = run, state

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        state = self.run.current.states[self.state]
        return None if state is None or state.untouched else at_places(output, state.on(output.device))


class SpreadToMembers(Hook):
    """Forward hook of a connector of a packed tower that sees an earlier block: [L, D] -> [L0, D], for every member."""

    def __init__(self, run: TokenTracker, state: int):
        self.run, self.state = run, state

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        state = self.run.current.states[self.state]
        if state is None or state.untouched:
            return None
        unit, _ = units.ended_in(state.on(output.device), output.device)
        return output.index_select(0, unit)


class TapsToGrid(Hook):
    """Forward hook of a packed tower: what it tapped, [L0, D] a tap, becomes one row a unit that is left, at its place."""

    def __init__(self, run: TokenTracker, state: int):
        self.run, self.state = run, state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        state = self.run.current.states[self.state]
        if state is None or state.untouched:
            return None
        tapped = output[-1] if isinstance(output, tuple) else output.deepstack_features
        tapped = [_of_members(x, state.on(x.device)) for x in tapped]
        if isinstance(output, tuple):
            return (*output[:-1], tapped)
        output.deepstack_features = tapped
        return output


def at_places(x: Tensor, state: TokenState) -> Tensor:
    """Units [L, D] -> [L0, D], `DROPPED` where no unit is left."""
    assert state.entered is not None
    place, total, keep = units.places(state, x.device), sum(state.entered), units.real(state)
    if keep is not None:  # padding is written to a row of its own
        place = place.where(keep, total)
    return x.new_full((total + 1, x.shape[1]), DROPPED).index_copy(0, place, x)[:total]


def _of_members(x: Tensor, state: TokenState) -> Tensor:
    """[L0, D] -> [L0, D]: the mean over the members of every unit that is left, at its place."""
    unit, alive = units.ended_in(state, x.device)
    number, wide = sum(units.counts_of(state)), at_least_fp32(x)
    unit = unit.where(alive, number)
    total = wide.new_zeros(number + 1, x.shape[1]).index_add(0, unit, wide)
    count = wide.new_zeros(number + 1).index_add(0, unit, wide.new_ones(len(unit)))
    return at_places((total / count.clamp_min(1)[:, None])[:number].to(x.dtype), state)


class UnmergeToGrid(Hook):
    """Forward hook of a tower whose grid is needed: all that it returns has N0 tokens again; merged ones share features."""

    def __init__(self, run: TokenTracker):
        self.run = run

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        states = self.run.current.states
        output.last_hidden_state = on_grid(output.last_hidden_state, states[-1])
        hidden = getattr(output, "hidden_states", None)
        if hidden is not None:
            output.hidden_states = tuple(on_grid(x, state) for x, state in zip(hidden, states, strict=True))
        return output


def on_grid(x: Tensor | None, state: TokenState | None) -> Tensor | None:
    """Tokens [V, N, C] -> [V, N0, C]. Patches that are padding all get the one padding row that is kept for them."""
    if x is None or state is None or state.index is None:
        return x
    state = state.on(x.device)
    if state.real is not None:
        assert state.group is not None
        state = state._replace(group=state.group.where(state.real | (state.group >= 0), x.shape[1] - 1))
    return unmerge(x, state)
