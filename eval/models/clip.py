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

from vtok.errors import ConfigError, MissingExtraError, UnsupportedModelError, shown, unknown
from vtok.eval.models.assets import asset
from vtok.reading import is_folder

BACKENDS = ("open_clip", "transformers")
REFERENCE = "reference-clip"
CLIP_FOLDER, WEIGHTS_FILE = "easyvqa_clip", "open_clip_model.safetensors"  # of the reference CLIP, in `assets/`
_SCHEMES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class DualEncoder:
    """A model that puts images and texts into one space. This class speaks open_clip's dialect: `encode_image`, `encode_text`.

    Attributes:
        net: the model.
        preprocess: PIL image -> [C, H, W].
        tokenizer: texts -> what `encode_text` takes.
        name: under which it was found.
        pretrained: tag of its weights, "" if there is none.
        backend: one of `BACKENDS`.
    """

    net: nn.Module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Any]
    name: str
    pretrained: str = ""
    backend: str = "open_clip"

    def encode_image(self, net: nn.Module, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D] of unit length, by `net`: this model or a patched copy of it."""
        model: Any = net
        return F.normalize(model.encode_image(images).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """T texts -> [T, D] of unit length."""
        model: Any = self.net
        return F.normalize(model.encode_text(self._tokens(texts)).float(), dim=-1)

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts)).to(next(self.net.parameters()).device)


class HuggingFaceEncoder(DualEncoder):
    """The dialect of transformers: `get_image_features`, `get_text_features`; the contrastive half of BLIP for retrieval."""

    def encode_image(self, net: nn.Module, images: Tensor) -> Tensor:
        model: Any = net
        if _is_blip(model):
            found = model.vision_proj(model.vision_model(pixel_values=images).last_hidden_state[:, 0])
        else:
            found = _features(model.get_image_features(pixel_values=images))
        return F.normalize(found.float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        model: Any = self.net
        tokens = self._tokens(texts)
        if _is_blip(model):
            found = model.text_proj(model.text_encoder(**tokens).last_hidden_state[:, 0])
        else:
            found = _features(model.get_text_features(**tokens))
        return F.normalize(found.float(), dim=-1)


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
        backend = _backend_of(name)
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {shown(backend)}; known: {', '.join(BACKENDS)}")
    torch.manual_seed(seed)
    return _load_open_clip(name, pretrained) if backend == "open_clip" else _load_hugging_face(name)


def _backend_of(name: str) -> str:
    if name.startswith(_SCHEMES) or (Path(name) / "open_clip_config.json").is_file():
        return "open_clip"
    if is_folder(name) or "/" in name:  # open_clip writes its names with dashes
        return "transformers"
    return "open_clip"


def _load_open_clip(name: str, pretrained: str) -> DualEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "open_clip") from error
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
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BlipForImageTextRetrieval
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    try:
        config = AutoConfig.from_pretrained(name)
        kind: Any = BlipForImageTextRetrieval if config.model_type == "blip" else AutoModel
        model = kind.from_pretrained(name)
        processor, words = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {name}: {error}") from error
    return hugging_face_encoder(model, processor, words, name)


def hugging_face_encoder(model: nn.Module, processor: Any, words: Any, name: str) -> HuggingFaceEncoder:
    """A Hugging Face model with its image processor and tokenizer.

    Raises:
        UnsupportedModelError: it has no image and text features in one space, or takes images as something else than pixels.
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
