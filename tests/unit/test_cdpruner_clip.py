"""CDPruner by CLIP's own relevance: a tiny CLIP beside a tiny LLaVA, against the equations taken step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vlm_zoo import build, generate, inputs, visual

import vtok
from vtok.eval.models.reference import asset
from vtok.methods.features.cdpruner import clip_relevance
from vtok.methods.features.cdpruner_clip import load
from vtok.ops.determinantal import greedy_dpp
from vtok.patches.hf_vlm.families import find

transformers = pytest.importorskip("transformers")
TOKENIZER = str(asset("easyvqa_llava/tokenizer.json").parent)  # 43 words; tiny models know more numbers than these


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> str:
    return made(tmp_path_factory.mktemp("clip"), width_of("LLaVA-1.5"))


def width_of(name: str) -> int:
    return find(build(name))[0].info.tower.width


def made(folder: Path, width: int, most: int = 10) -> str:
    """A CLIP of random weights with the reference LLaVA's words."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text, "max_position_embeddings": most},
        vision_config={**sizes, "hidden_size": width, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def asked(name: str = "LLaVA-1.5") -> dict[str, Tensor]:
    """Prompts whose words the tokenizer knows."""
    values, model = inputs(name), build(name)
    ids = values["input_ids"].clone()
    words = ~visual(model, ids) & values["attention_mask"].bool()
    ids[words] = 4 + ids[words] % 38
    return {**values, "input_ids": ids}


def expected(clip: str, model: Any, values: dict[str, Tensor], keep: float) -> list[list[int]]:
    """Kept visual tokens of every image of a LLaVA-1.5, by the equations."""
    tokenizer, full = transformers.AutoTokenizer.from_pretrained(clip), transformers.CLIPModel.from_pretrained(clip).eval()
    inner, seen = model.model, visual(model, values["input_ids"])
    with torch.no_grad():
        hidden = inner.vision_tower(values["pixel_values"], output_hidden_states=True).hidden_states
        patches = hidden[model.config.vision_feature_layer][:, 1:]
        patches = full.visual_projection(full.vision_model.post_layernorm(patches))
        features = list(inner.get_image_features(values["pixel_values"], return_dict=True).pooler_output)
    found = []
    rows = [b for b in range(len(seen)) for _ in range(int(seen[b].sum()) // len(features[0]))]
    for i, b in enumerate(rows):
        first = int(seen[b].int().argmax())
        text = values["input_ids"][b, first:][~seen[b, first:]]
        ids = tokenizer(tokenizer.decode(text, skip_special_tokens=True).strip(), add_special_tokens=False)["input_ids"]
        embeds = []
        for j in range(0, max(1, len(ids)), 8):
            one = torch.tensor([[tokenizer.bos_token_id, *ids[j : j + 8], tokenizer.eos_token_id]])
            with torch.no_grad():
                embeds.append(full.text_projection(full.text_model(input_ids=one).pooler_output)[0])
        relevance = clip_relevance(patches[i : i + 1], torch.stack(embeds))
        count = max(1, round(keep * patches.shape[1]))
        found.append(greedy_dpp(features[i][None], relevance, count)[0].sort().values.tolist())
    return found


@pytest.mark.parametrize("preset", [None, "official"])
def test_what_stays_is_what_the_equations_say(clip: str, preset: str | None) -> None:
    model, values = build("LLaVA-1.5"), asked()
    wanted = expected(clip, model, values, 0.5)
    params = {"clip": clip, "tokenizer": TOKENIZER, "preset": preset, "relevance": "clip", "keep": 0.5}
    short = vtok.prune_inputs(model, values, "cdpruner", **params)
    vtok.patch(model, "cdpruner", **params)
    generate(model, values)
    (prompt,) = vtok.info(model).prompts
    assert prompt.positions == ("compact" if preset else "original")
    assert sum(prompt.rows[0].tokens_out) == sum(map(len, wanted))
    vtok.unpatch(model)
    features = list(model.model.get_image_features(values["pixel_values"], return_dict=True).pooler_output)
    left = torch.cat([f.view(-1, f.shape[-1]) for f in short["mm_encoder_outputs"]["image"].pooler_output])
    assert torch.allclose(left, torch.cat([one[kept] for one, kept in zip(features, wanted)]), atol=1e-6)


def test_relevance_reads_the_question(clip: str) -> None:
    model, values = build("LLaVA-1.5"), asked()
    assert len(load(clip, TOKENIZER).segments("is there a red circle in the image " * 3)) > 1
    vtok.patch(model, "cdpruner", keep=0.5, relevance="clip", clip=clip, tokenizer=TOKENIZER)
    before = generate(model, values)[1]
    other, seen = copy.deepcopy(values), visual(model, values["input_ids"])
    behind = (seen.cumsum(1) > 0) & ~seen & values["attention_mask"].bool()
    other["input_ids"][behind] = 4 + (values["input_ids"][behind] + 7) % 38
    assert (generate(model, other)[1] - before).abs().max() > 1e-4


def test_crops_have_a_budget_each_under_the_preset(tmp_path: Path) -> None:
    clip = made(tmp_path / "clip", width_of("LLaVA-NeXT"))
    model, values = build("LLaVA-NeXT"), asked("LLaVA-NeXT")
    counts = {}
    for preset in (None, "official"):
        vtok.patch(model, "cdpruner", keep_tokens=3, relevance="clip", clip=clip, tokenizer=TOKENIZER, preset=preset)
        generate(model, values)
        counts[preset] = vtok.info(model).prompts[0].rows[0].tokens_out[1]
    assert counts[None] == 3 and counts["official"] > 3 and counts["official"] % 3 == 0
    vtok.save_config(model, tmp_path / "vtok.json")
    vtok.patch(build("LLaVA-NeXT"), tmp_path / "vtok.json")


def test_what_is_refused(clip: str, tmp_path: Path) -> None:
    params = {"relevance": "clip", "tokenizer": TOKENIZER}
    for extra in ({}, {"preset": "official"}):
        with pytest.raises(vtok.ConfigError, match=r"a CLIP that the model does not carry: pass clip=FOLDER"):
            vtok.patch(build("LLaVA-1.5"), "cdpruner", **{**params, "tokenizer": None}, **extra)
    with pytest.raises(vtok.ConfigError, match="cdpruner cannot read clip="):
        vtok.patch(build("LLaVA-1.5"), "cdpruner", clip=str(tmp_path / "nothing"), **params)
    wide = made(tmp_path / "wide", 48)
    with pytest.raises(vtok.UnsupportedModelError, match=r"tower of .* is \d+ wide, that of clip=.* 48; pass the CLIP"):
        vtok.patch(build("LLaVA-1.5"), "cdpruner", clip=wide, **params)
    with pytest.raises(vtok.UnsupportedModelError, match=r"cdpruner looks at the attention of .* vision tower, which cannot"):
        vtok.patch(build("Qwen2.5-VL"), "cdpruner", clip=clip, **params)
