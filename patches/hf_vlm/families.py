"""Hugging Face vision-language models as data: where each keeps its LLM, what its visual tokens are, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import nn

from vtok.core.prompt import TowerFacts, VLMInfo
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder import attention_probe as decoder_probe
from vtok.patches.hf_vision.adapter import HfAdapter
from vtok.patches.hf_vision.tables import TOWERS, release
from vtok.patches.hf_vlm import crops as hf_cuts
from vtok.patches.hf_vlm import layout as hf_views
from vtok.patches.hf_vlm.image_features import Cuts, ViewCounts, Views
from vtok.patches.hf_vlm.tower_bridge import Joint
from vtok.patches.macs import linear_macs
from vtok.patches.protocol import Tower, look_up, qualified_name

OLDEST = (5, 23)  # release of transformers
SUPPORTED = (
    "transformers' LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3, SmolVLM, Gemma3 "
    "and PaliGemma"
)


def _no_grid(model: Any) -> tuple[int, int] | None:
    return None


@dataclass(frozen=True)
class VLMSpec:
    """One class of models.

    Attributes:
        text: child that is the LLM.
        views: says what the visual tokens of an image are.
        view_counts: says of how many views of the vision tower an image is made.
        grid: rows and columns of visual tokens of every image; says `None` where they depend on the image.
        cuts: says how images were cut into these views.
        rotary_3d: whether positions are (time, height, width), which cannot be renumbered.
        connector: child between vision tower and LLM, if all there happens token by token; "" = the grid is needed.
        projector: child that takes what leaves the tower's feature block, token by token, whatever joins its output afterwards;
            "" = there is none.
        packed: whether the vision tower runs the patches of all images as one sequence.
        flat_positions: whether the LLM finds the borders of packed samples in positions [rows, columns]; some look for them
            only in a row of their own in front of time, height and width.
        hands_on: whether forward gives the vision tower the keywords that it does not name itself.
    """

    text: str = "language_model"
    views: Views = hf_views.square
    view_counts: ViewCounts = hf_views.even_counts
    grid: Callable[[Any], tuple[int, int] | None] = _no_grid
    cuts: Cuts = hf_cuts.lone
    rotary_3d: bool = False
    connector: str = ""
    projector: str = ""
    packed: bool = False
    flat_positions: bool = True
    hands_on: bool = False


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_PROJECTED = VLMSpec(grid=hf_views.tower_grid, connector="multi_modal_projector")
_LLAVA = replace(_PROJECTED, projector="multi_modal_projector", views=hf_views.patches, hands_on=release() >= (5, 24))
_QWEN = VLMSpec(views=hf_views.frames, rotary_3d=True, packed=True, hands_on=True)
_QWEN_2 = replace(_QWEN, flat_positions=False)
_IDEFICS = VLMSpec("text_model", hf_views.tiles, cuts=hf_cuts.rows)
_ANYRES = VLMSpec(
    views=hf_views.any_resolution, view_counts=hf_views.crop_counts, cuts=hf_cuts.packed, projector="multi_modal_projector"
)

VLMS: dict[str, VLMSpec] = {
    _in("gemma3") + "Gemma3Model": VLMSpec(grid=hf_views.pooled_grid),
    _in("idefics3") + "Idefics3Model": _IDEFICS,
    _in("internvl") + "InternVLModel": VLMSpec(grid=hf_views.shuffled_grid, cuts=hf_cuts.tiles),
    _in("llava") + "LlavaModel": _LLAVA,
    _in("llava_next") + "LlavaNextModel": _ANYRES,
    _in("llava_onevision") + "LlavaOnevisionModel": _ANYRES,
    _in("paligemma") + "PaliGemmaModel": _PROJECTED,
    _in("qwen2_5_vl") + "Qwen2_5_VLModel": _QWEN_2,
    _in("qwen2_vl") + "Qwen2VLModel": _QWEN_2,
    _in("qwen3_vl") + "Qwen3VLModel": _QWEN,
    _in("smolvlm") + "SmolVLMModel": _IDEFICS,
}

# LLMs whose layers are known to take gathered masks, positions and rotary tables.
TEXT_MODELS = frozenset(
    {
        _in("gemma") + "GemmaModel",
        _in("gemma2") + "Gemma2Model",
        _in("gemma3") + "Gemma3TextModel",
        _in("llama") + "LlamaModel",
        _in("mistral") + "MistralModel",
        _in("qwen2") + "Qwen2Model",
        _in("qwen2_5_vl") + "Qwen2_5_VLTextModel",
        _in("qwen2_vl") + "Qwen2VLTextModel",
        _in("qwen3") + "Qwen3Model",
        _in("qwen3_vl") + "Qwen3VLTextModel",
    }
)

_CROSS = "its LLM attends to the image by cross-attention: visual tokens are no part of the prompt that could be shortened"
_SHARED = "later layers of its LLM share keys and values with earlier ones, which would have to hold the same tokens"
_LINEAR = "its LLM has linear-attention layers, whose state cannot forget single tokens"
_MERGED = "it puts image features into the prompt itself, so that vtok is not told which columns are visual"
_CHUNKED = "its LLM attends within chunks of the prompt, whose borders dropped tokens would move"

REFUSED: dict[str, str] = {
    _in("colqwen2") + "ColQwen2ForRetrieval": _MERGED,
    _in("gemma3n") + "Gemma3nModel": _SHARED,
    _in("gemma4") + "Gemma4Model": _SHARED,
    _in("idefics") + "IdeficsModel": _CROSS,
    _in("lfm2_vl") + "Lfm2VlModel": _LINEAR,
    _in("llama4") + "Llama4ForConditionalGeneration": _CHUNKED,
    _in("mllama") + "MllamaModel": _CROSS,
    _in("pi0") + "PI0Model": _MERGED,
    _in("qwen3_5") + "Qwen3_5Model": _LINEAR,
    _in("qwen3_5_moe") + "Qwen3_5MoeModel": _LINEAR,
}


@dataclass(frozen=True)
class VLM:
    """A vision-language model that can be patched.

    Attributes:
        path: name inside the patched model, "" = the model itself.
        module: the model without its language head: it merges features into the prompt and runs the LLM.
        spec: its row in the table.
        info: what methods may know.
        tokens: modality -> id of its placeholder.
        tower: its vision tower, if its blocks can be looked into.
    """

    path: str
    module: Any
    spec: VLMSpec
    info: VLMInfo
    tokens: dict[str, int]
    tower: Tower | None = None

    @property
    def text(self) -> Any:
        """The LLM."""
        return getattr(self.module, self.spec.text)

    def joint(self) -> Joint:
        """How this model takes what its vision tower yields, once the tower yields fewer tokens.

        Raises:
            UnsupportedModelError: it takes the tokens of several layers side by side, or a first token that may be any.
        """
        assert self.tower is not None and self.info.tower is not None
        config, name = self.module.config, self.info.name
        layers = getattr(config, "vision_feature_layer", -1)
        skip = int(getattr(config, "vision_feature_select_strategy", None) == "default")
        if self.spec.connector and isinstance(layers, Sequence) and len(set(layers)) > 1:
            raise UnsupportedModelError(
                f"{name} takes its features from layers {list(layers)} of the vision tower side by side, which would hold "
                "different tokens; drop visual tokens before the LLM instead"
            )
        if self.spec.connector and skip > self.tower.num_prefix:
            raise UnsupportedModelError(
                f"{name} leaves out the first token of its vision tower (vision_feature_select_strategy='default'), which has "
                "no class token: once patches are merged or dropped, the first is not always the same"
            )
        return Joint(self.spec.connector, self.info.tower.feature_block + 1, skip)


def _check_release() -> None:
    """Raises under a release of transformers whose prompts cannot be shortened."""
    if release() < OLDEST:
        raise UnsupportedModelError(
            f"vision-language models need transformers {OLDEST[0]}.{OLDEST[1]} or newer, found {version('transformers')}: it "
            "runs the hooks of a layer again in the backward pass of a checkpoint and mixes up the images of a prompt in beam "
            "search; upgrade transformers, or patch the model's vision tower by itself"
        )


class HfVLMAdapter:
    """Finds the vision-language models of Hugging Face transformers."""

    supported = SUPPORTED

    def vlms(self, model: nn.Module) -> Sequence[VLM]:
        """See `find`."""
        return find(model)


def find(model: nn.Module) -> Sequence[VLM]:
    """The vision-language models inside a model; empty if there is none.

    Raises:
        UnsupportedModelError: one is there but its prompts cannot be shortened; the message says why.
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=True):
        why = look_up(module, REFUSED)
        if why is not None:
            raise UnsupportedModelError(f"{type(module).__name__} cannot be patched: {why}; supported: {SUPPORTED}")
        spec = look_up(module, VLMS)
        if spec is not None:
            _check_release()
            found.append(_describe(path, module, spec))
    return found


def _describe(path: str, module: Any, spec: VLMSpec) -> VLM:
    name, text = type(module).__name__, getattr(module, spec.text)
    config = text.config
    problem = _problem(text)
    if problem is not None:
        raise UnsupportedModelError(f"the LLM of {name}, {qualified_name(type(text))}, {problem}; supported: {SUPPORTED}")
    if getattr(module.config, "vision_feature_layer", None) == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer=0 of {name}: transformers takes 0 for no layer at all and fails when it encodes an image; "
            "name the output of a block, such as -1 or -2"
        )
    tokens = {m: getattr(module.config, f"{m}_token_id", None) for m in ("image", "video")}
    tower, facts, no_tower = _tower(module, text, spec)
    deep = getattr(getattr(module.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    info = VLMInfo(
        name=name,
        depth=len(text.layers),
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        first_layer=max(len(deep), 1),
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        no_attention=next((why for layer in text.layers if (why := decoder_probe.why_not(layer))), None),
        tower=facts,
        no_tower=no_tower,
        grid=None if facts is not None and facts.prefix_kept else spec.grid(module),
        crops=spec.cuts is not hf_cuts.lone,
        videos=hasattr(module, "get_video_features"),
        connector_macs=linear_macs(getattr(module, spec.projector)) if spec.projector else 0,
    )
    return VLM(path, module, spec, info, {m: token for m, token in tokens.items() if token is not None}, tower)


def _tower(module: Any, text: Any, spec: VLMSpec) -> tuple[Tower | None, TowerFacts | None, str]:
    """(the vision tower, what is known of it, why it cannot be looked into)."""
    inside = set(text.modules())
    found = [(path, m) for path, m in module.named_modules() if m not in inside and look_up(m, TOWERS) is not None]
    if len(found) != 1:
        named = next((m for name, m in module.named_children() if name.startswith("vision") or name == "visual"), module)
        if spec.packed:
            return None, None, f"{type(named).__name__} runs the patches of all images as one sequence, cut where images end"
        return None, None, f"{type(named).__name__} is no vision tower whose blocks vtok knows"
    try:
        tower = HfAdapter().tower(*found[0])
        block = feature_block(getattr(module.config, "vision_feature_layer", -1), len(tower.blocks))
    except UnsupportedModelError as error:
        return None, None, str(error)
    info = tower.info
    facts = TowerFacts(
        info.depth,
        info.has_cls,
        info.num_prefix,
        block,
        info.width,
        info.num_heads,
        info.head_dim,
        info.num_patches,
        bool(info.num_prefix) and getattr(module.config, "vision_feature_select_strategy", None) == "full",
    )
    return tower, facts, ""


def feature_block(vision_feature_layer: int | Sequence[int], depth: int) -> int:
    """0-based block of the vision tower that the features come from.

    Args:
        vision_feature_layer: index into the tower's hidden states, embeddings first (LLaVA: -2); of several the deepest counts.
        depth: blocks of the tower.

    Raises:
        UnsupportedModelError: the features are the embeddings, or no such layer exists.
    """
    layers = list(vision_feature_layer) if isinstance(vision_feature_layer, Sequence) else [vision_feature_layer]
    block = max((layer + depth if layer < 0 else layer - 1 for layer in layers), default=-1)
    if not 0 <= block < depth:
        raise UnsupportedModelError(
            f"vision_feature_layer={vision_feature_layer} is the output of no block; the vision tower has {depth}"
        )
    return block


def _problem(text: Any) -> str | None:
    """Why an LLM's prompts cannot be shortened, or `None`."""
    config = text.config
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        return f"has layers of type {', '.join(odd)}, whose state cannot forget single tokens or depends on where they stand"
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares keys and values between layers, which would have to hold the same tokens"
    if not any(qualified_name(cls) in TEXT_MODELS for cls in type(text).__mro__):
        return "is not among those that vtok has been tested with"
    return None
