"""What a patched model loses, sample by sample: against labels, and against the unpatched model, for which no label is needed.

Shapes: b samples of a batch, K classes or width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import ConfigError, unknown

Values = Mapping[str, np.ndarray]  # measure -> [samples]; see `class_values` and `embedding_values`


def output_of(result: Any) -> Tensor:
    """[b, K] of what a model returned: a tensor, or logits or a pooled embedding of transformers; else a `ConfigError`."""
    if isinstance(result, Tensor) and result.ndim == 2:
        return result
    for name in ("logits", "image_embeds", "pooler_output"):
        if isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)
    shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    raise ConfigError(f"a model to tune returns class scores or one embedding an image, got {shape}")


def classifies(model: nn.Module) -> bool:
    """Whether the model's outputs are scores of classes."""
    classes = getattr(model, "num_classes", None)  # timm
    return (isinstance(classes, int) and classes > 0) or type(model).__name__.endswith("ForImageClassification")


def class_values(logits: Tensor, unpatched: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
    """Measures of classifiers, from logits [b, K] of the patched model and of the unpatched one, and labels [b] int64, if there
    are any.

    Returns:
        `kl`: nats that the patched model's probabilities are off the unpatched one's; `agreement`: whether both name the same
        class; with labels `top1`: whether it is right, and `cross_entropy`, nats.
    """
    ours, theirs = (F.log_softmax(t.double(), 1) for t in (logits, unpatched))
    values = {
        "kl": (theirs.exp() * (theirs - ours)).sum(1),
        "agreement": (logits.argmax(1) == unpatched.argmax(1)).double(),
    }
    if labels is not None:
        values["top1"] = (logits.argmax(1) == labels).double()
        values["cross_entropy"] = F.nll_loss(ours, labels, reduction="none")
    return {name: value.cpu().numpy() for name, value in values.items()}


def embedding_values(found: Tensor, unpatched: Tensor, labels: Tensor | None = None) -> dict[str, np.ndarray]:
    """Measures of models that return embeddings [b, K]: `distance`, one minus the cosine to the unpatched model's."""
    return {"distance": (1 - F.cosine_similarity(found.double(), unpatched.double(), dim=1)).cpu().numpy()}


# objective -> measures whose means are made small (of a share: what is missing of it), in order of rank
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "kl": ("kl",),
    "agreement": ("agreement", "kl"),
    "accuracy": ("top1", "kl"),
    "cross_entropy": ("cross_entropy",),
    "distance": ("distance",),
}
_SHARES = ("agreement", "top1")


def loss(objective: str, values: Values) -> tuple[float, ...]:
    """What a search makes small, from measures of all samples seen so far.

    Raises:
        UnknownNameError: no such objective.
        ConfigError: it needs something that is not there, such as labels.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if lacking := [name for name in OBJECTIVES[objective] if name not in values]:
        possible = [name for name, needed in OBJECTIVES.items() if all(one in values for one in needed)]
        raise ConfigError(
            f"objective {objective} needs {' and '.join(lacking)}, which model and data do not give; possible: "
            f"{', '.join(possible)}"
        )
    means = {name: float(np.mean(values[name])) for name in OBJECTIVES[objective]}
    return tuple(1 - mean if name in _SHARES else mean for name, mean in means.items())


@torch.inference_mode()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """[b, K] of a batch, moved to where the model is."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    return output_of(model(images.to(first.device, first.dtype)))
