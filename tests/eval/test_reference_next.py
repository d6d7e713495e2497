"""The reference LLaVA-NeXT: differences from the LLaVA, questions about pages, and its training."""

from dataclasses import replace

import pytest
import torch
from helpers_easyvqa import naming, write_small

from vtok.eval.models.easyvqa import BLANK, CLASSES, COLOURS, PLACES, SHAPES, Pictures, compose
from vtok.eval.models.reference import asset, load_reference_pages, load_reference_pictures
from vtok.eval.training.loop import Every, Stage

transformers = pytest.importorskip("transformers")

from vtok.eval.models.reference_next import (  # noqa: E402
    DIFFERENCES,
    NEXT_FOLDER,
    ReferenceLLaVANeXT,
    add_differences,
    differences,
    draw_cells,
    load_reference_llava_next,
    load_reference_llava_next_processor,
    load_reference_page_questions,
    make_next_processor,
    page_questions,
    questions_about,
    write_reference_llava_next,
)
from vtok.eval.models.reference_vlm import BOS, IMAGE, PROMPT, ReferenceLLaVA, make_processor, make_tokenizer, save_folder  # noqa: E402
from vtok.eval.training import llava as train_llava  # noqa: E402
from vtok.eval.training import llava_next as train_llava_next  # noqa: E402
from vtok.eval.training import loop as train_run  # noqa: E402
from vtok.eval.training.llava_next import (  # noqa: E402
    Placer,
    Recipe,
    accuracy,
    draw_pages,
    draw_questions,
    packed_accuracy,
    read_pages,
    start,
    train,
    views,
)
from vtok.eval.training.turns import answer_logits, pack  # noqa: E402

SMALL = {"width": 32, "depth": 2, "heads": 2, "text_width": 32, "text_hidden": 48, "text_depth": 4, "text_heads": 2}
TINY = ReferenceLLaVANeXT(patch_size=32, **SMALL)
RECIPE = Recipe(
    stages=(Stage(32, 0.04, 1e-3, 0.5), Stage(32, 0.04, 1e-3, 0.0)), batch_size=4, held_out=24, placing_layer=2, model=TINY
)
RED_CIRCLE, BLUE_TRIANGLE = CLASSES.index("red circle"), CLASSES.index("blue triangle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """easy-VQA in small: 72 pictures a split, three of each class."""
    return write_small(tmp_path_factory.mktemp("easyvqa"), 72, 3, lambda number, colour, shape: naming(colour, shape))


def test_views_are_what_the_processor_makes():
    pages = load_reference_pages("test").images[:3]
    processor = make_next_processor(ReferenceLLaVANeXT())
    inputs = processor(images=list(pages), text=[PROMPT.format(question="is there a red circle?")] * 3, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 5, 3, 64, 64)
    assert torch.allclose(inputs["pixel_values"], views(pages), atol=1e-6)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [64 + 16 * 17] * 3


def test_a_turn_packed_with_others_computes_what_it_computes_alone():
    torch.manual_seed(0)
    model, tokenizer = TINY.build(), make_tokenizer()
    pages = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    asked = [("what shape is top left?", "circle"), ("is bottom right blank?", "no")]
    turns = [(tokenizer.encode(q, add_special_tokens=False), tokenizer.convert_tokens_to_ids(a)) for q, a in asked]
    with torch.no_grad():
        visual = read_pages(model, pages)
        packed = answer_logits(model, visual, pack([turns, turns[:1]]))
        alone = []
        for row, turn in [(0, turns[0]), (0, turns[1]), (1, turns[0])]:
            ids = torch.tensor([[BOS, *[IMAGE] * visual.shape[1], *turn[0], turn[1]]])
            sizes = torch.tensor([[128, 128]])
            out = model(input_ids=ids, pixel_values=views(pages[row : row + 1]), image_sizes=sizes)
            alone.append(out.logits[0, -2:])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_the_placer_knows_which_token_lies_where():
    """The tokens that change when one cell is painted are those that it assigns to the cell."""
    torch.manual_seed(0)
    model = replace(TINY, patch_size=16).build()
    placer = Placer(32, 4)
    white = torch.full((1, 3, 128, 128), 255, dtype=torch.uint8)
    with torch.no_grad():
        plain = read_pages(model, white)
        for cell in range(4):
            page = compose(
                torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[0 if c == cell else -1 for c in range(4)]])
            )
            changed = (read_pages(model, page) - plain).abs().amax(-1)[0, 16:].view(8, 9) > 1e-6
            assert torch.equal(changed[:, :-1], placer.cell == cell) and not changed[:, -1].any()


def test_differences_are_small_and_nearly_exact():
    torch.manual_seed(0)
    base = {"a": torch.randn(6, 40), "b": torch.randn(4), "c": torch.randn(3, 5), "same": torch.randn(7, 9)}
    weights = {
        "a": base["a"] + 0.01 * torch.randn(6, 40),
        "b": torch.randn(4),
        "c": torch.randn(4, 5),
        "new": torch.randn(8),
        "same": base["same"].clone(),
    }
    found = differences(weights, base)
    assert found["a"].dtype == torch.int8 and found["a.scale"].shape == (6,)
    assert found["c"].dtype == found["b"].dtype == found["new"].dtype == torch.float16
    back = add_differences(found, base)
    assert back.keys() == weights.keys()
    step = (weights["a"] - base["a"]).abs().amax(1, keepdim=True) / 127
    assert bool(((back["a"] - weights["a"]).abs() <= 0.51 * step).all())
    assert torch.equal(back["same"], base["same"])
    for name in ("b", "c", "new"):
        assert torch.equal(back[name], weights[name].half().float())


def test_differences_for_another_llava():
    found = differences({"a": torch.randn(6, 4)}, {"a": torch.randn(6, 4)})
    with pytest.raises(ValueError, match=r"differences in a are for \[6, 4\], the LLaVA has \[5, 4\]"):
        add_differences(found, {"a": torch.randn(5, 4)})
    with pytest.raises(ValueError, match="the LLaVA has nothing"):
        add_differences(found, {})


def test_as_many_pages_of_each_density():
    cells = draw_cells(40, torch.Generator().manual_seed(0))
    assert torch.bincount((cells != BLANK).sum(1)).tolist() == [0, 10, 10, 10, 10]
    assert (cells != BLANK).sum(0).min() > 15  # every place is filled as often as any other, more or less
    assert cells.max() == BLANK and draw_cells(3, torch.Generator().manual_seed(0)).shape == (3, 4)


@pytest.mark.parametrize("cells", [[RED_CIRCLE, BLANK, BLANK, BLUE_TRIANGLE], [BLANK, BLANK, RED_CIRCLE, BLANK], [1, 2, 3, 4]])
def test_questions_about_a_page(cells):
    asked = questions_about(cells, torch.Generator().manual_seed(0))
    assert len(asked) == 16
    for place, cell in zip(PLACES, cells):
        answers = dict(asked)
        if cell == BLANK:
            assert answers[f"what shape is {place}?"] == answers[f"what color is {place}?"] == "blank"
        else:
            colour, shape = CLASSES[cell].split()
            assert answers[f"what shape is {place}?"] == shape and answers[f"what color is {place}?"] == colour
        assert answers[f"is {place} blank?"] == ("yes" if cell == BLANK else "no")
    there = {CLASSES[c] for c in cells if c != BLANK}
    for question, answer in asked[12:]:
        assert (answer == "yes") == any(question == f"is there a {name}?" for name in there)
    assert [answer for _, answer in asked[12:]] == ["yes", "yes", "no", "no"]
    colour, shape = asked[14][0].removeprefix("is there a ").rstrip("?").split()
    assert any((colour in name) != (shape in name) for name in there)


def test_the_tokenizer_knows_the_questions():
    tokenizer = make_tokenizer()
    for cells in draw_cells(8, torch.Generator().manual_seed(0)).tolist():
        for question, answer in questions_about(cells, torch.Generator().manual_seed(1)):
            assert tokenizer.unk_token_id not in tokenizer.encode(f"{question} {answer}")


def test_drawn_test_questions():
    pictures, classes = load_reference_pictures("test")
    rows, asked = draw_questions(Pictures(pictures, classes), 40, 0)
    questions = page_questions(pictures, classes, rows, asked)
    assert questions.pictures.shape == (40, 3, 128, 128) and len(questions.texts) == 240
    assert torch.bincount(questions.density).tolist() == [0, 60, 60, 60, 60]
    assert torch.equal(questions.density, (questions.cells != BLANK).sum(1)[questions.rows])
    for number in range(40):
        mine = [i for i in range(240) if questions.rows[i] == number]
        answers = {questions.texts[i]: questions.answers[i] for i in mine}
        assert questions.answers[mine[0]] in SHAPES and questions.answers[mine[1]] in COLOURS
        assert [questions.answers[i] for i in mine[-2:]] == ["yes", "no"]
        for text, answer in answers.items():
            for place, cell in zip(PLACES, questions.cells[number].tolist()):
                if text == f"is {place} blank?":
                    assert (answer == "yes") == (cell == BLANK)


def test_the_bundled_questions():
    questions = load_reference_page_questions()
    assert questions.pictures.shape == (600, 3, 128, 128) and len(questions.texts) == len(questions.answers) == 3600
    assert torch.bincount(questions.density).tolist() == [0, 900, 900, 900, 900]
    assert int(questions.open.sum()) == 1800
    assert 0.45 < sum(a == "yes" for a in questions.answers) / 1800 < 0.55
    written = {t: a for t, a, r in zip(questions.texts, questions.answers, questions.rows.tolist()) if r == 5}
    known = {t: a for seed in range(9) for t, a in questions_about(questions.cells[5].tolist(), _seeded(seed))}
    assert written.items() & known.items() and all(known.get(t, a) == a for t, a in written.items())


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_the_bundled_configuration_is_the_one_in_the_code():
    folder = asset(f"{NEXT_FOLDER}/config.json").parent
    bundled, ours = transformers.AutoConfig.from_pretrained(folder).to_dict(), ReferenceLLaVANeXT().config().to_dict()
    for config in (bundled, ours):
        for part in (config, config["text_config"], config["vision_config"]):
            for key in ("architectures", "dtype", "transformers_version", "_name_or_path"):
                part.pop(key, None)
    assert bundled == ours
    processor = load_reference_llava_next_processor()
    page = torch.zeros(3, 128, 128, dtype=torch.uint8)
    inputs = processor(images=[page], text=[PROMPT.format(question="is top left blank?")], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == 336 and inputs["pixel_values"].shape == (1, 5, 3, 64, 64)


def test_pages_are_drawn_with_their_pictures_in_their_cells():
    pictures = torch.arange(24).view(24, 1, 1, 1).expand(24, 3, 64, 64).to(torch.uint8)
    pages, cells = draw_pages(Pictures(pictures, torch.arange(24)), RECIPE, torch.Generator().manual_seed(0))
    shown = pages[:, 0, ::64, ::64].flatten(1)
    assert torch.equal(shown.long(), torch.where(cells == BLANK, 255, cells))


def test_only_the_end_of_a_line_is_new():
    torch.manual_seed(0)
    llava = ReferenceLLaVA(patch_size=32, **SMALL).build()
    model = start(TINY, llava.state_dict())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in llava.state_dict().items())
    with pytest.raises(ValueError, match="are not the weights of such a LLaVA"):
        start(TINY, {"nonsense": torch.zeros(1)})


def test_training_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    llava = tmp_path / "llava.pt"
    torch.save(ReferenceLLaVA(patch_size=32, **SMALL).build().state_dict(), llava)
    straight = train(RECIPE, tmp_path / "a" / "next.pt", llava, folder, every=Every(save=2))
    assert not straight.training

    class StopError(Exception):
        pass

    real, calls = train_run.save_atomically, []

    def stopping(payload, path):
        real(payload, path)
        calls.append(payload["step"])
        if len(calls) in (1, 3):
            raise StopError

    monkeypatch.setattr(train_run, "save_atomically", stopping)
    for _ in range(2):
        with pytest.raises(StopError):
            train(RECIPE, tmp_path / "b" / "next.pt", llava, folder, every=Every(save=2))
    resumed = train(RECIPE, tmp_path / "b" / "next.pt", llava, folder, every=Every(save=2))
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    moved = [k for k, v in torch.load(llava, weights_only=True).items() if not torch.equal(v, straight.state_dict()[k])]
    assert len(moved) > 20
    with pytest.raises(FileNotFoundError, match="the LLaVA to start from"):
        train(RECIPE, tmp_path / "c.pt", tmp_path / "no.pt", folder)


def test_single_questions_and_packed_ones_score_the_same(monkeypatch):
    monkeypatch.setattr(train_llava, "ANSWER_TOKENS", 1)  # untrained, the model does not stop after a word
    torch.manual_seed(0)
    model = TINY.build()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[:5] = 0
    pictures, classes = load_reference_pictures("calibration")
    rows, asked = draw_questions(Pictures(pictures, classes), 8, 0)
    questions = page_questions(pictures, classes, rows, asked)
    tokenizer = make_tokenizer()
    with torch.no_grad():
        said = []
        for text, page in zip(questions.texts, questions.rows.tolist()):
            turn = pack([[(tokenizer.encode(text, add_special_tokens=False), 9)]])
            logits = answer_logits(model, read_pages(model, questions.pictures[page : page + 1]), turn)
            said.append(tokenizer.decode([logits[0].argmax().item()]))
    questions = questions._replace(answers=[s if i % 2 else a for i, (s, a) in enumerate(zip(said, questions.answers))])
    share = packed_accuracy(model, questions, tokenizer)
    alone = accuracy(model.eval(), questions, batch_size=7)
    assert bool(alone[1::2].all()) and alone.double().mean().item() == pytest.approx(share)


def test_export_and_load(folder, tmp_path):
    """A stored LLaVA-NeXT is its LLaVA and the differences; nothing but their rounding is lost."""
    torch.manual_seed(0)
    llava_anatomy = ReferenceLLaVA(patch_size=16, **SMALL)
    llava = llava_anatomy.build()
    save_folder(tmp_path / "easyvqa_llava", llava, make_processor(llava_anatomy))
    model = TINY.build()
    train_llava_next.export(model, RECIPE, tmp_path, folder)
    loaded = load_reference_llava_next(tmp_path / "easyvqa_llava_next", tmp_path / "easyvqa_llava")
    assert not loaded.training and loaded.generation_config.eos_token_id == 2
    for name, weight in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == torch.float32 and (other - weight).abs().max() <= 0.005 * max(1.0, weight.abs().max()), name
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "easyvqa_llava_next")
    assert type(processor) is transformers.LlavaNextProcessor and processor.patch_size == 32
    assert (tmp_path / "easyvqa" / "test-page-questions.json.gz").is_file()
    save_folder(tmp_path / "whole", loaded, processor)
    whole = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(v.half().float(), whole.state_dict()[k]) for k, v in loaded.state_dict().items())
    (tmp_path / "easyvqa_llava_next" / DIFFERENCES).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks differences.safetensors; train it: python -m"):
        load_reference_llava_next(tmp_path / "easyvqa_llava_next", tmp_path / "easyvqa_llava")


def test_the_bundled_model_reads_pages():
    model, questions = load_reference_llava_next(), load_reference_page_questions()
    some = slice(0, 48)  # about the first eight pages, two of each density
    few = questions._replace(
        texts=questions.texts[some],
        answers=questions.answers[some],
        rows=questions.rows[some],
        open=questions.open[some],
        density=questions.density[some],
    )
    assert torch.bincount(few.density).tolist() == [0, 12, 12, 12, 12]
    assert accuracy(model, few).double().mean() > 0.85


def test_a_folder_of_its_own_is_complete(tmp_path):
    write_reference_llava_next(tmp_path)
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    expected = load_reference_llava_next().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half().float()) for name, value in model.state_dict().items())  # kept in fp16
    page = load_reference_page_questions().pictures[0].permute(1, 2, 0).numpy()
    prompt = {"text": PROMPT.format(question="what shape is top left?"), "images": page, "return_tensors": "pt"}
    own, bundled = transformers.AutoProcessor.from_pretrained(tmp_path), load_reference_llava_next_processor()
    assert torch.equal(own(**prompt)["input_ids"], bundled(**prompt)["input_ids"])
