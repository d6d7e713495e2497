"""easy-VQA as captions: classes from questions, pages, vocabulary, the training script and what is bundled."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vtok.eval.models.easyvqa import (
    BLANK,
    CLASSES,
    PLACES,
    TEMPLATES,
    Pictures,
    caption,
    classes_of,
    compose,
    draw_groups,
    draw_pages,
    load_easyvqa,
)
from vtok.eval.models.reference import PageCLIP, asset, load_reference_pages, load_reference_pictures
from vtok.eval.training.bpe import learn_merges, vocabulary_size, write_merges
from vtok.eval.training.loop import Every, Stage

open_clip = pytest.importorskip("open_clip")

# After the check that open_clip is there: these import it.
from vtok.eval.training import clip as train_clip  # noqa: E402
from vtok.eval.training import loop as train_loop  # noqa: E402
from vtok.eval.training.clip import Recipe, contrastive_loss, draw_batch, make_tokenizer, resample, train  # noqa: E402

RED_CIRCLE = CLASSES.index("red circle")


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("what shape is present?", "circle"), ("what color is the shape?", "red")], RED_CIRCLE),
        ([("what color is the circle?", "red")], RED_CIRCLE),
        ([("what is the red shape?", "circle")], RED_CIRCLE),
        ([("is there a circle?", "yes"), ("is no red shape present?", "no")], RED_CIRCLE),
        ([("is there a triangle?", "no"), ("is no rectangle present?", "yes"), ("is a red shape present?", "yes")], RED_CIRCLE),
        ([("is there a triangle?", "no"), ("is a red shape present?", "yes")], None),
        ([("is there a circle?", "yes")], None),
    ],
)
def test_classes_follow_from_questions(questions, expected):
    found = classes_of([(question, answer, 7) for question, answer in questions])
    assert found == ({} if expected is None else {7: expected})


def test_answers_that_contradict_each_other():
    with pytest.raises(ValueError, match="picture 3 contradict"):
        classes_of([("is there a circle?", "yes", 3), ("what shape is present?", "triangle", 3)])


def test_captions():
    cells = [CLASSES.index("blue rectangle"), BLANK, BLANK, RED_CIRCLE]
    assert caption(cells) == "blue rectangle top left, red circle bottom right"
    assert len(CLASSES) == len(set(CLASSES)) == 24


def test_pages_show_pictures_in_their_places():
    pictures = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 64, 64) * 50
    (page,) = compose(pictures, torch.tensor([[2, -1, 0, 1]]))
    corners = [page[:, r, c].unique().tolist() for r, c in ((10, 10), (10, 100), (100, 10), (127, 127))]
    assert page.shape == (3, 128, 128)
    assert corners == [[100], [255], [0], [50]]
    assert page[0, 63, 63] == 100 and page[0, 63, 64] == 255 and page[0, 64, 63] == 0


def test_pages_of_a_group_differ_in_one_respect():
    pages = draw_groups(300, 0.4, torch.Generator().manual_seed(0))
    assert pages.shape == (300, 4, 4)
    assert bool((pages != BLANK).any(-1).all())
    for base, swapped, recoloured, reshaped in pages.tolist():
        assert sorted(base) == sorted(swapped) and sum(a != b for a, b in zip(base, swapped)) in (0, 2)
        ((old, new),) = [(a, b) for a, b in zip(base, recoloured) if a != b]
        assert old % 3 == new % 3 and old // 3 != new // 3
        ((old, new),) = [(a, b) for a, b in zip(base, reshaped) if a != b]
        assert old % 3 != new % 3 and old // 3 == new // 3
    assert 0.25 < (pages[:, 0] == BLANK).float().mean() < 0.35  # 0.4 of three cells of four


def one_of_each(copies=1):
    classes = torch.arange(24).repeat(copies)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(classes), 3, 64, 64), generator=generator, dtype=torch.uint8), classes


def test_drawn_pictures_are_of_the_class_that_was_asked_for():
    pictures, classes = one_of_each(5)
    source = Pictures(pictures, classes)
    cells = torch.randint(0, 25, (200, 4), generator=torch.Generator().manual_seed(1))
    rows = source.rows(cells, torch.Generator().manual_seed(2))
    assert torch.equal(rows == -1, cells == BLANK)
    assert torch.equal(classes[rows[rows >= 0]], cells[cells != BLANK])
    assert len(set(rows[cells == 4].tolist())) > 1
    with pytest.raises(ValueError, match="there is none of: yellow triangle"):
        Pictures(pictures[:23], classes[:23])


def test_drawn_pages_have_captions_of_their_own():
    source = Pictures(*one_of_each())
    rows, cells = draw_pages(source, 60, 0.25, seed=3)
    assert len({caption(page) for page in cells.tolist()}) == len(rows) == 240
    again, _ = draw_pages(source, 60, 0.25, seed=3)
    assert torch.equal(rows, again)


def test_vocabulary(tmp_path):
    """Every word of a caption is one token of open_clip's tokenizer; other words are spelled; the end is the largest."""
    tokenizer = make_tokenizer(tmp_path, 24)
    words = set(" ".join((*CLASSES, *PLACES)).split())
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    assert tokenizer.vocab_size == vocabulary_size(train_clip.merges()) == PageCLIP().vocab_size
    longest = ", ".join(f"yellow rectangle {place}" for place in PLACES)
    ids = tokenizer([longest, "zebra"])
    assert ids.shape == (2, 24) and int((ids[0] > 0).sum()) == 21
    assert ids.max() == tokenizer.eot_token_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("zebra")).strip() == "zebra"
    first = (tmp_path / "bpe.txt.gz").read_bytes()
    write_merges(tmp_path / "bpe.txt.gz", train_clip.merges())
    assert (tmp_path / "bpe.txt.gz").read_bytes() == first


def test_merges_are_frequent_pairs_first():
    assert learn_merges(["aab", "aab", "xab"]) == [("a", "b</w>"), ("a", "ab</w>"), ("x", "ab</w>")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """easy-VQA's form with 72 pictures of noise, three of each class."""
    root = tmp_path_factory.mktemp("easyvqa")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (root / split / "images").mkdir(parents=True)
        questions = []
        for number in range(72):
            colour, shape = CLASSES[number % 24].split()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / split / "images" / f"{number}.png")
            questions += [(f"what color is the {shape}?", colour, number)]
        (root / split / "questions.json").write_text(json.dumps(questions[1:]))  # nothing is known of picture 0
    return root


def test_reading_the_set(folder, tmp_path):
    pictures, classes = load_easyvqa("test", folder)
    assert pictures.shape == (71, 3, 64, 64) and classes.tolist() == [n % 24 for n in range(1, 72)]
    second = np.asarray(Image.open(folder / "test" / "images" / "1.png"))
    assert np.array_equal(pictures[0].permute(1, 2, 0).numpy(), second)
    with pytest.raises(FileNotFoundError, match=r"questions.json is missing"):
        load_easyvqa("test", tmp_path)


TINY = PageCLIP(width=32, layers=2, head_width=16, text_width=32, text_layers=1, patch_size=32)
RECIPE = Recipe(stages=(Stage(64, 0.06, 1e-3, 0.5), Stage(32, 0.06, 1e-3, 0.0)), groups=2, singles=3, held_out=24, model=TINY)


def test_batches(folder, tmp_path):
    pictures, classes = load_easyvqa("train", folder)
    source, tokenizer = Pictures(pictures, classes), make_tokenizer(tmp_path, 24)
    batch = draw_batch(source, RECIPE, tokenizer, torch.Generator().manual_seed(0))
    assert batch.images.shape == (11, 3, 128, 128) and batch.images.abs().max() <= 1
    assert batch.texts.shape == (11, 24) and batch.meaning.shape == (11,)
    assert (batch.meaning[-3:] < 0).all() and (batch.meaning[:-3] >= 0).all()
    texts = [tokenizer.decode(row.tolist()) for row in batch.texts]
    for i in range(11):  # the same number exactly where the same is said (prompts of one class differ in their wording)
        for j in range(8):
            assert (batch.meaning[i] == batch.meaning[j]) == (texts[i] == texts[j])


def test_equal_captions_share_the_target():
    """Against the definition, pair by pair."""
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    meaning = torch.tensor([3, 1, 3, -2, -2])
    logits = (2 * image @ text.T).log_softmax(1), (2 * text @ image.T).log_softmax(1)
    expected = 0.0
    for table in logits:
        for i in range(5):
            same = [j for j in range(5) if meaning[j] == meaning[i]]
            expected -= sum(table[i, j] for j in same) / len(same) / 5 / 2
    found = contrastive_loss(image, text, torch.tensor(2.0, dtype=torch.float64), meaning)
    assert found.item() == pytest.approx(float(expected), rel=1e-6)


def test_resampling_keeps_the_function_nearly():
    """On images that are constant within coarse patches the resampled embedding gives what the coarse one gave."""
    torch.manual_seed(0)
    coarse = replace(TINY, patch_size=64).build()
    fine = resample(coarse, TINY, 32)
    assert fine.visual.positional_embedding.shape == (17, 32) and coarse.visual.positional_embedding.shape == (5, 32)
    assert torch.equal(fine.visual.positional_embedding[0], coarse.visual.positional_embedding[0])
    x = torch.full((1, 3, 128, 128), 0.7)
    a, b = coarse.visual.conv1(x)[0, :, 0, 0], fine.visual.conv1(x)[0, :, 0, 0]
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_training_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    straight = train(RECIPE, tmp_path / "a" / "clip.pt", folder, every=Every(save=2))
    assert straight.visual.conv1.kernel_size == (32, 32) and not straight.training

    class StopError(Exception):
        pass

    real, calls = train_loop.save_atomically, []

    def stopping(payload, path):
        real(payload, path)
        calls.append(payload["step"])
        if len(calls) in (1, 3, 4):
            raise StopError

    monkeypatch.setattr(train_loop, "save_atomically", stopping)
    for _ in range(3):
        with pytest.raises(StopError):
            train(RECIPE, tmp_path / "b" / "clip.pt", folder, every=Every(save=2))
    resumed = train(RECIPE, tmp_path / "b" / "clip.pt", folder, every=Every(save=2))
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_exported_models_are_open_clips_own(folder, tmp_path):
    """What `export` writes, `load_clip` and open_clip's own `local-dir:` read; fp16 is all that is lost."""
    from vtok.eval.models.clip import load_clip

    torch.manual_seed(0)
    model = TINY.build().eval()
    train_clip.export(model, RECIPE, tmp_path, folder)
    encoder = load_clip(str(tmp_path / "easyvqa_clip"))
    weights = encoder.net.state_dict()
    assert all(torch.equal(v.half(), weights[k].half()) for k, v in model.state_dict().items())
    assert encoder.tokenizer(["red circle"]).max() == TINY.vocab_size - 1
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    assert encoder.preprocess(picture).shape == (3, 128, 128)
    assert encoder.preprocess(picture)[:, 5, 5].tolist() == [1, -1, -1]
    assert (tmp_path / "easyvqa" / "test-pages.json").is_file()


def test_the_bundled_pages():
    pages = load_reference_pages("test")
    assert pages.images.shape == (1000, 3, 128, 128) and pages.cells.shape == (1000, 4)
    assert len(set(pages.captions)) == 1000
    pictures, classes = load_reference_pictures("test")
    assert pictures.shape == (888, 3, 64, 64) and torch.bincount(classes).min() > 20
    cell = int((pages.cells[0] != BLANK).nonzero()[0, 0])
    shown = pages.images[0].unflatten(1, (2, 64)).unflatten(3, (2, 64))[:, cell // 2, :, cell % 2]
    same = (pictures == shown).flatten(1).all(1).nonzero().flatten()
    assert classes[same].tolist() == [pages.cells[0, cell]] * len(same) and len(same)


def test_calibration_pages_are_disjoint_from_test_pages():
    calibration, test = (load_reference_pictures(split)[0] for split in ("calibration", "test"))
    assert len(calibration) == Recipe().held_out
    known = {picture.numpy().tobytes() for picture in test}
    assert not any(picture.numpy().tobytes() in known for picture in calibration)
    assert load_reference_pages("calibration").images.shape == (100, 3, 128, 128)


def test_templates_name_the_class():
    assert all(template.format(c="red circle").endswith("red circle") for template in TEMPLATES)
    assert asset("easyvqa/LICENSE").read_text().startswith("MIT License")
