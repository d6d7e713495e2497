"""Greedy tokens in vLLM are those of transformers on prompts that `vtok.prune_inputs` shortened: the same weights, fp32."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import asked
from cases import CASES, UNCACHED
from engines import ask, differences, engine, preemptions, reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
EVERYWHERE = [(model, case) for model, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), EVERYWHERE)
def test_every_method_on_every_model(model, name, case):
    """Pictures of many sizes at once, two in a prompt, the same again, requests without any; then all of it from caches."""
    folder, requests = model(name), asked.of(name)
    expected = reference(folder, case)
    cached = name not in UNCACHED
    with engine(folder, CASES[name][case], enable_prefix_caching=cached) as llm:
        first, again = ask(llm, requests), ask(llm, requests)
    assert differences(expected, first) == []
    assert differences(expected, again) == []
    if CASES[name][case] is not None:
        assert sum(one["prompt"] for one in first) < sum(one["unpruned"] for one in expected)
    assert (sum(one["cached"] for one in again) > 0) is cached


SCHEDULED = [
    ("llava", "todre"),
    ("qwen25", "todre_center"),
    ("qwen25", "uniform"),
    ("internvl", "divprune"),
    ("gemma3", "fastervlm"),
    ("idefics3", "todre"),
    ("qwen25_video", "vidcom2"),
    ("onevision_video", "divprune"),
    ("onevision_video", "evs"),
]
SITUATIONS = {
    "chunks that end inside images": {"max_num_batched_tokens": 20, "max_num_seqs": 3},
    "chunks of one block": {"max_num_batched_tokens": 32, "max_num_seqs": 8},
    "no prefix cache": {"enable_prefix_caching": False},
    "no prefix cache, chunks": {"enable_prefix_caching": False, "max_num_batched_tokens": 24, "max_num_seqs": 4},
    "no cache of processed pictures": {"mm_processor_cache_gb": 0},
    "blocks run out": {"num_gpu_blocks_override": 9, "max_model_len": 128, "max_num_seqs": 8},
}


LITTLE = "blocks run out"
EVERY_WAY = [(*one, situation) for one in SCHEDULED for situation in SITUATIONS if situation != LITTLE]
# A budget of few tokens is raised to the largest picture that vLLM foresees, and some with crops are larger: unpruned, as
# beside evs, it refuses them.
EVERY_WAY = [one for one in EVERY_WAY if one[1] != "evs" or "max_num_batched_tokens" not in SITUATIONS[one[2]]]
EVERY_WAY += [(*one, LITTLE) for one in SCHEDULED if one[0] in ("llava", "qwen25")]  # few tokens, in one kind of block


@pytest.mark.parametrize(("name", "case", "situation"), EVERY_WAY)
def test_however_the_prompts_are_scheduled(model, name, case, situation):
    folder, requests = model(name), asked.of(name)
    with engine(folder, CASES[name][case], **SITUATIONS[situation]) as llm:
        for _ in range(2):
            assert differences(reference(folder, case), ask(llm, requests)) == []
        if situation == LITTLE:
            assert preemptions(llm) > 0


@pytest.mark.parametrize("chunk", range(21, 30))
def test_chunks_that_end_at_and_around_the_border_of_an_image(model, chunk):
    """One request at a time, whose image begins at some token and ends at another: a chunk ends at, before and behind both."""
    folder = model("qwen25")
    with engine(folder, CASES["qwen25"]["divprune"], max_num_batched_tokens=chunk, max_num_seqs=1) as llm:
        assert differences(reference(folder, "divprune"), ask(llm, asked.of("qwen25"))) == []


@pytest.mark.parametrize(("name", "case"), [("llava", "divprune"), ("qwen25", "divprune")])
def test_requests_that_are_aborted_leave_the_others_right(model, name, case):
    from engines import prompt
    from vllm import SamplingParams

    folder, requests = model(name), asked.of(name)
    expected = reference(folder, case)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    with engine(folder, CASES[name][case], max_num_batched_tokens=24, max_num_seqs=4) as llm:
        core = llm.llm_engine
        for i, one in enumerate(requests):
            core.add_request(str(i), prompt(*one), greedy)
        found, steps = {}, 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    found[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
            steps += 1
            if steps in (2, 5, 9):  # one that is being read, or waits
                core.abort_request([str(steps)])
        again = ask(llm, requests)
    assert set(range(len(requests))) - set(found) <= {2, 5, 9}
    assert len(found) < len(requests)
    assert all(found[i] == expected[i]["tokens"] for i in found if i not in (2, 5, 9))
    assert differences(expected, again) == []


def test_positions_matter(model, monkeypatch):
    """The same with positions left where a prompt's images begin: the proof above would notice."""
    folder = model("qwen25")
    from vtok.serving.vllm_plugin import qwen_vl

    monkeypatch.setattr(qwen_vl, "placed", lambda positions, media, at, computed: positions)
    with engine(folder, CASES["qwen25"]["divprune"]) as llm:
        found = differences(reference(folder, "divprune"), ask(llm, asked.of("qwen25")))
    assert len(found) > 8
