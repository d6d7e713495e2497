"""Methods for videos on the bundled LLaVA: its weights in a LLaVA-OneVision, asked about clips of pictures that move.

A clip shows one picture of easy-VQA, in every frame moved by up to three of its 64 pixels, so that all frames hold the answer.
`python -m vtok.eval.demo.clips` prints the table of the second part of assets/docs/results/prompt_methods.md in the repository.

Shapes: Q questions, B of a batch, F frames of a clip, P pixels of a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

import vtok
from vtok.config import MethodConfig
from vtok.eval.common.statistics import paired_difference, share
from vtok.eval.models import reference_vlm
from vtok.eval.report.sections import with_sign
from vtok.eval.report.tables import Column, Table
from vtok.eval.report.values import with_ends
from vtok.registry import METHODS

METHODS_SHOWN = ("random", "uniform", "downsample", "evs", "vidcom2", "fastvid")
BESIDE = ("random", "downsample")
_MOVED = 3  # pixels


class Shown(NamedTuple):
    """One setting.

    Attributes:
        title: of it.
        keep: share of the visual tokens; 1 = unpatched.
        method: name; "" = unpatched.
        tokens: visual tokens of a clip that stay, on average.
        hits: [Q] bool, questions that were answered right.
    """

    title: str
    keep: float
    method: str
    tokens: float
    hits: np.ndarray


def load_clip_llava() -> Any:
    """The reference LLaVA's weights in a LLaVA-OneVision that reads videos, in eval mode."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    source = reference_vlm.load_reference_llava()
    config = source.config
    net = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.text_config.vocab_size - 1,
            video_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_grid_pinpoints=[[config.vision_config.image_size] * 2],
        )
    )
    weights = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}  # newlines show nothing
    net.load_state_dict({**weights, **source.state_dict()})
    return net.eval()


def clip_of(picture: Tensor, frames: int, seed: int) -> Tensor:
    """[F, 3, P, P]: a picture [3, P, P] moved around at random."""
    steps = torch.randint(-_MOVED, _MOVED + 1, (frames, 2), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.roll(picture, (int(dy), int(dx)), (1, 2)) for dy, dx in steps])


def batches(questions: int, frames: int, size: int = 20) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """(Inputs of the model, answers) of Q questions in equal distances, B at most together, about clips of F frames."""
    held = reference_vlm.load_reference_questions()
    processor = reference_vlm.load_reference_llava_processor()
    tokenizer, images = processor.tokenizer, processor.image_processor
    mean, std = (torch.tensor(one)[:, None, None] for one in (images.image_mean, images.image_std))
    side = held.pictures.shape[-1] // reference_vlm.ReferenceLLaVA().patch_size
    visual = frames * (side // 2) ** 2 + 1  # and the newline behind a video
    rows = torch.linspace(0, len(held.texts) - 1, questions).long().tolist()
    for start in range(0, questions, size):
        some = rows[start : start + size]
        words = [tokenizer(held.texts[i], add_special_tokens=False).input_ids for i in some]
        length = max(map(len, words)) + visual + 1
        ids = torch.zeros(len(some), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, own in enumerate(words):
            row = [tokenizer.bos_token_id, *[reference_vlm.IMAGE] * visual, *own]
            ids[b, -len(row) :], mask[b, -len(row) :] = torch.tensor(row), 1
        clips = torch.stack([clip_of(held.pictures[int(held.rows[i])], frames, i) for i in some])
        pixels = (clips.float() / 255 - mean) / std
        values = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
        yield values, [held.answers[i] for i in some]


def ask(net: Any, asked: Sequence[tuple[dict[str, Tensor], list[str]]]) -> tuple[np.ndarray, float]:
    """([Q] bool, questions whose first word is the answer; visual tokens of a clip that enter the LLM, on average)."""
    tokenizer = reference_vlm.load_reference_llava_processor().tokenizer
    hits: list[bool] = []
    kept: list[int] = []
    for values, answers in asked:
        with torch.inference_mode():
            said = net(**values).logits[:, -1].argmax(-1)
        hits += [tokenizer.decode([int(one)]).strip() == answer for one, answer in zip(said, answers)]
        (prompt,) = vtok.info(net).prompts or (None,)
        whole = (values["input_ids"] == net.config.video_token_id).sum(1).tolist()
        kept += prompt.rows[-1].tokens_out if prompt is not None and prompt.rows else whole
    return np.array(hits), sum(kept) / len(kept)


def measure(questions: int, frames: int, keeps: Sequence[float]) -> list[Shown]:
    """Every method at every share, the unpatched model first."""
    net, asked = load_clip_llava(), list(batches(questions, frames))
    hits, tokens = ask(net, asked)
    found = [Shown("unpatched", 1.0, "", tokens, hits)]
    for keep in keeps:
        for name in METHODS_SHOWN:
            config: MethodConfig = METHODS.get(name).create(keep=keep)
            torch.manual_seed(0)  # random draws
            with vtok.patched(net, config):
                hits, tokens = ask(net, asked)
            found.append(Shown(f"{name}(keep={keep:g})", keep, name, tokens, hits))
    return found


def table(found: Sequence[Shown]) -> Table:
    """Shares right, with paired differences to the unpatched model, random and downsample."""

    def right(row: Shown) -> str:
        return with_ends(share(row.hits).scaled(100), 1)

    def gap(method: str, row: Shown) -> str:
        keep = row.keep if method else 1.0
        other = next((one for one in found if one.method == method and one.keep == keep), None)
        if other is None or other is row:
            return "-"
        return with_sign(paired_difference(row.hits.astype(float) - other.hits.astype(float)).scaled(100))

    columns = [
        Column("setting", lambda row: row.title, left=True),
        Column("tokens", lambda row: f"{row.tokens:.0f}"),
        Column("right % [95 %]", right),
        Column("vs unpatched [95 %]", partial(gap, "")),
        *(Column(f"vs {name} [95 %]", partial(gap, name)) for name in BESIDE),
    ]
    return Table.of(found, columns, part=lambda row: row.keep)


def main(
    questions: int = 120,
    frames: int = 4,
    keep: Annotated[str, typer.Option(help="shares of the visual tokens")] = "0.25,0.1",
) -> None:
    """Methods for videos on the bundled LLaVA: its weights in a LLaVA-OneVision, asked about clips of pictures that move."""
    print(table(measure(questions, frames, [float(one) for one in keep.split(",")])).markdown())


if __name__ == "__main__":
    typer.run(main)
