"""CDPruner's relevance by CLIP's own text tower, as its authors' program takes it.

A vision-language model carries CLIP's vision tower, but neither its text tower nor the projections into the common space, and
knows the question as numbers of its own tokenizer. They are read from two folders, or names on the Hub: of a CLIP whose vision
tower is that of the model, and of the model's tokenizer.

Shapes: B images, V views of each, m tokens of a view, n visual tokens of an image, C width of the tower, D of the LLM, e of
CLIP's common space, T text tokens, M segments of a question.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, PromptText, TowerBlock, View, VLMInfo
from vtok.core.reduction import Plan
from vtok.core.tokens import at_least_fp32
from vtok.errors import ConfigError, StateError, UnsupportedModelError
from vtok.methods.features.view_tokens import ViewReducer, ViewTokens, looked_at, view_sizes, view_tokens
from vtok.ops.determinantal import balanced, greedy_dpp, greedy_dpp_macs, scaled
from vtok.ops.matching import unit

_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # names of models there


class Clip:
    """The parts of CLIP that a vision-language model lacks, and the tokenizers of both. They stay where they were used last.

    Args:
        clip: folder or name of a CLIP of transformers with its tokenizer.
        tokenizer: folder or name of the vision-language model's tokenizer.
    """

    def __init__(self, clip: str, tokenizer: str):
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ConfigError(
                "cdpruner with relevance='clip' reads a CLIP by transformers; pip install vtok[transformers]"
            ) from error
        try:
            self.words, self.own = AutoTokenizer.from_pretrained(clip), AutoTokenizer.from_pretrained(tokenizer)
            model: Any = CLIPModel.from_pretrained(clip)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cdpruner cannot read clip={clip!r} and tokenizer={tokenizer!r}: {str(error)[:200]}") from error
        model.vision_model.encoder.layers = torch.nn.ModuleList()  # the vision-language model has them
        self.model: Any = model.eval().requires_grad_(False)
        self.most = model.config.text_config.max_position_embeddings

    @property
    def width(self) -> int:
        """Of the vision tower, C."""
        return int(self.model.visual_projection.in_features)

    def segments(self, question: str) -> list[list[int]]:
        """Numbers of CLIP's tokens, in pieces of as many as its text tower takes, each with the marks of start and end."""
        inner = self.words(question, add_special_tokens=False)["input_ids"]
        start, end = self.words.bos_token_id, self.words.eos_token_id
        room = self.most - 2
        return [[start, *inner[i : i + room], end] for i in range(0, max(1, len(inner)), room)]

    def question(self, ids: list[int]) -> str:
        """The text of a prompt behind its image, marks of the model left out; words of a chat template are part of it."""
        return str(self.own.decode(ids, skip_special_tokens=True)).strip()

    def of_text(self, text: PromptText) -> Tensor:
        """[B, e]: mean over a question's segments of their unit vectors. One host synchronisation: tokenizers read words."""
        if text.ids is None:
            raise StateError("cdpruner with relevance='clip' reads the question, and its token ids are not known")
        model, found = self.model.to(text.ids.device), []
        for ids, real in zip(text.ids.tolist(), text.real.tolist()):
            pieces = self.segments(self.question([one for one, there in zip(ids, real) if there]))
            length = max(map(len, pieces))
            padded = torch.tensor([[*piece, *[piece[-1]] * (length - len(piece))] for piece in pieces], device=text.ids.device)
            mask = torch.tensor([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces], device=padded.device)
            pooled = model.text_model(input_ids=padded, attention_mask=mask).pooler_output
            found.append(unit(model.text_projection(pooled)).mean(0))
        return torch.stack(found)

    def of_patches(self, hidden: Tensor) -> Tensor:
        """[.., C] that left the tower's feature block -> unit vectors [.., e]."""
        model = self.model.to(hidden.device)
        weight = model.visual_projection.weight
        return unit(model.visual_projection(model.vision_model.post_layernorm(hidden.to(weight.dtype))))


@functools.lru_cache(maxsize=2)
def load(clip: str, tokenizer: str) -> Clip:
    """`Clip`, read once."""
    return Clip(clip, tokenizer)


def build(config: Any, info: VLMInfo) -> ClipReducer:
    """CDPruner by CLIP's relevance for one model.

    Raises:
        ConfigError: the CLIP or the tokenizer is missing, or cannot be read.
        UnsupportedModelError: the model's tower is not that CLIP's, or merges patches.
    """
    if config.clip is None or config.tokenizer is None:
        raise ConfigError(
            "cdpruner's program takes relevance from a CLIP that the model does not carry: pass clip=FOLDER, whose vision "
            "tower is the model's, and tokenizer=FOLDER, the model's own; or relevance='embeddings', which needs neither"
        )
    tower, block = looked_at(config, info, None)
    if not _HUB.fullmatch(config.clip) or os.path.isdir(config.clip):  # what the Hub names is read when it is first needed
        _fitting(load(config.clip, config.tokenizer), config, info)
    if info.grid is not None and info.grid[0] * info.grid[1] != tower.num_patches:
        raise UnsupportedModelError(
            f"cdpruner compares patches with the question, but {info.name} merges {tower.num_patches} patches into "
            f"{info.grid[0] * info.grid[1]} visual tokens; pass relevance='embeddings'"
        )
    return ClipReducer(config, info, (block,))


def _fitting(found: Clip, config: Any, info: VLMInfo) -> Clip:
    """The same, whose tower is as wide as that of the model."""
    tower = info.tower
    assert tower is not None
    if found.width != tower.width:
        raise UnsupportedModelError(
            f"cdpruner: the vision tower of {info.name} is {tower.width} wide, that of clip={config.clip!r} {found.width}; "
            "pass the CLIP that the tower comes from, or relevance='embeddings'"
        )
    return found


@dataclass(frozen=True)
class ClipReducer(ViewReducer):
    """CDPruner for one model; `blocks` holds the tower's feature block."""

    @property
    def clip(self) -> Clip:
        """What is read of CLIP, when it is first needed."""
        return _fitting(load(self.config.clip, self.config.tokenizer), self.config, self.info)

    @property
    def reads_text(self) -> bool:
        return True

    def _count(self, sizes: list[int]) -> int:
        """Tokens that stay of views of so many tokens: of each its own in the program, else of all together."""
        return sum(map(self.config.count, sizes)) if self.config.official else self.config.count(sum(sizes))

    def features(self, images: ImageFeatures) -> Plan | None:
        held = view_tokens(images, self.config.name)
        sizes = [group.size for group in held.groups for _ in group.views]
        return None if self._count(sizes) == sum(sizes) else self.choose(images, held)

    def choose(self, images: ImageFeatures, held: ViewTokens) -> Plan:
        config = self.config
        tokens, pool = at_least_fp32(images.tokens), held.pool
        relevance = balanced(scaled(self._similarity(images, held)[:, pool], config.sign), config.theta)
        if not config.official:
            return Plan(held.kept([pool[greedy_dpp(tokens[:, pool], relevance, config.count(len(pool)))]]))
        by_row = relevance.new_zeros(tokens.shape[:2]).index_copy(1, pool, relevance)
        parts = []
        for group in held.groups:
            quality = by_row[:, group.rows.flatten()].view(-1, group.size)
            parts.append(held.rows(group, greedy_dpp(held.tokens(tokens, group), quality, config.count(group.size))))
        return Plan(held.kept(parts))

    def _similarity(self, images: ImageFeatures, held: ViewTokens) -> Tensor:
        """[B, n]: cosine of every patch with the question, averaged over its segments; 0 at rows of no view."""
        block: TowerBlock = images.tower[self.blocks[0]]
        hidden, text = held.hidden(block), images.text
        if hidden is None:
            raise StateError("cdpruner compares patches with the question, but visual tokens are no single patches here")
        if text is None:
            raise StateError(
                f"cdpruner compares the {images.modality}s of {self.info.name} with the prompt's text, but which prompt they "
                'belong to cannot be told; pass relevance="none"'
            )
        clip = self.clip
        words = clip.of_text(text).repeat_interleave(held.views, 0)
        return held.by_row(torch.bmm(clip.of_patches(hidden), words[..., None]).squeeze(2))

    def feature_count(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        sizes = view_sizes(views)
        count = self._count(sizes)
        behind = sum(view.stop - view.start for view in views if view.newline) if modality == "video" else 0
        return n if count == sum(sizes) else min(n, count + behind)

    def feature_macs(self, n: int, views: tuple[View, ...], modality: str = "image") -> int:
        """Projection of the patches, into a space as wide as their tower, and the choice. The text tower's depend on the
        question and are left out."""
        sizes, config, width = view_sizes(views), self.config, self.info.width
        if self._count(sizes) == sum(sizes):
            return 0
        assert self.info.tower is not None
        macs = sum(sizes) * self.info.tower.width * (self.info.tower.width + 1)
        if config.official:
            return macs + sum(greedy_dpp_macs(size, config.count(size), width) for size in sizes)
        return macs + greedy_dpp_macs(sum(sizes), config.count(sum(sizes)), width)
