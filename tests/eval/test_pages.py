"""Pages of small print, the questions about them and what is kept apart for tests; the LLaVA-NeXT that reads them."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vtok
from vtok.eval.models import pages
from vtok.eval.models.assets import asset
from vtok.eval.models.pages import KINDS, draw_page
from vtok.eval.models.pages.compose import INK_NAMES, INKS, PATCH, QUARTERS, SIZE, quarter_of
from vtok.eval.models.pages.model import TRAINED, ReferencePrint
from vtok.eval.models.pages.print import FONTS, NAMES, load_print
from vtok.eval.models.pages.questions import density, one_of_each, questions_about
from vtok.eval.models.reference_vlm import IMAGE, save_weights
from vtok.eval.runs.models import CALIBRATION_PROMPTS
from vtok.eval.tasks.vqa.records import blind_scores
from vtok.eval.tasks.vqa.sources.opening import open_vqa, printed_pages
from vtok.eval.training import loop
from vtok.eval.training.loop import Every, Stage
from vtok.eval.training.pages import train as train_pages
from vtok.eval.training.pages.looking import (
    INK_WORDS,
    NAME_WORDS,
    NOTHING,
    columns_of_crops,
    lay_out,
    looking_loss,
    places_of,
)
from vtok.eval.training.pages.train import Recipe, build, pixels_of, stacked, train, views
from vtok.eval.training.patch_words import UNCLEAR, missed
from vtok.eval.training.turns import logits_and_states, pack

TINY = ReferencePrint(width=16, hidden=16, depth=2, heads=2, text_width=16, text_hidden=16, text_depth=4, text_heads=4)
RECIPE = Recipe(
    pages=8,
    read=Stage(PATCH, 2, 1e-3, 0.1),
    answer=Stage(PATCH, 2, 1e-3, 0.1),
    read_batch_size=4,
    batch_size=4,
    turns=6,
    guided=2,
    model=TINY,
)


def true_answer(text, words):
    """What a page shows, asked in another way than the questions were made."""
    by_name = {NAMES[w.name]: w for w in words}
    if found := re.fullmatch(r"what color is (\w+)", text):
        return INK_NAMES[by_name[found[1]].ink]
    if found := re.fullmatch(r"what word is (\w+)", text):
        (only,) = (name for name, w in by_name.items() if INK_NAMES[w.ink] == found[1])
        return only
    if found := re.fullmatch(r"is there (\w+)", text):
        return "yes" if found[1] in by_name else "no"
    if found := re.fullmatch(r"what is (under|over) (\w+)", text):
        left, top, width, height = by_name[found[2]].box
        middle = left + width / 2, top + height / 2 + (28 if found[1] == "under" else -28)
        near = [(math.dist(middle, (w.box[0] + w.box[2] / 2, w.box[1] + w.box[3] / 2)), name) for name, w in by_name.items()]
        distance, name = min(near)
        assert distance < 14
        return name
    raise AssertionError(text)


def test_a_page_is_always_the_same_and_words_stand_apart():
    first, again = draw_page("test", 3), draw_page("test", 3)
    assert first.words == again.words and first.image.tobytes() == again.image.tobytes()
    for split in ("train", "test"):
        for number in range(16):
            page = draw_page(split, number)
            covered = np.zeros((SIZE, SIZE), int)
            for left, top, width, height in (w.box for w in page.words):
                assert left >= 0 and left + width <= SIZE and top >= 0 and top + height <= SIZE
                covered[top : top + height, left : left + width] += 1
            assert covered.max() == 1
            pixels = np.asarray(page.image)
            assert (pixels[covered == 0] == 255).all()  # the box of a word holds all of its print
            assert len({w.name for w in page.words}) == len(page.words)


def test_crops_are_blank_where_they_should_be_and_words_are_not_cut():
    half = SIZE // 2
    for number in range(24):
        page = draw_page("test", number)
        pixels = np.asarray(page.image).reshape(2, half, 2, half, 3)
        filled = [q for q in range(QUARTERS) if (pixels[q // 2, :, q % 2] < 255).any()]
        assert len(filled) == number % QUARTERS + 1
        assert set(filled) == {quarter_of(w.place) for w in page.words}
        for left, top, width, height in (w.box for w in page.words):
            assert left // half == (left + width - 1) // half and top // half == (top + height - 1) // half


def test_inks_are_what_is_printed():
    for number in range(12):
        page = draw_page("test", number)
        pixels = np.asarray(page.image).astype(int)
        for word in page.words:
            left, top, width, height = word.box
            area = pixels[top : top + height, left : left + width].reshape(-1, 3)
            darkest = area[area.min(1).argmin()]
            away = [np.abs(darkest - np.array(rgb)).max() for rgb in INKS.values()]
            assert int(np.argmin(away)) == word.ink


def test_print_of_the_test_is_not_that_of_training():
    assert not set(FONTS["train"]) & set(FONTS["test"])
    train_print, test_print = load_print("train"), load_print("test")
    learned = {word.tobytes() for words in train_print for word in words}
    assert len(train_print) == 20 and len(test_print) == 2
    assert not learned & {word.tobytes() for words in test_print for word in words}


def test_the_sheet_is_what_the_fonts_print():
    """The bundled sheet shows the words that it should, as far as another version of FreeType prints alike."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    from vtok.eval.models.pages.print import SHEET
    from vtok.eval.training.pages.sheet import make_sheet

    made, bundled = np.asarray(make_sheet(), np.float64), np.asarray(Image.open(asset(SHEET)).convert("L"), np.float64)
    assert made.shape == bundled.shape and np.abs(made - bundled).mean() < 2


def test_answers_are_what_the_pages_show():
    asked = one_of_each("test", range(24))
    assert {one.kind for one in asked} == set(KINDS)
    for one in asked:
        assert one.answer == true_answer(one.text, draw_page("test", one.number).words)
        assert density(one.number) == len({quarter_of(w.place) for w in draw_page("test", one.number).words})
    present = [one.answer for one in asked if one.kind == "present"]
    assert present.count("yes") == present.count("no") == 12
    for number in range(8):
        words = draw_page("train", number).words
        for found in questions_about(words, random.Random(0)).values():
            assert all(answer == true_answer(text, words) for text, answer in found)


def test_the_model_has_a_word_for_everything_and_answers_are_one():
    tokenizer = pages.make_print_processor().tokenizer
    for one in one_of_each("train", range(10)):
        words, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (one.text, one.answer))
        assert tokenizer.unk_token_id not in words + answer and len(answer) == 1


def test_views_are_what_the_processor_makes():
    drawn = [draw_page("test", number) for number in range(3)]
    inputs = pages.make_print_processor()(
        images=[page.image for page in drawn], text=["<image> is there owl"] * 3, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (3, 5, 3, 84, 84)
    assert torch.allclose(inputs["pixel_values"], views(pixels_of(drawn)), atol=1e-5)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [ReferencePrint().visual_tokens] * 3 == [192] * 3


def test_tokens_are_laid_out_as_the_model_does_it():
    torch.manual_seed(0)
    model = TINY.build()
    torch.nn.init.normal_(model.model.image_newline)
    shown = views(pixels_of([draw_page("test", number) for number in (2, 3)]))
    with torch.inference_mode():
        wanted = model.model.get_image_features(shown, image_sizes=torch.tensor([[SIZE, SIZE]] * 2)).pooler_output
        features = model.model.vision_tower(shown.flatten(0, 1), output_hidden_states=True).hidden_states[-1][:, 1:]
        projected = model.model.multi_modal_projector(features).unflatten(0, (2, 5))
        visual, crops = lay_out(projected, model.model.image_newline)
    assert torch.allclose(visual, torch.stack(list(wanted)), atol=1e-6)
    assert torch.equal(torch.cat([torch.zeros(2, 1, 16), visual], 1)[:, columns_of_crops()], crops)


def test_patches_are_known_by_what_they_show():
    side = SIZE // PATCH
    for number in range(6):
        words = draw_page("train", number).words
        found = places_of(words)
        for patch in range(side**2):
            row, column = divmod(patch, side)
            shown = []
            for word in words:
                left, top, width, height = word.box
                across = len(set(range(left, left + width)) & set(range(column * PATCH, (column + 1) * PATCH)))
                down = len(set(range(top, top + height)) & set(range(row * PATCH, (row + 1) * PATCH)))
                if across and down:
                    shown.append((across >= 5 and down >= 5, word))
            clear = [word for enough, word in shown if enough]
            if clear:
                assert NAME_WORDS.index(found.names[patch]) in {w.name for w in clear}
                assert INK_WORDS.index(found.inks[patch]) in {w.ink for w in clear}
            else:
                assert found.names[patch] == found.inks[patch] == (UNCLEAR if shown else NOTHING)


def test_missed_attention_is_the_log_of_the_share_that_is_right():
    right = torch.tensor([[[True, False, False, True], [False] * 4]])
    asked = torch.tensor([[True, True]])
    assert missed(torch.zeros(1, 2, 2, 4), right, asked).item() == pytest.approx(math.log(2))
    scores = torch.where(right[:, None], 30.0, 0.0).expand(1, 2, 2, 4)
    assert missed(scores, right, asked).item() == pytest.approx(0, abs=1e-6)


def test_looking_at_the_right_places_is_learned():
    """Steps on the loss alone turn attention of the two layers to what it is told."""
    torch.manual_seed(0)
    model = build(replace(RECIPE, model=replace(TINY, text_width=48)))
    page = draw_page("train", 3)
    places = stacked([page])
    encode = pages.make_print_processor().tokenizer.encode
    asked = questions_about(page.words, random.Random(0))
    turns = pack([[(encode(q, add_special_tokens=False), encode(a, add_special_tokens=False)[0]) for q, a in asked["under"]]])
    table = model.get_input_embeddings().weight.detach()
    crops = table[places.names.clamp(min=NOTHING)] + table[places.inks.clamp(min=NOTHING)]
    views_ = crops.unflatten(1, (2, 6, 2, 6)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    visual, _ = lay_out(torch.cat([torch.zeros(1, 1, 36, 48), views_], 1), torch.zeros(48))
    optimizer = torch.optim.Adam(model.model.language_model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        _, states, positions = logits_and_states(model, visual, turns, True)
        loss = looking_loss(model, states, positions, turns, places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_pages, "VALIDATION", {"test": range(2)})
    straight = train(RECIPE, tmp_path / "a.pt", every=Every(save=1))
    assert not straight.training

    class StopError(Exception):
        pass

    real, calls = loop.save_atomically, []

    def stopping(payload, path):
        real(payload, path)
        calls.append(payload["step"])
        if len(calls) in (2, 5):
            raise StopError

    monkeypatch.setattr(loop, "save_atomically", stopping)
    for _ in range(2):
        with pytest.raises(StopError):
            train(RECIPE, tmp_path / "b.pt", every=Every(save=1))
    resumed = train(RECIPE, tmp_path / "b.pt", every=Every(save=1))
    assert len(calls) >= 8
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    fresh = build(RECIPE).state_dict()
    assert sum(not torch.equal(v, fresh[k]) for k, v in straight.state_dict().items()) > 60


def test_weights_are_kept_in_half_precision(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ReferencePrint().build()
    save_weights(tmp_path / TRAINED, model)
    monkeypatch.setenv("VTOK_ASSETS", str(tmp_path))
    loaded = pages.load_reference_print()
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.half().float(), loaded.state_dict()[name]), name


def test_bundled_questions_hold_little_without_the_page():
    data = open_vqa("print")
    kinds = Counter(q.groups["kind"] for q in data.questions)
    assert len(data.questions) >= 600 and min(kinds[kind] for kind in KINDS) >= 100
    assert blind_scores(data).mean() <= 0.45
    kept_apart = {q.image for q in printed_pages(calibration=True).questions}
    assert len(kept_apart) >= CALIBRATION_PROMPTS and not kept_apart & set(range(Recipe().pages))


def test_the_bundled_model_answers_and_needs_the_page():
    data = open_vqa("print")
    asked = [q for q in data.questions if q.image < 8]
    model, processor = pages.load_reference_print(), pages.make_print_processor()
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
    assert np.mean(right(pixel_values=inputs["pixel_values"].index_fill(1, torch.arange(1, 5), 1.0))) <= 0.6  # small print
    with vtok.patched(model, "random", keep=0.125):
        torch.manual_seed(0)
        assert np.mean(right()) < np.mean(seen)
    assert right() == seen


def test_hidden_tokens_are_as_good_as_dropped():
    """Logits of later text are those of a model that is fed without them, positions as they were."""
    torch.manual_seed(0)
    model = build(RECIPE).eval()
    visual = torch.randn(1, 156, TINY.text_width)
    turns = pack([[([5, 6, 7], 8), ([9, 4], 3)]])
    hidden = torch.rand(1, 156) < 0.5
    with torch.no_grad():
        found = logits_and_states(model, visual, turns, False, hidden)[0]
        assert (found - logits_and_states(model, visual, turns, False)[0]).abs().max() > 1e-4
        stays = torch.cat([torch.tensor([True]), ~hidden[0], torch.ones(turns.ids.shape[1], dtype=torch.bool)])
        left = model.model.language_model(**_without(_inputs(model, visual, turns), stays)).last_hidden_state
        expected = model.lm_head(left[:, -turns.ids.shape[1] :][turns.targets != -100])
    assert (found - expected).abs().max() < 1e-5


def _inputs(model, visual, turns):
    """Of the language model, for one sequence."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logits_and_states(model, visual, turns, False)
    handle.remove()
    return seen[0]


def _without(given, stays):
    """Without columns."""
    mask = given["attention_mask"][:, :, stays][..., stays]
    return {**given, "inputs_embeds": given["inputs_embeds"][:, stays], "attention_mask": mask} | {
        "position_ids": given["position_ids"][:, stays]
    }


def test_only_what_holds_no_print_is_hidden():
    torch.manual_seed(0)
    places = stacked([draw_page("train", number) for number in range(40)])
    hidden = train_pages.without_print(places)
    overview, lines = hidden[:, :36], hidden[:, 36:].unflatten(1, (12, 13))
    assert not lines[..., :12].flatten(1)[places.names != NOTHING].any()
    ends = lines[..., 12]
    assert 10 <= ends.all(1).sum() <= 32 and not ends.all()
    assert (
        0.2 < overview.float().mean() < 0.8 and 0.2 < lines[..., :12].flatten(1)[places.names == NOTHING].float().mean() < 0.8
    )
