"""Evaluation: accuracy, FLOPs and speed of patched models against the unpatched ones, and the program `vtok`.

# What the numbers mean

`vtok eval imagenet` uses timm's own data pipeline, flags and output fields, runs patched and unpatched models on the same batches,
and reports paired differences with their standard errors. Files that cannot be read are skipped, counted and named.
`vtok eval zeroshot` and `retrieval` take any open_clip or Hugging Face dual encoder, by name or folder, and write files that
`clip_benchmark build` reads; they differ from it in that equal captions match each other and ties count against the model.
`vtok eval vqa` asks any supported vision-language model single questions with greedy `generate()`: exact match, VQAv2's soft
accuracy as lmms-eval and as the official program normalise answers, agreement (the share of answers that are the unpatched
model's), visual tokens in every decoder layer, KV bytes, time to the first token and for each further one. It goes on where it
was stopped, writes every answer (`samples.jsonl`) and VQAv2's result files, and `--baselines` adds random and uniform with as many
tokens.

GMACs count multiply-accumulates of matrix products, per image, patch embedding and head included; GFLOPs are twice that. "Implied"
is unpatched over patched GMACs, the reduction's own left out and shown apart; "achieved" is measured over implied.

`vtok tune MODEL METHOD --flops 0.4` searches the schedule of a method at a budget; every candidate costs what the default costs, or
up to half a percent of the model's FLOPs less, and the winner is compared with the default on images that the search never saw. It
ranks candidates by the KL divergence of the patched from the unpatched model's probabilities, which needs no label and repeats on
other images better than accuracy does: over 20 schedules of ToMe at 0.4 of the reference ViT's FLOPs, ranks by 400 calibration images
correlate with held-out accuracy by 0.70 (KL), 0.55 (cross-entropy) and 0.45 (accuracy), with 100 images by 0.52, 0.40 and 0.19; over 17
of Zero-TPrune by 0.88, 0.91 and 0.83, with 100 images by 0.79, 0.74 and 0.50. `vtok.eval.tune.tuner.tune` does it on tensors.

`visualize` (`vtok viz`) draws the token map of an image, `write_report` (`vtok report`) makes one HTML page of results. The names and modules of this package are imported when they are asked for.
"""  # noqa: E501  # rows of tables, which cannot be broken

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_NAMES = {"TokenMaps": "viz.draw", "visualize": "viz.token_maps", "write_report": "report.html"}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"vtok.eval.{_NAMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"vtok.eval.{name}") is not None:
        return import_module(f"vtok.eval.{name}")
    raise AttributeError(f"module 'vtok.eval' has no attribute {name!r}")
