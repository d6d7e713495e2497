"""Prompts as transformers' own call makes them: a chat template that begins a sequence itself is not begun twice."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from helpers_vqa import picture, tiny_llava, tiny_next
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vtok.eval.models.vlm import BeginsOnce, VisionLanguageModel
from vtok.eval.training.atp.questions import Host

QUESTION = "is there a circle?"
PARTS = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


def beginning_tokenizer(**named):
    """One token a word; begins every text with `<bos>`, as Gemma's and Llama's do."""
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *named.values(), "is", "there", "a", "circle?", "yes"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made.add_special_tokens(["<unk>", "<pad>", "<bos>", "<eos>", *dict.fromkeys(named.values())])
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, extra_special_tokens=named)


def llava(template):
    found = tiny_llava()
    found.processor.chat_template = template.replace("IMAGE", "<image>")
    return found.processor


def llava_next(template):
    found = tiny_next()
    found.processor.chat_template = template.replace("IMAGE", "<image>")
    return found.processor


def gemma(template):
    named = {"image_token": "<soft>", "boi_token": "<start>", "eoi_token": "<end>"}
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(
        images, beginning_tokenizer(**named), chat_template=template.replace("IMAGE", "<start>"), image_seq_length=4
    )


PROCESSORS = {"llava": llava, "llava-next": llava_next, "gemma3": gemma}


def own_ids(processor, questions):
    """Ids [B, L] of transformers' own call, pictures and all."""
    processor.tokenizer.padding_side = "left"
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": question}]}]
        for i, question in enumerate(questions)
    ]
    made = processor.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    return made["input_ids"]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_are_those_of_transformers(name, begins):
    processor = PROCESSORS[name](("{{ bos_token }} " if begins else "") + PARTS)
    if begins and name != "gemma3":  # the bundled tokenizers begin nothing by themselves
        processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{processor.tokenizer.bos_token} $A",
            special_tokens=[(processor.tokenizer.bos_token, processor.tokenizer.bos_token_id)],
        )
    questions = [QUESTION, "is there a circle? yes"]
    net = torch.nn.Linear(1, 1)
    made = VisionLanguageModel(net, processor, "x").inputs([picture(0), picture(1)], questions)["input_ids"]
    assert torch.equal(made, own_ids(processor, questions))
    begun = (made == processor.tokenizer.bos_token_id).sum(1).tolist()
    plain = processor.tokenizer(QUESTION)["input_ids"]
    adds = plain[0] == processor.tokenizer.bos_token_id
    assert begun == [1, 1] if begins or adds else begun == [0, 0]


def test_training_and_the_harness_begin_once_too():
    processor = gemma("{{ bos_token }} " + PARTS)
    host = Host(torch.nn.Linear(1, 1), processor)
    ids = host.inputs([picture(0)], [host.prompt(QUESTION)])["input_ids"]
    assert torch.equal(ids, own_ids(processor, [QUESTION]))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}], tokenize=False
    )
    once = BeginsOnce(processor)  # as the harness calls it: one text, no list
    assert torch.equal(once(images=[picture(0)], text=text, return_tensors="pt")["input_ids"], ids)
    assert (processor(images=[picture(0)], text=text, return_tensors="pt")["input_ids"] == 2).sum() == 2
    assert once.tokenizer is processor.tokenizer and once.chat_template == processor.chat_template
    assert copy.copy(once).image_seq_length == pickle.loads(pickle.dumps(once)).image_seq_length == 4


def test_texts_that_do_not_begin_are_begun():
    tokenizer = beginning_tokenizer()
    once = BeginsOnce(gemma(PARTS))
    assert once(text=[QUESTION], return_tensors="pt")["input_ids"][0, 0] == tokenizer.bos_token_id
    assert once(text=[QUESTION], return_tensors="pt", add_special_tokens=False)["input_ids"][0, 0] != tokenizer.bos_token_id
