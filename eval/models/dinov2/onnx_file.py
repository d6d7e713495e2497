"""The weights in an ONNX file, without the onnx package: protobuf is a list of numbered fields."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# numbers of fields in onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto)
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _FLOAT = 1, 2, 8, 9, 1
_NODE_INPUT, _NODE_NAME, _NODE_TYPE = 1, 3, 4
_VARINT, _BYTES, _LENGTHS = 0, 2, {1: 8, 5: 4}  # kinds of fields, and lengths of those of a fixed one


class Node(NamedTuple):
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
    weights = {}
    try:
        graph = _message(_message(memoryview(path.read_bytes()))[_GRAPH][0])
        for tensor in map(_message, graph[_INITIALIZER]):
            if tensor[_TENSOR_TYPE][-1:] == [_FLOAT]:
                shape = [size for dims in tensor[_TENSOR_DIMS] for size in ([dims] if isinstance(dims, int) else _packed(dims))]
                weights[_text(tensor[_TENSOR_NAME])] = np.frombuffer(tensor[_TENSOR_RAW][-1], "<f4").reshape(shape)
        nodes = [
            Node(_text(node[_NODE_TYPE]), _text(node[_NODE_NAME]), tuple(str(one, "utf-8") for one in node[_NODE_INPUT]))
            for node in map(_message, graph[_NODE])
        ]
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ONNX model, or damaged") from error
    return weights, nodes


def _text(values: list[memoryview]) -> str:
    return str(values[-1], "utf-8") if values else ""


def _message(data: memoryview) -> defaultdict[int, list[Any]]:
    """Number of a field -> its values, in the order of the message: whole numbers, or `memoryview`s."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == _VARINT:
            value, place = _varint(data, place)
            found[key >> 3].append(value)
            continue
        length = _LENGTHS.get(key & 7)
        if key & 7 == _BYTES:
            length, place = _varint(data, place)
        if length is None or place + length > len(data):
            raise IndexError(place)
        found[key >> 3].append(data[place : place + length])
        place += length
    return found


def _packed(data: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        values.append(value)
    return values


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """(value, place behind it)."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
