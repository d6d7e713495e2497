"""The reference vision-language models that come with vtok, and questions about easy-VQA's pictures to ask them.

Their folders in `assets/` are what Hugging Face transformers expects: `from_pretrained(folder)` of `AutoProcessor` and of the
model's class works on them without vtok.

Shapes: n pictures [n, 3, 64, 64] uint8, Q questions.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtok.eval.models.assets import asset, save_weights
from vtok.eval.models.data import read_idx
from vtok.eval.models.easyvqa import COLOURS, PICTURE_SIZE, PLACES, SHAPES
from vtok.eval.models.reference import DATA_FOLDER, MEAN, STD, load_reference_pictures
from vtok.writing import write

LLAVA_FOLDER = "easyvqa_llava"
LLAVA_WEIGHTS = "model.safetensors"
IMAGE_TOKEN = "<image>"
PROMPT = IMAGE_TOKEN + " {question}"  # the answer is one word, and then the end of the sequence
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN, "<unk>")
PAD, BOS, EOS, IMAGE, UNKNOWN = range(len(SPECIAL))
YES_NO = ("yes", "no")
WORDS = (
    *("?", "a", "contain", "does", "image", "in", "is", "not", "of", "present", "shape", "color", "the", "there", "what"),
    *("page", "at", "blank", "cell", "how", "many", *YES_NO, *SHAPES, *COLOURS),
    *sorted({word for place in PLACES for word in place.split()}),
)


@dataclass(frozen=True)
class ReferenceLLaVA:
    """Anatomy of the reference LLaVA: Hugging Face's `LlavaForConditionalGeneration`, CLIP tower and Llama, 2.2 M parameters.
    The other reference LLaVAs derive from it.

    The language model takes the tower's last layer without the class token, so that no layer is computed in vain (LLaVA-1.5
    takes the last but one).

    Attributes:
        image_size: side of what the tower sees, in pixels.
        patch_size: side of a patch; `(image_size / patch_size) ** 2` visual tokens.
        width: of the tower.
        depth: blocks of the tower.
        heads: of the tower.
        hidden: width of the tower's MLPs; `None` = four times its own.
        text_width: of the language model.
        text_hidden: width of its MLPs.
        text_depth: its layers.
        text_heads: its heads.
    """

    image_size: int = PICTURE_SIZE
    patch_size: int = 4
    width: int = 96
    depth: int = 6
    heads: int = 3
    hidden: int | None = None
    text_width: int = 128
    text_hidden: int = 320
    text_depth: int = 8
    text_heads: int = 4

    kind: ClassVar[str] = "Llava"  # how the names of transformers' classes begin
    image_processor: ClassVar[str] = "CLIPImageProcessor"
    words: ClassVar[Sequence[str]] = WORDS  # of the vocabulary, behind `SPECIAL`
    scale: ClassVar[tuple[Sequence[float], Sequence[float]]] = ((MEAN,) * 3, (STD,) * 3)  # mean and deviation of pixels

    @property
    def visual_tokens(self) -> int:
        """Tokens that a picture takes in the prompt."""
        return (self.image_size // self.patch_size) ** 2

    def grids(self) -> dict[str, Any]:
        """What configuration and image processor are told of crops."""
        return {}

    def vision(self) -> Any:
        """Configuration of the tower."""
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden or 4 * self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )

    def config(self) -> Any:
        """A `LlavaConfig`, or what its class is called for this kind."""
        import transformers

        text = transformers.LlamaConfig(
            vocab_size=len(SPECIAL) + len(self.words),
            hidden_size=self.text_width,
            intermediate_size=self.text_hidden,
            num_hidden_layers=self.text_depth,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.text_heads,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )
        return getattr(transformers, f"{self.kind}Config")(
            vision_config=self.vision(),
            text_config=text,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            image_seq_length=(self.image_size // self.patch_size) ** 2,
            **self.grids(),
        )

    def build(self, config: Any = None) -> Any:
        """A freshly initialised model in eval mode that stops at the end of its answer in a plain `generate()`."""
        import transformers

        model = getattr(transformers, f"{self.kind}ForConditionalGeneration")(config or self.config())
        model.generation_config = transformers.GenerationConfig(
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=4
        )
        return model.eval()


def make_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """One token a word or punctuation mark, in lower case; a prompt begins with `<s>`; batches are padded on the left. It knows
    `words` behind `SPECIAL`.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start = SPECIAL[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNKNOWN],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=1024,
    )


def make_processor(anatomy: ReferenceLLaVA) -> Any:
    """A processor for pictures and prompts, which brings pictures to the size and scale of the tower."""
    import transformers

    side, (mean, std) = anatomy.image_size, anatomy.scale
    images = getattr(transformers, anatomy.image_processor)(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
        **anatomy.grids(),
    )
    return getattr(transformers, f"{anatomy.kind}Processor")(
        image_processor=images,
        tokenizer=make_tokenizer(anatomy.words),
        patch_size=anatomy.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token, which "default" takes away again
    )


def save_folder(folder: Path, model: Any, processor: Any) -> None:
    """Writes a folder for `from_pretrained`: weights in fp16 that load as fp32, configuration, tokenizer, preprocessing."""
    save_settings(folder, model, processor)
    save_weights(folder / LLAVA_WEIGHTS, model)


def save_settings(folder: Path, model: Any, processor: Any) -> None:
    """The folder without the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    for part in (model.config, model.generation_config, processor):
        part.save_pretrained(folder)


def load_reference_llava(folder: Path | None = None) -> Any:
    """The trained reference LLaVA in eval mode, fp32 (its weights are stored in fp16), bundled or from another folder of the
    same form. Raises `FileNotFoundError` if the weights are missing.
    """
    from transformers import LlavaForConditionalGeneration

    home = home_of(LLAVA_FOLDER, folder)
    if not (home / LLAVA_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{home} has no {LLAVA_WEIGHTS}; train it: python -m vtok.eval.training.llava --export assets, or install vtok "
            "again"
        )
    return LlavaForConditionalGeneration.from_pretrained(home, dtype=torch.float32).eval()


def load_reference_llava_processor(folder: Path | None = None) -> Any:
    """Its processor: `processor(images=..., text=PROMPT.format(question=...), return_tensors="pt")`."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(home_of(LLAVA_FOLDER, folder))


def home_of(name: str, folder: Path | None) -> Path:
    """The folder that was given, or else the bundled one of that name."""
    return asset(f"{name}/config.json").parent if folder is None else folder


class Questions(NamedTuple):
    """Questions about pictures.

    Attributes:
        pictures: [n, 3, 64, 64] uint8, or pages [n, 3, 128, 128].
        texts: Q questions; the prompt is `PROMPT.format(question=...)`.
        answers: Q words.
        rows: [Q] which picture each is about.
        open: [Q] bool, False where the answer is yes or no.
        density: [Q] cells of that page that are not blank, 1 to 4; about pages only.
        cells: [n, 4] classes, see `vtok.eval.models.easyvqa`; about pages only.
    """

    pictures: Tensor
    texts: list[str]
    answers: list[str]
    rows: Tensor
    open: Tensor
    density: Any = None
    cells: Any = None


def collect_questions(pictures: Tensor, asked: Iterable[tuple[str, str, int]]) -> Questions:
    """`Questions` from (question, answer, row of the picture), as easy-VQA lists them."""
    texts, answers, rows = zip(*asked)
    is_open = torch.tensor([answer not in YES_NO for answer in answers])
    return Questions(pictures, list(texts), list(answers), torch.tensor(rows), is_open)


def about(questions: Questions, pictures: Tensor) -> Questions:
    """The questions about the pictures of these numbers, which get the numbers 0, 1, ... in this order."""
    row = {number: i for i, number in enumerate(pictures.tolist())}
    asked = zip(questions.texts, questions.answers, questions.rows.tolist())
    return collect_questions(questions.pictures[pictures], [(q, a, row[n]) for q, a, n in asked if n in row])


def load_reference_questions(split: str = "test") -> Questions:
    """Bundled questions: `"test"` (all 9,673 about the 1,000 test pictures) or `"calibration"` (about training pictures that
    were kept out of training).

    The first pictures are those of `load_reference_pictures(split)`, whose class follows from the questions; the others come
    after them.
    """
    pictures, _ = load_reference_pictures(split)
    if split == "test":
        rest = read_idx(asset(f"{DATA_FOLDER}/{split}-rest-pictures-idx4-ubyte.gz"))
        pictures = torch.cat((pictures, rest.permute(0, 3, 1, 2)))
    return collect_questions(pictures, read_questions(f"{split}-questions.json.gz"))


def write_questions(path: Path, asked: Any) -> None:
    """Writes plain values as compressed JSON; the same values give the same bytes."""
    write(path, gzip.compress(json.dumps(asked, separators=(",", ":")).encode(), 9, mtime=0))


def read_questions(name: str) -> Any:
    """What `write_questions` wrote, from a bundled file."""
    with gzip.open(asset(f"{DATA_FOLDER}/{name}"), "rt", encoding="utf-8") as file:
        return json.load(file)
