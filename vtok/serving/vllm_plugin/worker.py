"""The part of vLLM that runs a model: what was seen of the vision tower, and what is refused before an engine starts."""

# Classes here are put in front of vLLM's, which have what mypy misses in them.
# mypy: disable-error-code="attr-defined, call-arg, misc"

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger

from vtok.core.tower import TowerBlock
from vtok.errors import UnsupportedModelError
from vtok.serving.choice import TokenChoice
from vtok.serving.tower import block_of
from vtok.serving.vllm_plugin.families import choice_of

logger = init_logger("vllm.vtok")


def start(architecture: str, vllm_config: Any) -> TokenChoice | None:
    """The choice of a model that is about to be built, said in the log; `None` = nothing is pruned.

    Raises:
        UnsupportedModelError: the engine is set up in a way in which pruned prompts were never run.
    """
    choice = choice_of(vllm_config.model_config.hf_config, architecture)
    if choice is None:
        return None
    lora = vllm_config.lora_config
    for what, used in (
        ("speculative decoding", vllm_config.speculative_config is not None),
        ("LoRA on the vision tower", getattr(lora, "enable_tower_connector_lora", False)),
    ):
        if used:
            raise UnsupportedModelError(f"vtok prunes visual tokens without {what} only: leave it, or the key, out")
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if choice.tower_blocks and ranks > 1:
        raise UnsupportedModelError(
            f"{choice.config.name} looks at the attention of the vision tower, whose heads tensor parallelism spreads over "
            f"{ranks} ranks: serve a method that looks at features alone, such as divprune, or use one rank"
        )
    if choice.left_out:
        logger.warning("vtok: %s", choice.left_out)
    logger.info("vtok: %s", choice)
    return choice


class TowerWatch:
    """Sees queries, keys and values of some blocks of a vision tower, and what leaves them, while it encodes images.

    Args:
        layers: of the tower: of vLLM's CLIP, SigLIP, Idefics3 (one projection to all three) or InternVL (one each).
        blocks: 0-based.
        num_prefix: tokens in front of the patches.
    """

    def __init__(self, layers: Any, blocks: Sequence[int], num_prefix: int):
        self.num_prefix = num_prefix
        self._layers = {block: layers[block] for block in blocks}
        self._seen: dict[Any, Tensor] = {}
        for layer in self._layers.values():
            for module in (layer, *_projections(layer)):
                module.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self._seen[module] = output[0] if isinstance(output, tuple) else output

    def take(self) -> dict[int, TowerBlock]:
        """What the last pass of the tower left, all views of all images; nothing is kept of it here."""
        found = {}
        for block, layer in self._layers.items():
            qkv = torch.cat([self._seen.pop(module) for module in _projections(layer)], -1)
            attention = _attention(layer)
            heads = getattr(attention, "num_heads_per_partition", None) or attention.num_heads
            found[block] = block_of(qkv, heads, attention.scale, self.num_prefix, self._seen.pop(layer))
        return found


def watch(layers: Any, choice: TokenChoice | None) -> TowerWatch:
    """Sees the blocks that a choice looks at, among the layers of a vision tower."""
    facts = None if choice is None else choice.info.tower
    return TowerWatch(layers, () if choice is None else choice.tower_blocks, 0 if facts is None else facts.num_prefix)


class PrunedModel:
    """Put in front of a model of vLLM's: its choice, and what is seen of its vision tower.

    Attributes:
        architecture: vLLM's name of the model.
        vtok: `None` = nothing is pruned.
        vtok_watch: sees the blocks of the tower that the choice looks at.
    """

    architecture: ClassVar[str]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        choice = start(self.architecture, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtok: TokenChoice | None = choice
        self.vtok_watch = watch(self._vtok_layers(), choice)

    def _vtok_layers(self) -> Any:
        """Of the vision tower."""
        return self.vision_tower.vision_model.encoder.layers


class WithoutGraphs:
    """Put in front of a model of vLLM's that can replay its encoder from CUDA graphs."""

    vtok: TokenChoice | None

    def get_encoder_cudagraph_config(self) -> Any:
        """None of the encoder is replayed from a graph: what is done with its output would be left out."""
        found = super().get_encoder_cudagraph_config()
        return found if self.vtok is None else dataclasses.replace(found, modalities=[])


def _attention(layer: Any) -> Any:
    """Of a block of a vision tower."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def _projections(layer: Any) -> tuple[Any, ...]:
    """Modules of a block from which queries, keys and values come, normalised where the block normalises them."""
    attention = _attention(layer)
    if hasattr(attention, "qkv_proj"):
        return (attention.qkv_proj,)
    normed = getattr(attention, "qk_normalization", False)
    return (*((attention.q_norm, attention.k_norm) if normed else (attention.q_proj, attention.k_proj)), attention.v_proj)
