"""The weights in an ONNX file, without the onnx package: protobuf is a list of numbered fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# numbers of fields in onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto)
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _FLOAT = 1, 2, 8, 9, 1
_NODE_INPUT, _NODE_NAME, _NODE_TYPE = 1, 3, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operation: its kind ("MatMul"), its name and the names of its inputs."""

    kind: str
    name: str
    inputs: tuple[str, ...]


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """The fp32 initializers of a graph, by name, and its nodes.

    Args:
        path: of the file; whole tensors as raw data, as PyTorch writes them.

    Raises:
        ValueError: the file is damaged or no ONNX model.
    """
    try:
        fields = _fields(memoryview(path.read_bytes()))
        graph = [*_fields(next(value for number, value in fields if number == _GRAPH))]
        weights = dict(_tensor(value) for number, value in graph if number == _INITIALIZER)
        nodes = [_node(value) for number, value in graph if number == _NODE]
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ONNX model, or damaged") from error
    return {name: value for name, value in weights.items() if value is not None}, nodes


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """(name, values), `None` for what is not fp32."""
    shape, kind, name, raw = [], 0, "", memoryview(b"")
    for number, value in _fields(message):
        if number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else [*_packed(value)]
        elif number == _TENSOR_TYPE:
            kind = value
        elif number == _TENSOR_NAME:
            name = str(value, "utf-8")
        elif number == _TENSOR_RAW:
            raw = value
    return name, np.frombuffer(raw, "<f4").reshape(shape) if kind == _FLOAT else None


def _node(message: memoryview) -> Node:
    inputs, name, kind = [], "", ""
    for number, value in _fields(message):
        if number == _NODE_INPUT:
            inputs.append(str(value, "utf-8"))
        elif number == _NODE_NAME:
            name = str(value, "utf-8")
        elif number == _NODE_TYPE:
            kind = str(value, "utf-8")
    return Node(kind, name, tuple(inputs))


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a message: a whole number, or a `memoryview`."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == _VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(key & 7)
        if key & 7 == _BYTES:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise IndexError(place)
        yield key >> 3, data[place : place + length]
        place += length


def _packed(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """(value, place behind it)."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
