"""YAML as users write it, read without surprises: plain values, every key once, no more of them than a person would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vtok.errors import ConfigError
from vtok.reading import read_text

MOST = 10_000  # values that a file may unfold to: anchors that name each other make billions of a few lines
DEEPEST = 40  # mappings and lists inside each other


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key which stands twice in one mapping, where the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary.

        Raises:
            yaml.constructor.ConstructorError: a key stands twice.
        """
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                twice = seen.setdefault(key, key_node) is not key_node
            except TypeError:  # a list as a key: the parent says so
                continue
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        return super().construct_mapping(node, deep=deep)


def read(path: Path) -> Any:
    """The content of a file.

    Raises:
        ConfigError: it cannot be read, or is no YAML of plain values.
    """
    return parse(read_text(path), str(path))


def parse(text: str, where: str, loader: type[yaml.SafeLoader] = Loader, kind: str = "not a YAML file") -> Any:
    """Plain values from YAML.

    Args:
        text: the YAML.
        where: it comes from, for messages.
        loader: what builds the values.
        kind: what is said of a text that cannot be read.

    Raises:
        ConfigError: it is no YAML, has a key twice, or unfolds to more values than a person would write.
    """
    try:
        value = yaml.load(text, loader)
    except RecursionError:
        raise ConfigError(f"{where}: {kind}: lists and mappings are nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: the 99th of February, numbers of endless digits
        raise ConfigError(f"{where}: {kind}: {error}") from error
    try:
        _count(value, {}, where, 0)
    except _CircleError:
        raise ConfigError(f"{where}: an anchor (&name) holds itself; write the values out") from None
    return value


class _CircleError(Exception):
    """A value that holds itself."""


def _count(value: Any, known: dict[int, int | None], where: str, depth: int) -> int:
    """How many values there are, those of a repeated anchor counted every time.

    Raises:
        ConfigError: too many, or too deep.
    """
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in known:
        found = known[id(value)]
        if found is None:
            raise _CircleError
        return found
    if depth > DEEPEST:
        raise ConfigError(f"{where}: lists and mappings are nested more than {DEEPEST} deep")
    known[id(value)] = None
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    total = 1
    for part in parts:
        total += _count(part, known, where, depth + 1)
        if total > MOST:
            raise ConfigError(f"{where}: unfolds to more than {MOST:,} values (anchors that repeat each other?); write fewer")
    known[id(value)] = total
    return total
