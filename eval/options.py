"""Options of tasks and of the search for schedules, which the command line makes its flags of.

They stand apart from what uses them so that `--help` imports neither torch nor a backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from vtok.errors import ConfigError, shown
from vtok.eval.common.checked import MOST, Count, DType, Seed, Share, Whole, check_fields

PICTURES = "reference-pictures"  # of zero-shot classification, which come with vtok
CAPTIONED = "reference-pages"  # of retrieval
TUNED = ("reference", "reference-clip", "reference-llava", "reference-scenes")  # bring their samples for `vtok tune`
Pixels = Annotated[int, Field(ge=1, le=100_000)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]  # of timm, but for training's "random"
Deviation = Annotated[float, Field(ge=1e-9)]


@dataclass(frozen=True)
class Options:
    """Of classification: timm's flags, under timm's names (`-` as `_`), with timm's defaults.

    Attributes:
        dataset: timm's name of a dataset ("hfds/...", "torch/..."); "" = image folder or .tar.
        split: of the dataset; a folder of that name inside the data folder is used if there is one.
        class_map: file that maps folder names to classes; "" = by WordNet ids, names or numbers of the folders, or
            by their natural order where there are as many as outputs.
        num_samples: evenly spaced images to take; `None` = all.
        pretrained: load pretrained weights (for a model given by name, without checkpoint).
        checkpoint: file with weights, for a model given by name.
        use_ema: take the averaged weights of the checkpoint.
        num_classes, gp, model_kwargs: for timm's create_model.
        batch_size: images in a batch.
        workers: processes that read images; 0 = none.
        img_size, in_chans, input_size, crop_pct, crop_mode, crop_border_pixels, mean, std, interpolation: preprocessing;
            `None` = as the model's configuration says, which published numbers rest on.
        use_train_size: take the size the model was trained at where it has another for tests.
        pin_mem: page-locked memory for transfers.
        channels_last: memory format.
        device: `None` = the GPU if there is one.
        amp, amp_dtype: autocast.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        real_labels: ReaL JSON, or "timm" for the file that timm brings along.
        valid_labels: file with the numbers of the model's outputs that count.
        seed: for random initialisation.
    """

    dataset: str = ""
    split: str = "validation"
    class_map: str = ""
    num_samples: Count | None = None
    pretrained: bool = True
    checkpoint: str = ""
    use_ema: bool = False
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    gp: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: Count = 256
    workers: Whole = 4
    img_size: Count | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    input_size: tuple[Pixels, Pixels, Pixels] | None = None
    use_train_size: bool = False
    crop_pct: Annotated[float, Field(ge=1e-3, le=1000)] | None = None
    crop_mode: Literal["squash", "border", "center"] | None = None
    crop_border_pixels: Annotated[int, Field(ge=0, le=100_000)] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Deviation, ...] | None = None
    interpolation: Interpolation | None = None
    pin_mem: bool = False
    channels_last: bool = False
    device: str | None = None
    amp: bool = False
    amp_dtype: DType = "float16"
    model_dtype: DType | None = None
    real_labels: str = ""
    valid_labels: str = ""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        channels = self.in_chans or (self.input_size[0] if self.input_size else 3)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) not in (1, channels):
                raise ConfigError(f"{name} takes 1 or {channels} numbers, got {shown(value)}")


@dataclass(frozen=True)
class ClipOptions:
    """Flags of the tasks for dual encoders.

    Attributes:
        pretrained: open_clip's tag or file of weights; "" = none (folders and Hugging Face models bring theirs).
        backend: "open_clip" or "transformers"; `None` = find out.
        split: of the data.
        num_samples: evenly spaced images to take; `None` = all.
        batch_size: images in a batch.
        workers: processes that read images; 0 = none.
        device: `None` = the GPU if there is one.
        amp, amp_dtype: autocast.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        language: of the texts; stored with the result.
        seed: for random initialisation.
    """

    pretrained: str = ""
    backend: Literal["open_clip", "transformers"] | None = None
    split: str = "test"
    num_samples: Count | None = None
    batch_size: Count = 64
    workers: Whole = 4
    device: str | None = None
    amp: bool = False
    amp_dtype: DType = "bfloat16"
    model_dtype: DType | None = None
    language: str = "en"
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ZeroshotOptions(ClipOptions):
    """Flags of zero-shot classification, beside those of `ClipOptions`.

    Attributes:
        templates: prompts with `{c}` for the class; one that is a file holds one prompt a line; "openai" and "simple" are
            open_clip's 80 and 7 for ImageNet. None = "a photo of a {c}." (for the bundled pictures, the prompts of training).
        classnames: file with a class name a line, in the order of the labels, or "imagenet" for open_clip's; folders are
            found in it by name where they can be. "" = the folders' names, underscores as spaces, for WordNet ids those of
            ImageNet's classes.
        dataset: timm's name of a data set ("torch/cifar10", "hfds/..."); "" = a folder with one sub-folder a class.
        class_map: file that maps folders to classes; "" = as the class names say, or natural order of the folders.
    """

    templates: tuple[str, ...] = ()
    classnames: str = ""
    dataset: str = ""
    class_map: str = ""


@dataclass(frozen=True)
class RetrievalOptions(ClipOptions):
    """Flags of retrieval, beside those of `ClipOptions`.

    Attributes:
        recall_k: numbers of answers to look at.
        images: folder of the images; "" = the folder of the caption file.
        max_captions: of each image, the first ones; `None` = all.
        equal_captions: whether an image also matches the captions of others that are equal to its own.
    """

    recall_k: tuple[Count, ...] = (1, 5, 10)
    images: str = ""
    max_captions: Count | None = None
    equal_captions: bool = True


@dataclass(frozen=True)
class VQAOptions:
    """Flags of visual question answering.

    Attributes:
        task: whose files, prompts and scores: "vqa" (the bundled questions, lines of JSON, VQAv2's files), "chartqa", "docvqa",
            "gqa", "mmbench", "mme", "mmmu", "mvbench", "ocrbench", "pope", "refcoco", "scienceqa", "scienceqa_img",
            "seedbench", "textvqa", "videomme", "vizwiz" or "vqav2".
        questions: file with the questions; "" = find it in the folder of the data.
        annotations: file with VQAv2's annotations; "" = find it.
        images: folder of the images, or of the videos; "" = the folder of the data.
        ocr: file with TextVQA's OCR tokens, which are then put into the prompt; "" = no tokens in the prompt.
        split: part of the data; "" = the one that the task is quoted on. Of test splits whose answers are kept secret (vqav2,
            textvqa, docvqa, vizwiz) the files for the evaluation server are written, and agreement is measured.
        results: file with answers of another program, `[{"question_id", "answer"}]`, scored as one more record.
        prompt: text behind every question; `None` = what the task brings (VQAv2: "Answer the question using a single word or
            phrase." on a line of its own; easy-VQA: nothing).
        max_new_tokens: length of an answer at most; `None` = the task's, 16 for most.
        num_samples: questions to ask, one of each of so many equal stretches; `None` = all.
        frames: of a video that the model is shown, at equal distances.
        frames_as_images: whether frames are shown as so many images: to models that read no videos.
        shrink: factor that the sides of every picture are divided by before the processor sees it (VTC-Bench: 2, 3, 4, 5, 10).
            Of models of native resolution (Qwen-VL) about its square fewer tokens are left; others make it large again.
        batch_size: questions in a batch.
        baselines: also random and uniform, which keep before the LLM the share of visual tokens that each setting keeps on
            average over the decoder layers.
        floors: deprecated name of `baselines`.
        device: `None` = the GPU if there is one.
        model_dtype: "float32", "bfloat16" or "float16"; `None` = the model's own.
        seed: of methods that draw, and of the bootstrap.
        output: folder of `samples.jsonl`, `results.jsonl` and a file of answers a setting; a second run goes on where the first
            was stopped. "" = none.
    """

    task: str = "vqa"
    questions: str = ""
    annotations: str = ""
    images: str = ""
    ocr: str = ""
    split: str = ""
    results: str = ""
    prompt: str | None = None
    max_new_tokens: Count | None = None
    num_samples: Count | None = None
    frames: Count = 16
    frames_as_images: bool = False
    shrink: Count = 1
    batch_size: Count = 16
    baselines: bool = False
    device: str | None = None
    model_dtype: DType | None = None
    seed: Seed = 0
    output: str = ""
    floors: bool = False

    def __post_init__(self) -> None:
        if self.floors is True:
            warnings.warn("`floors` is called `baselines` now", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "baselines", True)
        check_fields(self)


@dataclass(frozen=True)
class Plan:
    """How to search.

    Attributes:
        flops: share of the unpatched model's FLOPs to leave.
        search: "tpe" learns from earlier candidates, "halving" and "random" do not, and "random" drops none early.
        candidates: how many schedules, the default among them.
        eta: of successive halving: the best 1 / eta go on.
        objective: "kl", "agreement", "accuracy", "cross_entropy" or "distance"; "" = kl, of embeddings distance.
        seed: of the candidates.
        batch_size: samples in a forward pass.

    Raises:
        ConfigError: a value of another type, or beyond its limits.
    """

    flops: Share
    search: str = "tpe"
    candidates: Annotated[int, Field(ge=2, le=MOST)] = 48
    eta: Annotated[int, Field(ge=2, le=MOST)] = 3
    objective: str = ""
    seed: Seed = 0
    batch_size: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Source:
    """Where model and samples come from; the fields are flags of `vtok tune`.

    Attributes:
        data: image folder to calibrate on (of a VLM: questions, see `vtok eval vqa`); `None` for models that bring theirs.
        held_out: others to compare on; `None` = what is left of `data`.
        images: calibration images or questions; `None` = 400, or what there is.
        held_out_images: images or questions to compare on; `None` = all there are.
        seed: of candidates, and of the choice and the order of images.
        pretrained: load pretrained weights of a timm model.
        checkpoint: file with its weights.
        num_classes: of it.
        class_map: file that maps folder names to classes.
        workers: processes that read images.
        batch_size: in a forward pass.
        device: `None` = where the model is loaded.
    """

    data: str | None = None
    held_out: str | None = None
    images: Count | None = None
    held_out_images: Annotated[int, Field(ge=2, le=MOST)] | None = None
    seed: Seed = 0
    pretrained: bool = True
    checkpoint: str = ""
    num_classes: Count | None = None
    class_map: str = ""
    workers: Whole = 4
    batch_size: Count = 100
    device: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
