"""Tiny vision-language models, methods that choose in known ways, and the oracle: the whole prompt under an explicit mask."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtok
from vtok.config import MethodConfig
from vtok.core.prompt import ImageFeatures, LayerAttention, Layout, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.patches.hf_vlm.families import examples, find
from vtok.testing.prompt_oracle import MaskedPrompt

EXAMPLES = examples()
MaskOracle = MaskedPrompt
NEW = 8  # greedy steps
TOLERANCE = 1e-5


@functools.cache
def _prototype(name: str) -> Any:
    torch.manual_seed(0)
    model = EXAMPLES[name].build()
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            p.data.normal_()  # Gemma3's projection starts from zeros, which would make all image features zero
        elif p.ndim > 1:
            p.data.mul_(3.0)  # far from uniform attention and logits
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [116, 117, 118, 119]  # placeholders have no images behind them
    return model


def build(name: str, kernel: str = "sdpa") -> Any:
    """A fresh copy of an example."""
    model = copy.deepcopy(_prototype(name))
    model.set_attn_implementation(kernel)
    return model


def inputs(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts, the second padded on the left; the first has more images where a family allows it."""
    return EXAMPLES[name].inputs(_prototype(name), torch.Generator().manual_seed(seed))


def visual(model: Any, ids: Tensor) -> Tensor:
    """[B, L] bool."""
    (vlm,) = find(model)
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in vlm.tokens.values():
        found |= ids == token
    return found


def text_model(model: Any) -> Any:
    (vlm,) = find(model)
    return vlm.text


@dataclass(frozen=True)
class Columns(MethodConfig):
    """Drops fixed columns: at layers, or before the LLM (layer 0)."""

    name: ClassVar[str] = "columns"
    shares: tuple[tuple[int, int], ...] = ()  # (layer, share)

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        return _ColumnsReducer(self.shares)


@dataclass(frozen=True)
class _ColumnsReducer(VLMReducer):
    shares: tuple[tuple[int, int], ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(Place.DECODER_IN, layer) for layer, _ in self.shares)

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        assert attention is None
        share = dict(self.shares)[at.index]
        if share == 0:
            return torch.zeros_like(layout.visual)
        first = layout.column.where(layout.real, layout.length).amin(1, keepdim=True)  # differs between rows, not between beams
        return (layout.column + first) % share == 0


def column_keeps(model: Any, values: dict[str, Tensor], shares: tuple[tuple[int, int], ...]) -> dict[int, Tensor]:
    """Decoder layer -> [B, L] bool: what `Columns` leaves alive in each layer of the whole prompt."""
    ids = values["input_ids"]
    seen, alive, result = visual(model, ids), torch.ones_like(ids, dtype=torch.bool), {}
    for layer in range(len(text_model(model).layers)):
        for first, share in shares:
            if first == layer:
                column = torch.arange(ids.shape[1]) + values["attention_mask"].argmax(1, keepdim=True)
                stays = torch.zeros_like(seen) if share == 0 else column % share == 0
                alive = alive & (stays | ~seen)
        result[layer] = alive
    return result


def generate(model: Any, values: dict[str, Any], steps: int = NEW, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
    """(new tokens [B, steps], logits [B, steps, V], whole output) of greedy decoding."""
    values = {k: copy.copy(v) for k, v in values.items()}
    out = model.generate(
        **values, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return out.sequences[:, values["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


def assert_same(found: tuple[Tensor, Tensor, Any], expected: tuple[Tensor, Tensor, Any]) -> float:
    """Same tokens and logits; returns the largest difference."""
    difference = (found[1] - expected[1]).abs().max().item()
    assert difference <= TOLERANCE * max(1.0, expected[1].abs().max().item()), difference
    assert torch.equal(found[0], expected[0])
    return difference


def assert_threads_apart(model: Any) -> None:
    """Two threads with prompts of their own on one patched LLaVA-1.5: each gets, and is told, what it gets alone."""
    prompts = [inputs("LLaVA-1.5", seed) for seed in range(2)]
    prompts[1] = {k: v[1:] if k != "pixel_values" else v[2:] for k, v in prompts[1].items()}
    alone, found, counts = [generate(model, p) for p in prompts], {}, {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = generate(model, prompts[i])
        counts[i] = vtok.info(model).prompts[0].rows[0].tokens_in

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i][1], alone[i][1]) for i in range(2))
    assert counts == {0: (32, 16), 1: (16,)}


def feature_keeps(model: Any, values: dict[str, Tensor], keep: float, method: str = "uniform") -> Tensor:
    """[B, L] bool: what a method on image features leaves, by asking the method itself about each image alone."""
    from vtok.patches.hf_vlm import image_features as hf

    (vlm,) = find(model)
    reducer = vtok.METHODS.get(method)(keep=keep).build_vlm(vlm.info)
    with torch.no_grad():
        outputs = hf.encode(vlm.module, values)
    stays = torch.ones_like(values["input_ids"], dtype=torch.bool)
    for modality, output in outputs.items():
        first, rows = 0, []
        for i, x in enumerate(output.pooler_output):
            views = vlm.family.views(vlm.module, modality, i, first, x, values)
            plan: Plan = reducer.features(ImageFeatures(x[None], views, modality))
            row = torch.zeros(len(x), dtype=torch.bool)
            row[plan.keep[0]] = True
            rows.append(row)
            first += len(x)
        stays[values["input_ids"] == vlm.tokens[modality]] = torch.cat(rows)
    return stays


def tower_probs(name: str, values: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Modality -> block -> [V, H, N, N]: what eager attention of the unpatched tower returns."""
    from vtok.patches.hf_vlm import image_features as hf

    model = build(name, "eager")
    (vlm,) = find(model)
    kept: dict[int, Any] = {}
    handles = [
        block.attention.register_forward_hook(lambda m, args, out, i=i: kept.__setitem__(i, out[1]))
        for i, block in enumerate(vlm.tower.blocks)
    ]
    found = {}
    with torch.no_grad():
        for modality, pixels in hf.PIXELS.items():
            if values.get(pixels) is not None:
                call = {k: v for k, v in values.items() if k not in hf.PIXELS.values() or k == pixels}
                hf.encode(vlm.module, call)
                found[modality] = dict(kept)
    for handle in handles:
        handle.remove()
    return found


@dataclass(frozen=True)
class Attended(MethodConfig):
    """Keeps the visual tokens that the last text token attends to most, as read from `probe` decoder layers before."""

    name: ClassVar[str] = "attended"
    layer: int = 2
    count: int = 5
    back: int = 1

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        return AttendedReducer(self.layer, self.count, self.back)


@dataclass(frozen=True)
class AttendedReducer(VLMReducer):
    layer: int
    count: int
    back: int
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.DECODER_IN, self.layer),)

    def probe(self, at: Site) -> int:
        return at.index - self.back

    def keep(self, x: Tensor, layout: Layout, attention: LayerAttention | None, at: Site) -> Tensor:
        assert attention is not None
        assert attention.layer == at.index - self.back
        last = torch.full((len(x), 1), x.shape[1] - 1)
        score = attention.probs(last).mean(1)[:, 0].masked_fill(~layout.visual, -1)
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        return torch.zeros_like(layout.visual).scatter(1, chosen, True)


@dataclass(frozen=True)
class Nearest(MethodConfig):
    """Keeps every fourth visual token and folds each of the others into the nearest kept one by plain means."""

    name: ClassVar[str] = "nearest"

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        return _NearestReducer()


@dataclass(frozen=True)
class _NearestReducer(VLMReducer):
    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.IMAGE_FEATURES, 0),)

    def features(self, images: ImageFeatures) -> Plan:
        batch, n, _ = images.tokens.shape
        order = torch.arange(n)
        keep, src = order[order % 4 == 0], order[order % 4 != 0]
        dst = (src // 4).clamp_max(len(keep) - 1)
        keep, src, dst = (t.expand(batch, -1) for t in (keep.flip(0), src, len(keep) - 1 - dst))
        return Plan(keep, src, dst)
