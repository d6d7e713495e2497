"""CDPruner against its authors' program (see golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import FOLDER, assert_close, assert_equal
from helpers_layers import info
from torch import Tensor

import vtok
from vtok.core.prompt import ImageFeatures, PromptText, View
from vtok.methods.features.cdpruner import clip_relevance, text_relevance
from vtok.ops.determinantal import balanced, greedy_dpp, scaled

FILES = {"baseline2_cdpruner": 7, "baseline2_cdpruner_576": 1}


def cases(name: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Case -> its arrays."""
    import numpy as np

    found: dict[str, dict[str, Any]] = {}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for key in arrays:
            case, _, field = key.partition("__")
            if field:
                t = torch.from_numpy(arrays[key])
                found.setdefault(case, {})[field] = t.item() if t.ndim == 0 else t.to(dtype) if t.is_floating_point() else t
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("file", FILES)
def test_relevance_and_order(file: str, dtype: torch.dtype) -> None:
    found = cases(file, dtype)
    assert len(found) == FILES[file]
    for g in found.values():
        relevance = clip_relevance(g["patch_embeds"], g["text_embeds"], joint=True)
        assert_close(relevance.double(), g["relevance"].double(), 2e-5)
        order = greedy_dpp(g["features"], relevance, g["k"])
        assert_equal(order, g["order"])
        assert_equal(order.sort(1).values, g["kept"])


def test_each_image_by_itself() -> None:
    """Where the program couples a batch, an image alone is what ours keeps of it in company."""
    g = cases("baseline2_cdpruner", torch.float64)["batch2_joint_minmax"]
    together = greedy_dpp(g["features"], clip_relevance(g["patch_embeds"], g["text_embeds"]), g["k"])
    for b in range(2):
        one = slice(b, b + 1)
        alone = greedy_dpp(g["features"][one], clip_relevance(g["patch_embeds"][one], g["text_embeds"], joint=True), g["k"])
        assert_equal(alone[0], together[b])
    alone = clip_relevance(g["patch_embeds"], g["text_embeds"])
    assert (alone - g["relevance"]).abs().amax(1).max() > 0.01  # the program's depends on the company


def slow_greedy(x: Tensor, quality: Tensor, k: int) -> list[int]:
    """The token whose addition makes the determinant largest, every determinant from scratch."""
    u = x / x.norm(dim=1, keepdim=True)
    kernel = quality[:, None] * (u @ u.T) * quality
    taken: list[int] = []
    for _ in range(k):
        gains = [
            float(torch.linalg.det(kernel[[*taken, i]][:, [*taken, i]])) if i not in taken else -1.0 for i in range(len(x))
        ]
        taken.append(max(range(len(x)), key=gains.__getitem__))
    return taken


def test_the_choice_by_determinants() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 9, generator=generator, dtype=torch.float64)
    quality = torch.rand(2, 14, generator=generator, dtype=torch.float64) + 0.1
    order = greedy_dpp(x, quality, 6)
    for b in range(2):
        assert order[b].tolist() == slow_greedy(x[b], quality[b], 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_does_not_choose(seed: int) -> None:
    """Rows of a wide model are almost at right angles, so all tokens add almost the same; cosines know no length."""
    x, quality = torch.randn(1, 576, 4096, generator=torch.Generator().manual_seed(seed)), torch.ones(1, 576)
    order = greedy_dpp(x, quality, 64)
    assert order[0, 0] == 0
    assert_equal(greedy_dpp(3 * x, quality, 64), order)
    assert_equal(greedy_dpp(x.double(), quality, 64), order)


def test_copies_of_a_token_leave_from_the_end() -> None:
    """Newline tokens are copies; what a batch rounds otherwise must not choose among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 30, 64, generator=generator)
    x[:, 5::6] = x[:, 5:6]
    quality = torch.rand(1, 30, generator=generator)
    quality[:, 5::6] = 1
    order = greedy_dpp(x, quality, 12)
    assert order[0, 0] == 5 and not {11, 17, 23, 29} & set(order[0].tolist())
    for _ in range(5):
        other = quality * (1 + 3e-7 * torch.randn(1, 30, generator=generator))
        assert_equal(greedy_dpp(x, other, 12), order)


@pytest.mark.parametrize("k", [24, 31, 32, 33, 40])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_choose_near_the_rank(seed: int, k: int) -> None:
    x = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(seed))
    quality = torch.ones(1, 60)
    order = greedy_dpp(x, quality, k)
    for other in (1.7 * x, x.double()):
        assert_equal(greedy_dpp(other, quality, k).sort().values, order.sort().values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beyond_the_rank_relevance_fills_up(dtype: torch.dtype) -> None:
    """The program asks 20 tokens of rank 8 for 20 and gets 15."""
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[0, 3], x[0, 4] = 0, x[0, 5]
    quality = torch.linspace(0.5, 1, 20, dtype=dtype)[None]
    order = greedy_dpp(x, quality, 20)[0]
    assert_equal(order.sort().values, torch.arange(20))
    rest = order[8:].tolist()
    assert rest == sorted(rest, reverse=True)


def test_relevance_of_text() -> None:
    """Mean cosine with the words that are no padding, scaled within each image; the sign turns it around."""
    generator = torch.Generator().manual_seed(0)
    tokens, words = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64) for n in (12, 5))
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = text_relevance(tokens, PromptText(words, real))
    for b in range(2):
        cosine = torch.cosine_similarity(tokens[b][:, None], words[b][real[b]][None], dim=2).mean(1)
        span = cosine.max() - cosine.min()
        assert_close(found[b], (cosine - cosine.min() + 1e-6) / span, 1e-12)
        assert int(text_relevance(tokens, PromptText(words, real), -1)[b].argmax()) == int(cosine.argmin())
    assert scaled(torch.ones(1, 4)).tolist() == [[1.0] * 4]
    assert_close(balanced(found, 0.5), (found / 2).exp(), 1e-12)
    assert balanced(found, None) is found


def test_the_sign_follows_the_relevance() -> None:
    assert [vtok.CDPruner(relevance=r).sign for r in ("embeddings", "none", "clip")] == [1, 1, -1]
    assert vtok.CDPruner(preset="official").sign == -1 and vtok.CDPruner(sign=-1).sign == -1


def test_what_a_model_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, words = (torch.randn(2, n, 32, generator=generator) for n in (40, 6))
    text = PromptText(words, torch.ones(2, 6, dtype=torch.bool))
    images = ImageFeatures(tokens, (View(0, 5, 8),), text=text)
    chosen = []
    for params in ({}, {"relevance": "none"}, {"sign": -1}, {"theta": 0.9}):
        reducer = vtok.CDPruner(keep_tokens=10, **params).build_vlm(info(32))
        plan = reducer.features(images)
        assert plan is not None and plan.keep.shape == (2, 10)
        assert reducer.feature_count(40, images.views) == 10
        chosen.append(plan.keep.tolist())
    assert len({str(c) for c in chosen}) == 4
    with pytest.raises(vtok.StateError, match='which prompt they belong to cannot be told; pass relevance="none"'):
        vtok.CDPruner().build_vlm(info(32)).features(images._replace(text=None))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"relevance": "words"}, "unknown relevance 'words'; known: clip, embeddings, none"),
        ({"clip": "folder"}, "clip names a folder for relevance='clip', got 'folder' with 'embeddings'"),
        ({"relevance": "none", "preset": "official"}, "preset='official' takes relevance from CLIP"),
        ({"sign": 0}, "sign is 1 or -1, got 0"),
        ({"theta": 1.0}, r"theta is a number in \[0, 1\), got 1.0"),
    ],
)
def test_values_that_make_no_sense(params: dict[str, Any], message: str) -> None:
    with pytest.raises(vtok.VtokError, match=message):
        vtok.CDPruner(**params)
