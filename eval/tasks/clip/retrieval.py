"""Image and text retrieval by any open_clip or Hugging Face dual encoder, with the metrics and fields of clip_benchmark.

Text retrieval asks with an image and looks for one of its captions; image retrieval asks with a caption. Only the two encoders
are used: models that rank again with a cross-encoder (BLIP's matching head) are measured without it.

Shapes: I images, T texts, D width of the common space.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.errors import ConfigError
from vtok.eval.common.distributed import current
from vtok.eval.common.statistics import clustered_mean_stderr, paired_difference, share
from vtok.eval.common.timing import BaselineCache
from vtok.eval.models.clip import DualEncoder
from vtok.eval.options import RetrievalOptions
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.clip.pipeline import Progress, run
from vtok.eval.tasks.clip.recall import Positives, first_ranks, text_groups
from vtok.eval.tasks.image_folder import CheckedImages

TEXT_BATCH = 256


def evaluate(
    model: str | DualEncoder,
    data: str | os.PathLike,
    settings: Sequence[Any] = (None,),
    options: RetrievalOptions | None = None,
    progress: Progress | None = None,
    memory: BaselineCache[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Recalls; see `vtok.eval.tasks` for what all tasks share. Captions of one image are one cluster for the errors.

    Args:
        model: a name (see `load_clip`), or a model.
        data: Karpathy's JSON file or its folder (see `open_captions`), or `"reference-pages"`.
        settings, options, progress: see there, and `RetrievalOptions`.
        memory: see `vtok.eval.tasks.encoders.show`.

    Returns:
        Records with clip_benchmark's fields; `metrics` are `image_retrieval_recall@k` and `text_retrieval_recall@k` in [0, 1],
        and `recall_sum` (papers print 100 times that).
    """
    options = options or RetrievalOptions()
    if not options.recall_k:
        raise ConfigError("recall_k is an empty list; give one number at least, such as 1")
    source = open_captions(data, options.split, options.images, options.max_captions)
    images = CheckedImages(source, "RGB", options.num_samples)
    captions = [source.captions[index] for index in images.indices]
    texts = [caption for own in captions for caption in own]
    about = {"dataset": source.name, "task": "zeroshot_retrieval", "equal_captions": options.equal_captions}

    def score(embedded: Tensor, labels: Tensor) -> Callable[[Tensor], _Ranked]:
        gallery = _Gallery(images, captions, labels, embedded, options)
        about["num_texts"] = len(gallery.owner)  # of the images that could be read
        return partial(_Ranked, gallery)

    return run(model, images, data, settings, options, progress, memory, about, partial(encode_texts, texts=texts), score)


def encode_texts(encoder: DualEncoder, texts: Sequence[str]) -> Tensor:
    """[T, D] of unit length, on the CPU; the processes share the batches."""
    processes, starts = current(), range(0, len(texts), TEXT_BATCH)
    own = {i: encoder.encode_text(texts[i : i + TEXT_BATCH]).cpu() for i in starts if processes.owns(i // TEXT_BATCH)}
    return torch.cat(list(processes.gather(own, starts).values()))


class _Gallery:
    """The images that could be read and their texts: what is asked for, and what counts as right."""

    def __init__(
        self,
        images: CheckedImages,
        captions: Sequence[Sequence[str]],
        labels: Tensor,
        embedded: Tensor,
        options: RetrievalOptions,
    ):
        place = {index: row for row, index in enumerate(images.indices)}
        rows = [place[int(label)] for label in labels]  # labels are numbers of the whole data set
        first = np.cumsum([0, *(len(own) for own in captions)])
        kept = [t for row in rows for t in range(first[row], first[row + 1])]
        self.owner = torch.tensor([i for i, row in enumerate(rows) for _ in captions[row]])
        self.texts = embedded[kept]
        group = text_groups([text for row in rows for text in captions[row]], options.equal_captions)
        self.positives, self.options = Positives(self.owner, group, len(rows)), options


class _Ranked:
    """Hits of one setting: metric -> per query 1.0 if a right answer is among the first k, else 0.0."""

    def __init__(self, gallery: _Gallery, images: Tensor):
        options, positives = gallery.options, gallery.positives
        image_ranks = first_ranks(gallery.texts, images, positives.of_texts)
        text_ranks = first_ranks(images, gallery.texts, positives.of_images)
        self.owner, self.hits = gallery.owner.numpy(), dict[str, np.ndarray]()
        for k in options.recall_k:
            self.hits[f"image_retrieval_recall@{k}"] = (image_ranks < k).double().numpy()
            self.hits[f"text_retrieval_recall@{k}"] = (text_ranks < k).double().numpy()
        self.correct = self.hits[f"text_retrieval_recall@{min(options.recall_k)}"]  # one query an image

    def metrics(self, base: _Ranked | None) -> dict[str, Any]:
        found: dict[str, float] = {}
        errors: dict[str, Any] = {}
        for name, values in self.hits.items():
            cluster = self.owner if name.startswith("image") else np.arange(len(values))
            found[name], errors[f"{name}_stderr"] = clustered_mean_stderr(values, cluster)
            errors[f"{name}_ci"] = share(values, cluster).ends
            if base is not None:
                change = values - base.hits[name]
                difference, error = clustered_mean_stderr(change, cluster)
                errors |= {f"{name}_difference": difference, f"{name}_difference_stderr": error}
                errors[f"{name}_difference_ci"] = paired_difference(change, cluster).ends
        return found | {"recall_sum": float(sum(found.values()))} | errors
