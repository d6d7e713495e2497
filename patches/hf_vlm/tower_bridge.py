"""What stands between a vision tower that yields fewer tokens and the rest of a vision-language model.

Where the connector works token by token, it gets the tokens that are left, and its output is put back to as many rows as the
model's own checks expect: every token at the patch that it stands for, in raster order (merging scrambles), `DROPPED` at all
others. The rows of `DROPPED` leave the prompt before the LLM, also where a caller puts features into inputs_embeds. Features
say
themselves where they are missing, so that whatever is done with them between encoding and reading the prompt (repeating them
for beams, moving, casting, scaling) needs no care; callers of get_image_features see finite numbers, next to nothing.

Where the connector needs the grid, every patch gets the features of the token it ended in, before anybody sees them.

Shapes: V images as the tower takes them (crops, tiles, frames), N tokens that are left, N0 tokens that entered block 0,
n visual tokens of an image, C and D widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtok.core.reduction import unmerge
from vtok.core.tokens import TokenState
from vtok.core.tracker import TokenTracker
from vtok.errors import StateError
from vtok.patches.module_swap import Hook

DROPPED = 2.0**-10  # in every dimension: no feature and no word is that, and every floating-point type holds it exactly


@dataclass(frozen=True)
class TowerBridge:
    """How the model takes what its tower yields.

    Attributes:
        connector: path of the module that works token by token; "" = the grid is needed.
        state: number of the token state of the features: 0 = what entered block 0, i + 1 = what left block i.
        skip: tokens at the front that the model leaves out (the class token).
    """

    connector: str
    state: int
    skip: int


def install(model: Any, tower: nn.Module, joint: TowerBridge, run: TokenTracker) -> None:
    """Hooks the tower and what follows it.

    Args:
        model: without its language head.
        tower: its vision tower, patched.
        joint: of these two.
        run: of the tower.
    """
    if joint.connector:
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
