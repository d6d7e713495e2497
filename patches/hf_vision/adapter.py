"""Adapter for Hugging Face transformers' vision encoders, which `hf_tables` describes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from vtok.core.tracker import TokenTracker
from vtok.cost.encoder import TowerCost
from vtok.errors import UnsupportedModelError
from vtok.patches.hf_vision.heads import HeadEnds, HeadStarts, MeanInput, MeanOutput, NoPoolMask, WholeAttentions
from vtok.patches.hf_vision.tables import ATTENTIONS, BLOCKS, OWNERS, TOWERS, OwnerSpec, TowerSpec, release
from vtok.patches.macs import block_cost, linear_macs, position_macs
from vtok.patches.pooling import PoolBias
from vtok.patches.protocol import Block, Example, Tower, look_up, own_forward, qualified_name
from vtok.patches.stems import ConvStem, StatedStem, UnmaskedImages, UnmaskedImagesEnd


class HfAdapter:
    """Adapter for Hugging Face transformers."""

    supported = (
        "transformers' ViT, DeiT, BEiT, ViT-MAE and ViT-MSN encoders, DINOv2 (with registers) and DINOv3, the image towers of "
        "CLIP, SigLIP, SigLIP2, BLIP, InternVL, Idefics2, Idefics3 and SmolVLM, and their image classifiers"
    )

    def towers(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Sequence[Tower]:
        found = []
        for path, module in model.named_modules(remove_duplicate=True):
            spec = look_up(module, TOWERS)
            if spec is not None:
                found.append(self._tower(path, module, spec, list(_owners(model, path)), input_size))
        return found

    def tower(self, path: str, module: nn.Module) -> Tower:
        """A tower by itself, at its own input size.

        Raises:
            UnsupportedModelError: it cannot be patched; the message says why.
        """
        spec = look_up(module, TOWERS)
        assert spec is not None
        return self._tower(path, module, spec, [], None)

    def _tower(
        self,
        path: str,
        module: Any,
        spec: TowerSpec,
        owners: list[tuple[nn.Module, OwnerSpec]],
        input_size: tuple[int, int, int] | None,
    ) -> Tower:
        name = type(module).__name__
        blocks = tuple(_block(name, i, block) for i, block in enumerate(module.get_submodule(spec.layers)))
        if not blocks:
            raise UnsupportedModelError(f"{name} has no blocks left to patch")
        size = input_size or _native_size(module.config)
        return Tower(
            path=path,
            module=module,
            blocks=blocks,
            num_prefix=spec.num_prefix + _num_registers(module),
            has_cls=spec.num_prefix > 0,
            width=module.config.hidden_size,
            input_size=size,
            grid=_grid(module.config, size),
            blind_reader=next((owner.blind for _, owner in owners if owner.blind), None),
            heads=tuple(getattr(outer, name) for outer, owner in owners for name in owner.heads),
            averaged_by=next((outer for outer, owner in owners if owner.averages), None),
        )

    def attach(self, tower: Tower, run: TokenTracker) -> None:
        module: Any = tower.module
        spec = _spec(tower)
        links = [block.module.__dict__["_vtok"] for block in tower.blocks]
        first = next((link.index for link in links if link.site is not None), len(links))  # blocks in front run their own code
        stepwise = tuple(link.index for link in links if link.stepwise and link.index >= first)
        if stepwise:
            module.register_forward_pre_hook(WholeAttentions(stepwise), with_kwargs=True)
        module.register_forward_pre_hook(UnmaskedImages(run), with_kwargs=True)
        module.register_forward_hook(UnmaskedImagesEnd(run))
        if spec.shapes:
            embeddings = module.get_submodule(spec.embed.rpartition(".")[0])
            embeddings.register_forward_pre_hook(StatedStem(run, spec.shapes, 1), with_kwargs=True)
        elif _ratio(module.config) is None:
            module.get_submodule(spec.embed).register_forward_hook(ConvStem(run))
        pool = getattr(module, spec.attn_pool, None) if spec.attn_pool else None
        if pool is not None:
            pool.register_forward_pre_hook(NoPoolMask(run), with_kwargs=True)
            pool.attention.register_forward_pre_hook(PoolBias(run, "key_padding_mask", drop_prefix=False), with_kwargs=True)
        if _averages(module, spec):
            getattr(module, spec.mean_pooler).register_forward_pre_hook(MeanInput(run))
        if tower.averaged_by is not None:
            tower.averaged_by.register_forward_pre_hook(HeadStarts(run))
            tower.averaged_by.register_forward_hook(HeadEnds(run), always_call=True)
            module.register_forward_hook(MeanOutput(run))

    def cost(self, tower: Tower) -> TowerCost:
        module: Any = tower.module
        spec = _spec(tower)
        head, per_token = sum(linear_macs(m) for m in tower.heads), 0
        pool = getattr(module, spec.attn_pool, None) if spec.attn_pool else None
        if pool is not None:
            width = pool.attention.embed_dim  # q of the one query and the output; k, v, scores and values of every token
            head += 2 * width * width + linear_macs(pool.mlp)
            per_token = 2 * width * width + 2 * width
        head += linear_macs(getattr(module, "pooler", None))
        averages = tower.averaged_by is not None or _averages(module, spec)
        rows, columns = _grid(module.config, tower.input_size, masked=False)
        per_patch = position_macs(module.get_submodule(spec.embed))
        if spec.positions and release() >= spec.positions_since:
            per_patch += position_macs(module.get_submodule(spec.positions))
        return TowerCost(
            rows * columns * per_patch,
            tuple(block_cost(b) for b in tower.blocks),
            head,
            per_token,
            weighted_mean=module.config.hidden_size if averages else 0,
            unpooled=tower.num_prefix,
        )

    def examples(self) -> Sequence[Example]:
        from vtok.patches.hf_vision.examples import EXAMPLES

        return EXAMPLES


def _owners(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, OwnerSpec]]:
    """The transformers models around the tower at `path`, outermost first.

    Raises:
        UnsupportedModelError: one of them is not known to work with fewer tokens.
    """
    names = path.split(".") if path else []
    for i in range(len(names)):
        outer = model.get_submodule(".".join(names[:i]))
        if not any(cls.__module__.startswith("transformers.models.") for cls in type(outer).__mro__):
            continue
        spec = look_up(outer, OWNERS)
        if spec is None:
            raise UnsupportedModelError(
                f"{type(outer).__name__} may need every patch of its tower {'.'.join(names[i:])}; if not, patch that: "
                f"vtok.patch(model.{path}, ...). supported: {HfAdapter.supported}"
            )
        yield outer, spec


def _block(tower: str, index: int, block: nn.Module) -> Block:
    spec = look_up(block, BLOCKS)
    attention = None if spec is None else spec.attention(block)
    attend = None if attention is None else look_up(attention, ATTENTIONS)
    if spec is None or attend is None or not all(hasattr(attention, tap.child) for tap in attend.taps.values()):
        odd = block if attention is None else attention
        raise UnsupportedModelError(
            f"block {index} of {tower} holds a {qualified_name(type(odd))}, which vtok cannot patch "
            f"(older versions of transformers build some of these differently); supported: {HfAdapter.supported}"
        )
    return Block(block, spec, attend, own_forward(block, BLOCKS), own_forward(spec.attention(block), ATTENTIONS))


def _spec(tower: Tower) -> TowerSpec:
    spec = look_up(tower.module, TOWERS)
    assert spec is not None
    return spec


def _averages(module: Any, spec: TowerSpec) -> bool:
    """Whether a child of the tower averages the patches."""
    return bool(spec.mean_pooler) and getattr(module, spec.mean_pooler) is not None and module.config.use_mean_pooling


def _num_registers(module: Any) -> int:
    tokens = getattr(module.embeddings, "register_tokens", None)
    return 0 if tokens is None else tokens.shape[1]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _native_size(config: Any) -> tuple[int, int, int]:
    """The input size that the model was built for."""
    rows, columns = _pair(config.patch_size)
    if hasattr(config, "image_size"):
        height, width = _pair(config.image_size)
    else:  # SigLIP2: a square grid of position embeddings, any shape of image
        side = round(config.num_patches**0.5)
        height, width = side * rows, side * columns
    return getattr(config, "num_channels", 3), height, width


def _grid(config: Any, size: tuple[int, int, int], masked: bool = True) -> tuple[int, int]:
    """(rows, columns) of patches; of those that ViT-MAE keeps at random no grid is known: one row."""
    rows, columns = (side // patch for side, patch in zip(size[1:], _pair(config.patch_size)))
    ratio = _ratio(config)
    return (rows, columns) if ratio is None or not masked else (1, int(rows * columns * (1 - ratio)))


def _ratio(config: Any) -> float | None:
    """The share of the patches that ViT-MAE leaves out; it puts the others in a random order. `None` = another model."""
    return getattr(config, "mask_ratio", None)
