"""PiToMe's presets in whole towers of every backend: patched models against plain loops over the unpatched blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import helpers_pitome as slow
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import BACKENDS, images

import vtok
from vtok.eval.benchmarks.flops import count_macs
from vtok.patches.attention import Tap
from vtok.targets.resolve import run_of
from vtok.testing.tiny import randomise

DEPTH, WIDTH, HEADS, RATIO = 16, 32, 2, 0.9  # deeper than 13: the last blocks of `official_llava` match by energy
Keys = Callable[[Any, Tensor], Tensor]


class Loop(NamedTuple):
    """An unpatched tower taken apart.

    Attributes:
        blocks: in order.
        enter: images -> the tokens that enter block 0.
        attend: (block, x) -> what its attention adds to x.
        mlp: (block, x) -> what its MLP adds to x.
        keys: (block, x) -> [B, N, H D] keys of x.
        leave: (tokens that left the last block, sizes [B, N] or `None`) -> the model's output.
    """

    blocks: Any
    enter: Callable[[Tensor], Tensor]
    attend: Callable[[Any, Tensor], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]
    keys: Keys
    leave: Callable[[Tensor, Tensor | None], Tensor]


def timm_vit(**extra: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=48, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=2, num_classes=5, **extra
    )


def timm_loop(model: Any) -> Loop:
    def leave(x: Tensor, size: Tensor | None) -> Tensor:
        if model.global_pool == "token":
            return model.forward_head(model.norm(x))
        weight = torch.ones_like(x[:, 1:, 0]) if size is None else size[:, 1:]
        mean = (x[:, 1:] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return model.head(model.fc_norm(mean))

    return Loop(
        model.blocks,
        lambda pixels: model.norm_pre(model._pos_embed(model.patch_embed(pixels))),
        lambda block, x: block.ls1(block.attn(block.norm1(x))),
        lambda block, x: block.ls2(block.mlp(block.norm2(x))),
        lambda block, x: block.attn.qkv(block.norm1(x)).chunk(3, -1)[1],
        leave,
    )


def open_clip_vit() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(48, 8, WIDTH, DEPTH, HEADS, 2.0, output_dim=5)


def open_clip_loop(model: Any) -> Loop:
    def keys(block: Any, x: Tensor) -> Tensor:
        return F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)[1]

    return Loop(
        model.transformer.resblocks,
        model._embeds,
        lambda block, x: block.attention(block.ln_1(x)),
        lambda block, x: block.mlp(block.ln_2(x)),
        keys,
        lambda x, _: model.ln_post(x)[:, 0] @ model.proj,
    )


def hf_config(family: str) -> Any:
    import transformers

    return getattr(transformers, f"{family}Config")(
        image_size=48, patch_size=8, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH, num_labels=5,
    )  # fmt: skip


class Reads(nn.Module):
    """A transformers model that returns one tensor."""

    def __init__(self, inner: nn.Module, field: str):
        super().__init__()
        self.inner, self.field = inner, field

    def forward(self, pixels: Tensor) -> Tensor:
        return getattr(self.inner(pixel_values=pixels), self.field)


def hf_clip() -> nn.Module:
    from transformers import CLIPVisionModel

    return Reads(CLIPVisionModel(hf_config("CLIPVision")), "pooler_output")


def hf_blip() -> nn.Module:
    from transformers import BlipVisionModel

    return Reads(BlipVisionModel(hf_config("BlipVision")), "last_hidden_state")


def hf_vit() -> nn.Module:
    from transformers import ViTForImageClassification

    return Reads(ViTForImageClassification(hf_config("ViT")), "logits")


def hf_clip_loop(model: Any) -> Loop:
    tower = model.inner
    return Loop(
        tower.encoder.layers,
        lambda pixels: tower.pre_layrnorm(tower.embeddings(pixels)),
        lambda block, x: block.self_attn(block.layer_norm1(x), attention_mask=None)[0],
        lambda block, x: block.mlp(block.layer_norm2(x)),
        lambda block, x: block.self_attn.k_proj(block.layer_norm1(x)),
        lambda x, _: tower.post_layernorm(x[:, 0]),
    )


def hf_blip_loop(model: Any) -> Loop:
    tower = model.inner
    return Loop(
        tower.encoder.layers,
        tower.embeddings,
        lambda block, x: block.self_attn(block.layer_norm1(x))[0],
        lambda block, x: block.mlp(block.layer_norm2(x)),
        lambda block, x: block.self_attn.qkv(block.layer_norm1(x)).chunk(3, -1)[1],
        lambda x, _: tower.post_layernorm(x),
    )


def hf_vit_loop(model: Any) -> Loop:
    tower = model.inner.vit
    return Loop(
        tower.layers,
        tower.embeddings,
        lambda block, x: block.attention(block.layernorm_before(x))[0],
        lambda block, x: block.mlp(block.layernorm_after(x)),
        lambda block, x: block.attention.k_proj(block.layernorm_before(x)),
        lambda x, _: model.inner.classifier(tower.layernorm(x)[:, 0]),
    )


TOWERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Loop]]] = {
    "timm: ViT": (timm_vit, timm_loop),
    "timm: ViT average pool": (functools.partial(timm_vit, global_pool="avg"), timm_loop),
    "open_clip: ViT": (open_clip_vit, open_clip_loop),
    "transformers: CLIP": (hf_clip, hf_clip_loop),
    "transformers: BLIP": (hf_blip, hf_blip_loop),
    "transformers: ViT": (hf_vit, hf_vit_loop),
}
TOWERS = {name: made for name, made in TOWERS.items() if name.split(":")[0] in BACKENDS}
PRESET = pytest.mark.parametrize("preset", slow.PRESETS)
HIDDEN = ("official_clip", "official_blip", "official_llava")


@functools.cache
def tower(name: str) -> nn.Module:
    """In float64, every parameter random; shared: tests patch it and take the patch off."""
    return randomise(TOWERS[name][0]().eval().double())


def picture() -> Tensor:
    """Two images of 36 patches."""
    return images("timm: ViT", dtype=torch.float64)[..., :48, :48]


def plain_loop(loop: Loop, pixels: Tensor, preset: str) -> tuple[Tensor, Tensor, list[int]]:
    """(tokens that leave the last block, the model's output, tokens after every block)."""
    x = loop.enter(pixels)
    size, counts = torch.ones(x.shape[:2], dtype=torch.float64), []
    for i, block in enumerate(loop.blocks):
        known = slow.step(preset, i, len(loop.blocks))
        keys = loop.keys(block, x).unflatten(-1, (HEADS, -1)).mean(-2)
        x = x + loop.attend(block, x)
        if known.place == "mid":
            x, size = slow.merged(x, size, x if known.metric == "hidden" else keys, known, RATIO)
        x = x + loop.mlp(block, x)
        if known.place == "end":
            x, size = slow.merged(x, size, x if known.metric == "hidden" else keys, known, RATIO)
        counts.append(x.shape[1])
    return x, loop.leave(x, size if known.weighted else None), counts


@PRESET
@pytest.mark.parametrize("name", TOWERS)
def test_a_patched_tower_equals_a_plain_loop(name: str, preset: str) -> None:
    model, x = tower(name), picture()
    loop = TOWERS[name][1](model)
    with torch.no_grad():
        tokens, expected, counts = plain_loop(loop, x, preset)
        left: list[Tensor] = []
        with vtok.patched(model, "pitome", ratio=RATIO, preset=preset):
            handle = loop.blocks[-1].register_forward_hook(lambda _m, _a, out: left.append(out))
            out = model(x)
            handle.remove()
            run = run_of(model)
    assert counts[-1] < 14
    assert run is not None
    assert [run.current.tokens(i + 1) for i in range(DEPTH)] == counts
    assert (left[0] - tokens).abs().max() <= 1e-10 * tokens.abs().max()
    assert (out - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in TOWERS for p in slow.PRESETS if p in HIDDEN or n == "timm: ViT"])
def test_plans_and_budgets_say_what_runs(name: str, preset: str) -> None:
    """And unpatching leaves no trace."""
    model, x = tower(name), picture()
    with torch.no_grad():
        reference = model(x)
        plan = vtok.plan(model, "pitome", preset=preset, flops=0.6)
        assert plan.estimate.fraction == pytest.approx(0.6, abs=0.02)
        vtok.patch(model, "pitome", preset=preset, flops=0.6)
        taps = sum(isinstance(hook, Tap) for m in model.modules() for hook in m._forward_hooks.values())
        assert (taps == 0) or preset not in HIDDEN, "nobody looks at what these hooks catch"
        counted = count_macs(model, x)
        seen = vtok.info(model).towers[0]
    assert [block.tokens_out for block in seen.blocks] == list(plan.tokens)
    assert plan.tokens[-1] < 37
    assert seen.estimate is not None
    assert counted.model == plan.estimate.macs == seen.estimate.macs
    assert counted.reduction == plan.estimate.reduction_macs == seen.estimate.reduction_macs > 0
    with torch.no_grad():
        assert torch.equal(vtok.unpatch(model)(x), reference)


@PRESET
@pytest.mark.parametrize("name", [n for n in TOWERS if n in ("timm: ViT", "open_clip: ViT", "transformers: CLIP")])
def test_saved_presets_come_back(name: str, preset: str, tmp_path: Any) -> None:
    model, x = tower(name), picture()
    with torch.no_grad(), vtok.patched(model, "pitome", ratio=RATIO, preset=preset):
        reference = model(x)
        configs = run_of(model).patch.configs  # type: ignore[union-attr]
        vtok.save_config(model, tmp_path)
    with torch.no_grad(), vtok.patched(model, tmp_path):
        assert torch.equal(model(x), reference)
        assert run_of(model).patch.configs == configs == (vtok.PiToMe(ratio=RATIO, preset=preset),)  # type: ignore[union-attr]


@pytest.mark.skipif("transformers" not in BACKENDS, reason="needs transformers")
def test_what_llava_reads_of_its_tower() -> None:
    """CLIP-L/14 at 336 px, but narrow: 576 patches, 24 blocks; LLaVA takes `hidden_states[-2][:, 1:]`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=8, num_hidden_layers=24, num_attention_heads=1, intermediate_size=8
    )
    model = randomise(CLIPVisionModel(config).eval())
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    for ratio, left in ((0.95, 183), (0.9, 54)):
        with torch.no_grad(), vtok.patched(model, "pitome", ratio=ratio, preset="official_llava"):
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert states[-2][:, 1:].shape[1] == left


@pytest.mark.skipif("transformers" not in BACKENDS, reason="needs transformers")
def test_blip_ranks_images_with_the_authors_preset() -> None:
    """Its text model attends to the merged tokens as if each were one patch, as theirs does: no proportional attention."""
    import transformers

    text = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"max_position_embeddings": 8, "bos_token_id": 1, "sep_token_id": 2, "encoder_hidden_size": WIDTH}
    config = transformers.BlipConfig(
        text_config=text, vision_config=hf_config("BlipVision").to_dict(), image_text_hidden_size=8
    )
    model = randomise(transformers.BlipForImageTextRetrieval(config).eval().double())
    words, x = torch.tensor([[1, 5, 6, 2]] * 2), picture()
    with pytest.raises(vtok.UnsupportedModelError, match="or one with prop_attn=False"):
        vtok.patch(model, "pitome", ratio=RATIO)
    with torch.no_grad():
        tokens, _, counts = plain_loop(hf_blip_loop(Reads(model.vision_model, "")), x, "official_blip")
        seen = model.vision_model.post_layernorm(tokens)
        read = model.text_encoder(words, encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2]))
        expected = model.itm_head(read.last_hidden_state[:, 0])
        found = vtok.patch(model, "pitome", ratio=RATIO, preset="official_blip")(input_ids=words, pixel_values=x).itm_score
    assert counts[-1] < 14
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
