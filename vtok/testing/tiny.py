"""The tiny models that backends offer as examples, with weights and images under which tokens differ."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from vtok.errors import MissingExtraError
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.examples import VLMExample
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, PAD, START
from vtok.patches.hf_vlm.examples.videos import VIDEO
from vtok.patches.hf_vlm.families import examples as vlms
from vtok.patches.hf_vlm.families import find
from vtok.patches.protocol import Example
from vtok.registry import ADAPTERS

# Parameters that bring queries and keys about, and weights of norms, by the names that backends give them.
_ATTENDING = ("qkv", "q_proj", "in_proj")
_NORMS = ("norm", "ln_")


def backends() -> list[str]:
    """Backends that are installed."""
    return [name for name in ADAPTERS if importlib.util.find_spec(name) is not None]


def examples(names: Sequence[str] | None = None) -> tuple[dict[str, Example], dict[str, Example]]:
    """The examples of some backends (default: of those that are installed), by "backend: name".

    Returns:
        (examples that the installed releases can run, examples that are too new for them).

    Raises:
        UnknownNameError: no such backend.
        MissingExtraError: it is not installed.
    """
    runs: dict[str, Example] = {}
    too_new: dict[str, Example] = {}
    for backend in backends() if names is None else names:
        adapter = ADAPTERS.get(backend)
        if importlib.util.find_spec(backend) is None:
            raise MissingExtraError(backend, backend)
        release = TorchVersion(importlib.import_module(backend).__version__)
        for example in adapter().examples():
            late = bool(example.since) and release < example.since
            (too_new if late else runs)[f"{backend}: {example.name}"] = example
    return runs, too_new


def build(example: Example) -> nn.Module:
    """The model in eval mode, every parameter random (see `randomise`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = example.build().eval()
    return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    """The same model with every parameter drawn anew: none is zero, attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        sharp = any(part in name for part in _ATTENDING)
        scale = 0.3 if p.ndim <= 1 or not p.any() else (2.5 if sharp else 1.0)
        fan = 1 if p.ndim <= 1 or not p.any() else p[0].numel()
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * scale / fan**0.5)
            if p.ndim == 1 and any(part in name for part in _NORMS) and name.endswith("weight"):
                p.add_(1)
    return model


def images(example: Example, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[B, C, H, W] random images with some structure: coarse blocks plus noise, so that tokens differ in how alike they are."""
    channels, height, width = example.input_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 4, 4, generator=generator, dtype=torch.float64)
    coarse = coarse.repeat_interleave(height // 4, 2).repeat_interleave(width // 4, 3)
    return (coarse + 0.3 * torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)).to(dtype)


def vlm_examples(names: Sequence[str] | None = None) -> dict[str, VLMExample]:
    """The tiny vision-language models, if their backend is among those named and installed."""
    wanted = "transformers" in (backends() if names is None else names)
    return vlms() if wanted else {}


def build_vlm(example: VLMExample) -> Any:
    """The model in eval mode, with SDPA where it has it; attention and logits are far from uniform, no answer ends early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = example.build()
        for p in model.parameters():
            if p.ndim > 1 and not p.any():
                p.data.normal_()
            elif p.ndim > 1:
                p.data.mul_(3.0)
    model.set_attn_implementation("sdpa" if "sdpa" in example.kernels else "eager")
    model.generation_config.update(eos_token_id=None, pad_token_id=PAD, suppress_tokens=[END, START, VIDEO, IMAGE])
    return model


def vlm_prompts(example: VLMExample, model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(kind, batch of two prompts, the second padded on the left): as the example makes them; videos alone and pages cut into
    crops, where the family has them; one image each, for methods that take no others."""
    values = example.inputs(model, torch.Generator().manual_seed(0))
    yield "several images", values
    if example.videos is not None:
        yield "videos", example.videos(model, torch.Generator().manual_seed(0))
    if example.pages is not None:
        yield "cropped pages", example.pages(model, torch.Generator().manual_seed(0))
    yield "one image each", one_image_each(values)


def one_image_each(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two prompts with one image each, the second padded on the left, out of prompts the last of which has one image.

    Args:
        values: of a model whose images are all [C, H, W], or packed along a grid.
    """
    last, start = values["attention_mask"][-1].argmax(), 2  # the second prompt lacks two words at its start
    made = {}
    for name, value in values.items():
        if value.shape == values["input_ids"].shape:
            row = value[-1, last:]
            made[name] = torch.stack([row, torch.cat([row[start:].new_full((start,), PAD), row[start:]])])
        else:
            made[name] = value[-2:]
    if "image_grid_thw" in values:
        made["pixel_values"] = values["pixel_values"][-int(made["image_grid_thw"].prod(1).sum()) :]
    return made


# What belongs to one image (or video) each, beside its pixels; patches of all of them may be packed along a grid.
_PER_IMAGE = {
    "image": ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def alone(model: Any, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The prompts of a batch one by one, without padding, each with its own images and videos.

    Args:
        model: unpatched or not.
        values: of a batch, as `vlm_prompts` makes them.
    """
    (vlm,) = find(model)
    ids, made = values["input_ids"], []
    with torch.no_grad():
        sizes = {kind: [len(x) for x in output.pooler_output] for kind, output in hf.encode(vlm.module, values).items()}
    first = dict.fromkeys(sizes, 0)
    for row, real in enumerate(values["attention_mask"].bool()):
        one = {name: value[row : row + 1, real] for name, value in values.items() if value.shape == ids.shape}
        for kind, counts in sizes.items():
            left, start = int((ids[row] == vlm.tokens[kind]).sum()), first[kind]
            while left > 0:
                left -= counts[first[kind]]
                first[kind] += 1
            if first[kind] > start:
                one |= _images(values, kind, start, first[kind])
        made.append(one)
    return made


def _images(values: dict[str, Tensor], kind: str, start: int, stop: int) -> dict[str, Tensor]:
    """Pixels of some images of a batch and what belongs to them."""
    pixels, *_ = _PER_IMAGE[kind]
    found = {name: values[name][start:stop] for name in _PER_IMAGE[kind] if name in values}
    grid = next((values[name] for name in _PER_IMAGE[kind] if name.endswith("grid_thw") and name in values), None)
    if grid is not None:
        patches = grid.prod(1)
        found[pixels] = values[pixels][int(patches[:start].sum()) : int(patches[:stop].sum())]
    return found


def single_image(model: Any, example: VLMExample) -> tuple[dict[str, Tensor], tuple[int, int, int] | None] | None:
    """(a prompt with one image, its size as `vtok.plan` takes it; `None` = the usual one), if an example has one."""
    (vlm,) = find(model)
    for values in alone(model, example.inputs(model, torch.Generator().manual_seed(0))):
        if "pixel_values" not in values or "pixel_values_videos" in values:
            continue
        if "image_grid_thw" in values:
            grid = values["image_grid_thw"]
            if len(grid) > 1:
                continue
            side = vlm.module.config.vision_config.patch_size
            return values, (3, int(grid[0, 1]) * side, int(grid[0, 2]) * side)
        if "image_sizes" in values:
            if len(values["image_sizes"]) > 1:
                continue
            height, width = values["image_sizes"][0].tolist()
            return values, (3, height, width)
        pixels = values["pixel_values"]
        if pixels.ndim == 5:  # tiles of one row; blank ones are none
            pixels = pixels[:, pixels[0].flatten(1).any(1)]
            values["pixel_values"] = pixels
        if pixels.shape[:-3].numel() == 1:
            return values, None
    return None
