"""The part of vLLM that runs a model: what was seen of the vision tower, and what is refused before an engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Sees queries, keys and values of some blocks of a CLIP or SigLIP tower, and what leaves them, while it encodes images.

    Args:
        tower: of the model, `CLIPVisionModel` or `SiglipVisionModel` of vLLM.
        blocks: 0-based.
        num_prefix: tokens in front of the patches.
    """

    def __init__(self, tower: Any, blocks: Sequence[int], num_prefix: int):
        self.num_prefix = num_prefix
        self._layers = {block: tower.vision_model.encoder.layers[block] for block in blocks}
        self._qkv: dict[int, Tensor] = {}
        self._left: dict[int, Tensor] = {}
        for block, layer in self._layers.items():
            layer.self_attn.qkv_proj.register_forward_hook(self._hook(self._qkv, block))
            layer.register_forward_hook(self._hook(self._left, block))

    @staticmethod
    def _hook(found: dict[int, Tensor], block: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            found[block] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> dict[int, TowerBlock]:
        """What the last pass of the tower left, all views of all images; nothing is kept of it here."""
        found = {}
        for block, layer in self._layers.items():
            attention = layer.self_attn
            qkv, left = self._qkv.pop(block), self._left.pop(block)
            found[block] = block_of(qkv, attention.num_heads_per_partition, attention.scale, self.num_prefix, left)
        return found
