"""A tiny LLaVA with its processor, and questions about pictures of noise."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vtok.eval.models.vlm import VisionLanguageModel
from vtok.eval.tasks.vqa.data import Question, VQAData, kind_of

pytest.importorskip("transformers")

from vtok.eval.models.reference_next import ReferenceLLaVANeXT, make_next_processor
from vtok.eval.models.reference_vlm import SPECIAL, ReferenceLLaVA, make_processor, save_folder

ANATOMY = ReferenceLLaVA(
    image_size=16, patch_size=4, width=32, depth=2, heads=2, text_width=32, text_hidden=48, text_depth=4, text_heads=2
)
ASKED = (
    ("what color is the shape?", "blue"),
    ("is there a circle?", "yes"),
    ("does the image contain a triangle in the image?", "no"),
    ("what shape is present?", "circle"),
)
PICTURES = 5


def tiny_net(seed=0):
    torch.manual_seed(seed)
    net = ANATOMY.build()
    for p in net.parameters():
        if p.ndim > 1:
            p.data.mul_(3.0)  # answers that depend on the picture
    net.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # answers are words
    return net


def tiny_llava(seed=0):
    return VisionLanguageModel(tiny_net(seed), make_processor(ANATOMY), "tiny")


def tiny_next():
    torch.manual_seed(0)
    anatomy = ReferenceLLaVANeXT(**dataclasses.asdict(ANATOMY))
    return VisionLanguageModel(anatomy.build(), make_next_processor(anatomy), "tiny-next")


def save_tiny(folder):
    """A folder that `from_pretrained` reads."""
    save_folder(folder, tiny_net(), make_processor(ANATOMY))
    return folder


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(count=12):
    """Every picture is asked about more than once."""
    found = []
    for i in range(count):
        text, answer = ASKED[i % len(ASKED)]
        found.append(Question(i, text, (answer,), i % PICTURES, {"kind": kind_of(answer)}))
    return VQAData("noise", found, picture, blind={"is there a circle?": "yes", "what shape is present?": "triangle"})


def write_vqav2(folder, count=8):
    """The same questions as VQAv2's files: ten answers each, images named like COCO's."""
    data = questions(count)
    (folder / "val2014").mkdir(parents=True)
    for number in range(PICTURES):
        picture(number).save(folder / "val2014" / f"COCO_val2014_{number:012d}.png")
    asked = [{"question_id": 100 + q.doc_id, "image_id": q.image, "question": q.text} for q in data.questions]
    notes = [
        {
            "question_id": 100 + q.doc_id,
            "answer_type": "other" if q.groups["kind"] == "open" else "yes/no",
            "answers": [{"answer": q.target if i < 8 else "the cat", "answer_id": i + 1} for i in range(10)],
        }
        for q in data.questions
    ]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": notes}))
    return folder


def write_lines(folder, count=8):
    """The same questions as lines of JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        picture(number).save(folder / f"{number}.png")
    lines = [
        json.dumps({"id": f"q{q.doc_id}", "image": f"{q.image}.png", "question": q.text, "answers": q.target})
        for q in questions(count).questions
    ]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "asked.jsonl"


def words(text):
    return re.sub(r"\s+", " ", text)
