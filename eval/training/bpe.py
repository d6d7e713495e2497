"""A byte-pair vocabulary of a few words, in the file format of open_clip's `SimpleTokenizer`.

CLIP's own vocabulary has 49,408 entries; a text tower that knows twenty words needs 572: every byte, and the merges that turn
each word into one token. Any other text is still spelled in bytes.
"""

from __future__ import annotations

import gzip
import io
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from vtok.writing import write

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
        spelled = [_merged(word, best) for word in spelled]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        out.append("".join(pair) if both else word[i])
        i += 2 if both else 1
    return out


def vocabulary_size(merges: list[tuple[str, str]]) -> int:
    """Entries that `SimpleTokenizer` makes of a file with these merges."""
    return 2 * BYTES + len(merges) + SPECIALS


def write_merges(path: Path, merges: list[tuple[str, str]]) -> None:
    """Writes a merges file, the same bytes every time; `SimpleTokenizer` skips its first line."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write("\n".join(lines).encode())
    write(path, packed.getvalue())
