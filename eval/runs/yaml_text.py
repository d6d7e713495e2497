"""YAML as users write it, read without surprises: plain values, every key once, no more of them than a person would write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
    """The content of a file; errors are those of `parse` and of a file that cannot be read."""
    return parse(read_text(path), str(path))


def parse(text: str, where: str, loader: type[yaml.SafeLoader] = Loader, kind: str = "not a YAML file") -> Any:
    """Plain values from YAML; messages say `where` it comes from and, if it cannot be read, what `kind` of text it is. Raises
    `ConfigError`: it is no YAML, has a key twice, or unfolds to more values than a person would write."""
    try:
        value = yaml.load(text, loader)
    except RecursionError:
        raise ConfigError(f"{where}: {kind}: lists and mappings are nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: the 99th of February, numbers of endless digits
        raise ConfigError(f"{where}: {kind}: {error}") from error
    if sum(1 for _ in itertools.islice(_values(value, where), MOST + 1)) > MOST:
        raise ConfigError(f"{where}: unfolds to more than {MOST:,} values (anchors that repeat each other?); write fewer")
    return value


def _values(value: Any, where: str, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """A value and all in it, those of a repeated anchor every time; raises for what holds itself or is nested too deeply."""
    yield value
    if not isinstance(value, (dict, list, tuple, set)):
        return
    if id(value) in above:
        raise ConfigError(f"{where}: an anchor (&name) holds itself; write the values out")
    if len(above) > DEEPEST:
        raise ConfigError(f"{where}: lists and mappings are nested more than {DEEPEST} deep")
    for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
        yield from _values(part, where, (*above, id(value)))
