"""Scenes, the questions about them and what is kept apart for tests; the reference LLaVA that answers them."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vtok
from vtok.eval.models import scenes
from vtok.eval.models.assets import asset
from vtok.eval.models.dinov2 import installed, load_hf_dinov2, weights
from vtok.eval.models.scenes import KINDS, draw_scene
from vtok.eval.models.scenes.album import ARTISTS, NAMES, PHOTOGRAPHS, load_album
from vtok.eval.models.scenes.compose import COLOUR_NAMES, SIZE
from vtok.eval.models.scenes.model import load_tower
from vtok.eval.models.scenes.questions import NUMBERS, one_of_each
from vtok.eval.tasks.vqa.records import blind_scores
from vtok.eval.tasks.vqa.sources.opening import open_vqa, scene_questions

needs_weights = pytest.mark.skipif(not installed(), reason=f"needs the weights: {weights.INSTALL}")


def true_answer(text, things):
    """What a scene shows, asked in another way than the questions were made."""
    by_name = {NAMES[t.name]: t for t in things}
    colours = Counter(COLOUR_NAMES[t.colour] for t in things)
    if found := re.fullmatch(r"what color is behind the (\w+)", text):
        return COLOUR_NAMES[by_name[found[1]].colour]
    if found := re.fullmatch(r"what is on the plate that is (\w+)", text):
        (only,) = (name for name, t in by_name.items() if COLOUR_NAMES[t.colour] == found[1])
        return only
    if found := re.fullmatch(r"is there any (\w+)", text):
        return "yes" if found[1] in by_name else "no"
    if found := re.fullmatch(r"how many plates are (\w+)", text):
        return NUMBERS[colours[found[1]]]
    raise AssertionError(text)


def test_a_scene_is_always_the_same_and_nothing_overlaps():
    first, again = draw_scene("test", 3), draw_scene("test", 3)
    assert first.things == again.things and first.image.tobytes() == again.image.tobytes()
    for number in range(20):
        covered = np.zeros((SIZE, SIZE), int)
        for left, top, side in (t.box for t in draw_scene("test", number).things):
            assert left >= 0 and left + side <= SIZE and top >= 0 and top + side <= SIZE
            covered[top : top + side, left : left + side] += 1
        assert covered.max() == 1


def test_test_pictures_are_not_those_of_training():
    assert not set(ARTISTS["train"]) & set(ARTISTS["test"]) and not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    train, test = load_album("train"), load_album("test")
    learned = {picture.tobytes() for pictures in train.sprites for picture in pictures}
    assert all(test.sprites) and not learned & {picture.tobytes() for pictures in test.sprites for picture in pictures}
    assert not {p.tobytes() for p in train.photographs} & {p.tobytes() for p in test.photographs}


def test_answers_are_what_the_scenes_show():
    asked = one_of_each("test", range(24))
    assert {one.kind for one in asked} == set(KINDS)
    for one in asked:
        assert one.answer == true_answer(one.text, draw_scene("test", one.number).things)
    present = [one.answer for one in asked if one.kind == "present"]
    assert present.count("yes") == present.count("no") == 12


def test_the_model_has_a_word_for_everything_and_answers_are_one():
    tokenizer = scenes.make_scenes_processor().tokenizer
    for one in one_of_each("train", range(10)):
        words, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (one.text, one.answer))
        assert tokenizer.unk_token_id not in words + answer and len(answer) == 1


def test_bundled_questions_hold_little_without_the_picture():
    data = open_vqa("scenes")
    kinds = Counter(q.groups["kind"] for q in data.questions)
    assert len(data.questions) >= 600 and min(kinds[kind] for kind in KINDS) >= 100
    assert blind_scores(data).mean() <= 0.45
    kept_apart = {q.image for q in scene_questions(calibration=True).questions}
    assert not kept_apart & set(range(10_000))  # numbers that training draws from


@needs_weights
def test_the_tower_is_the_encoder_up_to_its_last_block():
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = load_hf_dinov2()(pixels, output_hidden_states=True).hidden_states[8]
        cut = load_tower(8)(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(whole, cut)


@needs_weights
def test_the_bundled_model_answers_and_needs_the_picture():
    data = open_vqa("scenes")
    asked = [q for q in data.questions if q.image < 3]
    model, processor = scenes.load_reference_scenes(), scenes.make_scenes_processor()
    inputs = processor(
        images=[data.read(q.image) for q in asked],
        text=[f"<image> {q.text}" for q in asked],
        padding=True,
        return_tensors="pt",
    )

    def right(**changed):
        with torch.inference_mode():
            said = model(**{**inputs, **changed}, logits_to_keep=1).logits[:, -1].argmax(-1)
        return [processor.decode(word).strip() == q.target for word, q in zip(said, asked)]

    seen = right()
    assert np.mean(seen) >= 0.8
    assert np.mean(right(pixel_values=torch.zeros_like(inputs["pixel_values"]))) <= 0.5
    with vtok.patched(model, "random", keep=0.0625):
        torch.manual_seed(0)
        assert np.mean(right()) < np.mean(seen)
    assert right() == seen


@needs_weights
def test_the_bundled_modules_of_atp():
    """They leave the tokens that they were trained for, more where a picture needs more, and answers that random ones lose."""
    data = open_vqa("scenes")
    asked = [q for q in data.questions if q.image < 2]
    model, processor = scenes.load_reference_scenes(), scenes.make_scenes_processor()
    images, texts = [data.read(q.image) for q in asked], [f"<image> {q.text}" for q in asked]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    vtok.patch(model, "atp", weights=str(asset("scenes/atp.safetensors")))
    with torch.inference_mode():
        said = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
    rows = vtok.info(model).prompts[0].rows
    assert np.mean([processor.decode(word).strip() == q.target for word, q in zip(said, asked)]) >= 0.6
    assert rows[0].tokens_in[0] == 256
    left = [count for row in rows for count in row.tokens_out]
    assert 0 < min(left) < max(left) < 256
