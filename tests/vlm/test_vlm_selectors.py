"""Every method that chooses among visual tokens by itself, on tiny vision-language models: what is dropped is exactly gone,
with a cache, padding, several images and beams; a batch is its rows; counts are as planned; configs survive a file. One pass
over every family of models is checked with the support matrix."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from helpers_todre import kernel_of, row_of
from torch import Tensor
from vlm_zoo import MaskOracle, assert_same, build, generate, inputs

import vtok
from vtok.capabilities import search_space
from vtok.core.prompt import View
from vtok.core.search_space import draw
from vtok.core.tokens import Place
from vtok.patches.hf_vlm.families import find
from vtok.patches.hf_vlm.install import pruner_of
from vtok.testing import prompt_oracle

METHODS: dict[str, dict[str, Any]] = {
    "divprune": {"keep": 0.4},
    "fastv": {"keep": 0.4},
    "cdpruner": {"keep": 0.4},
    "dart": {"keep": 0.6, "visual_pivots": 2, "text_pivots": 1},
    "sparsevlm": {},
    "pyramiddrop": {},
}
# Least share of the stated MACs of deciding that a counter finds: SparseVLM's are a bound, as if all text rated.
FOUND = {"sparsevlm": 0.3}
# Where a batch can be taken apart: each prompt with its own images.
ROWS = ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "Gemma3", "PaliGemma"]


def patched(name: str, method: str, **params: Any) -> Any:
    return vtok.patch(build(name, kernel_of(name)), method, **{**METHODS[method], **params})


def alive(model: Any, values: dict[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What a patched model let into every decoder layer of these prompts, and what it averaged in front of it."""
    generate(model, values, steps=1)
    (vlm,) = find(model)
    last = pruner_of(vlm).last
    return prompt_oracle._alive(last, len(vlm.text.layers)), prompt_oracle.folds(last)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "Gemma3"])
def test_a_padded_prompt_without_positions(name: str, method: str, seed: int) -> None:
    """`forward` numbers the columns of a row with its padding, `generate` without; the model sees no difference."""
    values, model = inputs(name, seed), patched(name, method)
    real = values["attention_mask"].bool()
    assert not bool(real[:, 0].all())
    with torch.no_grad():
        found = model(**values).logits
        expected = model(**values, position_ids=(real.cumsum(1) - 1).clamp_min(0)).logits
    assert_same(found[:, -1], expected[:, -1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen2.5-VL", "PaliGemma"])
def test_generation(name: str, method: str) -> None:
    """With a cache, without one, and with beams: the masked whole prompt says what comes out."""
    values, model = inputs(name), patched(name, method)
    layers, into = alive(model, values)
    assert not all(bool(rows.all()) for rows in layers.values())

    def beams(asked: Any) -> Tensor:
        return asked.generate(**copy.copy(values), max_new_tokens=4, num_beams=2, do_sample=False)

    with MaskOracle(build(name, kernel_of(name)), layers, into) as oracle:
        expected, ranked = generate(oracle.model, values, steps=5), beams(oracle.model)
    assert_same(generate(model, values, steps=5), expected)
    assert_same(generate(model, values, steps=5, use_cache=False), expected)
    assert torch.equal(beams(model), ranked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROWS)
def test_a_batch_is_its_rows(name: str, method: str) -> None:
    values, model = inputs(name), patched(name, method)
    together = generate(model, values, steps=3)
    rows = vtok.info(model).prompts[0].rows
    for b in range(2):
        alone = generate(model, row_of(name, values, b), steps=3)
        assert (alone[1][0] - together[1][b]).abs().max() <= 1e-5 * max(1.0, float(together[1].abs().max()))
        assert [row.tokens_out[0] for row in vtok.info(model).prompts[0].rows] == [row.tokens_out[b] for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_without_an_image_and_padding_on_either_side(method: str, side: str) -> None:
    """Also a prompt of nothing but two images and a word, and one of two words."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, 110, (count,), generator=generator).tolist()

    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    rows = [[1, *words(3), *[119] * 16, *words(7)], [1, *words(5)], [*[119] * 16, *words(1), *[119] * 16], words(2)]
    shown = [pixels[:1], None, pixels[1:], None]
    longest = max(map(len, rows))
    left = side == "left"
    ids = torch.tensor([[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows])
    gaps = [[False] * (longest - len(r)) for r in rows]
    real = torch.tensor([gap + [True] * len(r) if left else [True] * len(r) + gap for gap, r in zip(gaps, rows)])
    model = patched("LLaVA-1.5", method)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=real.long(), pixel_values=pixels).logits
        for b, row in enumerate(rows):
            pictures = {} if shown[b] is None else {"pixel_values": shown[b]}
            alone = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **pictures)
            first = 0
            if pictures:  # what is dropped in front of the first token that stays has no output of its own
                (vlm,) = find(model)
                first = int(prompt_oracle._alive(pruner_of(vlm).last, 4)[3][0].int().argmax())
            found, expected = together[b][real[b]][first:], alone.logits[0, first:]
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_plan(method: str) -> None:
    """One image of 16 visual tokens and 24 other tokens; the bits are back afterwards."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, *[119] * 16, *torch.randint(3, 110, (23,), generator=generator).tolist()]])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    model = build("LLaVA-1.5")
    with torch.no_grad():
        before = model(**values).logits
        planned = vtok.plan(model, method, **METHODS[method], prompt={"images": 1, "text_tokens": 24}).estimate
        vtok.patch(model, method, **METHODS[method])
        model(**values)
        found = vtok.info(model).prompts[0].estimate
        assert planned.exact
        assert [row.visual for row in planned.layers] == [row.visual for row in found.layers]
        assert planned.reduction_macs == found.reduction_macs > 0
        vtok.unpatch(model)
        assert torch.equal(model(**values).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_counter_finds_what_the_closed_form_says(method: str) -> None:
    from vtok.eval.benchmarks.flops import count_prompt_macs

    values = row_of("LLaVA-1.5", inputs("LLaVA-1.5"), 1)
    model = patched("LLaVA-1.5", method)
    counted = count_prompt_macs(model, values)
    found = vtok.info(model).prompts[0].estimate
    assert counted.reduction <= 1.02 * found.reduction_macs
    assert counted.reduction >= FOUND.get(method, 0.98) * found.reduction_macs


@pytest.mark.parametrize("method", METHODS)
def test_budgets_and_files(method: str, tmp_path: Any) -> None:
    prompt, model = {"images": 3, "text_tokens": 10}, build("LLaVA-1.5")
    vtok.patch(model, method, flops=1.0, prompt=prompt)
    assert vtok.info(model).prompts[0].budget.reached == 1.0
    vtok.patch(model, method, flops=0.85, prompt=prompt)
    assert abs(vtok.info(model).prompts[0].budget.reached - 0.85) <= 0.05
    vtok.patch(model, method, **METHODS[method])
    (config,) = vtok.info(model).prompts[0].configs
    vtok.save_config(model, tmp_path / "run.json")
    other, values = vtok.patch(build("LLaVA-1.5"), tmp_path / "run.json"), inputs("LLaVA-1.5")
    assert vtok.info(other).prompts[0].configs == (config,)
    assert torch.equal(generate(other, values, steps=2)[1], generate(model, values, steps=2)[1])


@pytest.mark.parametrize("method", METHODS)
def test_budget_candidates_start_with_a_no_op_and_never_ease(method: str) -> None:
    """A FLOPs budget is found by bisection over this order; so it is for every schedule that a search may draw."""
    (vlm,) = find(build("LLaVA-1.5"))
    info, config = dataclasses.replace(vlm.info, depth=32), vtok.METHODS.get(method)()
    steps = [config.budget_candidates(info)]
    try:
        space = search_space(config, info)
    except vtok.ConfigError:
        assert method == "divprune"  # it acts once, in one place, and has nothing else to choose
        space = {}
    if space:
        points = [draw(space, random.Random(seed)) for seed in range(3)]
        steps += [config.candidates_at(info, point) for point in points]
        assert len({candidates[1] for candidates in steps}) > 1, "all points are one setting"
    for candidates in steps:
        before = None
        for config in candidates[:: max(1, len(candidates) // 200)]:
            reducer, visual = config.build_vlm(info), 576
            assert before is not None or reducer.sites == ()
            left = []
            for site in reducer.sites:
                if site.place is Place.IMAGE_FEATURES:
                    visual = reducer.feature_count(visual, (View(0, 24, 24),))
                else:
                    visual = reducer.layer_count(site, visual, 576)
                left.append(visual)
            assert not before or all(a >= b for a, b in zip(before, left))
            before = left
        assert before is not None and before[-1] < 30


PAIRS = [("divprune", "pyramiddrop"), ("cdpruner", "fastv"), ("divprune", "sparsevlm"), ("fastv", "todre")]


@pytest.mark.parametrize(
    ("name", "methods"),
    [*itertools.product(["LLaVA-1.5", "Qwen2.5-VL"], PAIRS), ("LLaVA-1.5", ("tome", "dart"))],
)
def test_together(name: str, methods: tuple[str, str]) -> None:
    """What one leaves is what the next sees; counts are those of the plan."""
    values, params = inputs(name), {"todre": {"keep": 1.0, "tau": 1.0}, "tome": {"r": 2}, **METHODS}
    configs = [vtok.METHODS.get(method).create(**params[method]) for method in methods]
    model = vtok.patch(build(name), configs)
    one = row_of(name, values, 1)
    with torch.no_grad():
        model(**one)
    rows = vtok.info(model).prompts[0].rows
    assert len(rows) >= 2 and all(a.tokens_out[0] > b.tokens_out[0] for a, b in itertools.pairwise(rows))
    if name == "LLaVA-1.5":
        text = int((one["input_ids"] != 119).sum())
        planned = vtok.plan(build(name), configs, prompt={"images": 1, "text_tokens": text}).estimate
        found = vtok.info(model).prompts[0].estimate
        pairs = [(a.visual, b.visual) for a, b in zip(planned.layers, found.layers)]
        assert all(a == b if planned.exact else a >= b for a, b in pairs), pairs
    evidence = prompt_oracle.check_prompts(model, values)
    assert evidence.fault is None, evidence


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    values = inputs("LLaVA-1.5")
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    model = vtok.patch(build("LLaVA-1.5").to(dtype), method, **METHODS[method])
    assert generate(model, half, steps=2)[1].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(patched("LLaVA-1.5", method), values, steps=2)[1].isfinite().all()
