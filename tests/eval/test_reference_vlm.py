"""The reference LLaVA: its folder, processor and questions, as Hugging Face and as vtok load them."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from vtok.eval.models.easyvqa import classes_of
from vtok.eval.models.reference import asset, load_reference_pictures

transformers = pytest.importorskip("transformers")

from vtok.eval.models import reference_vlm  # noqa: E402
from vtok.eval.models.reference_vlm import (  # noqa: E402
    BOS,
    EOS,
    IMAGE,
    LLAVA_FOLDER,
    PAD,
    PROMPT,
    UNKNOWN,
    WORDS,
    ReferenceLLaVA,
    load_reference_llava,
    load_reference_llava_processor,
    load_reference_questions,
    make_processor,
    make_tokenizer,
    save_folder,
    write_questions,
)
from vtok.eval.training.llava import accuracy  # noqa: E402

TINY = ReferenceLLaVA(patch_size=16, width=32, depth=2, heads=2, text_width=32, text_hidden=48, text_depth=2, text_heads=2)


def test_size_and_tokens():
    model = ReferenceLLaVA().build()
    assert sum(p.numel() for p in model.parameters()) == 2_250_240
    assert ReferenceLLaVA().visual_tokens == model.config.image_seq_length == 256
    seen = model.get_image_features(torch.zeros(2, 3, 64, 64)).pooler_output
    assert [part.shape for part in seen] == [(256, 128)] * 2


def test_the_bundled_configuration_is_the_one_in_the_code():
    folder = asset(f"{LLAVA_FOLDER}/config.json").parent
    bundled = transformers.AutoConfig.from_pretrained(folder).to_dict()
    ours = ReferenceLLaVA().config().to_dict()
    skipped = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    for config in (bundled, ours):
        for part in (config, config["text_config"], config["vision_config"]):
            for key in skipped:
                part.pop(key, None)
    assert bundled == ours
    stop = transformers.GenerationConfig.from_pretrained(folder)
    assert (stop.pad_token_id, stop.bos_token_id, stop.eos_token_id) == (PAD, BOS, EOS)


def test_the_tokenizer_knows_every_word():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 5 + len(WORDS) == ReferenceLLaVA().config().text_config.vocab_size
    questions = load_reference_questions("test")
    for text in {*questions.texts, *questions.answers}:
        ids = tokenizer.encode(text)
        assert ids[0] == BOS and UNKNOWN not in ids and EOS not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ?", "?") == text
    assert tokenizer.encode("Unheard WORD?")[1:3] == [UNKNOWN, UNKNOWN]


def test_the_bundled_processor():
    processor = load_reference_llava_processor()
    pictures, _ = load_reference_pictures("test")
    text = [PROMPT.format(question=q) for q in ("what color is the shape?", "is there not a red shape in the image?")]
    inputs = processor(images=list(pictures[:2]), text=text, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [256, 256]
    assert inputs["input_ids"][0, :4].tolist() == [PAD] * 4 and inputs["input_ids"][0, 4] == BOS  # padded on the left
    assert torch.allclose(inputs["pixel_values"], pictures[:2].float() / 127.5 - 1, atol=1e-6)


def test_a_folder_is_what_transformers_expects(tmp_path):
    torch.manual_seed(0)
    model, processor = TINY.build(), make_processor(TINY)
    save_folder(tmp_path, model, processor)
    ours, plain = load_reference_llava(tmp_path), transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.half().float())
        assert torch.equal(plain.state_dict()[name], ours.state_dict()[name]) and ours.state_dict()[name].dtype == torch.float32
    assert not ours.training
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlavaProcessor
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    inputs = loaded(images=[picture], text=[PROMPT.format(question="is it red?")], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == TINY.visual_tokens == 16
    assert ours.generate(**inputs).shape[1] <= inputs["input_ids"].shape[1] + 4


def test_generation_stops_at_the_end_of_the_answer():
    model = TINY.build()
    bias = torch.zeros(5 + len(WORDS))
    bias[EOS] = 1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    ids = torch.tensor([[BOS, *[IMAGE] * 16, 9]])
    out = model.generate(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64))
    assert out[0, ids.shape[1] :].tolist() == [EOS]


def test_missing_weights(tmp_path):
    save_folder(tmp_path, TINY.build(), make_processor(TINY))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors; train it: python -m vtok.eval.training.llava"):
        load_reference_llava(tmp_path)


def test_the_bundled_questions():
    questions = load_reference_questions("test")
    assert questions.pictures.shape == (1000, 3, 64, 64) and questions.pictures.dtype == torch.uint8
    assert len(questions.texts) == len(questions.answers) == len(questions.rows) == 9673
    assert int(questions.open.sum()) == 2537
    assert {a for a, o in zip(questions.answers, questions.open.tolist()) if not o} == {"yes", "no"}
    pictures, classes = load_reference_pictures("test")
    assert torch.equal(questions.pictures[:888], pictures)
    found = classes_of(zip(questions.texts, questions.answers, questions.rows.tolist()))
    assert found == {i: int(c) for i, c in enumerate(classes)}  # and nothing about the 112 pictures that follow


def test_calibration_questions_are_about_calibration_pictures():
    questions = load_reference_questions("calibration")
    pictures, classes = load_reference_pictures("calibration")
    assert torch.equal(questions.pictures, pictures)
    found = classes_of(zip(questions.texts, questions.answers, questions.rows.tolist()))
    assert found == {i: int(c) for i, c in enumerate(classes)}


def test_about_keeps_the_questions_of_some_pictures():
    questions = load_reference_questions("calibration")
    some = reference_vlm.about(questions, torch.tensor([7, 3]))
    assert torch.equal(some.pictures, questions.pictures[[7, 3]])
    for number, row in ((7, 0), (3, 1)):
        ours = [(t, a) for t, a, r in zip(some.texts, some.answers, some.rows.tolist()) if r == row]
        assert ours == [(t, a) for t, a, r in zip(questions.texts, questions.answers, questions.rows.tolist()) if r == number]


def test_questions_are_written_the_same_every_time(tmp_path):
    asked = [("what is it?", "circle", 0), ("is it red?", "no", 1)]
    for name in ("a.json.gz", "b.json.gz"):
        write_questions(tmp_path / name, asked)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes())) == [list(q) for q in asked]


def test_other_anatomies():
    assert replace(ReferenceLLaVA(), patch_size=8).visual_tokens == 64


def test_the_bundled_model_answers_from_the_picture():
    model, questions = load_reference_llava(), load_reference_questions("test")
    assert not model.training and next(model.parameters()).dtype == torch.float32
    some = reference_vlm.about(questions, torch.arange(0, 1000, 150))  # 7 pictures
    right, blind = accuracy(model, some, 4), accuracy(model, some, 4, blank=True)
    assert right["all"] > 90 and right["open"] > 90 and blind["all"] < 75 and blind["open"] < 50
