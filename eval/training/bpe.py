"""A byte-pair vocabulary of a few words, in the file format of open_clip's `SimpleTokenizer`.

CLIP's own vocabulary has 49,408 entries; a text tower that knows twenty words needs 572: every byte, and the merges that turn
each word into one token. Any other text is still spelled in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from vtok.eval.models.data import write_gzip

BYTES = 256  # entries for bytes, and as many again for bytes that end a word
SPECIALS = 2  # start and end of text
_END = "</w>"


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of every word: the most frequent pair first, ties in alphabetical order (Sennrich 2016)."""
    spelled = [[*word[:-1], word[-1] + _END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            for i in range(len(word) - 1):  # what is behind a merged pair moves up
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]


def vocabulary_size(merges: list[tuple[str, str]]) -> int:
    """Entries that `SimpleTokenizer` makes of a file with these merges."""
    return 2 * BYTES + len(merges) + SPECIALS


def write_merges(path: Path, merges: list[tuple[str, str]]) -> None:
    """Writes a merges file, the same bytes every time; `SimpleTokenizer` skips its first line."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_gzip(path, "\n".join(lines).encode())
