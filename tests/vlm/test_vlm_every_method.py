"""All methods for prompts, one after the other: what plans, infos, budgets, files and searches say of them; which of them go
together; and that none whose counts are fixed asks the device for a number.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vlm_zoo import EXAMPLES, build, generate, inputs

import vtok
from vtok.capabilities import HasBudget, HasSearchSpace, candidates_at, prompt_reducer, search_space
from vtok.config import MethodConfig
from vtok.core.prompt import VLMReducer
from vtok.core.search_space import draw
from vtok.core.tokens import Place
from vtok.eval.benchmarks.selectors import Synthetic, _choice, _fresh
from vtok.patches.hf_vlm.families import find
from vtok.registry import METHODS
from vtok.testing.trials import trial

NAMES = [name for name in METHODS if METHODS.get(name).for_vlms()]
CALIBRATED = {"atp", "correlation"}  # need modules that were trained, or a threshold: tests of their own
VIDEO = {"evs", "fastvid", "vidcom2"}
PIXELS = {"pixel_dedup"}  # in front of packed towers, as many as an image has duplicates
STATED = [name for name in NAMES if name not in CALIBRATED]
# of which a budget sets the one number that there is, or whose modules were trained for one setting
NOTHING_TO_SEARCH = {"atp", "correlation", "divprune", "downsample", "evs", "pixel_dedup", "random", "uniform", "vidcom2"}
PROMPT = {"images": 1, "text_tokens": 8}


def setting(name: str) -> MethodConfig:
    return METHODS.get(name).create(**trial(name).prompt)


def family_for(name: str) -> str:
    return "LLaVA-OneVision" if name in VIDEO else "Qwen2.5-VL" if name in PIXELS else "LLaVA-1.5"


def model_for(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model that the method acts on, with prompts of which tokens leave."""
    model = build(family_for(name))
    if name not in VIDEO:
        return model, inputs(family_for(name))
    return model, EXAMPLES["LLaVA-OneVision"].videos(model, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STATED)
def test_plan_info_and_files_know_it(name: str, tmp_path: Any) -> None:
    config, (model, values) = setting(name), model_for(name)
    planned = vtok.plan(model, config, prompt=PROMPT)
    assert name in str(planned) and planned.estimate.layers
    before = build(family_for(name))
    expected = generate(before, values, steps=2)[1]
    vtok.patch(model, config)
    found = generate(model, values, steps=2)[1]
    assert found.isfinite().all()
    told = vtok.info(model)
    (prompt,) = told.prompts
    assert name in str(told) and prompt.configs == (config,)
    assert any(a > b for row in prompt.rows for a, b in zip(row.tokens_in, row.tokens_out)), "tokens leave"
    vtok.save_config(model, tmp_path / "vtok.json")
    saved = json.loads((tmp_path / "vtok.json").read_text())
    assert name in str(saved)
    again = vtok.patch(build(family_for(name)), tmp_path / "vtok.json")
    assert torch.equal(generate(again, values, steps=2)[1], found)
    assert torch.equal(generate(vtok.unpatch(model), values, steps=2)[1], expected)


@pytest.mark.parametrize("name", [name for name in STATED if name not in PIXELS])
def test_a_budget_sets_it(name: str) -> None:
    model, values = model_for(name)
    assert issubclass(METHODS.get(name), HasBudget)
    given = {"calibration": values} if name in VIDEO else {"prompt": PROMPT}
    vtok.patch(model, name, flops=0.85, **given)
    (prompt,) = vtok.info(model).prompts
    assert (prompt.budget is not None and "0.85" in str(prompt.budget)) or "85" in str(vtok.info(model))
    assert prompt.configs[0].knob(), "numbers, not the budget"


@pytest.mark.parametrize("name", NAMES)
def test_a_search_may_vary_it_or_says_why_not(name: str) -> None:
    info = find(build("LLaVA-1.5"))[0].info
    config = METHODS.get(name)()
    if name in NOTHING_TO_SEARCH:
        with pytest.raises(vtok.ConfigError, match=f"{name} has no schedule on vision-language models that could be searched"):
            search_space(config, info)
        return
    assert isinstance(config, HasSearchSpace)
    space = search_space(config, info)
    drawn = draw(space, random.Random(0))
    assert set(drawn) == set(space) and space
    found = candidates_at(config, info, drawn)
    assert len(found) > 1 and all(one.name == name for one in (found[0], found[len(found) - 1]))


# Which methods go together.
BEFORE = ["cdpruner", "divprune", "downsample", "fastervlm", "hired", "holov", "prumerge", "random", "todre", "uniform"]
BEFORE += ["visionzip", "vispruner"]
INSIDE = ["dart", "fastv", "pyramiddrop", "sparsevlm"]
PAIRS = list(itertools.product(BEFORE, INSIDE))


def test_the_pairs_are_all_that_the_sites_allow() -> None:
    info = find(build("LLaVA-1.5"))[0].info
    first, later = [], []
    for name in STATED:
        if name in VIDEO | PIXELS:
            continue
        config = setting(name).replace(**({"probe": None} if name == "todre" else {}))
        places = {site.place for site in prompt_reducer(config, info).sites}
        (first if places == {Place.IMAGE_FEATURES} else later).append(name)
    assert sorted(first) == sorted(BEFORE) and sorted(later) == sorted(INSIDE)


def together(pair: tuple[str, str]) -> None:
    """Each takes what it would take alone of what it is shown, and a batch is its prompts one by one."""
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    configs = [setting(name) for name in pair]
    if pair[0] == "todre":
        configs[0] = vtok.ToDRE(keep=0.5, probe=None)  # its second stage is another method inside the LLM
    alone = vtok.patch(model, configs[0])
    generate(alone, values, steps=1)
    (row,) = vtok.info(alone).prompts[0].rows
    vtok.patch(model, configs)
    logits = generate(model, values, steps=3)[1]
    rows = vtok.info(model).prompts[0].rows
    assert rows[0].tokens_in == row.tokens_in and rows[0].tokens_out == row.tokens_out
    assert len(rows) > 1 and rows[1].tokens_in == rows[0].tokens_out, pair
    assert all(a > b for a, b in zip(rows[-1].tokens_in, rows[-1].tokens_out)) or max(rows[-1].tokens_in) <= 5, pair
    first = int(values["attention_mask"][1].argmax())
    one = {
        "input_ids": values["input_ids"][1:, first:],
        "attention_mask": values["attention_mask"][1:, first:],
        "pixel_values": values["pixel_values"][-1:],
    }
    assert (generate(model, one, steps=3)[1] - logits[1:]).abs().max() < 5e-5 * max(1.0, float(logits.abs().max())), pair
    vtok.unpatch(model)


@pytest.mark.parametrize("pair", [PAIRS[i] for i in range(0, len(PAIRS), 5)], ids="+".join)
def test_some_pairs_go_together(pair: tuple[str, str]) -> None:
    together(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_goes_together(pair: tuple[str, str]) -> None:
    together(pair)


FIRST = [("evs", "fastv"), ("vidcom2", "dart"), ("fastvid", "pyramiddrop"), ("pixel_dedup", "fastv"), ("pixel_dedup", "random")]


@pytest.mark.parametrize("pair", FIRST, ids="+".join)
def test_methods_of_videos_and_pixels_go_with_later_ones(pair: tuple[str, str]) -> None:
    model, values = model_for(pair[0])
    vtok.patch(model, [setting(name) for name in pair])
    assert generate(model, values, steps=2)[1].isfinite().all()
    rows = vtok.info(model).prompts[0].rows
    assert len(rows) > 1 and rows[1].tokens_in == rows[0].tokens_out


# What is asked of the device.
ASKED = {"local_scalar_dense", "nonzero", "masked_select", "unique", "unique2", "equal", "is_nonzero"}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].strip("_")
        by_mask = name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        if name in ASKED or by_mask:
            raise AssertionError(f"a number is asked for: {func}")
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            raise AssertionError(f"numbers are asked for: {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_numbers_asked() -> Iterator[None]:
    """Fails where a number of a tensor is read on the host, or the size of a result depends on numbers."""
    with _Operators(), _Lists(), torch.no_grad():
        yield


# methods that ask for the number of text tokens or raters, or for counts that depend on the image; said so in their docstrings
ASKS = {"sparsevlm", "fastvid"}


def choice(name: str, **params: Any) -> tuple[VLMReducer, Any]:
    prompt = Synthetic.of(4 * 36, 4, 64, name in VIDEO)
    config = METHODS.get(name).create(**{**trial(name).prompt, **params})
    reducer = prompt_reducer(config, prompt.info())
    return reducer, _choice(reducer, prompt, reducer.sites[0])[0]


@pytest.mark.parametrize("name", [name for name in STATED if name not in ASKS | PIXELS])
def test_no_number_is_asked_for_where_counts_are_fixed(name: str) -> None:
    reducer, call = choice(name, **({"probe": None} if name == "todre" else {}))
    if name == "hired":  # the image decides how crops share
        reducer, call = choice_of_one_view("hired")
    assert reducer.fixed_counts
    call()  # what is cached by layout is made once
    with no_numbers_asked():
        call()


def choice_of_one_view(name: str) -> tuple[VLMReducer, Any]:
    prompt = Synthetic.of(36, 1, 64)
    reducer = prompt_reducer(setting(name), prompt.info())
    images = prompt.images(reducer)
    return reducer, lambda: reducer.features(_fresh(images))


@pytest.mark.parametrize("name", ["divprune", "visionzip", "holov", "fastv", "pyramiddrop", "evs"])
def test_nor_under_the_preset(name: str) -> None:
    _, call = choice(name, preset="official")
    call()
    with no_numbers_asked():
        call()


def test_the_watch_sees_what_it_is_for() -> None:
    x = torch.arange(4.0)
    for ask in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: int(x[0]), lambda: x.tolist()):
        with pytest.raises(AssertionError), no_numbers_asked():
            ask()
    _, call = choice("sparsevlm")
    with pytest.raises(AssertionError), no_numbers_asked():
        call()
