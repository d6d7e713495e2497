"""What encoded images carry between the call that encoded them and the passes that read their prompt.

It is one more field of the model's own output class: who takes an output apart and rebuilds it (`type(output)(**output)`, the
hooks of accelerate, pickle, copy) keeps it. It goes with the output, so that nothing has to be cleared, and belongs to these
images, whichever thread reads them.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import field, fields, make_dataclass
from typing import Any

from torch import Tensor

_FIELD, _BASE = "vtok", "_vtok_base"
_PLANS = 8  # prompts with these images that are remembered at a time


class Note:
    """Of images that a patched model encoded. Others hand it on as it is: it is no mapping, no sequence and no tensor.

    Args:
        blocks: of the vision tower that a method looks at: number -> what entered it (vtok.patches.hf_vlm.tower.taps.Caught).
        call: other arguments of `get_image_features` than pixels: sizes of images and the like; "pixel_size" is (height, width)
            of the pixels, if these were images of one size; "video_shape" is the shape of the pixels of videos.
        images: their features [n, D], by which they are found again after generate() has repeated them for beams.

    Attributes:
        plans: of prompts with these images, for passes that read them again without a cache (decoder_pass.Recorded).
    """

    def __init__(self, blocks: dict[int, Any], call: dict[str, Any], images: list[Tensor]):
        self.blocks, self.call, self.images = blocks, call, images
        self.plans: deque[Any] = deque(maxlen=_PLANS)


def note_of(output: Any) -> Note | None:
    """What encoded images carry, or `None`."""
    note = getattr(output, _FIELD, None)
    return note if isinstance(note, Note) else None


def noted(output: Any, note: Note) -> Any:
    """A copy of an output that carries the note."""
    output = plain(output)
    return _in_order(_carrier(plain_class(output))(**_values(output), **{_FIELD: note}), output)


def plain(output: Any) -> Any:
    """The output in its own class, without a note: what a patched model returns to its caller."""
    base = plain_class(output)
    if base is type(output):
        return output
    return _in_order(base(**{name: x for name, x in _values(output).items() if name != _FIELD}), output)


def plain_class(output: Any) -> Any:
    """The model's own class of an output."""
    return getattr(type(output), _BASE, type(output))


def _in_order(rebuilt: Any, output: Any) -> Any:
    """Entries in the order of another output: models set some of them later than their class names them."""
    for key in output:
        if key in rebuilt:
            rebuilt.move_to_end(key)
    return rebuilt


def _values(output: Any) -> dict[str, Any]:
    return {f.name: getattr(output, f.name) for f in fields(output)}


@functools.cache
def _carrier(base: Any) -> Any:
    extra = (_FIELD, Any, field(default=None, repr=False, compare=False))
    module = f"{__name__}.{base.__module__}"  # pytrees tell classes apart by module and name
    return make_dataclass(
        base.__name__, [extra], bases=(base,), namespace={"__reduce__": _reduce, "__module__": module, _BASE: base}
    )


def _reduce(self: Any) -> Any:  # the class exists only here: rebuild it from the model's own
    return _rebuild, (plain_class(self), _values(self))


def _rebuild(base: Any, values: dict[str, Any]) -> Any:
    return _carrier(base)(**values)
