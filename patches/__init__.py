"""What touches other people's classes: one file per backend, found by the module names of the classes in a model.

# Models

timm's plain vision transformers: **276 of the 297 plain ViTs in the registry of timm 1.0.31** (ViT, DeiT and its distilled
models, DeiT-III, AugReg, DINOv2 and DINOv3 with registers, EVA-02, BEiT, SigLIP, FlexiViT, NaFlexViT with image input, hybrids): CLS,
distillation and register tokens are never touched, attention and average pooling see how many patches a token stands for. What is
not supported (windowed and hierarchical models, SAM, relative-position blocks, packed NaFlex input) is refused with a sentence that
says what is: `print(vtok.supports(model))`.

open_clip's image towers: **115 of the 144 architectures that open_clip 3.3 registers** (CLIP, CLIPA, MetaCLIP and
CoCa with every pooling, on its own vision transformer; SigLIP, SigLIP 2, EVA-CLIP, PE and ViTamin through its timm wrapper). The
text tower, though built from the same blocks, is never touched:

```python
model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-16", pretrained="openai")
vtok.patch(model.eval(), "pitome")  # the image tower of the whole model; `vtok.patch(model.visual, ...)` is the same
features = model.encode_image(images)
```

Hugging Face transformers (5.18 and later; vision-language models: 5.23 and later): ViT, DeiT, BEiT, ViT-MAE (its encoder) and ViT-MSN, DINOv2 with and without registers, DINOv3,
the image towers of CLIP, SigLIP, SigLIP2, BLIP, InternVL, Idefics2, Idefics3 and SmolVLM, alone or inside `CLIPModel`, `SiglipModel`, ...,
and their image classifiers, average-pooling ones included. Text towers are never touched; sdpa and eager give the same numbers.

```python
from transformers import CLIPModel, pipeline

model = CLIPModel.from_pretrained("openai/clip-vit-base-patch16").eval()
vtok.patch(model, "tome", r=8)  # the image tower alone
classify = pipeline("zero-shot-image-classification", model=model, ...)
model.save_pretrained("folder")  # the weights as they were
vtok.save_config(model, "folder")  # vtok.patch(loaded, "folder") brings the patch back
```

- Images that come padded to one length (SigLIP2's NaFlex batches, Idefics3's `patch_attention_mask`) give what each would give alone:
  padding is never merged, kept or attended to. That takes one host synchronisation a block, for padded batches only, so these do not
  compile into one graph.
- `output_hidden_states=True` returns what every block returned, so lengths fall from block to block; `output_attentions=True` returns
  each block's map of the tokens it had. ATS computes only part of its maps and refuses.
- Models whose text model attends to the image tokens (`BlipForImageTextRetrieval` ...) cannot weigh merged tokens: they take
  methods that prune, and merging without proportional attention, such as `pitome` with `preset="official_blip"`.
- Flash and flex kernels take no size bias: merging methods and ATS ask for `model.set_attn_implementation("sdpa")`; pruning runs
  under any kernel, and so does `vtok.ToMe(r=8, prop_attn=False)`.
- PEFT first, then vtok (the other order is noticed); accelerate's hooks and `Trainer`'s gradient checkpointing work.
- Plans and budgets count the image tower and what follows it (pool, projection, classifier), not a text tower.

## Vision-language models

LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3, SmolVLM, Gemma3 and PaliGemma of Hugging
Face transformers (5.23 and later): batches with padding, several images, beams, static caches, training with gradient
checkpointing; under `sdpa` and `eager` every layer keeps its own kernel.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

vlm = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf").eval()
vtok.patch(vlm, "todre", keep=0.1)  # a tenth of the visual tokens enter the LLM, none its last layers
answer = vlm.generate(**inputs, max_new_tokens=16)  # as before
print(vtok.info(vlm))  # tokens and GMACs of tower, connector and every layer, bytes of the KV cache

vtok.patch(vlm, ["pitome", "todre"])  # merge inside the vision tower, then prune: each accounted for
short = vtok.prune_inputs(
    vtok.unpatch(vlm), inputs, "todre", keep=0.1, probe=None
)  # no hooks: an unpatched model, a shorter prompt
```

- A choice equals hiding what was dropped: 8 greedy steps under an explicit mask in every layer, within 1e-5, for every model above.
  Tokens keep the positions that they had (`positions="compact"` numbers them anew, in every layer what it holds); what a prompt
  dropped is kept on its KV cache, so that later turns and interleaved calls are right. New images in a later turn (all ids, the new
  pixels and the cache) are shortened as well by what acts before the LLM; `info` goes on to tell of the first.
- Packed rows (positions that start over, no mask) stay packed: no sample sees another, each is a prompt of its own to methods.
  `output_hidden_states` and `output_attentions` have a place for every column of the prompt; a dropped one repeats the nearest
  kept one in front of it, and gets no attention.
- Vision encoder methods act in the tower, `random` and `uniform` too where `layers` name its blocks. Their tokens leave the prompt
  too in LLaVA-1.5 and PaliGemma, whose connectors work token by token, and in the Qwen family (Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
  Qwen3.5, with their mixtures of experts), where the 2 x 2 patches of one visual token merge, move or leave as one: numbers and
  counts are of these units, for each image (or frame of a video) as if it came alone; `input_size` says for which size budgets are
  solved. A merged unit stands where the unit stood that it was merged into, in the window of that unit where blocks attend within
  windows. The others need every patch at its place: methods that merge are put back on the grid, which saves work in the tower
  alone and is said, methods that drop are refused.
- `todre` and `atp` decide between decoder layers too; the attention that they need is worked out for those rows, at that layer.
- `correlation` is for models that cut pages into crops; `vtok.patch(vlm, "correlation", calibration=[inputs, ...])` sets its
  threshold on a few of your pages.
- `print(vtok.supports(vlm))` says what works on a model, and why something does not.

Models of many other families need no row to have their prompts shortened: `vtok.patches.hf_vlm.generic` lists them.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from vtok.patches.protocol import Adapter
from vtok.registry import ADAPTERS, VLM_ADAPTERS, Registry


def find_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Adapters whose backend some module of `model` comes from; only these are imported."""
    for name in _backends(model, ADAPTERS):
        yield name, ADAPTERS.get(name)()


def find_vlms(model: nn.Module) -> Sequence[Any]:
    """The vision-language models inside `model`, as their backends describe them; empty if there is none.

    Raises:
        UnsupportedModelError: one is there but cannot be patched.
    """
    return [vlm for name in _backends(model, VLM_ADAPTERS) for vlm in VLM_ADAPTERS.get(name)().vlms(model)]


def why_no_prompt(model: nn.Module) -> str | None:
    """Why the prompts of a vision-language model inside `model` stay as they are, although its vision encoder may be patched;
    `None` if there is none.
    """
    found = (VLM_ADAPTERS.get(name)().why_no_prompt(model) for name in _backends(model, VLM_ADAPTERS))
    return next((why for why in found if why is not None), None)


def _backends(model: nn.Module, known: Registry[Any]) -> list[str]:
    roots = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    return [name for name in known if name in roots]
