"""The reference models that come with vtok: small, trained on real images by scripts of this package; in `assets/`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.eval.models.assets import asset, load_weights
from vtok.eval.models.clip import REFERENCE, DualEncoder, load_clip
from vtok.eval.models.data import FASHION_MEAN, FASHION_STD, read_idx
from vtok.eval.models.easyvqa import BLANK, PAGE_SIZE, caption, compose

VIT_WEIGHTS = "fashion_vit.safetensors"
DATA_FOLDER = "easyvqa"
CONFIG_FILE, MERGES_FILE = "open_clip_config.json", "bpe.txt.gz"
MEAN = STD = 0.5


@dataclass(frozen=True)
class FashionViT:
    """Anatomy of the reference ViT: a plain timm `VisionTransformer`, CLS and 196 patches of 2 x 2 pixels, 1.4 M parameters."""

    img_size: int = 28
    patch_size: int = 2
    in_chans: int = 1
    num_classes: int = 10
    embed_dim: int = 96
    depth: int = 12
    num_heads: int = 3

    def build(self, **extra: Any) -> nn.Module:
        """A freshly initialised model; `extra` goes to timm's constructor (training passes its dropout rates)."""
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**asdict(self), **extra)


def load_reference_vit() -> nn.Module:
    """The trained reference ViT in eval mode, fp32 (its weights are stored in fp16); `pretrained_cfg` tells timm how its images
    are prepared.
    """
    anatomy = FashionViT()
    model: Any = anatomy.build()
    model.load_state_dict(load_weights(VIT_WEIGHTS))
    size = (anatomy.in_chans, anatomy.img_size, anatomy.img_size)
    scale = {"mean": (FASHION_MEAN,), "std": (FASHION_STD,)}
    model.pretrained_cfg = {"input_size": size, **scale, "crop_pct": 1.0, "interpolation": "bicubic"}
    return model.eval()


def load_reference_images(split: str = "test") -> tuple[Tensor, Tensor]:
    """Bundled Fashion-MNIST images: `"test"` (all 10,000) or `"calibration"` (1,000 training images kept out of training), as
    (images [S, 1, 28, 28] uint8, labels [S] int64).
    """
    prefix = {"test": "t10k", "calibration": "calibration"}[split]
    images = read_idx(asset(f"fashion_mnist/{prefix}-images-idx3-ubyte.gz"))
    labels = read_idx(asset(f"fashion_mnist/{prefix}-labels-idx1-ubyte.gz"))
    return images.unsqueeze(1), labels.long()


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Share of `images` (already normalised) whose highest logit is the label."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(-1) == y).sum()) for x, y in zip(images.split(batch_size), labels.split(batch_size)))
    model.train(was_training)
    return hits / len(labels)


@dataclass(frozen=True)
class PageCLIP:
    """Anatomy of the reference CLIP: open_clip's own towers, CLS and 256 patches of 8 x 8 pixels, 1.9 M parameters.

    Attributes:
        image_size: side of a page in pixels.
        patch_size: side of a patch.
        width: of the image tower, and of the common space.
        layers: of the image tower.
        head_width: channels a head.
        text_width: of the text tower.
        text_layers: of the text tower.
        context_length: tokens of a caption at most; the longest has 21.
        vocab_size: entries of the vocabulary (see `vtok.eval.training.bpe`).
    """

    image_size: int = PAGE_SIZE
    patch_size: int = 8
    width: int = 96
    layers: int = 12
    head_width: int = 32
    text_width: int = 96
    text_layers: int = 4
    context_length: int = 24
    vocab_size: int = 572

    def model_config(self) -> dict[str, Any]:
        """The `model_cfg` of an `open_clip_config.json`."""
        return {
            "embed_dim": self.width,
            "vision_cfg": {
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "width": self.width,
                "layers": self.layers,
                "head_width": self.head_width,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": self.vocab_size,
                "width": self.text_width,
                "heads": self.text_width // self.head_width,
                "layers": self.text_layers,
                "tokenizer_kwargs": {"bpe_path": MERGES_FILE},
            },
        }

    def build(self) -> nn.Module:
        """A freshly initialised `open_clip.CLIP`."""
        from open_clip.model import CLIP

        return CLIP(**self.model_config())


def preprocess_config() -> dict[str, Any]:
    """The `preprocess_cfg` of an `open_clip_config.json`."""
    return {"size": PAGE_SIZE, "mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def normalise_page(images: Tensor) -> Tensor:
    """uint8 pixels -> fp32 in [-1, 1], as the model was trained."""
    return (images.float() / 255 - MEAN) / STD


def load_reference_clip() -> DualEncoder:
    """The trained reference CLIP in eval mode, fp32 (its weights are stored in fp16), with preprocessing and tokenizer. Raises
    `MissingExtraError` if open_clip is not installed.
    """
    return load_clip(REFERENCE)


class Pages(NamedTuple):
    """Pages [P, 3, 128, 128] uint8 with captions that are all different; `cells` [P, 4]: class of every cell (see
    `vtok.eval.models.easyvqa`).
    """

    images: Tensor
    captions: list[str]
    cells: Tensor


def load_reference_pictures(split: str = "test") -> tuple[Tensor, Tensor]:
    """Bundled easy-VQA pictures: `"test"` (888 test pictures) or `"calibration"` (training pictures kept out of training), as
    (pictures [n, 3, 64, 64] uint8, classes [n] int64).
    """
    pictures = read_idx(asset(f"{DATA_FOLDER}/{split}-pictures-idx4-ubyte.gz"))
    classes = read_idx(asset(f"{DATA_FOLDER}/{split}-classes-idx1-ubyte.gz"))
    return pictures.permute(0, 3, 1, 2).contiguous(), classes.long()


def load_reference_pages(split: str = "test") -> Pages:
    """Bundled pages: `"test"` (1,000, from test pictures) or `"calibration"` (from training pictures kept out of training).

    They come in groups of four that differ in a single respect: see `vtok.eval.models.easyvqa.draw_groups`.
    """
    pictures, classes = load_reference_pictures(split)
    rows = torch.tensor(json.loads(asset(f"{DATA_FOLDER}/{split}-pages.json").read_text(encoding="utf-8")))
    cells = torch.cat((classes, classes.new_tensor([BLANK])))[rows]
    return Pages(compose(pictures, rows), [caption(page) for page in cells.tolist()], cells)
