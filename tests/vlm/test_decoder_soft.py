"""The training form of ATP in vision-language models: a gate of zeros and ones is pruning, gradients reach every threshold."""

import pytest
import torch
from atp_vlm import LAYERS, modules, prompts, saved
from helpers_errors import message_of
from vlm_zoo import build, generate, text_model

import vtok
from vtok.methods.atp.reducer import SoftATP
from vtok.patches.decoder.soft_gates import softened
from vtok.patches.hf_vlm.families import find

HARD = 1e9  # a temperature at which gates are 0 or 1


def _labels(values):
    """The last two tokens of each prompt are its answer."""
    return values["input_ids"].where(torch.arange(values["input_ids"].shape[1]) >= values["input_ids"].shape[1] - 2, -100)


def _gentle(seed, dtype=torch.float32):
    """Modules whose thresholds are all near one half, so that either branch decides about some tokens."""
    made = modules(seed).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.3)
    return made


def _frozen(name, kernel="sdpa"):
    return build(name, kernel).requires_grad_(False)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA, Qwen3 text", "LLaVA, Mistral text, window 9"])
def test_gates_of_zeros_and_ones_are_pruning(tmp_path, name, seed, kernel):
    """For every row that survives, in a batch with padding on the left; counts and thresholds too."""
    values, made = prompts(3, seed), modules(seed)
    model = build(name, kernel)
    with torch.no_grad():
        with softened(model, SoftATP(made, HARD)) as soft:
            found = model(**values, use_cache=False).logits
        expected = vtok.patch(model, "atp", weights=saved(tmp_path, seed))(**values).logits
    kept = soft.decisions[LAYERS[-1]].keep
    assert torch.equal(soft.counts.round(), soft.hard_counts.float())
    assert soft.hard_counts[:, -1].tolist() == list(vtok.info(model).prompts[0].rows[-1].tokens_out)
    assert (found - expected)[kept].abs().max() <= 1e-4
    assert (soft.total == 16).all()


def test_answers_ask_for_nothing(tmp_path):
    """With an answer behind the question the decisions are those of inference, which sees the question alone."""
    values, made = prompts(2, 1), modules(1)
    answer = _labels(values) != -100
    model = build("LLaVA-1.5")
    with torch.no_grad():
        with softened(model, SoftATP(made, HARD, answer)) as soft:
            model(**values, use_cache=False)
        with softened(model, SoftATP(made, HARD)) as leaky:
            model(**values, use_cache=False)
        question = {k: v if k == "pixel_values" else v[:, :-2] for k, v in values.items()}
        vtok.patch(model, "atp", weights=saved(tmp_path, 1))(**question)
    left = vtok.info(model).prompts[0].rows[-1].tokens_out
    assert soft.hard_counts[:, -1].tolist() == list(left)
    assert not torch.allclose(soft.decisions[1].theta_r, leaky.decisions[1].theta_r)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_gradients_reach_all_thresholds(kernel):
    """Of the language loss alone and of the budget alone, through a frozen model."""
    values = prompts(3, 2)
    for budget in (False, True):
        made, model = _gentle(2), _frozen("LLaVA-1.5", kernel)
        with softened(model, SoftATP(made, 10.0, _labels(values) != -100)) as soft:
            loss = model(**values, labels=_labels(values), use_cache=False).loss
        if budget:
            loss = soft.losses(target_tokens=4).extra
        loss.backward()
        for layer in LAYERS:
            head = made.head(layer)
            for part in (head.redundant, head.spatial, head.fc):
                assert part.weight.grad is not None and part.weight.grad.abs().sum() > 0, (layer, budget)
        assert all(p.grad is None for p in model.parameters())


def test_kernels_give_the_same_gradients():
    values, gradients = prompts(2, 4), []
    for kernel in ("eager", "sdpa"):
        made, model = modules(4), _frozen("LLaVA-1.5", kernel)
        with softened(model, SoftATP(made, 10.0)):
            model(**values, labels=_labels(values), use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-6, rtol=1e-3)


def test_gradients_are_right():
    """A step along the gradient changes the loss by as much as the gradient says."""
    values, made, model = prompts(2, 4), _gentle(4, torch.float64), _frozen("LLaVA-1.5").double()
    values["pixel_values"] = values["pixel_values"].double()

    def loss():
        with softened(model, SoftATP(made, 3.0)) as soft:
            logits = model(**values, use_cache=False).logits[:, -1]
        return logits.log_softmax(-1)[:, 5].sum() + soft.losses(target_tokens=4).extra

    loss().backward()
    parameters = list(made.head(3).parameters())  # the last module: no score behind it depends on its gates
    slope = sum(p.grad.square().sum() for p in parameters).sqrt().item()
    change = []
    for step in (0.02, -0.04):  # large ones: the model's norms and rotary tables are fp32 whatever its weights are
        with torch.no_grad():
            for p in parameters:
                p += step / slope * p.grad
            change.append(loss().item())
    assert (change[0] - change[1]) / 0.04 == pytest.approx(slope, rel=0.02)


def test_padding_changes_nothing():
    values, made, model = prompts(2, 6), modules(6), _frozen("LLaVA-1.5")
    results = []
    for extra in (0, 4):
        padded = {k: v if k == "pixel_values" else torch.nn.functional.pad(v, (extra, 0)) for k, v in values.items()}
        with softened(model, SoftATP(made, 10.0)) as soft:
            logits = model(**padded, use_cache=False).logits[:, extra:]
        real = values["attention_mask"] == 1
        results.append((logits[real], soft.counts, soft.losses(target_tokens=4).extra))
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-4)


def test_prompts_without_an_image_count_for_nothing():
    values, made, model = prompts(images=(1, 0), seed=2), modules(2), _frozen("LLaVA-1.5")
    with softened(model, SoftATP(made, 10.0)) as soft:
        model(**values, use_cache=False)
    assert soft.counts[1].tolist() == [0.0] * 3
    average = soft.losses(target_tokens=4).average.item()
    assert average == pytest.approx((16 + soft.counts[0].sum().item()) / 4)


def test_gradient_checkpointing():
    values, gradients = prompts(2, 3), []
    for checkpoints in (False, True):
        made, model = modules(3), build("LLaVA-1.5").train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with softened(model, SoftATP(made, 10.0)) as soft:
            loss = model(**values, labels=_labels(values), use_cache=False).loss
        (loss + soft.losses(target_tokens=4).extra).backward()
        gradients.append({n: p.grad for part in (made, model) for n, p in part.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name


def test_low_precision():
    values, made = prompts(2, 3), modules(3)
    for dtype in (torch.bfloat16, torch.float16):
        model = _frozen("LLaVA-1.5").to(dtype)
        with softened(model, SoftATP(made, 10.0)) as soft:
            logits = model(**{**values, "pixel_values": values["pixel_values"].to(dtype)}, use_cache=False).logits
        assert logits.isfinite().all()
        assert soft.counts.dtype == torch.float32


def test_nothing_is_left_behind():
    model, values = build("LLaVA-1.5"), prompts()
    before = generate(model, values)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyError), softened(model, SoftATP(modules(), 10.0)):
        raise KeyError
    with softened(model, SoftATP(modules(), 10.0)), torch.no_grad():
        assert not torch.equal(model(**values, use_cache=False).logits, before[1])
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(generate(model, values)[1], before[1])


# Refusals.


def _pass(model, soft, **values):
    with softened(model, soft):
        return model(**values)


def test_models_that_cannot_be_trained(tmp_path):
    values, soft = prompts(), SoftATP(modules(), 10.0)
    patched = vtok.patch(build("LLaVA-1.5"), "atp", weights=saved(tmp_path))
    assert "call vtok.unpatch(model) first" in message_of(vtok.ConfigError, _pass, patched, soft, **values)
    assert "Linear holds 0" in message_of(vtok.UnsupportedModelError, _pass, torch.nn.Linear(2, 2), soft)
    model = build("LLaVA-1.5")
    text_model(model).config._attn_implementation_internal = "flash_attention_2"
    assert "does not take; use 'sdpa' or 'eager'" in message_of(vtok.UnsupportedModelError, _pass, model, soft, **values)
    deeper = SoftATP(modules(depth=9, layers=(2, 8)), 10.0)
    assert "from the decoder layers 1 to 3 on, got 8" in message_of(vtok.ConfigError, _pass, build("LLaVA-1.5"), deeper)


def test_passes_that_cannot_be_trained(tmp_path):
    values, model = prompts(), build("LLaVA-1.5")
    with softened(model, SoftATP(modules(), 10.0)):
        model(**values)
        assert "covers one forward pass; open it anew" in message_of(vtok.StateError, model, **values)
    cache = generate(model, values, steps=2)[2].past_key_values
    later = {"input_ids": torch.ones(2, 1, dtype=torch.long), "past_key_values": cache}
    assert "no cache that holds text already" in message_of(vtok.StateError, _pass, model, SoftATP(modules(), 10.0), **later)
    (vlm,) = find(model)
    embedded = {"inputs_embeds": torch.zeros(1, 4, 64)}
    assert "pass input_ids" in message_of(vtok.StateError, _pass, model, SoftATP(modules(), 10.0), **embedded)
    ids = values["input_ids"][:1]
    packed = {"input_ids": ids, "pixel_values": values["pixel_values"][:1], "use_cache": False}
    packed["position_ids"] = (torch.arange(ids.shape[1]) % 9)[None]
    words = message_of(vtok.StateError, _pass, model, SoftATP(modules(), 10.0), **packed)
    assert "give every sample a row of its own" in words
    with softened(model, SoftATP(modules(), 10.0)):
        assert "was called on its own" in message_of(vtok.StateError, vlm.text, **embedded)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    text = message_of(vtok.StateError, _pass, model, SoftATP(modules(), 10.0), **values)
    assert "reentrant checkpoints lose the gradients of attention masks" in text
