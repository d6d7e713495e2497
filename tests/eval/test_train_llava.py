"""The training of the reference LLaVA: isolated turns, lessons, resampling, resuming, exporting."""

from dataclasses import replace

import pytest
import torch
from helpers_easyvqa import naming, write_small

from vtok.eval.models.reference import normalise_page
from vtok.eval.training.loop import Every, Stage

pytest.importorskip("transformers")

from vtok.eval.models.reference_vlm import (
    BOS,
    EOS,
    IMAGE,
    SPECIAL,
    ReferenceLLaVA,
    load_reference_llava,
    load_reference_questions,
    make_tokenizer,
)
from vtok.eval.training import llava as train_llava
from vtok.eval.training import loop as train_run
from vtok.eval.training.llava import (
    Lessons,
    Namer,
    Recipe,
    accuracy,
    augment,
    load_lessons,
    load_questions,
    packed_accuracy,
    read,
    resample,
    train,
)
from vtok.eval.training.turns import IGNORED, answer_logits, pack, turn_mask

TINY = ReferenceLLaVA(patch_size=16, width=32, depth=2, heads=2, text_width=32, text_hidden=48, text_depth=2, text_heads=2)
RECIPE = Recipe(
    tower=Stage(32, 1, 1e-3, 0.5),
    stages=(Stage(32, 1, 1e-3, 0.5), Stage(16, 1, 1e-3, 0.0)),
    batch_size=8,
    turns=3,
    held_out=24,
    model=TINY,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """easy-VQA in small: 48 pictures a split, two of each class, the last four of unknown class."""

    def asked(number, colour, shape):
        known = naming(colour, shape) if number < 44 else []
        return [["is there a triangle?", "yes" if shape == "triangle" else "no"], *known]

    return write_small(tmp_path_factory.mktemp("easyvqa"), 48, 5, asked)


def test_a_turn_packed_with_others_computes_what_it_computes_alone():
    """Against the model's own forward pass on one question, padding and the eos included."""
    torch.manual_seed(0)
    model = TINY.build()
    tokenizer = make_tokenizer()
    pixels = torch.randn(2, 3, 64, 64)
    said = [
        [("what color is the shape?", "red"), ("is it a circle?", "no"), ("what shape is there in the image?", "circle")],
        [("is a red circle present?", "yes")],
    ]
    turns = [[(tokenizer.encode(q, add_special_tokens=False), tokenizer.convert_tokens_to_ids(a)) for q, a in s] for s in said]
    with torch.no_grad():
        visual, _ = read(model, pixels)
        packed = answer_logits(model, visual, pack(turns))
        alone = []
        for row, sequence in enumerate(turns):
            for question, answer in sequence:
                ids = torch.tensor([[BOS, *[IMAGE] * TINY.visual_tokens, *question, answer]])
                alone.append(model(input_ids=ids, pixel_values=pixels[row : row + 1]).logits[0, -2:])
    assert packed.shape == (8, model.config.text_config.vocab_size)
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_answers_of_other_turns_change_nothing():
    torch.manual_seed(0)
    model = TINY.build()
    visual = torch.randn(1, 16, 32)
    first, second = pack([[([7, 8], 20), ([9], 21)]]), pack([[([7, 8], 30), ([9], 21)]])
    with torch.no_grad():
        a, b = answer_logits(model, visual, first), answer_logits(model, visual, second)
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]]) and not torch.equal(a[1], b[1])


def test_packing():
    turns = pack([[([7, 8], 20), ([9], 21)], [([7], 22)]])
    assert turns.ids.tolist() == [[7, 8, 20, 9, 21], [7, 22, 0, 0, 0]]
    assert turns.targets.tolist() == [
        [IGNORED, 20, EOS, 21, EOS],
        [22, EOS, IGNORED, IGNORED, IGNORED],
    ]
    assert turns.turn.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert turns.place.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    seen = turn_mask(turns.turn, 2)[0, 0].int().tolist()
    assert seen[1] == [1, 1, 0, 0, 0, 0, 0] and seen[4] == [1, 1, 1, 1, 1, 0, 0] and seen[6] == [1, 1, 0, 0, 0, 1, 1]


def test_lessons_and_held_out_pictures(folder):
    learned, classes, away = load_lessons(24, folder)
    assert len(learned.pictures) == 24 and len(away.pictures) == 24
    assert classes.tolist() == [n % 24 for n in range(20)] + [-1] * 4
    assert away.pictures[:, 0, 0, 0].tolist() == [5 * n for n in range(20, 44)]
    assert learned.pictures[-4:, 0, 0, 0].tolist() == [5 * n for n in range(44, 48)]
    lessons = Lessons(learned, classes)
    assert [len(turns) for turns in lessons.turns] == [3] * 20 + [1] * 4
    turns = lessons.draw(torch.tensor([0, 23]), 2)
    assert turns.turn.max(1).values.tolist() == [2, 1]


def test_augmentation_keeps_every_pixel_a_pixel_of_the_picture():
    torch.manual_seed(0)
    pictures = torch.arange(64).repeat(64, 1)[None, None].expand(16, 3, 64, 64).to(torch.uint8)  # the column, everywhere
    moved = augment(pictures, 3)
    assert moved.shape == pictures.shape and moved.dtype == torch.uint8
    for picture in moved:
        steps = picture[0, 0].int().diff()
        assert bool((steps >= 0).all() or (steps <= 0).all()) and steps.abs().max() == 1
        assert int((steps == 0).sum()) <= 3
    assert len({int(m[0, 0, 0]) for m in moved}) > 4
    assert torch.equal(augment(pictures[:, :, :, :1].expand(-1, -1, -1, 64), 0)[0, 0, :, 0], pictures[0, 0, :, 0])


def test_resampling_keeps_the_language_model():
    coarse = replace(TINY, patch_size=32).build()
    fine = resample(coarse, TINY, 16)
    tower = fine.model.vision_tower
    assert fine.config.image_seq_length == 16 and fine.config.vision_config.patch_size == 16
    after = fine.state_dict()
    changed = [n for n, w in coarse.state_dict().items() if w.shape != after[n].shape or not torch.equal(w, after[n])]
    assert len(changed) == 2 and all(n.endswith(("patch_embedding.weight", "position_embedding.weight")) for n in changed)
    x = torch.full((1, 3, 64, 64), 0.7)
    (patches,) = (m for n, m in tower.named_modules() if n.endswith("patch_embedding"))
    (before,) = (m for n, m in coarse.model.vision_tower.named_modules() if n.endswith("patch_embedding"))
    assert torch.nn.functional.cosine_similarity(before(x)[0, :, 0, 0], patches(x)[0, :, 0, 0], dim=0) > 0.99


def test_naming_ignores_unknown_classes():
    namer = Namer(32)
    x = torch.randn(4, 32)
    some = namer.loss(x, torch.tensor([3, -1, 23, -1]), namer.pooled)
    shape, colour = namer.pooled(x[[0, 2]])[:, :3].log_softmax(1), namer.pooled(x[[0, 2]])[:, 3:].log_softmax(1)
    expected = -(shape[0, 0] + shape[1, 2]) / 2 - (colour[0, 1] + colour[1, 7]) / 2
    assert some.item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    straight = train(RECIPE, tmp_path / "a" / "llava.pt", folder, every=Every(save=2))
    assert straight.config.vision_config.patch_size == 16 and not straight.training

    class StopError(Exception):
        pass

    real, calls = train_run.save_atomically, []

    def stopping(payload, path):
        real(payload, path)
        calls.append(payload["step"])
        if len(calls) in (1, 3, 4):
            raise StopError

    monkeypatch.setattr(train_run, "save_atomically", stopping)
    for _ in range(3):
        with pytest.raises(StopError):
            train(RECIPE, tmp_path / "b" / "llava.pt", folder, every=Every(save=2))
    resumed = train(RECIPE, tmp_path / "b" / "llava.pt", folder, every=Every(save=2))
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    ends = [torch.load(train_llava.stage_file(tmp_path / "b" / "llava.pt", n), weights_only=True) for n in range(3)]
    assert torch.equal(ends[2]["lm_head.weight"], straight.state_dict()["lm_head.weight"])
    assert not torch.equal(ends[1]["lm_head.weight"], straight.state_dict()["lm_head.weight"])


def test_single_questions_and_packed_ones_score_the_same(folder, monkeypatch):
    """`generate()`, one question at a time and padded on the left, against the packed pass."""
    monkeypatch.setattr(train_llava, "ANSWER_TOKENS", 1)  # untrained, the model does not stop after a word
    torch.manual_seed(1)
    model = TINY.build()
    tokenizer, (questions, classes) = make_tokenizer(), load_questions("test", folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[: len(SPECIAL)] = 0
        said = []  # the model's own words are the right answers of half of the questions
        for text, row in zip(questions.texts, questions.rows.tolist()):
            visual, _ = read(model, normalise_page(questions.pictures[row : row + 1]))
            turn = pack([[(tokenizer.encode(text, add_special_tokens=False), EOS)]])
            said.append(tokenizer.decode([answer_logits(model, visual, turn)[0].argmax().item()]))
    answers = [own if i % 2 else answer for i, (own, answer) in enumerate(zip(said, questions.answers))]
    questions = questions._replace(answers=answers)
    share = packed_accuracy(model, Lessons(questions, classes))
    model.eval()
    alone, blank = accuracy(model, questions, 16, batch_size=37), accuracy(model, questions, 16, blank=True)
    assert alone["all"] == pytest.approx(100 * share) and alone["all"] >= 49
    weights = questions.open.double().mean().item()
    assert alone["all"] == pytest.approx(weights * alone["open"] + (1 - weights) * alone["yes_no"])
    assert blank == accuracy(model, questions._replace(pictures=torch.full_like(questions.pictures, 255)), 16)


def test_export_and_load(folder, tmp_path):
    torch.manual_seed(0)
    model = TINY.build()
    train_llava.export(model, RECIPE, tmp_path, folder)
    loaded = load_reference_llava(tmp_path / "easyvqa_llava")
    assert all(torch.equal(v.half(), loaded.state_dict()[k].half()) for k, v in model.state_dict().items())
    assert (tmp_path / "easyvqa" / "test-questions.json.gz").is_file()


def test_the_bundled_questions_are_the_packages():
    pytest.importorskip("easy_vqa")
    ours, (package, _) = load_reference_questions("test"), load_questions("test")
    assert torch.equal(ours.pictures, package.pictures) and ours.texts == package.texts and ours.answers == package.answers
    calibration, (_, _, away) = load_reference_questions("calibration"), load_lessons(Recipe().held_out)
    assert torch.equal(calibration.pictures, away.pictures) and calibration.texts == away.texts
