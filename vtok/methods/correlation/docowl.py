"""Host parts of mPLUG-DocOwl-1.5 (Hu et al., arXiv 2403.12895), the model that correlation-guided compression was published on:
shape-adaptive cropping, the H-Reducer, and the compressor between vision model and H-Reducer. transformers has no DocOwl: these
are functions to call from its own code. With them its `encode_images` becomes, for one page, the page before its crops:

    weights = HReducer.of(self.model.vision2text.state_dict())
    return encode_docowl(self.model.vision_model, images, weights, alpha=0.9)

`plain_layout("docowl", views, 256)` of `vtok.ops.crops` then says which of the features belong to which view.

How pruned tokens pass the H-Reducer, which wants a full grid, is not known. Both ways are ours: `"group"` (the default, no
training needed) runs it on the full grid and drops whole output tokens; `"strip"` runs it on the tokens kept, four by four,
which mixes patches that were not neighbours.

Shapes: V views, global first, n patches of each, C width of the vision model, H heads, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.errors import ConfigError, shown
from vtok.methods.correlation.merge import compress_features
from vtok.methods.correlation.scores import select_tokens
from vtok.methods.correlation.views import feature_metric, feature_scores
from vtok.ops.attention import cls_attention
from vtok.ops.crops import H_REDUCER, group_map, plain_layout

# Crop grids (rows x columns) by the most crops they allow, in the order in which equals are preferred.
_GRIDS = {
    1: "1x1",
    4: "1x1 1x2 2x1 1x3 3x1 2x2 1x4 4x1",
    9: "1x1 1x2 2x1 1x3 3x1 2x2 1x4 4x1 1x5 5x1 1x6 6x1 2x3 3x2 1x7 7x1 4x2 2x4 1x8 8x1 3x3 1x9 9x1",
    20: (
        "1x1 1x2 2x1 1x3 3x1 1x4 2x2 4x1 1x5 5x1 1x6 2x3 3x2 6x1 1x7 7x1 1x8 2x4 4x2 8x1 1x9 3x3 9x1 1x10 2x5 5x2 10x1 1x11 "
        "11x1 2x6 3x4 4x3 6x2 2x7 7x2 3x5 5x3 2x8 4x4 8x2 2x9 3x6 6x3 9x2 2x10 4x5 5x4 10x2"
    ),
}
ANCHORS = {most: tuple((int(r), int(c)) for r, c in (g.split("x") for g in grids.split())) for most, grids in _GRIDS.items()}
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PLACEHOLDER = "<|image|>"


def best_anchor(size: tuple[int, int], anchors: Sequence[tuple[int, int]] = ANCHORS[9], view: int = 448) -> int:
    """The crop grid whose shape fits an image best; its size counts a hundredth of that.

    The first argmax of 100 IoU(A, S) + IoU(A, image), A the grid's pixels, S as wide as these but of the image's shape.
    Heights are cut to whole pixels and everything is fp32, as in the authors' code: either decides close calls.

    Args:
        size: (width, height) of the image in pixels.
        anchors: (rows, columns) of crops.
        view: pixels along a side of a crop.

    Returns:
        Number of the grid in `anchors`.

    Raises:
        ConfigError: an image without pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ConfigError(f"an image has at least one pixel, got width {width} and height {height}")
    high, wide = torch.tensor(anchors).mul(view).unbind(-1)
    shaped = (wide * (height / width)).long()

    def overlap(other_wide: Tensor, other_high: Tensor) -> Tensor:
        shared = torch.minimum(wide, other_wide) * torch.minimum(high, other_high)
        return shared / (wide * high + other_wide * other_high - shared + 1e-5)

    score = overlap(wide, shaped) * 100 + overlap(torch.tensor(width), torch.tensor(height))
    return int(score.argmax())


def crop_views(image: Tensor, grid: tuple[int, int], view: int = 448) -> Tensor:
    """The whole page and its crops, each squashed to a square, normalised for CLIP.

    Args:
        image: [3, height, width] uint8.
        grid: rows and columns of crops, e.g. `ANCHORS[9][best_anchor((width, height))]`.
        view: pixels along a side of a view.

    Returns:
        [1 + rows columns, 3, view, view] fp32, the page first, then crops row by row.

    Raises:
        ConfigError: not such an image.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ConfigError(f"an image is [3, height, width] uint8, got {list(image.shape)} {image.dtype}")
    rows, columns = grid
    page, crops = _resized(image, view, view), _resized(image, rows * view, columns * view)
    crops = crops.view(3, rows, view, columns, view).permute(1, 3, 0, 2, 4).reshape(-1, 3, view, view)
    mean, std = image.new_tensor(_MEAN, dtype=torch.float32), image.new_tensor(_STD, dtype=torch.float32)
    return (torch.cat([page[None], crops]) / 255 - mean[:, None, None]) / std[:, None, None]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic as Pillow does it: columns first, and whole grey levels in between."""
    x = image[None].float()
    for size in ((x.shape[2], width), (height, width)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x[0]


def crop_positions(grid: tuple[int, int], anchors: Sequence[tuple[int, int]] = ANCHORS[9]) -> Tensor:
    """Row and column of every view, [1 + rows columns, 2]; the page stands beyond the longest side of any grid."""
    cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)
    beyond = max(max(anchor) for anchor in anchors)
    return torch.cat([cells.new_full((1, 2), beyond), cells])


def crop_prompt(query: str, grid: tuple[int, int]) -> str:
    """Writes out the image placeholder of a query: one for the page and one for every crop, each after a marker (plain text).

    Raises:
        ConfigError: the query has no placeholder or several.
    """
    if query.count(PLACEHOLDER) != 1:
        raise ConfigError(f"the query must hold {PLACEHOLDER} once, found {query.count(PLACEHOLDER)} times: {shown(query)}")
    names = ["<global_img>", *(f"<crop_img_row{r}_col{c}>" for r in range(grid[0]) for c in range(grid[1]))]
    return query.replace(PLACEHOLDER, "".join(name + PLACEHOLDER for name in names))


class HReducer(NamedTuple):
    """Weights of the H-Reducer (`conv_shape` 1x4): two convolutions over four patches side by side, and a projection.

    Attributes:
        before: ([4C, C, 1, 4], [4C]).
        reduce: ([C, C, 1, 4], [C]).
        project: ([D, C], [D]).
        eos: [1, 1, D], a learned token behind every view.
    """

    before: tuple[Tensor, Tensor]
    reduce: tuple[Tensor, Tensor]
    project: tuple[Tensor, Tensor]
    eos: Tensor

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> HReducer:
        """From the `state_dict()` of DocOwl's `vision2text`; its `ln_q` is never used there.

        Raises:
            ConfigError: a weight is missing or is not of a 1x4 reducer.
        """
        names = ("reducer_before.0", "reducer", "visual_fc")
        missing = [key for name in names for key in (f"{name}.weight", f"{name}.bias") if key not in weights]
        if missing or "vit_eos" not in weights:
            what = ", ".join(missing or ["vit_eos"])
            raise ConfigError(f"these are not the weights of an H-Reducer, {what} is missing; pass vision2text.state_dict()")
        broken = [
            key for name in names for key in (f"{name}.weight", f"{name}.bias") if not bool(weights[key].isfinite().all())
        ]
        if broken:
            raise ConfigError(f"{broken[0]} of the H-Reducer holds NaN or infinity; load the weights again")
        before, reduce, project = ((weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names)
        if before[0].shape[2:] != H_REDUCER or reduce[0].shape[2:] != H_REDUCER:
            raise ConfigError(f"conv_shape 1x4 is supported, got kernels {list(before[0].shape)} and {list(reduce[0].shape)}")
        return cls(before, reduce, project, weights["vit_eos"])


def h_reducer(x: Tensor, weights: HReducer) -> Tensor:
    """Four tokens in, one out: [.., n, C] -> [.., n / 4, D], without `eos`.

    As four patches side by side never cross a row, the grid plays no part: this is the model's own H-Reducer on the full grid,
    and equally defined on any sequence of fours.

    Raises:
        ConfigError: n is no multiple of 4.
    """
    if x.shape[-2] % 4:
        raise ConfigError(f"the H-Reducer takes tokens four by four, got {x.shape[-2]}; select_tokens(multiple=4) rounds up")
    z = F.gelu(_fours(x, *weights.before))
    z = z.unflatten(-1, (4, -1)).flatten(-3, -2)  # [.., n / 4, 4 C] -> [.., n, C]
    return F.linear(_fours(z, *weights.reduce), *weights.project)


def _fours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of kernel and stride 1 x 4 over consecutive tokens."""
    return F.linear(x.unflatten(-2, (-1, 4)).flatten(-2), weight[:, :, 0].transpose(1, 2).flatten(1), bias)


def split_qkv(fused: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the output of DocOwl's `query_key_value`, head by head: [V, N, 3 C] -> [V, H, N, d] each."""
    q, k, v = fused.unflatten(-1, (num_heads, 3, -1)).transpose(1, 2).unbind(-2)
    return q, k, v


def compress_docowl(
    hidden: Tensor,
    low: tuple[Tensor, Tensor],
    deep: tuple[Tensor, Tensor],
    weights: HReducer,
    alpha: float,
    beta: float = 0.03,
    design: str = "group",
    aggregation: str = "nearest",
    **selection: Any,
) -> list[Tensor]:
    """Image features of one page, compressed: for `encode_images`, in place of `vision2text(vision_model(views))`.

    The loop that splices features into the prompt takes a list of different lengths as it is.

    Args:
        hidden: [V, 1 + n, C], last hidden state of the vision model, class token first, the page before its crops.
        low, deep: (queries, keys) [V, H, 1 + n, d] of a low and a deep block, see `split_qkv` (a start: blocks 2 and 23 of 24).
        weights: of the H-Reducer.
        alpha, beta: see `redundant_tokens`.
        design: `"group"` or `"strip"`, see the module.
        aggregation: see `compress_features`; under `"group"` it works on the H-Reducer's output.
        selection: `sampling`, `seed` and `min_tokens` of `select_tokens`.

    Returns:
        V tensors [m_v + 1, D], `eos` last; the page's has all n / 4 + 1 tokens.

    Raises:
        ConfigError: unknown design, or a bad value of another parameter.
    """
    if design not in ("group", "strip"):
        raise ConfigError(f"design must be group or strip, got {shown(design)}")
    views, n = hidden.shape[0], hidden.shape[1] - 1
    groups = None
    x = hidden[:, 1:]
    if design == "group":
        groups = group_map((1, n), H_REDUCER).to(x.device)
        x = h_reducer(x, weights)
    layout = plain_layout("docowl", views, x.shape[1]).to(x.device)
    keys = low[1][:, :, 1:]
    low_attention, deep_attention = (cls_attention(q[:, :, 0], k) for q, k in (low, deep))
    scores = feature_scores(keys, low_attention, deep_attention, beta, layout, groups)
    kept = select_tokens(scores, alpha, multiple=1 if groups is not None else 4, **selection)
    metric = feature_metric(keys, layout, groups)
    features, _ = compress_features(x.flatten(0, 1), layout, kept, metric, scores.low, aggregation)
    lengths = kept.sum(-1).masked_fill(layout.is_global, x.shape[1]).tolist()
    parts = features.split(lengths)
    if groups is None:
        parts = [h_reducer(part, weights) for part in parts]
    return [torch.cat([part, weights.eos.view(1, -1).to(part.dtype)]) for part in parts]


def encode_docowl(
    vision_model: Any,
    views: Tensor,
    weights: HReducer,
    alpha: float,
    low_layer: int = 2,
    deep_layer: int = -1,
    **options: Any,
) -> list[Tensor]:
    """Image features of one page from DocOwl's own vision model, compressed.

    Two projections are listened to while the model runs; it is left as it was.

    Args:
        vision_model: `encoder.layers[i].self_attn.query_key_value` is the fused projection of block i.
        views: [V, 3, height, width], the page before its crops (`crop_views`).
        weights: of the H-Reducer.
        alpha: see `redundant_tokens`.
        low_layer, deep_layer: blocks (a start: 2 and the last of 24).
        options: of `compress_docowl`.

    Returns:
        As `compress_docowl`.
    """
    attentions = [vision_model.encoder.layers[layer].self_attn for layer in (low_layer, deep_layer)]
    caught: dict[int, Tensor] = {}
    handles = [
        attention.query_key_value.register_forward_hook(lambda module, args, output, i=i: caught.update({i: output}))
        for i, attention in enumerate(attentions)
    ]
    try:
        hidden = vision_model(views).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    low, deep = (split_qkv(caught[i], attention.num_heads)[:2] for i, attention in enumerate(attentions))
    return compress_docowl(hidden, low, deep, weights, alpha, **options)
