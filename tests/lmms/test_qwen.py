"""lmms-eval's Qwen2.5-VL and Qwen3-VL on tiny random models: its own classes, patched by hand, say the same."""

from dataclasses import replace

import pytest
import torch
from helpers_lmms import FAMILIES, Harness, counts, said, save_qwen
from lmms_eval.models import get_model

import vtok
from vtok.eval.lmms.record import Recorder
from vtok.eval.lmms.task import write_task
from vtok.eval.models.vlm import load_vlm
from vtok.eval.tasks.vqa.sources.opening import open_vqa

pytestmark = pytest.mark.lmms
COUNT, DEPTH = 6, 4
PIXELS = {"device_map": "cpu", "min_pixels": 12544, "max_pixels": 65536}
VISUAL = {"vtok_qwen2_5_vl": 25, "vtok_qwen3_vl": 16}  # 128 pixels: 140 / 28 and 128 / 32 merged patches a side
KINDS = [(name, simple) for name in FAMILIES for simple in (False, True)]


def asked():
    """Questions of different lengths, not in the order of these."""
    data = open_vqa("easy-vqa-pages").take(COUNT)
    longer = [q._replace(text=q.text + " blank" * (5 * i % 7)) for i, q in enumerate(data.questions)]
    return replace(data, questions=longer)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return Harness(write_task(folder, asked(), 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("qwen")
    return {name: save_qwen(home / name, name) for name in FAMILIES}


def patched(harness, folders, name, method, size, simple):
    given = ",".join(f"{key}={value}" for key, value in PIXELS.items())
    return harness.run(name, f"pretrained={folders[name]},{given},method={method}", size, force_simple=simple)


def by_hand(harness, folders, name, method, size, simple, **params):
    """The harness's class without vtok's, patched where a method is given."""
    lm = get_model(name.removeprefix("vtok_"), force_simple=simple)(
        pretrained=str(folders[name]), batch_size=size, device="cpu", **PIXELS
    )
    if method is not None:
        vtok.patch(lm.model, method, **params)
    return harness.run(lm, None, size)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("name", "simple"), KINDS)
def test_answers_are_those_of_the_harness_own_class(name, simple, size, harness, folders):
    found, samples = patched(harness, folders, name, "uniform,keep=0.5", size, simple)
    _, expected = by_hand(harness, folders, name, "uniform", size, simple, keep=0.5)
    assert said(samples) == said(expected) and len(set(said(samples))) > 1
    half = VISUAL[name] // 2
    for count in counts(samples):
        assert count["visual_tokens"] == VISUAL[name] and count["kept_tokens"] == [half] * DEPTH
        assert count["gmacs"]["model"] < count["gmacs"]["base"] and 1 <= count["output_tokens"] <= 4
    assert sorted(count["batch_size"] for count in counts(samples)) == ([1] * 6 if size == 1 else [2, 2, 4, 4, 4, 4])
    assert found["throughput"]["avg_kept_tokens"] == half
    assert found["throughput"]["total_gen_tokens"] >= sum(count["output_tokens"] for count in counts(samples))


@pytest.mark.parametrize(("name", "simple"), KINDS)
def test_the_baseline_is_the_unpatched_model(name, simple, harness, folders):
    _, samples = patched(harness, folders, name, "none", 1, simple)
    _, expected = by_hand(harness, folders, name, None, 1, simple)
    _, fewer = patched(harness, folders, name, "todre,keep=0.3", 1, simple)
    assert said(samples) == said(expected) != said(fewer)
    assert [count["kept_tokens"] for count in counts(samples)] == [[VISUAL[name]] * DEPTH] * COUNT
    assert all(count["kept_tokens"][0] < VISUAL[name] / 3 + 1 for count in counts(fewer))


def test_each_sample_has_the_counts_of_its_own_prompt(harness, folders):
    """The harness sorts questions, batches them and reads the next batch while one runs: a prompt's length tells."""
    lengths = []
    for size in (1, 4):
        _, samples = patched(harness, folders, "vtok_qwen3_vl", "uniform,keep=0.5", size, True)
        lengths.append([count["input_tokens"] for count in counts(samples)])
    words = [len(q.text.replace("?", " ?").split()) for q in asked().questions]
    assert lengths[0] == lengths[1] and len(set(words)) > 3 and words != sorted(words) != words[::-1]
    assert len({length - count for length, count in zip(lengths[0], words)}) == 1


def test_beams_are_counted_once(harness, folders):
    given = ",".join(f"{key}={value}" for key, value in PIXELS.items())
    arguments = f"pretrained={folders['vtok_qwen3_vl']},{given},method=uniform,keep=0.5"
    _, samples = harness.run("vtok_qwen3_vl", arguments, 2, gen_kwargs="num_beams=3,max_new_tokens=3")
    assert [count["kept_tokens"] for count in counts(samples)] == [[8] * DEPTH] * COUNT
    assert all(1 <= count["output_tokens"] <= 3 for count in counts(samples))


def test_a_prompt_without_an_image_keeps_nothing_of_the_one_before(folders):
    model = load_vlm(str(folders["vtok_qwen3_vl"]))
    vtok.patch(model.net, "uniform", keep=0.5)
    data, recorder = asked(), Recorder(model.net)
    first = model.inputs([data.read(data.questions[0].image)], [data.questions[0].text])
    recorder.generate(**first, max_new_tokens=2)
    recorder.generate(
        input_ids=torch.tensor([[1, 20, 21], [1, 22, 23]]), attention_mask=torch.ones(2, 3).long(), max_new_tokens=2
    )
    with_image, *without = recorder.all
    assert with_image.kept_tokens == [with_image.visual_tokens // 2] * DEPTH and with_image.gmacs is not None
    assert [c.kept_tokens for c in without] == [[0] * DEPTH] * 2 and [c.gmacs for c in without] == [None] * 2
    assert [c.input_tokens for c in without] == [3, 3]


def test_what_comes_from_the_cache_has_no_counts(harness, folders, tmp_path):
    given = ",".join(f"{key}={value}" for key, value in PIXELS.items())
    arguments = f"pretrained={folders['vtok_qwen3_vl']},{given},method=uniform,keep=0.5"
    runs = [harness.run("vtok_qwen3_vl", arguments, 2, use_cache=str(tmp_path))[1] for _ in range(2)]
    assert said(runs[0]) == said(runs[1])
    assert all(counts(runs[0])) and counts(runs[1]) == [None] * COUNT


def test_counts_are_withheld_when_it_is_not_certain_whose_they_are(harness, folders, monkeypatch):
    """A class that read every document twice would mix up the questions."""
    seen = Recorder.watching

    def twice(self, lm):
        asked, note = self._asked, self._asked.append
        monkeypatch.setattr(self, "_asked", _Doubling(asked, note))
        return seen(self, lm)

    monkeypatch.setattr(Recorder, "watching", twice)
    found, samples = patched(harness, folders, "vtok_qwen3_vl", "uniform,keep=0.5", 1, False)
    assert not any(count and "kept_tokens" in count for count in counts(samples))
    assert found["throughput"]["avg_kept_tokens"] == 8  # the mean does not depend on whose they are


class _Doubling:
    def __init__(self, inner, note):
        self.inner, self.note = inner, note

    def append(self, document):
        self.note(document)
        self.note(document)

    def popleft(self):
        return self.inner.popleft()

    def __bool__(self):
        return bool(self.inner)
