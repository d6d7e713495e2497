"""What reduction must be equal to: masking and copies at full length, lossless duplicates, one image at a time for batches."""

import pytest
import torch
from zoo import BACKENDS, EXAMPLES, MERGING, STATIC, attach, build, covering, images, pairs, run

from vtok.eval.matrix import encoder as matrix
from vtok.registry import encoder_methods
from vtok.targets.resolve import run_of
from vtok.testing import encoder_checks

PAIRS = pairs()


def _kept_rows(run):
    """Original rows alive after each block, per image."""
    kept = {}
    for i, state in enumerate(run.current.states[1:]):
        if state.index is None:
            kept[i] = None
            continue
        real = torch.ones_like(state.index, dtype=torch.bool) if state.keep is None else state.keep
        kept[i] = [set(row[mask].tolist()) for row, mask in zip(state.index, real)]
    return kept


@pytest.mark.parametrize("method", encoder_methods())
@pytest.mark.parametrize("name", EXAMPLES)
def test_removing_equals_masking(name, method):
    """Every cell of the support matrix: rotary tables, relative biases, masks, sizes and pools follow the tokens that stay."""
    model, x = build(name, torch.float64), images(name, batch=matrix.IMAGES, dtype=torch.float64)
    found = matrix.judge(model, x, method, EXAMPLES[name].input_size)
    assert found["status"] != matrix.FAILED, found["reason"]
    assert (found["status"] == matrix.NO) == ((name, method) not in PAIRS)
    if found["status"] != matrix.NO:
        evidence = found["evidence"]
        assert all(left < entered for entered, left in evidence.tokens)
        assert set(evidence.differences) == {"masked"} | ({"copies"} if method in MERGING else set())
        assert max(evidence.differences.values()) <= 1e-10


def _four_colours(name):
    """16 identical patches of each of four colours, scattered: in a regular layout one colour may come to lie on every second
    row, where ToMe's matching finds it no partner of its own; whether it does is up to rounding."""
    channels, height, width = EXAMPLES[name].input_size
    colours = torch.tensor([[1.0, -1.0, 0.5], [-0.7, 0.9, 1.2], [0.3, 1.1, -1.3], [-1.2, -0.4, 0.8]], dtype=torch.float64)
    patches = colours.repeat(16, 1)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    x = patches.T.reshape(1, channels, 8, 8).repeat_interleave(height // 8, 2).repeat_interleave(width // 8, 3)
    return torch.cat([x, x.flip(1)])


def _has_positions(name):
    """Whether attention itself knows positions (or a convolution mixed them in), so that equal patches become unequal."""
    model = build(name)
    tables = any(
        hasattr(m, "relative_position_bias_table") and m.relative_position_bias_table is not None for m in model.modules()
    )
    shared = getattr(model, "rel_pos_bias", None) is not None
    rotary = any("rope" in child and module is not None for m in model.modules() for child, module in m._modules.items())
    return tables or shared or rotary or "hybrid" in name


LOSSLESS = [p for p in PAIRS if p[1] in MERGING and not _has_positions(p[0])]


def test_lossless_merging_covers_every_pool():
    pools = {"ViT average pool", "ViT average and maximum pool", "ViT maximum pool", "ViT map pool (SigLIP)", "EVA map pool"}
    merged = {name for name, _ in LOSSLESS}
    assert {f"timm: {pool}" for pool in pools} <= merged
    if "transformers" in BACKENDS:
        heads = {n for n in EXAMPLES if n.startswith("transformers: ") and ("average" in n or "attention pool" in n)}
        assert len(heads) >= 7
        assert heads - merged == {"transformers: BEiT relative bias, average pool"}


@pytest.mark.parametrize(("name", "method"), LOSSLESS)
def test_merging_duplicates_is_lossless(name, method):
    """Identical patches, no position embedding: whatever merges, the size bias and the weighted pool make up for it."""
    model, x = build(name, torch.float64), _four_colours(name)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if any(word in parameter_name for word in ("pos_embed", "positional_embedding", "position_embedding")):
                p.zero_()
        reference = model(x)
        attach(name, model, method)
        merged = model(x)
    run = run_of(model)
    assert run.current.tokens(run.depth) < run.current.length - 15
    assert (merged - reference).abs().max() <= 1e-9 * reference.abs().max()


@pytest.mark.parametrize(("name", "method"), covering(PAIRS, 1))
def test_a_batch_equals_one_image_at_a_time(name, method):
    run(encoder_checks.check_batch, name, method, batch=4, dtype=torch.float64)


@pytest.mark.parametrize(("name", "method"), covering(PAIRS, 2))
def test_plans_count_the_tokens_that_stay(name, method):
    run(encoder_checks.check_counts, name, method)


def test_ats_keeps_the_same_ids_alone_and_in_any_batch():
    name = "timm: ViT"
    model, x = build(name, torch.float64), images(name, batch=6, dtype=torch.float64)
    attach(name, model, "ats", num_tokens=40)
    run = run_of(model)
    with torch.no_grad():
        model(x)
        together = _kept_rows(run)
        counts = {len(rows) for rows in together[3]}
        assert len(counts) > 1, "all images kept the same number: the test says nothing"
        for order in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
            model(x[order])
            for block, rows in _kept_rows(run).items():
                assert rows == (None if together[block] is None else [together[block][b] for b in order])


@pytest.mark.parametrize("name", [n for n, m in PAIRS if m == "ats"])
def test_ats_drop_equals_mask(name):
    model, x = build(name, torch.float64), images(name, batch=4, dtype=torch.float64)
    with torch.no_grad():
        dropped = attach(name, model, "ats", num_tokens=40)(x)
        shapes = [run_of(model).current.tokens(i) for i in range(5)]
        masked = attach(name, model, "ats", num_tokens=40, **STATIC["ats"])(x)
        fixed = [run_of(model).current.tokens(i) for i in range(5)]
    assert (dropped - masked).abs().max() <= 1e-10 * masked.abs().max()
    assert shapes[-1] <= fixed[-1]


@pytest.mark.parametrize("method", encoder_methods())
def test_prefix_tokens_stay_in_front(method):
    for name in ("timm: ViT qk-norm, LayerScale, 4 registers", "timm: DeiT distilled", "timm: DINOv3 rotary, 4 registers"):
        model, x = build(name), images(name)
        attach(name, model, method, trace=True)
        with torch.no_grad():
            model(x)
        run = run_of(model)
        final, p = run.current.final, run.num_prefix
        assert final.index[:, :p].tolist() == [list(range(p))] * len(x)
        assert final.group[:, :p].tolist() == [list(range(p))] * len(x)
        if final.size is not None:
            assert (final.size[:, :p] == 1).all()
            assert (final.size.sum(1) == run.current.length).all()
