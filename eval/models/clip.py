"""Dual encoders by name: open_clip models and Hugging Face ones (CLIP, SigLIP, BLIP ...), behind one small interface.

Shapes: B images, T texts, D width of the common space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import ConfigError, UnsupportedModelError, shown, unknown
from vtok.eval.models.assets import asset, library
from vtok.reading import is_folder

BACKENDS = ("open_clip", "transformers")
REFERENCE = "reference-clip"
CLIP_FOLDER, WEIGHTS_FILE = "easyvqa_clip", "open_clip_model.safetensors"  # of the reference CLIP, in `assets/`
_SCHEMES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class DualEncoder:
    """A model that puts images and texts into one space. It speaks open_clip's dialect: `encode_image`, `encode_text`."""

    net: nn.Module  # the model
    preprocess: Callable[[Any], Tensor]  # PIL image -> [C, H, W]
    tokenizer: Callable[[list[str]], Any]  # texts -> what `encode_text` takes
    name: str  # under which it was found
    pretrained: str = ""  # tag of its weights, "" if there is none
    backend: str = "open_clip"  # one of `BACKENDS`

    def encode_image(self, net: nn.Module, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D] of unit length, by `net`: this model or a patched copy of it."""
        return F.normalize(self._of_images(net, images).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """T texts -> [T, D] of unit length."""
        tokens = self.tokenizer(list(texts)).to(next(self.net.parameters()).device)
        return F.normalize(self._of_texts(self.net, tokens).float(), dim=-1)

    def _of_images(self, net: Any, images: Tensor) -> Tensor:
        return net.encode_image(images)

    def _of_texts(self, net: Any, tokens: Any) -> Tensor:
        return net.encode_text(tokens)


class HuggingFaceEncoder(DualEncoder):
    """The dialect of transformers: `get_image_features`, `get_text_features`; the contrastive half of BLIP for retrieval."""

    def _of_images(self, net: Any, images: Tensor) -> Tensor:
        if _is_blip(net):
            return net.vision_proj(net.vision_model(pixel_values=images).last_hidden_state[:, 0])
        return _features(net.get_image_features(pixel_values=images))

    def _of_texts(self, net: Any, tokens: Any) -> Tensor:
        if _is_blip(net):
            return net.text_proj(net.text_encoder(**tokens).last_hidden_state[:, 0])
        return _features(net.get_text_features(**tokens))


def _is_blip(model: nn.Module) -> bool:
    return hasattr(model, "vision_proj") and hasattr(model, "text_proj")


def _features(output: Any) -> Tensor:
    """The embedding, which transformers 5 hands over inside an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_clip(name: str, pretrained: str = "", backend: str | None = None, seed: int = 0) -> DualEncoder:
    """A dual encoder in eval mode, fp32.

    Args:
        name: `"reference-clip"` (comes with vtok); a name of open_clip, or its `local-dir:` and `hf-hub:`; a name or folder of
            Hugging Face. A folder is taken for what its configuration file says it is.
        pretrained: open_clip's tag or file of weights; "" leaves a model given by open_clip's name at random weights.
        backend: "open_clip" or "transformers"; `None` = find out.
        seed: for random initialisation.

    Raises:
        ConfigError: no such model, weights or backend.
        MissingExtraError: the backend is not installed.
        UnsupportedModelError: the model has no image and text features in one space.
    """
    if name == REFERENCE:
        return replace(load_clip(f"local-dir:{asset(f'{CLIP_FOLDER}/{WEIGHTS_FILE}').parent}"), name=REFERENCE)
    if backend is None:
        own = name.startswith(_SCHEMES) or (Path(name) / "open_clip_config.json").is_file()
        foreign = is_folder(name) or "/" in name  # open_clip writes its names with dashes
        backend = "transformers" if foreign and not own else "open_clip"
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {shown(backend)}; known: {', '.join(BACKENDS)}")
    torch.manual_seed(seed)
    return _load_open_clip(name, pretrained) if backend == "open_clip" else _load_hugging_face(name)


def _load_open_clip(name: str, pretrained: str) -> DualEncoder:
    open_clip = library("open_clip", "open_clip_torch")
    folder = Path(name.removeprefix("local-dir:"))
    if (folder / "open_clip_config.json").is_file():
        name = f"local-dir:{folder}"
    elif not name.startswith(_SCHEMES) and name not in open_clip.list_models():
        where = "open_clip.list_models() names all; give a folder as local-dir:PATH, a Hugging Face model as OWNER/NAME"
        raise unknown("open_clip model", name, [*open_clip.list_models(), REFERENCE], where)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None)
        tokenizer = open_clip.get_tokenizer(name, **_own_vocabulary(folder))
    except (RuntimeError, OSError, ValueError) as error:  # unknown tag, no network, no weights in the folder
        raise ConfigError(f"open_clip cannot make {name} {pretrained}".rstrip() + f": {error}") from error
    return DualEncoder(model.eval().float(), preprocess, tokenizer, name, pretrained)


def _own_vocabulary(folder: Path) -> dict[str, str]:
    """`bpe_path` of a folder that brings its own merges: open_clip would look for the file in the working directory."""
    path = folder / "open_clip_config.json"
    if not path.is_file():
        return {}
    kwargs = json.loads(path.read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {}).get("tokenizer_kwargs") or {}
    file = kwargs.get("bpe_path")
    return {"bpe_path": str(folder / file)} if file and (folder / file).is_file() else {}


def _load_hugging_face(name: str) -> DualEncoder:
    hub = library("transformers")
    try:
        blip = hub.AutoConfig.from_pretrained(name).model_type == "blip"
        model = (hub.BlipForImageTextRetrieval if blip else hub.AutoModel).from_pretrained(name)
        processor, words = hub.AutoImageProcessor.from_pretrained(name), hub.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {name}: {error}") from error
    return hugging_face_encoder(model, processor, words, name)


def hugging_face_encoder(model: nn.Module, processor: Any, words: Any, name: str) -> HuggingFaceEncoder:
    """A Hugging Face model with its image processor and tokenizer. Raises `UnsupportedModelError` if it has no image and text
    features in one space, or takes images as something else than pixels.
    """
    if not _is_blip(model) and not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no get_image_features and get_text_features; zero-shot and retrieval need a dual "
            "encoder such as CLIPModel, SiglipModel or BlipForImageTextRetrieval"
        )
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    padding = "max_length" if kind.startswith("siglip") else "longest"  # SigLIP was trained on padded texts

    def preprocess(image: Any) -> Tensor:
        made: Mapping[str, Any] = processor(images=image, return_tensors="pt")
        if set(made) != {"pixel_values"} or made["pixel_values"].ndim != 4:
            raise UnsupportedModelError(f"{name} takes images as {', '.join(made)}, not as pixels [C, H, W] alone")
        return made["pixel_values"][0]

    def tokenizer(texts: list[str]) -> Any:
        return words(texts, padding=padding, truncation=True, return_tensors="pt")

    return HuggingFaceEncoder(model.eval().float(), preprocess, tokenizer, name, "", "transformers")
