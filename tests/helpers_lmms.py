"""Runs of lmms-eval in this process, and tiny random Qwen models in folders as `from_pretrained` reads them."""

import torch
import transformers
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from vtok.eval.lmms.task import TASK
from vtok.eval.models.reference_vlm import WORDS

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
END, START_IMAGE, END_IMAGE, IMAGE, VIDEO = 2, 4, 5, 6, 7
TURNS = (
    "{% for message in messages %}<|im_start|> {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}<|im_start|>"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_VISION = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
FAMILIES = {
    "vtok_qwen2_5_vl": (
        "Qwen2_5_VL",
        14,
        {"text_config": {**_TEXT, "rope_parameters": _ROPE}, "vision": {"window_size": 56, "fullatt_block_indexes": [1]}},
    ),
    "vtok_qwen3_vl": (
        "Qwen3VL",
        16,
        {
            "text_config": {**_TEXT, "head_dim": 16, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
            "vision": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        },
    ),
}


def tokenizer():
    """One token a word; batches are padded with `<|endoftext|>`."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[END], unk_token="<unk>"
    )


def save_qwen(folder, name):
    """A random model of a family with its processor; its answers depend on the picture."""
    family, patch, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        text_config=settings["text_config"],
        vision_config={**_VISION, **settings["vision"], "patch_size": patch},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START_IMAGE,
        vision_end_token_id=END_IMAGE,
    )
    torch.manual_seed(2)
    net = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for p in net.parameters():
        if p.ndim > 1:
            p.data.mul_(6.0)
    net.generation_config = transformers.GenerationConfig(
        eos_token_id=END, pad_token_id=0, suppress_tokens=[i for i in range(len(SPECIAL)) if i != END]
    )
    net.to(torch.bfloat16).save_pretrained(folder)
    kind = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    videos = transformers.Qwen3VLVideoProcessor if family == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    getattr(transformers, f"{family}Processor")(
        transformers.Qwen2VLImageProcessor(**kind), tokenizer(), videos(**kind), chat_template=TURNS
    ).save_pretrained(folder)
    return folder


class Harness:
    """lmms-eval with one folder of tasks, which is scanned once.

    Args:
        tasks: see `write_task`.
    """

    def __init__(self, tasks):
        self.manager = TaskManager("ERROR", include_path=str(tasks))

    def run(self, model, arguments, batch_size=1, **more):
        """Results of the whole task; samples in the order of the questions."""
        found = evaluator.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[TASK],
            task_manager=self.manager,
            batch_size=batch_size,
            device="cpu",
            **more,
        )
        samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
        return found, samples


def said(samples):
    return [sample["filtered_resps"][0].strip() for sample in samples]


def counts(samples):
    return [sample["token_counts"][0] for sample in samples]
