"""Three counts of the same thing must agree: the closed form (`plan`, `info`), torch's counter, and what modules really saw."""

import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vtok
from vtok.eval.benchmarks.flops import count_macs, formulas, links, watched_reduction
from vtok.registry import encoder_methods
from vtok.targets.resolve import towers

BATCH = 3


def static(method):
    """Row counts that do not depend on the image: in "drop" mode padding, and its cost, comes and goes with the batch."""
    return zoo.STATIC.get(method, {})


def patched(name, method, **extra):
    model = zoo.build(name)
    config = zoo.config_for(name, method, model, **extra)
    size = zoo.EXAMPLES[name].input_size
    plan = vtok.plan(model, config, input_size=size).estimate
    return vtok.patch(model, config, input_size=size), plan


@pytest.mark.parametrize("name", zoo.EXAMPLES)
def test_closed_form_of_unpatched_models_is_exact(name):
    model, images = zoo.build(name), zoo.images(name, BATCH)
    counted = count_macs(model, images)
    assert counted.reduction == 0 and counted.by_block == {}
    method = next(m for m in encoder_methods() if (name, m) in zoo.pairs([name]))
    assert counted.model == patched(name, method)[1].base_macs


@pytest.mark.parametrize(("name", "method"), zoo.covering(zoo.pairs(), 0))
def test_plan_info_and_counter_agree_exactly(name, method):
    model, plan = patched(name, method, **static(method))
    counted = count_macs(model, zoo.images(name, BATCH))
    seen = vtok.info(model).towers[0].estimate
    assert counted.model == seen.macs
    assert counted.reduction == seen.reduction_macs
    assert counted.by_block == {row.block: row.reduction_macs for row in seen.rows if row.reduction_macs}
    if plan.exact:
        assert (plan.macs, plan.reduction_macs) == (counted.model, counted.reduction)
    else:
        assert plan.macs >= counted.model
    assert counted.total == counted.model + counted.reduction


@pytest.mark.parametrize("name", [name for name, method in zoo.pairs() if method == "ats"])
def test_info_is_close_for_whatever_rows_ats_keeps(name):
    """In drop mode only; what a batch without padding saves is priced at most, not exactly."""
    model, plan = patched(name, "ats")
    counted = count_macs(model, zoo.images(name, BATCH))
    tower = vtok.info(model).towers[0]
    seen, mean = tower.estimate, tower.mean_estimate
    if mean is None:
        assert counted.model <= seen.macs <= 1.001 * counted.model
    else:  # layers that look at one token at a time may be shown no padding; attention is
        assert mean.macs <= counted.model <= seen.macs
    assert counted.reduction <= seen.reduction_macs <= counted.reduction + 0.003 * counted.model
    assert counted.total <= plan.macs + plan.reduction_macs


@pytest.mark.parametrize(("name", "method"), zoo.covering(zoo.pairs(zoo.FAMILIES), 2))
def test_reported_tokens_are_those_that_modules_see(name, method):
    model, _ = patched(name, method)
    images, rows = zoo.images(name, BATCH), {}
    blocks = towers(model, None)[0][1].blocks

    def watch(i):
        return lambda _module, args: rows.__setitem__(i, args[0].shape[:2].numel() // BATCH)

    for i, block in enumerate(blocks):
        (block.module if block.spec.whole else block.module.mlp).register_forward_pre_hook(watch(i))
    with torch.no_grad():
        model(images)
    tower = vtok.info(model).towers[0]
    for i, block in enumerate(tower.blocks):
        before_mlp = block.site in ("pre", "mid") and not blocks[i].spec.whole
        assert rows[i] == (block.tokens_out if before_mlp else block.tokens_in), i
    assert tower.blocks[-1].tokens_out < tower.blocks[0].tokens_in


@pytest.mark.parametrize(("r", "gmacs"), [(0, 1.25), (13, 0.73)])
def test_published_counts_of_deit_tiny(r, gmacs):
    model = vtok.patch(timm.create_model("deit_tiny_patch16_224").eval(), "tome", r=r)
    counted = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert round(counted.model / 1e9, 2) == gmacs
    assert counted.model == vtok.info(model).towers[0].estimate.macs


def test_batches_and_modes_do_not_change_the_count_per_image():
    model = zoo.attach("timm: ViT", zoo.build("timm: ViT"), "tome")
    counts = [count_macs(model, zoo.images("timm: ViT", batch)) for batch in (1, 2, 5)]
    assert len({(c.model, c.reduction) for c in counts}) == 1
    assert [c.images for c in counts] == [1, 2, 5]
    with torch.inference_mode():
        assert count_macs(model, zoo.images("timm: ViT")).model == counts[0].model


def test_reads_in_macs_and_in_flops():
    counted = count_macs(zoo.build("timm: ViT"), zoo.images("timm: ViT"))
    assert counted.gflops == 2 * counted.gmacs == pytest.approx(2e-9 * counted.total)
    assert "GMACs" in str(counted) and "GFLOPs (2x)" in str(counted)


def attend(backend, q_rows, mask):
    q, k, v = (
        torch.randn(2, 3, q_rows, 8),
        torch.randn(2, 3, 7, 8),
        torch.randn(2, 3, 7, 16 if backend is SDPBackend.MATH else 8),
    )
    bias = torch.randn(2, 1, 1, 7) if mask else None
    with sdpa_kernel(backend), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return counter.get_total_flops(), v.shape[-1]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("q_rows", [1, 7, 9])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_is_counted_on_every_path(backend, q_rows, mask):
    flops, width = attend(backend, q_rows, mask)
    assert flops == 2 * 2 * 3 * q_rows * 7 * (8 + width)


class Attention(nn.Module):
    """Fast path of torch's own modules, whose fused kernels hide their products from the counter."""

    def __init__(self, module):
        super().__init__()
        self.module = module.eval()

    def forward(self, x):
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(x, x, x, need_weights=False)[0]
        return self.module(x)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.MultiheadAttention(16, 2, batch_first=True), 5 * 16 * (4 * 16 + 2 * 5)),
        (nn.TransformerEncoderLayer(16, 2, 40, batch_first=True), 5 * 16 * (4 * 16 + 2 * 5) + 5 * 2 * 16 * 40),
    ],
)
def test_native_attention_kernels_are_counted(module, expected):
    assert count_macs(Attention(module), torch.randn(3, 5, 16)).total == expected


def test_other_products_are_counted():
    a, b = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        torch.mv(a[0], b[0, 0])
        torch.dot(a[0, 0], b[0, 0])
        torch.cdist(a, b, p=1.0)
    assert counter.get_total_flops() == 2 * (5 * 8 + 8 + 2 * 5 * 4 * 8)


def test_nothing_is_registered_for_the_process():
    before = dict(flop_registry)
    count_macs(zoo.build("timm: ViT"), zoo.images("timm: ViT"))
    assert flop_registry == before
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_watching_leaves_nothing_behind_even_after_an_error():
    model = zoo.attach("timm: ViT", zoo.build("timm: ViT"), "tome")

    def fail(_link):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), watched_reduction(model, fail):
        model(zoo.images("timm: ViT"))
    assert not any({"decide", "move"} & set(vars(link)) for link in links(model))
    model(zoo.images("timm: ViT"))
