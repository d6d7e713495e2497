"""Labels, losses and gradients of shortened prompts; outputs have the length of the prompt."""

import pytest
import torch
from vlm_zoo import EXAMPLES, Columns, MaskOracle, build, column_keeps, inputs, visual

import vtok

METHOD = Columns(((0, 2), (2, 3)))
MAIN = ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "Idefics3"]
EACH = [*MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES if name not in MAIN)]


def _build(name):
    return build(name, EXAMPLES[name].kernels[-1])


def _labels(model, values):
    """All text but the first token, which would be predicted from padding."""
    ids, real = values["input_ids"], values["attention_mask"] == 1
    return ids.masked_fill(visual(model, ids) | ~real | (real.cumsum(1) == 1), -100)


@pytest.mark.parametrize("name", EACH)
def test_logits_and_loss(name):
    """Logits of kept columns are the oracle's; a dropped one predicts what the last kept one before it does."""
    values, model = inputs(name), _build(name)
    labels = _labels(model, values)
    alive = column_keeps(model, values, METHOD.shares)
    with torch.no_grad():
        with MaskOracle(model, alive):
            expected = model(**values).logits
        found = vtok.patch(model, METHOD)(**values, labels=labels)
    assert found.logits.shape == expected.shape
    kept = alive[3] & (values["attention_mask"] == 1)
    assert (found.logits - expected)[kept].abs().max() <= 1e-5
    column = torch.arange(kept.shape[1]).where(kept, -1).cummax(1).values
    last = expected.gather(1, column.clamp_min(0)[..., None].expand_as(expected))
    real = (column >= 0) & (values["attention_mask"] == 1)
    assert (found.logits - last)[real].abs().max() <= 1e-5
    target = labels[:, 1:].where(real[:, :-1], -100)
    loss = torch.nn.functional.cross_entropy(last[:, :-1].flatten(0, 1), target.flatten())
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL"])
def test_loss_is_that_of_the_short_prompt(name):
    values, model = inputs(name), _build(name)
    values["labels"] = _labels(model, values)
    with torch.no_grad():
        short = model(**vtok.prune_inputs(model, values, "uniform", keep=0.4))
        long = vtok.patch(model, "uniform", keep=0.4)(**values)
    assert short.logits.shape[1] < values["input_ids"].shape[1] == long.logits.shape[1]
    assert long.loss.item() == pytest.approx(short.loss.item(), abs=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_gradient_checkpointing(name, reentrant):
    values, gradients = inputs(name), []
    for checkpoints in (False, True):
        model = vtok.patch(_build(name).train(), METHOD)
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**values, labels=_labels(model, values), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for parameter, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][parameter], gradient, atol=1e-6), parameter


def test_gradients_reach_the_tower_through_what_stays():
    """Training with a hard choice: the gradient is that of the short prompt."""
    values, gradients = inputs("LLaVA-1.5"), []
    model = _build("LLaVA-1.5").train()
    labels = _labels(model, values)
    alive = column_keeps(model, values, METHOD.shares)
    with MaskOracle(model, alive):
        logits = model(**values).logits
    kept = alive[3] & (values["attention_mask"] == 1)
    logits[kept].square().sum().backward()
    gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    model.zero_grad()
    vtok.patch(model, METHOD)(**values, labels=labels).logits[kept].square().sum().backward()
    found = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradients[0].abs().max() > 0
    assert torch.allclose(found, gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())
