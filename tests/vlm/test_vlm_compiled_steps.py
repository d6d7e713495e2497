"""Compiled steps of text behind a shortened prompt in a static cache, as generate() compiles them: one graph, same answers."""

import copy

import pytest
import torch
from helpers_errors import message_of
from transformers import CompileConfig, StaticCache
from vlm_zoo import EXAMPLES, TOLERANCE, Columns, build, inputs

import vtok

NAMES = ["LLaVA-1.5", "Qwen2.5-VL"]
OTHERS = ["Qwen3-VL", "LLaVA, Qwen3 text", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "InternVL", "Idefics3", "PaliGemma"]
EACH = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def _between(name):
    return Columns(((0, 2), (max(EXAMPLES[name].first_layer, 2), 3)))


def _asked(model, values, **options):
    return model.generate(
        **{key: copy.copy(value) for key, value in values.items()}, max_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


class Compiled:
    """Lets generate() compile its steps on any device, and keeps the graphs."""

    def __init__(self, fullgraph=True):
        torch.compiler.reset()
        self.graphs = graphs = []

        def keep(graph, _inputs):  # a function, which copies of the config share
            graphs.append(graph)
            return graph

        self.config = CompileConfig(backend=keep, fullgraph=fullgraph, mode=None)
        self.config._compile_all_devices = True

    def asked(self, model, values):
        return _asked(model, values, cache_implementation="static", compile_config=self.config)


def _assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("name", EACH)
def test_one_graph_that_serves_other_prompts(name):
    values, compiled, model = inputs(name), Compiled(), vtok.patch(build(name), _between(name))
    _assert_same(compiled.asked(model, values), _asked(model, values))
    assert len(compiled.graphs) == 1
    flipped = {key: value.flip(-1) if key == "pixel_values" else value for key, value in values.items()}
    _assert_same(compiled.asked(model, flipped), _asked(model, flipped))
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("method", ["fastv", "todre", vtok.RandomDrop(keep=0.5)])
def test_methods(method):
    values, compiled, model = inputs("LLaVA-1.5"), Compiled(), vtok.patch(build("LLaVA-1.5"), method)
    _assert_same(compiled.asked(model, values), _asked(model, values))
    assert len(compiled.graphs) == 1


def test_compact_positions():
    values, compiled = inputs("LLaVA-1.5"), Compiled()
    model = vtok.patch(build("LLaVA-1.5"), Columns(((0, 2),)), positions="compact")
    _assert_same(compiled.asked(model, values), _asked(model, values))
    assert len(compiled.graphs) == 1


def test_text_alone():
    values, compiled = {"input_ids": torch.tensor([[5, 6, 7, 8]])}, Compiled()
    model = vtok.patch(build("LLaVA-1.5"), Columns(((0, 2), (2, 3))))
    expected = _asked(build("LLaVA-1.5"), values)
    _assert_same(compiled.asked(model, values), expected)
    assert len(compiled.graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3", "LLaVA, Mistral text, window 9"])
def test_windows_are_counted_step_by_step(name):
    values, compiled, model = inputs(name), Compiled(fullgraph=False), vtok.patch(build(name), _between(name))
    _assert_same(compiled.asked(model, values), _asked(model, values))


def _prefilled(model, values, room):
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    with torch.no_grad():
        first = model(**values, cache=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return cache, first


def _mask(values, steps):
    return torch.nn.functional.pad(values["attention_mask"], (0, steps), value=1)


def _step(model, cache, token, mask, position):
    """One step as generate() prepares it: a 4-D mask over the columns that the cache counts, made outside."""
    prepared = model.prepare_inputs_for_generation(
        torch.zeros(len(token), mask.shape[1], dtype=torch.long).index_copy(1, torch.tensor([mask.shape[1] - 1]), token),
        cache=cache, attention_mask=mask, position_ids=position, is_first_iteration=False, next_sequence_length=1,
        use_cache=True,
    )  # fmt: skip
    return {key: value for key, value in prepared.items() if value is not None}


def test_rows_that_were_reordered():
    """The tables of slots follow the rows of the cache; a step that reads the first column of another row would differ."""
    name = "LLaVA-1.5"
    values, model = inputs(name), vtok.patch(build(name), _between(name))
    steps = []

    def told(graph, _inputs):
        steps.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend=told, fullgraph=True)
    length = values["input_ids"].shape[1]
    for order in ([1, 0], [0, 0]):
        cache, first = _prefilled(model, values, length + 4)
        cache.reorder_cache(torch.tensor(order))
        token, mask = first[order], _mask(values, 1)[order]
        other = copy.deepcopy(cache)
        position = (mask.sum(1, keepdim=True) - 1)[:, -1:]
        with torch.no_grad():
            expected = model(**_step(model, other, token, mask, position)).logits
            found = compiled(**_step(model, cache, token, mask, position)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert steps


def test_masks_that_the_llm_has_yet_to_make():
    """A compiled step with a mask [rows, columns]: the one that the LLM makes of it inside counts slots, not columns."""
    values, model = inputs("LLaVA-1.5"), vtok.patch(build("LLaVA-1.5"), Columns(((0, 2),)))
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="eager")
    cache, first = _prefilled(model, values, values["input_ids"].shape[1] + 4)
    mask, other = _mask(values, 1), copy.deepcopy(cache)
    call = {"input_ids": first, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "use_cache": True}
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call, cache=cache).logits, model(**call, cache=other).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Columns(((0, 2),)), vtok.ToMe(r=2)], ids=["columns", "tome"])
def test_steps_of_embeddings(method):
    """With a mask a column; whether they are words nobody can look, where a tower marks by its features what it dropped."""
    values, model = inputs("Qwen2.5-VL"), vtok.patch(build("Qwen2.5-VL"), method)
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="eager")
    cache, first = _prefilled(model, values, values["input_ids"].shape[1] + 4)
    other, position = copy.deepcopy(cache), _mask(values, 1).sum(1)[None, :, None].expand(3, -1, 1) - 1
    call = _step(model, cache, first, _mask(values, 1), position) | {"position_ids": position}
    words = {key: x for key, x in call.items() if key != "input_ids"} | {"inputs_embeds": model.get_input_embeddings()(first)}
    with torch.no_grad():
        if isinstance(method, vtok.ToMe):
            assert "cannot tell whether inputs_embeds" in message_of(vtok.UnsupportedModelError, compiled, **words)
            return
        expected = model(**{**call, "cache": other}).logits
        torch.testing.assert_close(compiled(**words).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow  # traces prefills, which break into many graphs
def test_a_compiled_model_reads_further_prompts_with_images():
    """A static cache that was reset, and whose plain contents were vouched for, must not pass for one that needs nothing."""
    name = "LLaVA-1.5"
    values, model = inputs(name), vtok.patch(build(name), Columns(((0, 2),)))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=values["input_ids"].shape[1] + 4)
    text = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 8]])}
    with torch.no_grad():
        expected = model(**values).logits
        assert not torch.allclose(expected, build(name)(**values).logits, atol=1e-3)
        for _ in range(2):
            compiled(**text, cache=cache, use_cache=True)
            cache.reset()
            found = compiled(**values, cache=cache, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            cache.reset()
