"""The patched block: attention half, reduction, MLP half; upstream's own forward wherever there is nothing to do.

Shapes: B batch, N tokens in, M tokens out, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config import Reducer
from vtok.core.reduction import Plan, apply_plan
from vtok.core.tokens import AttentionView, Place, Site, TokenState, add_bias, gather_mask, gather_positions, log_size_bias
from vtok.core.tracker import ForwardState, TokenTracker
from vtok.errors import UnsupportedModelError
from vtok.ops.rows import take_rows
from vtok.patches.attention import place_taps, projected_view, sdpa, tapped_view
from vtok.patches.module_swap import Hook, Mixin, check_forward, is_own, swap_class
from vtok.patches.padding import RealRows, alone, padding_of, plan_without_padding, real_rows
from vtok.patches.precision import autocasts, full_precision
from vtok.patches.protocol import Attend, Block, BlockSpec, Projected, Tower, qualified_name


@dataclass
class Link:
    """All that vtok stores on a block instance, as a plain attribute: never in a state_dict.

    Attributes:
        run: shared by the tower.
        index: number of the block.
        spec: anatomy of the block.
        attend: how its attention is called.
        site: where this block reduces, `None` = it does not.
        reducer: what decides there.
        stepwise: compute attention step by step (only some queries attend, or the module takes no mask).
        seeds: whether a mask that marks padding is looked at here: in the first block of a tower that reduces somewhere.
        merges: whether the tower merges tokens somewhere.
    """

    run: TokenTracker
    index: int
    spec: BlockSpec
    attend: Attend
    site: Site | None = None
    reducer: Reducer | None = None
    stepwise: bool = False
    seeds: bool = False
    merges: bool = False

    @property
    def whole(self) -> bool:
        """Whether the block's own forward runs, also once tokens have left."""
        return self.spec.whole or (self.site is None and self.attend.takes_bias and self.spec.passes_mask)

    @property
    def needs(self) -> frozenset[str]:
        """What the method looks at here."""
        return frozenset() if self.reducer is None else self.reducer.needs

    def decide(self, x: Tensor, state: TokenState, view: AttentionView) -> Plan | None:
        """The method's plan: without gradients, and outside autocast, which would push scores below fp32."""
        assert self.reducer is not None and self.site is not None
        if torch.is_grad_enabled() or autocasts(x.device.type):
            with torch.no_grad(), full_precision(x.device.type):
                return self._decide(self.reducer, x, state, view, self.site)
        return self._decide(self.reducer, x, state, view, self.site)

    def _decide(self, reducer: Reducer, x: Tensor, state: TokenState, view: AttentionView, at: Site) -> Plan | None:
        if state.keep is None or reducer.ragged:  # a ragged method knows padding: it makes some itself
            return reducer.plan(x, state, view, at)
        return plan_without_padding(reducer, x, state, view, at, self.run.spare)

    def move(self, x: Tensor, state: TokenState, plan: Plan | None) -> tuple[Tensor, TokenState]:
        """Applies a plan, if there is one."""
        if plan is None:
            return x, state
        with full_precision(x.device.type):
            return apply_plan(x, state, plan)


def chain(block: nn.Module, names: tuple[str, ...], h: Tensor) -> Tensor:
    """h through the named children of a block: modules are called, tensors multiplied, missing ones skipped."""
    for name in names:
        part = getattr(block, name, None)
        if part is not None:
            h = part(h) if isinstance(part, nn.Module) else part * h
    return h


class ReducingBlock(Mixin):
    """Mixin put in front of a block's own class, on one instance."""

    _vtok: Link

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        link = self._vtok
        run, spec = link.run, link.spec
        rows = x.transpose(0, 1) if spec.seq_first else x  # [B, N, C]
        done, state = run.enter(link.index, rows, self.training, x)
        state = state.on(x.device)
        if link.seeds and state.real is None:
            state = self._padded(done, rows, state, {**dict(zip(spec.args, args)), **kwargs})
        idle = link.site is None and state.untouched
        if idle or len(args) > len(spec.args):  # upstream's code, upstream's bits; and its error, if it is called wrongly
            out = super().forward(x, *args, **kwargs)
        else:
            kwargs = self._surroundings(rows, state, {**dict(zip(spec.args, args)), **kwargs} if args else kwargs)
            if link.whole:
                out = super().forward(x, **kwargs)
            else:
                out, state = self._split(rows, state, kwargs)
                out = out.transpose(0, 1) if spec.seq_first else out
            if spec.whole and link.site is not None:
                view = tapped_view(link.attend, self, run, kwargs.get(spec.mask), None, link.needs)
                out, state = link.move(out, state, link.decide(out, state, view))
        run.leave(done, link.index, state, out)
        return out

    def _padded(self, run: ForwardState, x: Tensor, state: TokenState, kwargs: dict[str, Any]) -> TokenState:
        """The state that enters the first block, with what the mask says of padding."""
        link = self._vtok
        assert link.spec.padding_mask is not None
        if torch.compiler.is_compiling() and link.run.unmasked:
            return state
        found = padding_of(link.spec.padding_mask(self, kwargs), x.shape[1], state.num_prefix, link.merges)
        if found is None:
            return state
        keep = found.keep.expand(x.shape[0], -1)
        return link.run.seed(run, state._replace(keep=keep, real=keep, masked=not found.alone))

    def _hides_nothing(self, kwargs: dict[str, Any]) -> bool:
        """Whether a mask was made for tracing alone; see `UnmaskedImages`."""
        mask = kwargs.get(self._vtok.spec.mask)
        made = torch.compiler.is_compiling() and self._vtok.run.unmasked
        return made and mask is not None and mask.dtype == torch.bool

    def _surroundings(self, x: Tensor, state: TokenState, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask and rotary table for the tokens that are left, sizes and padding added to the mask."""
        spec = self._vtok.spec
        if kwargs.get("is_causal"):
            raise UnsupportedModelError("is_causal=True has no meaning once tokens are merged or moved; vtok patches encoders")
        if (state.real is not None and not state.masked) or (kwargs and self._hides_nothing(kwargs)):
            # what replaces upstream's mask is N times smaller
            kwargs[spec.mask] = None
        mask = kwargs.get(spec.mask) if spec.own_mask is None else spec.own_mask(self, kwargs)
        device = x.device.type
        bias = None
        if state.size is not None or state.keep is not None:
            dtype = torch.get_autocast_dtype(device) if autocasts(device) else x.dtype  # that queries will have
            bias = log_size_bias(state, dtype, self._vtok.run.prop_attn)
        why = None if bias is None or self._vtok.stepwise else self._vtok.attend.refuses_bias(spec.attention(self))
        if why is not None:
            raise UnsupportedModelError(
                f"{type(self).__name__} must see the sizes of merged tokens and which rows are padding: {why}"
            )
        mask = gather_mask(mask, state)
        if state.masked and mask is not None and state.keep is not None and mask.shape[-2] > 1:
            mask = mask.masked_fill(~state.keep[:, None, :, None], mask.dtype == torch.bool)  # no row may lose all its keys
        mask = add_bias(mask, bias)
        if mask is not None or spec.mask in kwargs:
            kwargs[spec.mask] = mask
        if spec.rope is not None:
            kwargs[spec.rope] = gather_positions(kwargs.get(spec.rope), state)
        return kwargs

    def _split(self, x: Tensor, state: TokenState, kwargs: dict[str, Any]) -> tuple[Tensor, TokenState]:
        link = self._vtok
        spec, attend, attn = link.spec, link.attend, link.spec.attention(self)
        if link.stepwise and not torch.compiler.is_compiling():
            _check_unseen(attn)
        place = None if link.site is None else link.site.place
        bias = kwargs.get(spec.mask)
        rope = kwargs.get(spec.rope) if spec.rope else None
        h = chain(self, spec.pre1, x)
        packs = link.stepwise and rope is None and place in (None, Place.BLOCK_PRE) and not self.training
        real = None
        if link.stepwise:
            real = self._real(state, x.shape[1]) if packs else None
            projected = (
                attend.project(attn, h, rope) if real is None else _apart(real, attend.project(attn, real.together(h), None))
            )
            view = projected_view(attend, attn, projected, bias)
            rows = out = None
            if place is Place.BLOCK_PRE and link.reducer is not None:
                plan = link.decide(x, state, view)
                rows = None if plan is None else plan.keep  # rows that go attend no more, but still serve as keys and values
                out = link.reducer.attention(state, view, rows)
                x, state = link.move(x, state, plan)
            out = sdpa(attend, attn, projected, bias, rows) if out is None else out.transpose(1, 2).flatten(2)
            h = h if rows is None else take_rows(h, rows)
            real = self._real(state, x.shape[1]) if packs else None
            if real is not None:
                x, h, out = real.together(x), real.together(h), real.together(out)
            h = attend.output(attn, out, h)
        else:
            h = attend.call(attn, h, kwargs)
            view = tapped_view(attend, attn, link.run, bias, rope, link.needs)
        x = x + chain(self, spec.post1, h)
        if place is Place.BLOCK_MID:
            x, state = link.move(x, state, link.decide(x, state, view))
        x = x + chain(self, spec.post2, getattr(self, spec.mlp)(chain(self, spec.pre2, x)))
        x = x if real is None else real.apart(x)
        if place is Place.BLOCK_END:
            x, state = link.move(x, state, link.decide(x, state, view))
        return x, state

    def _real(self, state: TokenState, length: int) -> RealRows | None:
        """The rows that the layers of this block are shown; `None` = all."""
        real = real_rows(state, length)
        return real if real is not None and alone(self, self._vtok.spec.attention(self)) else None


def _check_unseen(attn: nn.Module) -> None:
    """Raises if somebody looks at an attention module, or changed it, whose layers are called one by one."""
    theirs = [hook for hook in _hooks(attn) if not isinstance(hook, Hook) and not _records(hook)]
    if theirs:  # what a profiler, say, puts on all modules alike looks on
        everywhere = {_kind(hook) for child in attn.children() for hook in _hooks(child)}
        theirs = [hook for hook in theirs if _kind(hook) not in everywhere]
    wrapped = "forward" in attn.__dict__ and "_hf_hook" not in attn.__dict__ and not is_own(attn, "forward")
    if theirs or wrapped:
        raise UnsupportedModelError(
            f"somebody {'hooked' if theirs else 'replaced the forward of'} the {type(attn).__name__} of a block in which vtok "
            "calls the layers of attention one by one, so that this would not run; put it on the layers inside (qkv, proj), or "
            "choose a method that leaves attention whole, such as tome or random"
        )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return *module._forward_hooks.values(), *module._forward_pre_hooks.values()


def _kind(hook: Any) -> tuple[type, Any]:
    return type(hook), getattr(hook, "__qualname__", None)


def _records(hook: Any) -> bool:
    """Whether transformers put a hook there to record outputs; what it misses is refused where it is asked for."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _apart(real: RealRows, p: Projected) -> Projected:
    """Queries, keys and values of real rows alone, laid out as the padded batch."""
    q, k, v = (real.heads_apart(t) for t in (p.q, p.k, p.v))
    return Projected(q, k, k, v)


def check(tower: Tower, steps: dict[int, tuple[Site, Reducer]]) -> None:
    """Raises whatever `install` and the adapter's `attach` would raise; changes nothing."""
    first = min(steps, default=len(tower.blocks))
    seen: dict[int, int] = {}
    for i, block in enumerate(tower.blocks):
        if seen.setdefault(id(block.module), i) != i:
            raise UnsupportedModelError(
                f"blocks {seen[id(block.module)]} and {i} are one {type(block.module).__name__}, which runs several times in a "
                "pass; vtok tells blocks apart by their modules. Give the tower a copy of it for every place (the copies may "
                "share their weights)"
            )
        link = _link(i, block, TokenTracker(0, 0, False, False), steps.get(i))
        if i >= first:
            _check_own(i, block, link)
        check_forward(block.module, block.spec.mixin or ReducingBlock)


def _check_own(index: int, block: Block, link: Link) -> None:
    """Raises if a class of somebody's own has a forward that would not run."""
    for own in (None if link.whole else block.own_forward, block.own_attention if link.stepwise else None):
        if own is not None:
            raise UnsupportedModelError(
                f"block {index}: {qualified_name(own)} has a forward of its own, which vtok would not run where tokens leave: "
                "there it calls the children one by one, as the class is built that this one derives from. Put what is "
                "different into children (norms, projections, MLP), or describe the class to vtok (CONTRIBUTING.md)"
            )


def install(blocks: tuple[Block, ...], run: TokenTracker, steps: dict[int, tuple[Site, Reducer]]) -> None:
    """Swaps the classes of a tower's blocks and hooks what their methods need. `check` comes first."""
    merges = any(reducer.sizes for _, reducer in steps.values()) or (run.patch is not None and run.patch.merges)
    for i, block in enumerate(blocks):
        link = _link(i, block, run, steps.get(i))
        link.seeds, link.merges = i == 0 and bool(steps) and block.spec.padding_mask is not None, merges
        block.module.__dict__["_vtok"] = link
        swap_class(block.module, block.spec.mixin or ReducingBlock)
        if link.reducer is not None and not link.stepwise and block.spec.mixin is None:
            place_taps(block.attend, block.attention, run, link.reducer.needs)


def _link(index: int, block: Block, run: TokenTracker, step: tuple[Site, Reducer] | None) -> Link:
    spec, attend = block.spec, block.attend
    if step is None:
        return Link(run, index, spec, attend, stepwise=not attend.takes_bias)
    site, reducer = step
    if spec.mixin is not None and type(reducer).attention is not Reducer.attention:
        raise UnsupportedModelError(
            f"block {index}: {type(block.module).__name__} attends patch by patch, and this method computes the attention of "
            "whole tokens itself; leave its parameter for that out (ats: parity)"
        )
    missing = reducer.needs - set(attend.taps)
    pre = site.place is Place.BLOCK_PRE
    stepwise = not spec.whole and (pre or bool(missing) or not attend.takes_bias)
    if (stepwise and not attend.splits) or (missing and not stepwise):
        raise UnsupportedModelError(
            f"block {index}: {type(block.attention).__name__} does not show {', '.join(sorted(missing or reducer.needs))}, "
            "which this method looks at"
        )
    return Link(run, index, spec, attend, site, reducer, stepwise)
