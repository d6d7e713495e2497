"""`vtok tune` beyond classifiers: prompts of vision-language models, and embeddings."""

import dataclasses
import json
import random

import pytest
import torch
import yaml
from test_tune import vtok_tune

import vtok
from vtok.core.search_space import draw
from vtok.eval.tasks.vqa.sources.opening import easy_vqa
from vtok.eval.tune import prompts as tune_prompts
from vtok.eval.tune.subjects import at_budget
from vtok.registry import METHODS

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llava():
    from vtok.eval.models.vlm import load_vlm

    return load_vlm("reference-llava")


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(tune_prompts, "PRICED", 3)


def drawn(subject, limit, default):
    """The first random point at the budget, and its setting."""
    rng = random.Random(0)
    points = (draw(subject.space(), rng) for _ in range(100))
    return next((point, found) for point in points if (found := at_budget(subject, point, limit, [default])))


class Keys:
    """In the place of a model: its inputs are the keys of the images and the questions."""

    def inputs(self, images, questions):
        return list(zip(images, questions))


def test_no_image_is_in_both_sets_and_held_out_ones_are_all_different():
    data = dataclasses.replace(easy_vqa(calibration=True), read=lambda key: key)
    both = tune_prompts.prompt_samples(Keys(), data, None, None, None, 0)
    shown = [[image for batch, _ in samples.read(0, len(samples), 50) for image, _ in batch] for samples in both]
    images = {q.image for q in data.questions}
    assert not set(shown[0]) & set(shown[1]) and len(shown[0]) == 400
    assert len(shown[1]) == len(set(shown[1])) == len(images) - len(images) // 2
    again = tune_prompts.prompt_samples(Keys(), data, None, None, None, 0)
    assert [list(s.read(0, 20, 20)) for s in again] == [list(s.read(0, 20, 20)) for s in both]
    assert [s.identity for s in tune_prompts.prompt_samples(Keys(), data, None, None, None, 1)] != [s.identity for s in both]
    with pytest.raises(vtok.ConfigError, match=r"--held-out-images 5000 is more than there is: 1000 images to compare on"):
        tune_prompts.prompt_samples(Keys(), data, easy_vqa(), 10, 5000, 0)


def test_candidates_cost_what_the_default_costs(llava, cheap):
    calibration, _ = tune_prompts.prompt_samples(llava, easy_vqa(calibration=True), easy_vqa(), 8, 8, 0, labelled=True)
    subject = tune_prompts.Prompts(llava, METHODS.get("todre")(), calibration)
    default, limit = subject.default(0.45)
    assert default.given() == {"keep": default.keep} and abs(limit - 0.45) < 0.01
    point, (config, fraction) = drawn(subject, limit, default)
    assert limit - 0.005 <= fraction <= limit and config.probe == point["probe"]
    assert at_budget(subject, point, limit, [default, config]) is None, "another candidate has it"
    inputs, labels = next(calibration.read(0, 3, 3))
    base = subject.outputs(subject.apply(None), inputs)
    assert base.shape == (3, llava.net.config.text_config.vocab_size) and labels.shape == (3,)
    with vtok.patched(llava.net, config):
        with torch.inference_mode():
            expected = llava.net(**inputs).logits[:, -1]
        cost = vtok.info(llava.net).prompts[0].mean_estimate or vtok.info(llava.net).prompts[0].estimate
    assert torch.allclose(subject.outputs(subject.apply(config), inputs), expected, atol=1e-5)
    assert cost.fraction == pytest.approx(fraction)


def test_the_space_leaves_what_is_given(llava, cheap):
    calibration, _ = tune_prompts.prompt_samples(llava, easy_vqa(calibration=True), easy_vqa(), 4, 4, 0)
    for params, searched in (
        ({}, {"probe", "tau"}),
        ({"probe": 5}, {"tau"}),
        ({"probe": None}, set()),
        ({"tau": 0.3}, {"probe"}),
    ):
        subject = tune_prompts.Prompts(llava, METHODS.get("todre")(**params), calibration)
        space = subject.space()
        assert set(space) == searched
        for seed in range(5):
            config = subject.config.candidates_at(subject.info, draw(space, random.Random(seed)))[500]
            assert config.keep == 0.5 and all(config.to_dict()[name] == value for name, value in params.items())
            config.build_vlm(subject.info)
    assert set(tune_prompts.Prompts(llava, METHODS.get("pitome")(), calibration).space()) == {"weights"}
    with pytest.raises(vtok.ConfigError, match="random has no schedule on vision-language models"):
        tune_prompts.Prompts(llava, METHODS.get("random")(), calibration).space()


@pytest.mark.slow
def test_methods_in_the_tower_are_tuned_on_questions_too(llava, cheap):
    calibration, _ = tune_prompts.prompt_samples(llava, easy_vqa(calibration=True), easy_vqa(), 4, 4, 0)
    subject = tune_prompts.Prompts(llava, METHODS.get("pitome")(), calibration)
    default, limit = subject.default(0.7)
    _, (config, fraction) = drawn(subject, limit, default)
    assert limit - 0.005 <= fraction <= limit and len(config.ratio.values) == llava.net.config.vision_config.num_hidden_layers


def test_questions_end_to_end(tmp_path, cheap):
    printed = vtok_tune(
        *("reference-llava", "todre", "--flops", 0.45, "--images", 6, "--held-out-images", 5, "--candidates", 2),
        *("--batch-size", 5, "--out", tmp_path),
    )
    assert "top-1 %" in printed and "easy-vqa (held out)" in printed
    content = yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    assert content["model"] == {"backend": "reference", "name": "reference-llava"} and content["task"] == "vqa"
    from vtok.eval.runs import loader as runs

    assert runs.load(str(tmp_path / "tuned.yaml")).method.name == "todre"
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records[0]["n"] == 5 and records[1]["gmacs"]["model"] < 0.5 * records[1]["gmacs"]["base"]


def test_embeddings_are_held_to_the_unpatched_ones(tmp_path):
    pytest.importorskip("open_clip")
    printed = vtok_tune(
        *("reference-clip", "tome", "--flops", 0.5, "--images", 6, "--held-out-images", 5, "--candidates", 3),
        *("--batch-size", 5, "--out", tmp_path),
    )
    assert "1 - cosine" in printed and "top-1" not in printed
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records[-1]["primary"] == "distance" and not records[-1]["percent"]
