"""Recall at k against a loop over sorted lists; ties, equal captions, clusters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.eval.common.statistics import clustered_mean_stderr, mean_stderr
from vtok.eval.tasks.clip import recall
from vtok.eval.tasks.clip.recall import Positives, first_ranks, text_groups


@st.composite
def sets(draw):
    """(image features, text features, owner of every text, texts): few words, so that captions repeat."""
    images = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 3), min_size=images, max_size=images))
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    texts = draw(st.lists(st.sampled_from(["a", "b", "c", "d e", "d  e"]), min_size=len(owner), max_size=len(owner)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return (*(torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (images, len(owner))), owner, texts)


def naive(scores, right, k):
    """Share of the rows whose k best-scoring columns hold a right one."""
    found = []
    for row, good in zip(scores, right):
        best = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        found.append(any(good[j] for j in best))
    return found


@settings(max_examples=60, deadline=None)
@given(sets(), st.integers(1, 8), st.booleans())
def test_recall_is_what_a_sort_gives(case, k, equal):
    images, texts, owner, words = case
    group = text_groups(words, equal)
    positives = Positives(owner, group, len(images))
    right = np.array(
        [
            [owner[t] == i or (equal and words[t].split() in [words[u].split() for u in range(len(words)) if owner[u] == i])
             for i in range(len(images))]
            for t in range(len(words))
        ]
    )  # fmt: skip
    scores = (texts @ images.T).numpy()
    assert (first_ranks(texts, images, positives.of_texts) < k).tolist() == naive(scores, right, k)
    assert (first_ranks(images, texts, positives.of_images) < k).tolist() == naive(scores.T, right.T, k)


def test_agrees_with_clip_benchmark():
    metrics = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    torch.manual_seed(0)
    images, texts = torch.randn(40, 6), torch.randn(200, 6)
    owner = torch.arange(200) % 40
    positives = Positives(owner, text_groups([str(i) for i in range(200)]), 40)
    pairs = torch.zeros(200, 40, dtype=torch.bool)
    pairs[torch.arange(200), owner] = True
    for k in (1, 5, 10):
        theirs = metrics.recall_at_k(texts @ images.T, pairs, k) > 0
        assert torch.equal(first_ranks(texts, images, positives.of_texts) < k, theirs)
        theirs = metrics.recall_at_k(images @ texts.T, pairs.T, k) > 0
        assert torch.equal(first_ranks(images, texts, positives.of_images) < k, theirs)


def test_ties_count_against_the_model():
    """A model that maps everything to one point has found nothing, up to k = all but the last place."""
    same = torch.ones(4, 3)
    positives = Positives(torch.arange(4), torch.arange(4), 4)
    assert first_ranks(same, same, positives.of_texts).tolist() == [3, 3, 3, 3]


def test_equal_captions_are_found_under_either_image():
    texts = ["a dog", "a cat", "a  dog "]
    images = torch.eye(3)
    asked = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])  # the captions of the dogs are swapped
    for equal, expected in ((True, [0, 0, 0]), (False, [1, 0, 1])):
        positives = Positives(torch.arange(3), text_groups(texts, equal), 3)
        ranks = first_ranks(asked, images, positives.of_texts)
        assert [int(r > 0) for r in ranks] == expected
    assert text_groups(texts).tolist() == [0, 1, 0]


def test_a_query_without_a_right_answer_is_never_found():
    right = torch.tensor([[False, False], [True, False]])
    assert first_ranks(torch.eye(2), torch.eye(2), lambda rows: right[rows]).tolist() == [2, 1]
    assert first_ranks(torch.empty(0, 2), torch.eye(2), lambda rows: right[rows]).tolist() == []


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(1)
    images, texts, owner = torch.randn(30, 4), torch.randn(70, 4), torch.arange(70) % 30
    positives = Positives(owner, torch.arange(70) // 2, 30)
    whole = first_ranks(texts, images, positives.of_texts), first_ranks(images, texts, positives.of_images)
    monkeypatch.setattr(recall, "CHUNK", 7)
    parts = first_ranks(texts, images, positives.of_texts), first_ranks(images, texts, positives.of_images)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


@given(st.lists(st.integers(0, 1), min_size=2, max_size=30))
def test_clusters_of_one_are_a_plain_mean(values):
    found = clustered_mean_stderr(np.array(values, float), np.arange(len(values)))
    assert found == pytest.approx(mean_stderr(values))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(2, 5))
def test_repeating_every_value_adds_nothing(values, times):
    """Captions that rise and fall together are worth one: the error does not shrink with their number."""
    alone = clustered_mean_stderr(np.array(values), np.arange(len(values)))
    together = clustered_mean_stderr(np.repeat(values, times), np.repeat(np.arange(len(values)), times))
    assert together == pytest.approx(alone, abs=1e-9)


def test_one_cluster_has_no_error():
    mean, error = clustered_mean_stderr(np.array([0.0, 1.0]), np.array([3, 3]))
    assert mean == 0.5 and np.isnan(error)
