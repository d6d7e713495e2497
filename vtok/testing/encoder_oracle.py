"""What a reduced forward pass must be equal to: the same decisions at full length, where nothing is ever taken out.

The decisions of the reduced pass are recorded and replayed on a sequence that keeps every row:

* `masked`: what was dropped or folded away stays in its row, but from there on no query attends to it and no pool counts it;
  what stays takes the value and the size of the merge. Equality says that positions, relative biases, masks and pools follow
  the tokens that stay. Checked for every method.
* `copies`: every row takes the features and the position of the token that it was folded into, and sizes are forgotten. A token
  that counts as often as it has members is so many copies of itself, so equality says that sizes reach attention and every
  pool, and are right. Checked where tokens are merged and attention is proportional (ToMe, equation 1).

Shapes: B batch, N tokens that a decision was made for, N0 tokens that entered block 0, M tokens after it, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vtok
from vtok.core.reduction import Plan, apply_plan
from vtok.core.tokens import AttentionView, TokenState
from vtok.errors import StateError
from vtok.ops.rows import take_rows
from vtok.patches.block import Link, ReducingBlock

TOLERANCE = 1e-10  # of the largest output, in float64


class Evidence(NamedTuple):
    """What a patched model did.

    Attributes:
        tokens: (tokens that entered, mean number of real ones that left) of every tower; of a vision-language model whose
            prompts get shorter, (visual tokens that entered, that left) of every prompt.
        differences: see `differences`.
        fault: what was wrong, `None` = nothing.
        prompts: kind of prompts that were read, see `vtok.testing.tiny.vlm_prompts`.
    """

    tokens: tuple[tuple[float, float], ...] = ()
    differences: Mapping[str, float] = {}
    fault: str | None = None
    prompts: str = ""


class Decision(NamedTuple):
    """A plan, and the state of the N tokens that it was made for."""

    state: TokenState
    plan: Plan


Decisions = dict[int, Decision]  # by the id of the block's link


def differences(model: nn.Module, x: Any) -> dict[str, float]:
    """How far a reduced pass is from its full-length replays.

    Args:
        model: patched with `trace=True`, in eval mode, with a tensor as output; left as it was.
        x: what the model takes.

    Returns:
        "masked" and, where it applies, "copies" -> largest difference of the outputs, as a share of the largest output.

    Raises:
        StateError: the model is not patched with `trace=True`, or nothing was decided in the pass.
    """
    links = [m._vtok for m in model.modules() if isinstance(m, ReducingBlock) and m._vtok.reducer is not None]
    if not links or not all(link.run.trace for link in links):
        raise StateError("the check needs a model that is patched with trace=True")
    made: Decisions = {}
    with torch.no_grad():
        with _replaced(links, [{"decide": _recorder(link, made)} for link in links]):
            reduced = model(x)
        if not made:
            raise StateError("no block took a token away, so there is nothing to compare")
        replays = {"masked": _masking}
        if any(d.plan.src is not None for d in made.values()) and _proportional(links, made):
            replays["copies"] = _copying
        found = {}
        for name, replay in replays.items():
            with _replaced(links, [replay(made.get(id(link))) for link in links]):
                found[name] = _distance(reduced, model(x))
    return found


def check_reduction(model: nn.Module, x: Tensor) -> Evidence:
    """Runs a model that is patched with `trace=True`: do tokens go down, and does removing them equal masking them?"""
    with torch.no_grad():
        model(x)
    towers = vtok.info(model).towers
    tokens = tuple((float(t.blocks[0].tokens_in), float(t.blocks[-1].mean_tokens)) for t in towers if t.blocks)
    if not tokens or any(left >= entered for entered, left in tokens):
        return Evidence(tokens, fault="no token was taken away")
    found = differences(model, x)
    wrong = [f"{name} replay differs by {value:.1e}" for name, value in found.items() if not value <= TOLERANCE]
    return Evidence(tokens, found, "; ".join(wrong) or None)


def _distance(reduced: Tensor, full: Tensor) -> float:
    if reduced.shape != full.shape:
        return float("inf")
    return float((reduced - full).abs().max() / full.abs().max())


def _proportional(links: Sequence[Link], made: Decisions) -> bool:
    return all(link.run.prop_attn for link in links) and all(d.plan.use_size for d in made.values())


@contextmanager
def _replaced(links: Sequence[Link], methods: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Other methods, by name, for each link, for a while."""
    for link, others in zip(links, methods):
        vars(link).update(others)
    try:
        yield
    finally:
        for link, others in zip(links, methods):
            for name in others:
                vars(link).pop(name, None)


def _recorder(link: Link, made: Decisions) -> Callable[..., Plan | None]:
    decide = link.decide

    def record(x: Tensor, state: TokenState, view: AttentionView) -> Plan | None:
        plan = decide(x, state, view)
        if plan is not None:
            made[id(link)] = Decision(state, plan)
        return plan

    return record


def _rows(decision: Decision) -> Tensor:
    """[B, N]: the rows that the decision's tokens have in the full sequence."""
    keep = decision.plan.keep
    n = decision.state.length
    return torch.arange(n, device=keep.device).expand(len(keep), n) if decision.state.index is None else decision.state.index


def _masking(decision: Decision | None) -> dict[str, Any]:
    plan = None if decision is None else masked_plan(decision)
    return {"decide": lambda x, state, view: plan}


def masked_plan(decision: Decision) -> Plan:
    """The plan for N0 tokens that folds as the decision does, and marks as padding what it takes away."""
    state, plan = decision
    rows, n = _rows(decision), state.length
    batch = len(rows)
    alive = rows.gather(1, plan.keep)
    real = plan.valid
    if real is None and state.keep is not None:
        real = state.keep.gather(1, plan.keep)
    valid = torch.zeros(batch, n + 1, dtype=torch.bool, device=rows.device)  # the last column collects rows of padding
    valid.scatter_(1, alive if real is None else alive.where(real, n), True)
    everything = torch.arange(n, device=rows.device).expand(batch, n)
    if plan.src is None or plan.dst is None:
        return Plan(everything, valid=valid[:, :n])
    return plan._replace(
        keep=everything, src=rows.gather(1, plan.src), dst=alive.gather(1, plan.dst), valid=valid[:, :n], counts=None
    )


def _copying(decision: Decision | None) -> dict[str, Any]:
    if decision is None:
        return {"decide": lambda x, state, view: None}
    rows, group, position = _rows(decision), *_whereabouts(decision)

    def decide(x: Tensor, state: TokenState, view: AttentionView) -> Plan:
        return Plan(position)  # where only kept rows attend, a copy attends as the token itself does

    def move(x: Tensor, state: TokenState, plan: Plan | None) -> tuple[Tensor, TokenState]:
        merged, _ = apply_plan(take_rows(x, rows), *decision)
        lost = group < 0
        return take_rows(merged, group.clamp_min(0)), state._replace(index=position, keep=~lost if lost.any() else None)

    return {"decide": decide, "move": move}


def _whereabouts(decision: Decision) -> tuple[Tensor, Tensor]:
    """For every original token [B, N0]: the row where it is after the decision (-1 = dropped), and that row's position."""
    _, after = apply_plan(_rows(decision)[..., None].double(), *decision)  # of the features only their number matters
    assert after.group is not None and after.index is not None
    return after.group, after.index.gather(1, after.group.clamp_min(0))
