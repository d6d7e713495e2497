"""Caches of shortened prompts whose rows move, that were copied, taken apart or cut, or that another model goes on with."""

import copy
import inspect
import io

import pytest
import torch
from helpers_errors import message_of
from vlm_zoo import TOLERANCE, Columns, MaskOracle, build, column_keeps, generate, inputs

import vtok
from vtok.patches.decoder.kv_cache import CACHES, ShortCache

SHARES = ((0, 2), (2, 3))
MORE = torch.tensor([[7, 8, 9], [10, 11, 12]])
MOVES = {
    "swapped": [("reorder_cache", [1, 0])],
    "one row twice": [("batch_select_indices", [1, 1])],
    "one row alone": [("batch_select_indices", [1])],
    "chosen by a mask": [("batch_select_indices", [False, True])],
    "repeated, then moved": [
        ("batch_repeat_interleave", 2),
        ("reorder_cache", [3, 0, 2, 1]),
        ("reorder_cache", [0, 1, 3, 2]),
    ],
}  # fmt: skip


def _name(model):
    return next(name for name in CACHES if name in inspect.signature(type(model).forward).parameters)


def _read(model, values):
    with torch.no_grad():
        return model(**values, use_cache=True)[_name(model)]


def _go_on(model, cache, mask, tokens=MORE):
    """Logits of two passes behind the prompt: positions, masks and what the cache holds by then all matter."""
    found = []
    with torch.no_grad():
        for ids in (tokens, tokens[:, :1] + 20):
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            found.append(model(input_ids=ids, attention_mask=mask, **{_name(model): cache}).logits)
    return torch.cat(found, 1)


def _moved(cache, moves):
    """Which row each row of a cache was, after it has been moved."""
    order = torch.arange(2)
    for operation, argument in moves:
        given = argument if isinstance(argument, int) else torch.tensor(argument)
        getattr(cache, operation)(given)
        order = order.repeat_interleave(argument) if isinstance(argument, int) else order[given]
    return order


@pytest.mark.parametrize("moves", MOVES.values(), ids=list(MOVES))
@pytest.mark.parametrize("name", ["LLaVA-1.5", "InternVL", "LLaVA, Mistral text, window 9"])
def test_what_is_known_follows_the_rows(name, moves):
    """Rows keep different numbers of tokens, and one is padded: the wrong row's mask would be seen."""
    values = inputs(name)
    model = build(name)
    keeps = column_keeps(model, values, SHARES)
    with MaskOracle(model, keeps) as oracle:
        cache = _read(model, values)
        order = _moved(cache, moves)
        oracle.alive = {layer: alive[order] for layer, alive in keeps.items()}
        mask, tokens = values["attention_mask"][order], MORE[order]
        expected = _go_on(model, cache, mask, tokens)
    vtok.patch(model, Columns(SHARES))
    cache = _read(model, values)
    _moved(cache, moves)
    found = _go_on(model, cache, mask, tokens)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_positions_follow_too():
    """Numbered anew, every row has positions of its own."""
    values, model = inputs("LLaVA-1.5"), build("LLaVA-1.5")
    vtok.patch(model, Columns(((0, 3),)), positions="compact")
    apart, cache = _go_on(model, _read(model, values), values["attention_mask"]), _read(model, values)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = _go_on(model, cache, values["attention_mask"].flip(0), MORE.flip(0))
    assert (found.flip(0) - apart).abs().max() <= 1e-5


def test_copies():
    """Deep copies and pickles know what the cache knew, and go their own way."""
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(SHARES))
    cache, mask = _read(model, values), values["attention_mask"]
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(cache), torch.load(buffer, weights_only=False)]
    cache.reorder_cache(torch.tensor([1, 0]))
    for other in copies:
        assert isinstance(other, ShortCache)
        assert type(other).__name__ == "DynamicCache"
        assert torch.equal(_go_on(model, other, mask), _go_on(model, _read(model, values), mask))


def _rebuilt(cache):
    from transformers import DynamicCache

    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


@pytest.mark.parametrize("shares", [((0, 2),), ((2, 3),)], ids=str)
def test_a_cache_that_was_rebuilt_from_its_tensors(shares):
    """Whether layers hold different numbers of tokens or all as few: positions and masks would be silently wrong."""
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(shares))
    out = generate(model, values, steps=3)[2]
    for mask in (torch.nn.functional.pad(values["attention_mask"], (0, 2), value=1), None):
        text = message_of(vtok.StateError, _go_on, model, _rebuilt(out[_name(model)]), mask)
        assert "was rebuilt from its tensors" in text
        assert "read the prompt anew" in text
    turn = {"input_ids": torch.cat([out.sequences, MORE], 1)}
    turn["attention_mask"] = torch.nn.functional.pad(values["attention_mask"], (0, 6), value=1)
    again = {_name(model): _rebuilt(out[_name(model)])}
    assert "was rebuilt from its tensors" in message_of(vtok.StateError, generate, model, turn, **again)


def test_caches_that_hold_text_alone():
    """Whoever filled or rebuilt them, as far as the call itself proves that nothing is missing."""
    plain, model = build("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(SHARES))
    text = {"input_ids": MORE, "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    expected = _go_on(plain, _read(plain, text), text["attention_mask"])
    assert torch.equal(_go_on(model, _read(plain, text), text["attention_mask"]), expected)
    assert torch.equal(_go_on(model, _rebuilt(_read(model, text)), text["attention_mask"]), expected)
    assert torch.equal(_go_on(model, _read(model, {"input_ids": MORE}), None), expected), "its own needs no proof"
    assert "nothing says how many" in message_of(vtok.StateError, _go_on, model, _read(plain, {"input_ids": MORE}), None)
    turn = {"input_ids": torch.cat([MORE, MORE + 30], 1), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    found, expected = (generate(m, turn, steps=2, **{_name(m): _read(plain, text)})[1] for m in (model, plain))
    assert torch.equal(found, expected)


def test_layers_that_somebody_cut():
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(SHARES))
    for tokens in (1, 12):
        cache = _read(model, values)
        _go_on(model, cache, values["attention_mask"])
        cache.layers[2].crop(-tokens)
        mask = torch.nn.functional.pad(values["attention_mask"], (0, 4), value=1)
        assert "somebody changed layers" in message_of(vtok.StateError, _go_on, model, cache, mask)


def test_another_model_cannot_go_on():
    """Without the hooks, masks and positions would be those of another prompt."""
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), "uniform", keep=0.5)
    cache = _read(model, values)
    for other in (vtok.unpatch(copy.deepcopy(model)), vtok.patch(copy.deepcopy(model), "uniform", keep=1.0)):
        text = message_of(vtok.StateError, _go_on, other, copy.deepcopy(cache), values["attention_mask"])
        assert "only the patched vision-language model that read it can go on" in text
    other = vtok.patch(copy.deepcopy(model), "random", keep=0.3)
    found = _go_on(other, copy.deepcopy(cache), values["attention_mask"])
    assert torch.equal(found, _go_on(model, cache, values["attention_mask"])), "another patch can: the cache says what is in it"


def test_an_empty_cache_is_an_ordinary_one_again():
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(SHARES))
    cache = _read(model, values)
    assert isinstance(cache, ShortCache)
    cache.reset()
    assert type(cache).__module__ == "transformers.cache_utils"
    assert not any(name.startswith("_vtok") for name in cache.__dict__)
    cache = _read(model, values)
    for layer in cache.layers:
        layer.reset()
    plain = build("LLaVA-1.5")
    text = {"input_ids": MORE, "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with torch.no_grad():
        found = model(**text, **{_name(model): cache}).logits
        assert torch.equal(found, plain(**text).logits)
    assert not isinstance(cache, ShortCache)
