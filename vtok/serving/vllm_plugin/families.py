"""The models that vtok prunes in vLLM: which class serves one, and what a method may know of it, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtok.core.prompt import VLMInfo
from vtok.core.tower import TowerFacts
from vtok.errors import ConfigError, UnsupportedModelError, shown
from vtok.serving.choice import TokenChoice

KEY = "vtok"  # in a model's config


@dataclass(frozen=True)
class ServedModel:
    """A class of vLLM's models.

    Attributes:
        place: "module:class", vtok's subclass of it.
        info: says what a method may know of a model, from its config.
    """

    place: str
    info: Callable[[Any], VLMInfo]


def settings_of(config: Any) -> Any:
    """What the key "vtok" holds; `None` = there is no such key."""
    return getattr(config, KEY, None)


def choice_of(config: Any, architecture: str) -> TokenChoice | None:
    """The choice that a model's config asks for; `None` = it does not.

    Raises:
        VtokError: it cannot be served.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ConfigError(f'"vtok" takes {{"method": name, parameters of the method}}, got {shown(settings)}')
    choice = TokenChoice(settings, MODELS[architecture].info(config))
    tower = choice.info.tower
    late = [] if tower is None else [block for block in choice.tower_blocks if block > tower.feature_block]
    if late and tower is not None:
        raise UnsupportedModelError(
            f"{choice.config.name} looks at block {late[0]} of the vision tower, of which vLLM builds blocks 0 to "
            f'{tower.feature_block}, where the features come from; name that one, as by "layer": {tower.feature_block}'
        )
    return choice


def _text(config: Any) -> dict[str, Any]:
    """What `VLMInfo` says of the LLM."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return {
        "depth": text.num_hidden_layers,
        "width": text.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


def feature_block(layers: int | Sequence[int], depth: int) -> int:
    """0-based block of the vision tower that the features come from; of several the deepest."""
    listed = [layers] if isinstance(layers, int) else list(layers)
    return max(layer + depth if layer < 0 else layer - 1 for layer in listed)


def _tower(config: Any) -> TowerFacts:
    """The tower of a LLaVA."""
    vision = config.vision_config
    prefixes = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens in front of the patches
    if vision.model_type not in prefixes:
        raise UnsupportedModelError(
            "vtok prunes visual tokens of a LLaVA in vLLM where its vision tower is CLIP's or SigLIP's, found "
            f"{vision.model_type}"
        )
    prefix, side = prefixes[vision.model_type], vision.image_size // vision.patch_size
    heads = vision.num_attention_heads
    return TowerFacts(
        vision.num_hidden_layers,
        prefix > 0,
        prefix,
        feature_block(config.vision_feature_layer, vision.num_hidden_layers),
        vision.hidden_size,
        heads,
        vision.hidden_size // heads,
        side * side,
        prefix > 0 and config.vision_feature_select_strategy == "full",
    )


def llava(config: Any) -> VLMInfo:
    """LLaVA-1.5."""
    tower, side = _tower(config), config.vision_config.image_size // config.vision_config.patch_size
    return VLMInfo("LLaVA", **_text(config), tower=tower, grid=None if tower.prefix_kept else (side, side))


def llava_next(config: Any) -> VLMInfo:
    """LLaVA-NeXT."""
    tower = _tower(config)
    if tower.prefix_kept:
        raise UnsupportedModelError(
            'vtok lays out crops without the class token of the vision tower, found vision_feature_select_strategy="full"'
        )
    return VLMInfo("LLaVA with crops", **_text(config), tower=tower, crops=True)


def onevision(config: Any) -> VLMInfo:
    """LLaVA-OneVision."""
    return replace(llava_next(config), name="LLaVA-OneVision", videos=True)


_PACKED = "it runs the patches of all images as one sequence, cut where images end"


def qwen_vl(config: Any) -> VLMInfo:
    """Qwen2-VL and Qwen2.5-VL."""
    return VLMInfo("Qwen-VL", **_text(config), no_tower=_PACKED, videos=True)


def qwen3_vl(config: Any) -> VLMInfo:
    """Qwen3-VL and Qwen3.5, which have text between the frames of a video."""
    return VLMInfo("Qwen-VL, which vtok serves with images alone from Qwen3-VL on,", **_text(config), no_tower=_PACKED)


def internvl(config: Any) -> VLMInfo:
    """InternVL as transformers has it: tiles whose patches are folded by pixel shuffle."""
    vision = config.vision_config
    patches = [size // patch for size, patch in zip(vision.image_size, vision.patch_size)]
    rows, columns = (int(side * config.downsample_ratio) for side in patches)
    tower = _whole_tower(vision, 1, patches[0] * patches[1])
    return VLMInfo(
        "InternVL, which vtok serves with images alone,", **_text(config), tower=tower, grid=(rows, columns), crops=True
    )


def gemma3(config: Any) -> VLMInfo:
    """Gemma 3: tiles whose patches are pooled to a square of tokens."""
    vision, side = config.vision_config, math.isqrt(config.mm_tokens_per_image)
    tower = _whole_tower(vision, 0, (vision.image_size // vision.patch_size) ** 2)
    return VLMInfo("Gemma 3", **_text(config), tower=tower, grid=(side, side))


def idefics3(config: Any) -> VLMInfo:
    """Idefics3 and SmolVLM: tiles with names in front, all of an image pruned together."""
    vision = config.vision_config
    tower = _whole_tower(vision, 0, (vision.image_size // vision.patch_size) ** 2)
    return VLMInfo("Idefics3", **_text(config), tower=tower, crops=True)


def _whole_tower(vision: Any, prefix: int, patches: int) -> TowerFacts:
    """A tower whose last layer the features come from."""
    depth, heads = vision.num_hidden_layers, vision.num_attention_heads
    return TowerFacts(depth, prefix > 0, prefix, depth - 1, vision.hidden_size, heads, vision.hidden_size // heads, patches)


_HERE = "vtok.serving.vllm_plugin."

# vLLM's name of an architecture -> how it is served.
MODELS: dict[str, ServedModel] = {
    "LlavaForConditionalGeneration": ServedModel(_HERE + "llava:VtokLlava", llava),
    "LlavaNextForConditionalGeneration": ServedModel(_HERE + "llava_next:VtokLlavaNext", llava_next),
    "LlavaOnevisionForConditionalGeneration": ServedModel(_HERE + "llava_next:VtokOnevision", onevision),
    "InternVLForConditionalGeneration": ServedModel(_HERE + "tiles:VtokInternVL", internvl),
    "Gemma3ForConditionalGeneration": ServedModel(_HERE + "tiles:VtokGemma3", gemma3),
    "Idefics3ForConditionalGeneration": ServedModel(_HERE + "marked_tiles:VtokIdefics3", idefics3),
    "SmolVLMForConditionalGeneration": ServedModel(_HERE + "marked_tiles:VtokSmolVLM", idefics3),
    "Qwen2VLForConditionalGeneration": ServedModel(_HERE + "qwen_vl:VtokQwen2", qwen_vl),
    "Qwen2_5_VLForConditionalGeneration": ServedModel(_HERE + "qwen_vl:VtokQwen25", qwen_vl),
    "Qwen3VLForConditionalGeneration": ServedModel(_HERE + "qwen_vl:VtokQwen3", qwen3_vl),
    "Qwen3_5ForConditionalGeneration": ServedModel(_HERE + "qwen_vl:VtokQwen35", qwen3_vl),
}
