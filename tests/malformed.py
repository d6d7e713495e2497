"""Inputs as nobody should give them, by the hundred: what they are, and how to find out what becomes of one.

An input may be refused, with an error of vtok's (or of the command line's) in a sentence, or accepted where it says something
that can be meant. It must not end in anything else: another exception, a hang, a message as long as the input.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from timm.models.vision_transformer import VisionTransformer

from vtok.errors import VtokError

LIMIT = 20.0  # seconds that an input may take
LONGEST = 4000  # characters of a message
ACCEPTED, REFUSED = "accepted", "refused"

NAN, INF = float("nan"), float("inf")
# Values in the place of another one. None of them is a sensible value of any setting of ours but those that a table names.
JUNK: dict[str, Any] = {
    "null": None,
    "empty text": "",
    "text": "nonsense",
    "markup": "[/red]{x}%s",
    "number in text": "0.5",
    "surrogate": "\ud800",
    "zero byte": "a\0b",
    "negative": -1,
    "huge": 10**30,
    "half": 0.5,
    "beyond": 1e308,
    "nan": NAN,
    "infinite": -INF,
    "true": True,
    "list": [],
    "list of null": [None],
    "list of text": ["a", "b"],
    "list of lists": [[1], [2]],
    "list of nan": [NAN, 0.5],
    "mapping": {},
    "mapping of junk": {"x": [1, {"y": None}]},
    "long text": "x" * 100_000,
    "long list": list(range(20_000)),
}


class TooSlowError(Exception):
    """An input took longer than `LIMIT`."""


@contextmanager
def time_limit(seconds: float = LIMIT) -> Iterator[None]:
    """Ends what takes longer, also where it waits for a pipe; what other timers there are go on afterwards."""

    def stop(number: int, frame: Any) -> None:
        raise TooSlowError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """(`ACCEPTED`, "") or (`REFUSED`, the message), or what went wrong and the end of the traceback."""
    try:
        with time_limit():
            call()
    except (VtokError, click.ClickException) as error:
        message = str(error.format_message() if isinstance(error, click.ClickException) else error)
        if not message.strip() or len(message) > LONGEST:
            return "no sentence", f"{type(error).__name__} of {len(message)} characters: {message[:200]}"
        return REFUSED, message
    except Exception as error:
        lines = traceback.format_exception(error)
        return type(error).__name__, "".join(lines)[-1500:]
    return ACCEPTED, ""


def mutations(value: Any, junk: dict[str, Any] | None = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """(what was done, the same plain values with that done): junk in the place of every part, parts missing, parts unknown."""
    junk = JUNK if junk is None else junk
    for name, other in junk.items():
        if other != value:
            yield f"{path or 'all'}={name}", copy.deepcopy(other)
    if isinstance(value, dict):
        yield f"{path}+unknown", {**value, "nonsense": 1}
        for key, part in value.items():
            yield f"{path}.{key} missing", {k: v for k, v in value.items() if k != key}
            for what, changed in mutations(part, junk, f"{path}.{key}"):
                yield what, {**value, key: changed}
    elif isinstance(value, list):
        for i, part in enumerate(value[:2]):
            for what, changed in mutations(part, junk, f"{path}[{i}]"):
                yield what, [*value[:i], changed, *value[i + 1 :]]


# JSON and YAML, and everything that looks like them.
TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\t\n",
    "zero bytes": b"\0\0\0\0",
    "latin": "é: ü\n".encode("latin-1"),
    "mark alone": b"\xef\xbb\xbf",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "half": b'{"format": 1, "towers": [',
    "deep": b"[" * 30_000,
    "deep mappings": b'{"a":' * 30_000,
    "digits": b"1" * 10_000,
    "digits under a key": b'{"key": ' + b"1" * 10_000 + b"}",
    "beyond any number": b'{"key": "x", "n": 1e999}',
    "nan": b'{"key": "x", "n": NaN}',
    "surrogate": b'{"key": "\\ud800"}',
    "list as key": b"? [1, 2]\n: 3\n",
    "twice": b'{"a": 1, "a": 2}\n',
    "tabs": b"a:\n\t- b\n",
    "python object": b"!!python/object/apply:os.system ['true']\n",
    "unknown tag": b"!nonsense {a: 1}\n",
    "anchor in itself": b"&a [*a]\n",
    "date": b"2001-99-99\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "random": bytes((i * 7919 + 13) % 256 for i in range(4096)),
}


def bomb(key: str, levels: int = 9) -> str:
    """A YAML line whose anchors unfold to 9 ** `levels` values."""
    parts = ["&a0 [x,x,x,x,x,x,x,x,x]"]
    parts += [f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return f"{key}: [{', '.join(parts)}]\n"


def plain(value: Any) -> bool:
    """Whether values are what JSON can hold, all of them finite: what an accepted setting must consist of."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) is not ...
    except (TypeError, ValueError, RecursionError):
        return False


def finite(value: Any) -> bool:
    """Whether no number in plain values is NaN or infinite."""
    if isinstance(value, dict):
        return all(finite(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return all(finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def pipe(path: Any) -> Any:
    """A named pipe that nobody writes into."""
    os.mkfifo(path)
    return path


# What a list of mutations is cut to in the default tests: every so many of it, so that all places are reached.
MOST = 150


def model():
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=4).eval()


def failures(inputs, allowed=(ACCEPTED, REFUSED)):
    """Names of inputs, (name, call[, allowed]), that end otherwise than allowed, with what they end in."""
    found, count = [], 0
    for name, call, *own in inputs:
        count += 1
        what, detail = outcome(call)
        if what not in (own[0] if own else allowed):
            found.append(f"{name}: {what} {detail}")
    assert count, "no inputs"
    return found


def some(inputs, most=MOST):
    """All of a short list, a fixed choice of a long one."""
    inputs = list(inputs)
    return inputs if len(inputs) <= most else random.Random(0).sample(inputs, most)


def told(found):
    return "\n".join([f"{len(found)} inputs end badly", *found[:12], *[one.splitlines()[0][:150] for one in found[12:60]]])


RUN = {
    "model": {"backend": "timm", "name": "test_vit"},
    "method": {"name": "tome", "r": 2},
    "task": "imagenet",
    "data": "folder",
    "num_samples": 4,
    "batch_size": 2,
    "dtype": "fp32",
    "seed": 1,
    "options": {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "sweep": {"method.r": [1, 2]},
    "output": "out",
}


def record():
    return {
        "key": "k",
        "task": "imagenet",
        "model": "net",
        "backend": "timm",
        "method": "tome",
        "setting": "tome(r=2)",
        "params": {"r": 2},
        "budget": None,
        "dataset": "pictures",
        "n": 16,
        "metrics": {
            "top1": 50.0,
            "top1_stderr": 12.9,
            "difference": -2.0,
            "difference_stderr": 1.0,
            "difference_ci": [-5.0, 1.0],
        },
        "primary": "top1",
        "percent": True,
        "tokens": {"in": 65, "out": 20.0, "mean_per_layer": [60.0, 40.0, 20.0]},
        "gmacs": {"base": 1.0, "model": 0.5, "pruner": 0.01},
        "implied_speedup": 2.0,
        "speedup": 1.4,
        "speedup_ci": [1.2, 1.6],
        "pairs": 9,
        "groups": {"class": {"a": {"n": 8, "top1": 50.0, "top1_difference": 0.0}}},
        "config": {"model": {"backend": "timm", "name": "net"}, "method": {"name": "tome", "r": 2}},
        "correct": "ff00",
    }
