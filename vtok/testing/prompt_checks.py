"""What every method for prompts must pass on every tiny vision-language model, as functions that raise AssertionError.

Models come unpatched and in eval mode, with their language head; `example` is what they were built from. Prompts are of the
first kind that the method takes and on which it acts: images, videos, pages cut into crops, one image each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import vtok
from vtok.capabilities import HasBudget
from vtok.config import MethodConfig
from vtok.errors import UnsupportedModelError
from vtok.patches.hf_vlm.examples import VLMExample
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.testing.encoder_checks import check_traces
from vtok.testing.prompt_oracle import TOLERANCE, check_any_prompts
from vtok.testing.tiny import alone, single_image, vlm_prompts

STEPS = 4  # of generation that are compared


@contextmanager
def _patched(model: Any, config: MethodConfig) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that prompts keep their length is no fault
        vtok.patch(model, config)
    try:
        yield model
    finally:
        vtok.unpatch(model)


def prompts(model: Any, example: VLMExample, config: MethodConfig) -> dict[str, Tensor]:
    """A batch of two prompts from which a method takes visual tokens; the model is left unpatched.

    Raises:
        UnsupportedModelError: the method takes none of the prompts that the example has.
    """
    refusal = None
    with _patched(model, config), torch.no_grad():
        for _, values in vlm_prompts(example, model):
            try:
                model(**values)
            except UnsupportedModelError as error:
                refusal = refusal or error
                continue
            rows = vtok.info(model).prompts[0].rows
            if rows and all(left < entered for entered, left in zip(rows[0].tokens_in, rows[-1].tokens_out)):
                return values
    if refusal is not None:
        raise refusal
    raise AssertionError(f"{config} takes no token from any prompt of {type(model).__name__}")


def check_masking(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """Every prompt loses visual tokens; logits and the words generated with a cache are those of the whole prompt in which what
    was taken is masked in every layer."""
    with _patched(model, config):
        fault = check_any_prompts(model, example, STEPS).fault
    assert fault is None, fault


def check_no_op(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """The mildest of a method's budget candidates changes nothing, bit for bit."""
    assert isinstance(config, HasBudget), f"{config.name} has no budget candidates"
    mildest = config.budget_candidates(find(model)[0].info)[0]
    values = prompts(model, example, config)
    with torch.no_grad():
        reference = model(**values).logits
        with _patched(model, mildest):
            found = model(**values).logits
    assert torch.equal(found, reference), f"{mildest} is the mildest candidate, and changes the output"


def check_batch(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """Every prompt of a padded batch keeps as many tokens and gets the logits that it gets alone."""
    values = prompts(model, example, config)
    each = alone(model, values)
    with _patched(model, config), torch.no_grad():
        together = model(**values).logits[:, -1]
        rows = vtok.info(model).prompts[0].rows
        for i, one in enumerate(each):
            logits = model(**one).logits[0, -1]
            far = float((logits - together[i]).abs().max() / together.abs().max())
            assert far <= TOLERANCE, f"prompt {i} alone differs by {far:.1e} of the largest logit"
            kept, wanted = vtok.info(model).prompts[0].rows[-1].tokens_out[0], rows[-1].tokens_out[i]
            assert kept == wanted, f"prompt {i} alone keeps {kept} visual tokens, in a batch {wanted}"


def check_order(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """What stays keeps its order in the prompt, and text stays."""
    values = prompts(model, example, config)
    with _patched(model, config), torch.no_grad():
        model(**values)
        pruner = pruner_of(find(model)[0])
        assert pruner is not None and pruner.last is not None
        last = pruner.last
    text = last.real & ~last.visual
    for layer, stage in last.stages.items():
        for row, places in enumerate(stage.column):
            there = places[places >= 0]
            assert (there.diff() > 0).all(), f"in front of layer {layer} columns of prompt {row} are out of order"
            lost = set(text[row].nonzero()[:, 0].tolist()) - set(there.tolist())
            assert not lost, f"in front of layer {layer} prompt {row} has lost text, columns {sorted(lost)}"


def check_counts(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """`vtok.plan` of a prompt with one image predicts the tokens of every decoder layer and their costs; it bounds the tokens
    where these depend on the image or the text."""
    found = single_image(model, example)
    assert found is not None, "the example has no prompt with one image"
    values, size = found
    vlm, ids = find(model)[0], values["input_ids"]
    text = int(sum((ids != token).long() for token in vlm.tokens.values()).eq(len(vlm.tokens)).sum())  # type: ignore[union-attr]
    prompt = {"images": 1, "text_tokens": text, **({} if size is None else {"input_size": size})}
    plan: Any = vtok.plan(model, config, prompt=prompt).estimate
    with _patched(model, config), torch.no_grad():
        model(**values)
        cost = vtok.info(model).prompts[0].estimate
    assert cost is not None and cost.base_macs == plan.base_macs
    ran, planned = [layer.tokens for layer in cost.layers], [layer.tokens for layer in plan.layers]
    if plan.exact:
        assert ran == planned, f"decoder layers see {ran} tokens, plan says {planned}"
        assert (cost.macs, cost.reduction_macs) == (plan.macs, plan.reduction_macs), "plan and pass have other costs"
    else:
        assert all(n <= most for n, most in zip(ran, planned)), f"decoder layers see {ran} tokens, at most {planned} by plan"


def check_unpatching(model: Any, example: VLMExample, config: MethodConfig) -> None:
    """A patch changes the output, no key of the `state_dict`, and leaves no trace."""
    values = prompts(model, example, config)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attributes = [set(m.__dict__) for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad():
        reference = model(**values).logits[:, -1]
        with _patched(model, config):
            assert list(model.state_dict()) == keys, "the patch changed the state_dict"
            assert not torch.equal(model(**values).logits[:, -1], reference), "the patch did nothing"
        assert torch.equal(model(**values).logits[:, -1], reference), "the unpatched model gives something else than before"
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks, "a hook is left"
    check_traces(model, classes, attributes)
