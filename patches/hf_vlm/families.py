"""Hugging Face vision-language models as data: one row says all of a family. Which are refused, and how one is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from torch import nn

from vtok.core.prompt import TowerFacts, VLMInfo
from vtok.errors import UnsupportedModelError
from vtok.patches.decoder import attention_probe as decoder_probe
from vtok.patches.decoder.text_models import stated_number, why_not_between
from vtok.patches.hf_packed.adapter import TOWERS as PACKED_TOWERS
from vtok.patches.hf_packed.adapter import PackedAdapter, lone_tower
from vtok.patches.hf_vision.adapter import HfAdapter
from vtok.patches.hf_vision.tables import TOWERS, release
from vtok.patches.hf_vlm import crops as hf_cuts
from vtok.patches.hf_vlm import layout as hf_views
from vtok.patches.hf_vlm import stated_images as stated
from vtok.patches.hf_vlm.examples import VLMExample
from vtok.patches.hf_vlm.examples import models as tiny
from vtok.patches.hf_vlm.generic import videos
from vtok.patches.hf_vlm.generic.interfaces import encodes, position_axes, text_path
from vtok.patches.hf_vlm.generic.refused import REFUSED, UNPROMPTED
from vtok.patches.hf_vlm.image_features import Cuts, ViewCounts, Views
from vtok.patches.hf_vlm.pixels import units
from vtok.patches.hf_vlm.stated_images import VisionCosts
from vtok.patches.hf_vlm.tower.bridge import TowerBridge, facts_of, feature_block, packed_bridge
from vtok.patches.macs import linear_macs
from vtok.patches.protocol import Adapter, Tower, look_up

OLDEST = (5, 23)  # release of transformers


def _no_grid(model: Any) -> tuple[int, int] | None:
    return None


@dataclass(frozen=True)
class Family:
    """One class of models: all that is said of it.

    Attributes:
        name: as users know it.
        text: path of the LLM.
        tower: path of the vision tower; "" = not known.
        views: says what the visual tokens of an image are.
        view_counts: says of how many views of the vision tower an image is made.
        grid: rows and columns of visual tokens of every image; says `None` where they depend on the image.
        cuts: says how images were cut into these views.
        rotary_3d: whether positions are (time, height, width), which cannot be renumbered.
        axes: of these positions; one more row in front of them may count the tokens.
        connector: child between vision tower and LLM, if all there happens token by token; "" = the grid is needed.
        projector: child that takes what leaves the tower's feature block, token by token, whatever joins its output afterwards;
            "" = there is none.
        packed: whether the vision tower runs the patches of all images as one sequence.
        flat_positions: whether the LLM finds the borders of packed samples in positions [rows, columns]; some look for them
            only in a row of their own in front of time, height and width.
        hands_on: whether forward gives the vision tower the keywords that it does not name itself.
        prefix: whether all columns of a prompt see each other.
        costs: what the vision side costs beside its tower; `None` = not known: plans and FLOPs budgets are refused.
        examples: name -> tiny model that the contract tests and the support matrix run.
        generic: whether this is no row, but what the interfaces of a model say of it.
    """

    name: str
    text: str = "language_model"
    tower: str = "vision_tower"
    views: Views = hf_views.square
    view_counts: ViewCounts = hf_views.even_counts
    grid: Callable[[Any], tuple[int, int] | None] = _no_grid
    cuts: Cuts = hf_cuts.lone
    rotary_3d: bool = False
    axes: int = 3
    connector: str = ""
    projector: str = ""
    packed: bool = False
    flat_positions: bool = True
    hands_on: bool = False
    prefix: bool = False
    costs: VisionCosts | None = None
    examples: Mapping[str, VLMExample] = field(default_factory=dict)
    generic: bool = False

    def __getstate__(self) -> dict[str, Any]:  # of a patched model that is pickled or copied: it needs no tiny models
        return {**self.__dict__, "examples": {}}


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_ANYRES = Family(
    "LLaVA-NeXT",
    views=hf_views.any_resolution,
    view_counts=hf_views.crop_counts,
    cuts=hf_cuts.packed,
    projector="multi_modal_projector",
    costs=VisionCosts(image=stated.any_resolution),
    examples=tiny.LLAVA_NEXT,
)
_IDEFICS = Family(
    "Idefics3",
    text="text_model",
    tower="vision_model",
    views=hf_views.tiles,
    cuts=hf_cuts.rows,
    costs=VisionCosts(("connector",), per_view=stated.shuffled),
    examples=tiny.IDEFICS3,
)
_QWEN2 = Family(
    "Qwen2-VL",
    tower="visual",
    views=hf_views.frames,
    rotary_3d=True,
    packed=True,
    flat_positions=False,
    hands_on=True,
    costs=VisionCosts(("visual.merger",), per_view=stated.merged, image=stated.packed_image),
    examples=tiny.QWEN2_VL,
)

# Class of the model without its language head -> its family. To add one, add a row, and what it names: functions in `layout`,
# `crops` and `stated_images`, where no family has them yet, and a tiny model in `examples`.
FAMILIES: dict[str, Family] = {
    _in("llava") + "LlavaModel": Family(
        "LLaVA-1.5",
        views=hf_views.patches,
        grid=hf_views.tower_grid,
        connector="multi_modal_projector",
        projector="multi_modal_projector",
        hands_on=release() >= (5, 24),
        costs=VisionCosts(),
        examples=tiny.LLAVA,
    ),
    _in("llava_next") + "LlavaNextModel": _ANYRES,
    _in("llava_onevision") + "LlavaOnevisionModel": replace(_ANYRES, name="LLaVA-OneVision", examples=tiny.LLAVA_ONEVISION),
    _in("qwen2_vl") + "Qwen2VLModel": _QWEN2,
    _in("qwen2_5_vl") + "Qwen2_5_VLModel": replace(_QWEN2, name="Qwen2.5-VL", examples=tiny.QWEN2_5_VL),
    _in("qwen3_vl") + "Qwen3VLModel": replace(
        _QWEN2,
        name="Qwen3-VL",
        flat_positions=True,
        costs=VisionCosts(("visual.merger", "visual.deepstack_merger_list"), per_view=stated.merged, image=stated.packed_image),
        examples=tiny.QWEN3_VL,
    ),
    _in("internvl") + "InternVLModel": Family(
        "InternVL",
        grid=hf_views.shuffled_grid,
        cuts=hf_cuts.tiles,
        costs=VisionCosts(per_view=stated.downsampled),
        examples=tiny.INTERNVL,
    ),
    _in("idefics3") + "Idefics3Model": _IDEFICS,
    _in("smolvlm") + "SmolVLMModel": replace(_IDEFICS, name="SmolVLM", examples=tiny.SMOLVLM),
    _in("gemma3") + "Gemma3Model": Family(
        "Gemma3",
        grid=hf_views.pooled_grid,
        costs=VisionCosts(weights=("multi_modal_projector.mm_input_projection_weight",), per_view=stated.pooled),
        examples=tiny.GEMMA3,
    ),
    _in("paligemma") + "PaliGemmaModel": Family(
        "PaliGemma",
        prefix=True,
        grid=hf_views.tower_grid,
        connector="multi_modal_projector",
        costs=VisionCosts(),
        examples=tiny.PALIGEMMA,
    ),
}


def examples() -> dict[str, VLMExample]:
    """The tiny models of all families."""
    return {name: example for family in FAMILIES.values() for name, example in family.examples.items()}


def supported() -> str:
    """In words."""
    *names, last = [family.name for family in FAMILIES.values()]
    return f"transformers' {', '.join(names)} and {last}"


@dataclass(frozen=True)
class VLM:
    """A vision-language model that can be patched.

    Attributes:
        path: name inside the patched model, "" = the model itself.
        module: the model without its language head: it merges features into the prompt and runs the LLM.
        family: its row in the table.
        info: what methods may know.
        tokens: modality -> id of its placeholder.
        tower: its vision tower, if methods can act inside.
    """

    path: str
    module: Any
    family: Family
    info: VLMInfo
    tokens: dict[str, int]
    tower: Tower | None = None

    @property
    def text(self) -> Any:
        """The LLM."""
        return self.module.get_submodule(self.family.text)

    @property
    def adapter(self) -> Adapter:
        """Of its vision tower."""
        return PackedAdapter() if self.packed else HfAdapter()

    @property
    def packed(self) -> bool:
        """Whether its tower, in which methods can act, reads all images as one sequence of units."""
        return self.tower is not None and look_up(self.tower.module, PACKED_TOWERS) is not None

    def sized(self, size: tuple[int, int, int] | None) -> VLM:
        """The same, with its tower described for images of a size (channels, height, width), if it takes them at any."""
        if size is None or self.tower is None or not self.tower.varies:
            return self
        return replace(self, tower=PackedAdapter().tower(self.tower.path, self.tower.module, size))

    def joint(self) -> TowerBridge:
        """How this model takes what its vision tower yields, once the tower yields fewer tokens.

        Raises:
            UnsupportedModelError: it takes the tokens of several layers side by side, or a first token that may be any.
        """
        assert self.tower is not None
        if self.packed:
            return packed_bridge(self.tower)
        assert self.info.tower is not None
        config, name = self.module.config, self.info.name
        layers = getattr(config, "vision_feature_layer", -1)
        skip = int(getattr(config, "vision_feature_select_strategy", None) == "default")
        if self.family.connector and isinstance(layers, Sequence) and len(set(layers)) > 1:
            raise UnsupportedModelError(
                f"{name} takes its features from layers {list(layers)} of the vision tower side by side, which would hold "
                "different tokens; drop visual tokens before the LLM instead"
            )
        if self.family.connector and skip > self.tower.num_prefix:
            raise UnsupportedModelError(
                f"{name} leaves out the first token of its vision tower (vision_feature_select_strategy='default'), which has "
                "no class token: once patches are merged or dropped, the first is not always the same"
            )
        return TowerBridge(self.family.connector, self.info.tower.feature_block + 1, skip)


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

    @property
    def supported(self) -> str:
        """The families, in words."""
        return supported()

    def vlms(self, model: nn.Module) -> Sequence[VLM]:
        """See `find`."""
        return find(model)

    def why_no_prompt(self, model: nn.Module) -> str | None:
        """Of a model in `UNPROMPTED`; `None` if no module is."""
        found = ((module, look_up(module, UNPROMPTED)) for module in model.modules())
        return next((f"prompts of {type(module).__name__} stay as they are: {why}" for module, why in found if why), None)


def find(model: nn.Module) -> Sequence[VLM]:
    """The vision-language models inside a model; empty if there is none.

    Raises:
        UnsupportedModelError: one is there but its prompts cannot be shortened; the message says why.
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=True):
        why = look_up(module, REFUSED)
        if why is not None:
            raise UnsupportedModelError(f"{type(module).__name__} cannot be patched: {why}; supported: {supported()}")
        family = look_up(module, FAMILIES) or generic(module)
        if family is not None:
            _check_release()
            found.append(_describe(path, module, family))
    return found


def generic(module: nn.Module) -> Family | None:
    """What the interfaces of a model say of it, where no row describes its family; `None` if it is no vision-language model.
    It is enough to shorten its prompt before the LLM, by methods that look at image features alone, one row an image."""
    if not encodes(module) or any(encodes(child) for child in module.children()):
        return None
    text = text_path(module)
    if text is None:
        return None
    return Family(
        type(module).__name__,
        text=text,
        tower="",
        views=videos.views,
        rotary_3d=hasattr(module, "get_rope_index"),
        axes=position_axes(module.get_submodule(text)),
        generic=True,
    )


def _check_row(module: nn.Module, family: Family) -> None:
    """Raises if a row names modules that a model does not have."""
    if family.generic:
        return
    named: dict[str, tuple[str, ...]] = {key: (getattr(family, key),) for key in ("text", "tower", "connector", "projector")}
    named["costs.modules"] = () if family.costs is None else family.costs.modules
    for key, paths in named.items():
        for path in paths:
            try:
                module.get_submodule(path)
            except AttributeError:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has no module {path!r}, which the row of {family.name} in FAMILIES "
                    f"(vtok/patches/hf_vlm/families.py) names as {key}: an error there, or a release of transformers that vtok "
                    "does not know"
                ) from None


def _describe(path: str, module: Any, family: Family) -> VLM:
    _check_row(module, family)
    name, text = type(module).__name__, module.get_submodule(family.text)
    config = text.config
    if not hasattr(text, "layers"):
        raise UnsupportedModelError(f"the LLM of {name}, {type(text).__name__}, keeps no list of layers, which vtok hooks")
    if getattr(module.config, "vision_feature_layer", None) == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer=0 of {name}: transformers takes 0 for no layer at all and fails when it encodes an image; "
            "name the output of a block, such as -1 or -2"
        )
    heads = stated_number(config, "num_attention_heads") or max(config.hidden_size // 64, 1)
    tower, facts, no_tower = _tower(module, text, family)
    info = VLMInfo(
        name=name,
        depth=len(text.layers),
        width=config.hidden_size,
        num_heads=heads,
        **decoder_probe.inner_layers(module.config, text),
        num_kv_heads=stated_number(config, "num_key_value_heads") or heads,
        head_dim=stated_number(config, "head_dim") or config.hidden_size // heads,
        tower=facts,
        no_tower=no_tower,
        grid=None if facts is not None and facts.prefix_kept else family.grid(module),
        crops=family.cuts is not hf_cuts.lone,
        videos=videos.encoder_of(module, "video") is not None,
        no_frames=videos.why_no_frames(module),
        no_patches=units.why_not(module),
        connector_macs=linear_macs(getattr(module, family.projector)) if family.projector else 0,
        no_layers=why_not_between(text),
        generic=family.generic,
    )
    return VLM(path, module, family, info, videos.placeholders_of(module), tower)


def _tower(module: Any, text: Any, family: Family) -> tuple[Tower | None, TowerFacts | None, str]:
    """(the vision tower, what is known of it, why it cannot be looked into)."""
    inside = set(text.modules())
    tower, why = lone_tower(module, inside)
    if family.generic and (tower is not None or not why):
        why = f"no row says which views of its vision tower an image of {type(module).__name__} is made of"
    if why:
        return tower, None, why
    found = [(path, m) for path, m in module.named_modules() if m not in inside and look_up(m, TOWERS) is not None]
    if len(found) != 1:
        named = next((m for name, m in module.named_children() if name.startswith("vision") or name == "visual"), module)
        if family.packed:
            return None, None, f"{type(named).__name__} runs the patches of all images as one sequence, cut where images end"
        return None, None, f"{type(named).__name__} is no vision tower whose blocks vtok knows"
    try:
        tower = HfAdapter().tower(*found[0])
        block = feature_block(getattr(module.config, "vision_feature_layer", -1), len(tower.blocks))
    except UnsupportedModelError as error:
        return None, None, str(error)
    kept = bool(tower.num_prefix) and getattr(module.config, "vision_feature_select_strategy", None) == "full"
    return tower, facts_of(tower, block, kept), ""
