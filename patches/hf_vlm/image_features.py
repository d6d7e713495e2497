"""Image features of Hugging Face vision-language models: encode, split by image, choose, and find the columns they belong to.

Shapes: B rows, L columns of the prompt, n visual tokens of an image, D width of the LLM.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vtok.core.prompt import ImageFeatures, TowerBlock, View, VLMReducer
from vtok.core.reduction import Plan, apply_plan
from vtok.core.tokens import TokenState
from vtok.errors import StateError, UnsupportedModelError
from vtok.ops.crops import Cut, ViewMap, view_map
from vtok.patches.hf_vlm.encoded import note_of
from vtok.patches.hf_vlm.generic import videos
from vtok.patches.hf_vlm.generic.outputs import deep_features, feature_list, joined, parted, with_features
from vtok.patches.hf_vlm.text import PromptTexts
from vtok.patches.hf_vlm.tower import bridge as vlm_tower
from vtok.patches.hf_vlm.tower import taps as tower_taps
from vtok.patches.module_swap import weights_of
from vtok.patches.precision import full_precision

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
COMPRESSED = videos.COMPRESSED
OLD_NAMES = {"pixel_values_images": "pixel_values", "image_patches": "pixel_values"}  # that models still take
# (model, modality, number of the image, its first feature, its features [n, D], keywords of the call) -> what the n tokens are
Views = Callable[[Any, str, int, int, Tensor, Mapping[str, Any]], tuple[View, ...]]
# (model, modality, features of every image, views of the tower in all, keywords of the call) -> views of every image, if known
ViewCounts = Callable[[Any, str, Sequence[Tensor], int, Mapping[str, Any]], list[int] | None]
# (model, features of every image, views of each, which of the call's images each is, keywords of the call) -> how each was cut
Cuts = Callable[[Any, Sequence[Tensor], Sequence[int], Sequence[int], Mapping[str, Any]], list[Cut | None]]


class Anatomy(Protocol):
    """What is known of the image features of a family of models; see the types."""

    @property
    def views(self) -> Views: ...
    @property
    def view_counts(self) -> ViewCounts: ...
    @property
    def cuts(self) -> Cuts: ...
    @property
    def projector(self) -> str: ...


class Chosen(NamedTuple):
    """What is left of the image features.

    Attributes:
        outputs: modality -> what `get_image_features` or `get_video_features` returned, kept rows changed where others were
            folded into them.
        rows: modality -> [features in all] bool, True = stays.
        layouts: (modality, views, tokens n, how many) of images that are laid out alike, if a method chose among features.
        alive: modality -> [features in all] bool, False = merged or dropped in the vision tower before; empty if none can be.
        images: modality -> how many images or videos the features are of.
    """

    outputs: dict[str, Any]
    rows: dict[str, Tensor]
    layouts: tuple[tuple[str, tuple[View, ...], int, int], ...] = ()
    alive: Mapping[str, Tensor] = {}
    images: Mapping[str, int] = {}


def renamed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call with pixels under the names that models have for them now."""
    return {OLD_NAMES.get(name, name): value for name, value in kwargs.items() if name not in OLD_NAMES or value is not None}


def carries_images(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call brings images or videos: generate() takes them away once the prompt is read."""
    given = any(kwargs.get(name) is not None for name in PIXELS.values())
    outputs = kwargs.get("mm_encoder_outputs")
    return given or (isinstance(outputs, Mapping) and any(value is not None for value in outputs.values()))


def encode(
    model: Any, kwargs: Mapping[str, Any], taps: tower_taps.TowerTaps | None = None, hands_on: bool = False
) -> dict[str, Any]:
    """Runs the vision side as generate() does: modality -> its output. What is encoded already is taken as it is.

    What the processor left out of the prompt is left out (see `videos.compressed`).

    Args:
        model: the one without language head.
        kwargs: of the call.
        taps: which blocks of the tower to watch, if the model is not patched to do so.
        hands_on: whether the vision side also gets the keywords that the model's forward does not name, as in a call of it.
    """
    unnamed = _unnamed(model, kwargs) if hands_on else {}
    given = kwargs.get("mm_encoder_outputs")
    outputs = {name: value for name, value in (given or {}).items() if value is not None}
    for modality, pixels in PIXELS.items():
        function = videos.encoder_of(model, modality)
        if modality in outputs or kwargs.get(pixels) is None:
            continue
        if function is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no get_{modality}_features, which vtok needs for {pixels}")
        if taps is not None:
            function = tower_taps.watched(model, function, taps)
        names = [name for name in inspect.signature(function).parameters if kwargs.get(name) is not None]
        named = {name: kwargs[name] for name in names if name != "kwargs"}
        with weights_of(model):
            outputs[modality] = function(**{**unnamed, **named, "return_dict": True})
    if "video" in outputs:
        outputs["video"] = videos.compressed(outputs["video"], kwargs)
    return outputs


def _unnamed(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords such as output_attentions or interpolate_pos_encoding."""
    named = {*inspect.signature(model.forward).parameters, "past_key_values"}  # the last is an old name of the cache
    return {name: value for name, value in kwargs.items() if name not in named}


def choose(
    model: Any,
    outputs: dict[str, Any],
    reducer: VLMReducer | None,
    anatomy: Anatomy,
    kwargs: Mapping[str, Any],
    has_dropped_tokens: bool = False,
) -> Chosen:
    """Asks the method which features stay, once for all images that are laid out alike.

    Of an image that lost tokens in the vision tower the method sees those that are left, as one row.

    Args:
        model: the one whose features these are.
        outputs: modality -> output, left as they are.
        reducer: of the method, or `None` to keep all.
        anatomy: says what the tokens of an image are, and which views of the vision tower they come from.
        kwargs: of the call.
        has_dropped_tokens: whether the vision tower is patched such that features may be missing.

    Raises:
        StateError: the method keeps no token of an image, or looks at the tower, of which nothing is known; or images were
            encoded before the tower was patched.
    """
    with weights_of(model):  # the ends of rows are told by a parameter
        return _choose(model, outputs, reducer, anatomy, kwargs, has_dropped_tokens)


def _choose(
    model: Any,
    outputs: dict[str, Any],
    reducer: VLMReducer | None,
    anatomy: Anatomy,
    kwargs: Mapping[str, Any],
    has_dropped_tokens: bool,
) -> Chosen:
    outputs, rows, alive, layouts, counts = dict(outputs), {}, {}, [], dict[str, int]()
    reads_text = reducer is not None and reducer.reads_text and bool(outputs)
    texts = PromptTexts(model, kwargs, videos.placeholders_of(model)) if reads_text else None
    for modality, output in outputs.items():
        images = feature_list(output)
        videos.check(model, modality)
        if has_dropped_tokens:
            stay = [~vlm_tower.holes(x.detach()) for x in images]
            alive[modality] = torch.cat(stay)
            if note_of(output) is None and bool(alive[modality].all()):
                raise StateError(
                    "mm_encoder_outputs was not encoded by the vision tower that vtok patched, and would not be shortened "
                    "there; pass pixels, or encode the images with the patched model"
                )
        else:
            stay = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in images]
        rows[modality], counts[modality] = stay, len(images)
        if reducer is None:
            continue
        note = note_of(output)
        call = kwargs if note is None else tower_taps.merge_call(kwargs, note)
        original = list(range(len(images))) if note is None else tower_taps.original(note, images)
        size = videos.pieces(modality, original, len(images) if note is None else len(note.images), call)
        images, stay, original = joined(images, size), joined(stay, size), [i // size for i in original[::size]]
        rows[modality], counts[modality] = stay, len(images)
        tower = _Towers(model, modality, output, reducer.tower_blocks, anatomy, kwargs)
        left = [mask.nonzero()[:, 0] for mask in stay] if has_dropped_tokens else []  # rows of the tokens that the tower left
        alike: dict[tuple[int, tuple[View, ...], int, int, Any], list[int]] = {}
        first, folded = 0, False
        deep = [joined(features, size) for features in deep_features(output)]
        for i, x in enumerate(images):
            if not len(x):  # a prompt without images, where a model returns the features of a prompt as one
                continue
            whole, cut = not has_dropped_tokens or len(left[i]) == len(x), tower.cuts[i]
            parts = (
                anatomy.views(model, modality, original[i], first, x.detach(), call) if whole else (View(0, 1, len(left[i])),)
            )
            alike.setdefault((parts[-1].stop, parts, len(tower.views[i]), whole or len(x), cut and cut.shape), []).append(i)
            first += len(x)
        for (_, parts, number, kind, _), numbers in alike.items():
            whole = kind is True
            tokens = torch.stack([images[i] if whole else images[i][left[i]] for i in numbers])
            layouts.append((modality, parts, tokens.shape[1], len(numbers)))
            patches = None if whole else torch.stack([left[i] for i in numbers])
            source = tower.source(numbers, tokens.device) if whole else None
            unreduced = 0 if whole else len(images[numbers[0]])
            text = None if texts is None else texts.of(modality, [len(x) for x in images], numbers, tokens.device)
            blocks, connector = tower.blocks(numbers), projecting(model, anatomy.projector) if whole else None
            seen = ImageFeatures(tokens.detach(), parts, modality, blocks, number, source, patches, unreduced, text, connector)
            with torch.no_grad(), full_precision(tokens.device.type):
                plan = reducer.features(seen)
            if plan is None:
                continue
            if plan.keep.shape[1] == 0 or (plan.valid is not None and not bool(plan.valid.any(1).all())):
                raise StateError(f"{type(reducer).__name__} keeps no token of an image; at least one must stay")
            folded = folded or plan.changes
            for features in deep if plan.changes else ():  # they are added to the same tokens inside the LLM
                there = torch.stack([features[i] if whole else features[i][left[i]] for i in numbers])
                for i, x in zip(numbers, _folded(plan, there)):
                    features[i] = x if whole else features[i].index_copy(0, left[i], x)
            for i, kept, x in zip(numbers, _masks(plan, tokens), _folded(plan, tokens)):
                if whole:
                    stay[i], images[i] = kept, x
                else:
                    stay[i] = stay[i].index_copy(0, left[i], kept)
                    images[i] = images[i].index_copy(0, left[i], x) if plan.changes else images[i]
        if folded:
            outputs[modality] = with_features(output, parted(images, size), [parted(features, size) for features in deep])
    return Chosen(outputs, {modality: torch.cat(parts) for modality, parts in rows.items()}, tuple(layouts), alive, counts)


class _Towers:
    """What the vision tower saw of every image: `views[i]` lists the views that image i is made of, `cuts[i]` says which."""

    def __init__(
        self, model: Any, modality: str, output: Any, blocks: Sequence[int], anatomy: Anatomy, kwargs: Mapping[str, Any]
    ):
        self.names, images = tuple(blocks), feature_list(output)
        self.views: list[range] = [range(0)] * len(images)
        self.cuts: list[Cut | None] = [None] * len(images)
        if not blocks:
            return
        self.seen = tower_taps.seen(output, blocks)
        self.device = images[0].device
        call = tower_taps.merge_call(kwargs, self.seen)
        count = next(caught.count for caught in self.seen.blocks.values())
        found = anatomy.view_counts(model, modality, self.seen.images, count, call)
        if found is None:
            raise StateError(
                f"which of the {count} views that the vision tower saw belong to which of the "
                f"{len(self.seen.images)} {modality}s cannot be told from their features; pass pixels and image_sizes together"
            )
        ends = list(itertools.accumulate(found))
        original = tower_taps.original(self.seen, images)
        self.views = [range(ends[i] - found[i], ends[i]) for i in original]
        if modality == "image":  # nobody crops videos
            self.cuts = anatomy.cuts(model, images, [found[i] for i in original], original, call)

    def blocks(self, numbers: Sequence[int]) -> dict[int, TowerBlock]:
        """For some of the images."""
        rows = [row for i in numbers for row in self.views[i]]
        return {name: self.seen.blocks[name].of(rows, self.device) for name in self.names}

    def source(self, numbers: Sequence[int], device: torch.device) -> ViewMap | None:
        """How patches became tokens, for some of the images, all cut alike."""
        cuts = [cut for i in numbers if (cut := self.cuts[i]) is not None]
        return view_map(cuts, device) if cuts else None


def projecting(model: Any, projector: str) -> Callable[[Tensor], Tensor] | None:
    """What `ImageFeatures.connector` is on a model; `None` if it takes the tokens of several tower layers side by side."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    if not projector or (isinstance(layers, Sequence) and len(set(layers)) > 1):
        return None
    child = getattr(model, projector)
    kind = next((p.dtype for p in child.parameters() if p.is_floating_point()), None)
    return lambda x: child(x if kind is None else x.to(kind))


def _masks(plan: Plan, tokens: Tensor) -> Tensor:
    """[B, n] bool: the rows that a plan keeps."""
    batch, n, _ = tokens.shape
    kept = torch.zeros(batch, n + 1, dtype=torch.bool, device=tokens.device)
    rows = plan.keep if plan.valid is None else plan.keep.where(plan.valid, n)  # padding is written to a column of its own
    return kept.scatter_(1, rows, True)[:, :n]


def _folded(plan: Plan, tokens: Tensor) -> Tensor:
    """[B, n, D]: the tokens, kept ones with what was folded into them."""
    if not plan.changes:
        return tokens
    out, _ = apply_plan(tokens, TokenState(0, tokens.shape[1]), plan)
    if plan.valid is not None:  # a padding row repeats a real one: it is written to a row of its own
        rows = plan.keep.where(plan.valid, tokens.shape[1])[..., None].expand_as(out)
        return torch.cat([tokens, tokens[:, :1]], 1).scatter(1, rows, out)[:, :-1]
    return tokens.scatter(1, plan.keep[..., None].expand_as(out), out)


def refuse_merged(model: Any) -> None:
    """Raises for a prompt of embeddings that came after images had been encoded, without these."""
    raise UnsupportedModelError(
        f"images were encoded ahead of this call, and {type(model).__name__} got a prompt as inputs_embeds without any: if its "
        "caller puts features into the prompt itself, vtok cannot tell which columns are visual; pass mm_encoder_outputs or "
        "pixels with the prompt, or call vtok.unpatch(model)"
    )


def refuse_unreached(model: Any, text: str) -> None:
    """Raises for a model that read a prompt by another way than through the child that vtok hooks."""
    raise UnsupportedModelError(
        f"{type(model).__name__} read a prompt without calling {text}, which vtok takes for its LLM: nothing was shortened; "
        "this family needs a row in vtok/patches/hf_vlm/families.py"
    )


def refuse_unmatched(model: Any, tokens: Mapping[str, int]) -> None:
    """Raises for a model that read a prompt whose placeholders, as vtok counts them, are more or fewer than the features."""
    raise UnsupportedModelError(
        f"{type(model).__name__} put its image features at other columns than those with the placeholders {dict(tokens)}, so "
        "that vtok cannot tell which are visual: nothing was shortened; this family needs a row in "
        "vtok/patches/hf_vlm/families.py"
    )


def warn_unseen(model: Any) -> None:
    """Says of a prompt of embeddings without images that none of it is shortened; features from elsewhere look like words."""
    warnings.warn(
        f"{type(model).__name__} got a prompt as inputs_embeds without images, of which vtok drops nothing: if image features "
        "are in it already, pass input_ids and pixels (or mm_encoder_outputs) instead",
        stacklevel=4,
    )


def placeholders(model: Any, embeddings: Tensor, tokens: Mapping[str, int]) -> Tensor:
    """[B, L] int64: placeholders in a prompt given as embeddings [B, L, D], -1 elsewhere, as the models find them themselves.

    Args:
        model: the one without language head.
        embeddings: of the prompt, features not yet in it.
        tokens: modality -> id of its placeholder.
    """
    table = model.get_input_embeddings()
    ids = torch.full(embeddings.shape[:2], -1, device=embeddings.device)
    with torch.no_grad():
        for token in tokens.values():
            if token < table.num_embeddings:
                row = table(torch.tensor(token, device=table.weight.device)).to(embeddings.device)
                ids.masked_fill_((embeddings == row).all(-1), token)
    return ids


def visual_columns(ids: Tensor, tokens: Mapping[str, int]) -> Tensor:
    """[B, L] bool: columns that hold a placeholder of any modality. ids [B, L]."""
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens.values():
        visual |= ids == token
    return visual


def kept_columns(ids: Tensor, tokens: Mapping[str, int], rows_of: Mapping[str, Tensor]) -> Tensor | None:
    """[B, L] bool: False at placeholders whose feature leaves; `None` if placeholders and features differ in number.

    The model itself raises then, and says it better. rows_of: as in `Chosen`.

    Raises:
        UnsupportedModelError: there are images and videos, whose placeholders are the same.
    """
    if len({tokens[modality] for modality in rows_of}) < len(rows_of):
        raise UnsupportedModelError(
            f"images and videos of this model have one placeholder (id {tokens['image']}), so that vtok cannot tell which "
            "columns are of which; pass prompts with images and prompts with videos apart"
        )
    keep = torch.ones_like(ids, dtype=torch.bool)
    for modality, rows in rows_of.items():
        here = ids == tokens[modality]
        if int(here.sum()) != len(rows):
            return None
        keep[here] = rows.to(ids.device)
    return keep
