"""`apply_plan` and `unmerge`, against loops over lists of tokens."""

import pytest
import torch
from helpers_golden import assert_close, assert_equal, start
from hypothesis import given
from hypothesis import strategies as st
from strategies import Shape, normal, positive, properties, random_plan, seeds, shapes

import vtok
from vtok.core.reduction import Plan, apply_plan, unmerge
from vtok.core.tokens import TokenState


def members(plan: Plan, b: int) -> list[list[int]]:
    """For every output row of image b the input rows in it, the one that stays first."""
    rows = [[int(i)] for i in plan.keep[b]]
    if plan.src is not None and plan.dst is not None:
        for source, row in zip(plan.src[b].tolist(), plan.dst[b].tolist()):
            rows[row].append(source)
    return rows


@properties
@given(shapes(), st.booleans(), seeds)
def test_every_row_is_the_mean_of_its_members_weighted_by_size(shape: Shape, sized: bool, seed: int) -> None:
    x, plan = normal(seed, shape.batch, shape.n, shape.width), random_plan(shape, True, seed)
    size = positive(seed, shape.batch, shape.n) if sized else None
    out, state = apply_plan(x, start(x, shape.num_prefix, size), plan)
    weight = torch.ones(shape.batch, shape.n, dtype=x.dtype) if size is None else size
    assert state.size is not None and state.size.dtype == x.dtype
    for b in range(shape.batch):
        for row, ids in enumerate(members(plan, b)):
            total = weight[b, ids].sum()
            assert_close(state.size[b, row], total, 1e-12)
            assert_close(out[b, row], (x[b, ids] * weight[b, ids, None]).sum(0) / total, 1e-12)
    assert_close(state.size.sum(1), weight.sum(1), 1e-12)  # no patch is lost


@properties
@given(shapes(), st.booleans(), seeds)
def test_given_weights_and_plain_means(shape: Shape, sized: bool, seed: int) -> None:
    x, plan = normal(seed, shape.batch, shape.n, shape.width), random_plan(shape, True, seed)
    assert plan.src is not None
    size = positive(seed, shape.batch, shape.n) if sized else None
    given_weight = positive(seed + 1, *plan.src.shape)
    weighted, sized_state = apply_plan(x, start(x, shape.num_prefix, size), plan._replace(weight=given_weight))
    plain, plain_state = apply_plan(x, start(x, shape.num_prefix, size), plan._replace(use_size=False))
    assert plain_state.size is None
    # The weights say how features are mixed; a token stands for as many patches as it has swallowed, whatever they weighed.
    assert_close(sized_state.size, apply_plan(x, start(x, shape.num_prefix, size), plan)[1].size, 1e-12)
    weight = torch.ones(shape.batch, shape.n, dtype=x.dtype) if size is None else size
    weight = weight.scatter(1, plan.src, given_weight)
    for b in range(shape.batch):
        for row, ids in enumerate(members(plan, b)):
            assert_close(plain[b, row], x[b, ids].mean(0), 1e-12)
            assert_close(weighted[b, row], (x[b, ids] * weight[b, ids, None]).sum(0) / weight[b, ids].sum(), 1e-12)


@properties
@given(shapes(), st.booleans(), seeds)
def test_rows_that_nothing_is_folded_into_are_copied_bit_for_bit(shape: Shape, merge: bool, seed: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, plan = normal(seed, shape.batch, shape.n, shape.width, dtype=dtype), random_plan(shape, merge, seed)
        out, _ = apply_plan(x, start(x, shape.num_prefix), plan)
        assert_equal(out[:, : shape.num_prefix], x[:, : shape.num_prefix])
        for b in range(shape.batch):
            for row, ids in enumerate(members(plan, b)):
                if len(ids) == 1:
                    assert_equal(out[b, row], x[b, ids[0]])


@properties
@given(shapes(), st.booleans(), st.booleans(), seeds)
def test_the_token_map_follows_every_original_token(shape: Shape, first: bool, second: bool, seed: int) -> None:
    """Two plans on tokens that are unit vectors: what a row holds can be read off its features."""
    x = torch.eye(shape.n, dtype=torch.float64).expand(shape.batch, -1, -1)
    state = start(x, shape.num_prefix)
    once, state = apply_plan(x, state, random_plan(shape, first, seed))
    twice, state = apply_plan(once, state, random_plan(shape._replace(n=once.shape[1]), second, seed + 1))
    assert state.group is not None and state.index is not None
    for b in range(shape.batch):
        for token in range(shape.n):
            holding = twice[b, :, token].nonzero().flatten().tolist()
            assert holding == ([] if state.group[b, token] < 0 else [state.group[b, token]])
        for row, token in enumerate(state.index[b].tolist()):
            assert state.group[b, token] == row  # a row is named after a token that lives in it
    back = unmerge(twice, state, fill=-7.0)
    dropped = state.group < 0
    assert (back[dropped] == -7).all()
    assert_equal(back[~dropped], twice[torch.arange(shape.batch)[:, None], state.group.clamp_min(0)][~dropped])


@properties
@given(shapes(), seeds)
def test_merging_in_two_steps_is_merging_at_once(shape: Shape, seed: int) -> None:
    x, size = normal(seed, shape.batch, shape.n, shape.width), positive(seed, shape.batch, shape.n)
    plan = random_plan(shape, True, seed)
    once, state = apply_plan(x, start(x, shape.num_prefix, size), plan)
    again = random_plan(shape._replace(n=once.shape[1]), True, seed + 1)
    twice, state = apply_plan(once, state, again)
    assert state.group is not None and state.size is not None
    total = torch.zeros_like(state.size).scatter_add(1, state.group, size)
    summed = torch.zeros_like(twice).scatter_add(1, state.group[..., None].expand_as(x), x * size[..., None])
    assert_close(state.size, total, 1e-12)
    assert_close(twice, summed / total[..., None], 1e-12)


@properties
@given(shapes(), seeds)
def test_dropping_moves_sizes_padding_and_positions_along(shape: Shape, seed: int) -> None:
    x, size = normal(seed, shape.batch, shape.n, shape.width), positive(seed, shape.batch, shape.n)
    real = positive(seed + 1, shape.batch, shape.n) > 1.5
    position = torch.arange(100, 100 + shape.n).expand(shape.batch, -1)
    plan = random_plan(shape, False, seed)
    out, state = apply_plan(x, start(x, shape.num_prefix, size, real)._replace(index=position), plan)
    for b, rows in enumerate(plan.keep.tolist()):
        assert_equal(out[b], x[b, rows])
        assert state.size is not None and state.keep is not None and state.index is not None
        assert_equal(state.size[b], size[b, rows])
        assert_equal(state.keep[b], real[b, rows])
        assert_equal(state.index[b], position[b, rows])


def test_padding_rows_hold_no_original_token() -> None:
    x = normal(0, 2, 4, 3)
    keep = torch.tensor([[0, 2, 0], [0, 1, 3]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    _, state = apply_plan(x, start(x, 1), Plan(keep, valid=valid))
    assert_equal(state.keep, valid)
    assert_equal(state.group, torch.tensor([[0, -1, 1, -1], [0, 1, -1, 2]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype_and_counts_exactly(dtype: torch.dtype) -> None:
    """bf16 counts to 256, fp16 to 2048: sizes and means are fp32, whatever the features are."""
    n = 3001
    x = normal(0, 1, n, 2, dtype=dtype)
    everything = Plan(torch.zeros(1, 1, dtype=torch.int64), torch.arange(1, n)[None], torch.zeros(1, n - 1, dtype=torch.int64))
    out, state = apply_plan(x, start(x, 0), everything)
    assert out.dtype == dtype and state.size is not None and state.size.dtype == torch.float32
    assert state.size.item() == n
    assert_close(out.double(), x.double().mean(1, keepdim=True), 2 * torch.finfo(dtype).eps)


def test_features_never_widen_or_narrow() -> None:
    plan = Plan(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]]))
    for features, sizes in ((torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64)):
        x, size = normal(0, 1, 3, 2, dtype=features), positive(0, 1, 3, dtype=sizes)
        out, state = apply_plan(x, start(x, 1, size), plan)
        assert out.dtype == features and state.size is not None and state.size.dtype == sizes


def test_gradients_flow_to_every_member_in_proportion() -> None:
    x = normal(0, 1, 4, 2).requires_grad_()
    plan = Plan(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))
    out, _ = apply_plan(x, start(x, 1, torch.tensor([[1.0, 3.0, 4.0, 1.0]], dtype=torch.float64)), plan)
    out[0, 1].sum().backward()
    assert x.grad is not None
    assert_close(x.grad[0, :, 0], torch.tensor([0, 3 / 8, 4 / 8, 1 / 8], dtype=torch.float64), 1e-15)


def test_unmerge_without_a_map() -> None:
    x = normal(0, 1, 3, 2)
    untouched = TokenState(1, 3)
    assert unmerge(x, untouched) is x
    _, state = apply_plan(x, untouched, Plan(torch.tensor([[0, 2]])))
    with pytest.raises(vtok.StateError, match="patch with trace=True"):
        unmerge(x[:, :2], state)
