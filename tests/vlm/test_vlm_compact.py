"""positions="compact" between decoder layers: every layer counts what it holds anew, as some programs do, also in decoding.

The oracle is the unpatched model on the whole prompt: in every layer a mask hides what was dropped, and rotary tables are those
of the rank of each column among what is left.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from vlm_zoo import TOLERANCE, Columns, MaskOracle, assert_same, build, column_keeps, generate, inputs, text_model

import vtok
from vtok.patches.decoder.kv_cache import PromptState, Stage, cache_in

SHARES = ((1, 2), (3, 3))
FAMILIES = ["LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3", "PaliGemma"]


class CompactOracle(MaskOracle):
    """Also with positions by rank."""

    def __init__(self, model: Any, alive: dict[int, Tensor], real: Tensor):
        super().__init__(model, alive)
        self.real, self.rotary = real, text_model(model).rotary_emb

    def _hook(self, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = super()._hook(i, module, args, kwargs)
        x, cache = args[0], cache_in(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(i))
        there = self.alive[i] & self.real
        there = there.repeat_interleave(len(x) // len(there), 0)
        there = torch.cat([there, there.new_ones(len(x), max(past + x.shape[1] - there.shape[1], 0))], 1)
        position = (there.cumsum(1) - 1).clamp_min(0)[:, past : past + x.shape[1]]
        return args, {**kwargs, "position_ids": position, "position_embeddings": self.rotary(x, position)}


def oracle(name: str, values: dict[str, Tensor], shares: Any) -> CompactOracle:
    model = build(name)
    return CompactOracle(model, column_keeps(model, values, shares), values["attention_mask"].bool())


@pytest.mark.parametrize("shares", [SHARES, ((2, 0),), ((0, 2), (2, 3))])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_counts_anew(name: str, shares: Any) -> None:
    values = inputs(name)
    found = generate(vtok.patch(build(name), Columns(shares), positions="compact"), values)
    with oracle(name, values, shares) as whole:
        expected = generate(whole.model, values)
    assert_same(found, expected)
    if all(
        share for _, share in shares
    ):  # behind an image at the start that left as a whole only the distance to nothing grows
        kept = generate(vtok.patch(build(name), Columns(shares)), values)
        assert (kept[1] - found[1]).abs().max() > 1e-3, "positions do matter"


@pytest.mark.parametrize("options", [{"use_cache": False}, {"num_beams": 3}])
def test_without_a_cache_and_with_beams(options: dict[str, Any]) -> None:
    values = inputs("LLaVA-1.5")
    model = vtok.patch(build("LLaVA-1.5"), Columns(SHARES), positions="compact")
    found = model.generate(**values, max_new_tokens=5, do_sample=False, **options)
    with oracle("LLaVA-1.5", values, SHARES) as whole:
        assert torch.equal(found, whole.model.generate(**values, max_new_tokens=5, do_sample=False, **options))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("method", "params"),
    [("pyramiddrop", {}), ("sparsevlm", {"keep": [0.6, 0.3], "layers": [0, 1]}), ("fastv", {"keep": 0.4})],
)
def test_methods_whose_programs_count_anew(method: str, params: dict[str, Any], kernel: str) -> None:
    """A batch gives what its prompts give alone, and a prompt that is read at once what is read word by word."""
    values = inputs("LLaVA-1.5")
    model = vtok.patch(build("LLaVA-1.5", kernel), method, positions="compact", **params)
    together = generate(model, values)
    assert vtok.info(model).prompts[0].positions == "compact"
    first = int(values["attention_mask"][1].argmax())
    alone = {
        "input_ids": values["input_ids"][1:, first:],
        "attention_mask": values["attention_mask"][1:, first:],
        "pixel_values": values["pixel_values"][-1:],
    }
    logits = generate(model, alone)[1]
    assert (logits - together[1][1:]).abs().max() <= 10 * TOLERANCE * max(1.0, logits.abs().max().item())
    other = generate(vtok.patch(build("LLaVA-1.5", kernel), method, **params), values)
    assert (other[1] - together[1]).abs().max() > 1e-4


def test_gradients_flow_through_renumbered_layers() -> None:
    values = inputs("LLaVA-1.5")
    model = vtok.patch(build("LLaVA-1.5"), Columns(SHARES), positions="compact").train()
    logits = model(**values).logits
    with oracle("LLaVA-1.5", values, SHARES) as whole:
        expected = whole.model.train()(**values).logits
    last = values["input_ids"].shape[1] - 1
    assert torch.allclose(logits[:, last], expected[:, last], atol=TOLERANCE * float(expected.detach().abs().max()))
    logits[:, last].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in text_model(model).layers[3].parameters())


def test_slots_of_what_is_left() -> None:
    """Two rows of six columns, the second padded by two on the left; before the LLM column 3 left the first row."""
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    state = PromptState(6, real)
    later = Stage(torch.tensor([[0, 2, 5], [2, 4, 5]]), torch.tensor([[0, 2, 5], [2, 4, 5]]), False)
    slot, gone = state.anew(later)
    assert slot.tolist() == [[0, 1, 2], [2, 3, 4]] and gone.tolist() == [3, 1]
    before = torch.tensor([[0, 1, 2, 4, 5], [-1, 2, 3, 4, 5]])
    state.before = Stage(before, before, True)
    slot, gone = state.anew(Stage(torch.tensor([[-1, 0, 5], [2, 3, 5]]), torch.tensor([[-1, 0, 4], [1, 2, 4]]), True))
    assert slot.tolist() == [[-1, 0, 1], [1, 2, 3]] and gone.tolist() == [3, 1]


@pytest.mark.parametrize("name", ["Gemma3", "Qwen2.5-VL"])
def test_models_that_cannot_count_anew(name: str) -> None:
    with pytest.raises(vtok.UnsupportedModelError, match=r"positions='compact' numbers .* use positions='original'"):
        vtok.patch(build(name), Columns(((3, 2),)), positions="compact")
