"""The tables of what vtok knows: METHODS, ADAPTERS and VLM_ADAPTERS. To add one, write its file and one line here.

Entries are "module:attribute" strings, imported on first use, so that `import vtok` imports no backend. Other packages add
theirs through the entry-point groups `vtok.methods` and `vtok.adapters`, or by the decorator `METHODS.register(name)`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, Generic, TypeVar

from vtok.errors import ConfigError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects, loaded lazily.

    Args:
        kind: what the entries are, in the singular; used in messages.
        entries: name -> "module:attribute" or "module:attribute.attribute".
        group: entry-point group that third parties use.
    """

    def __init__(self, kind: str, entries: dict[str, str], group: str):
        self.kind, self.group = kind, group
        self._entries: dict[str, Any] = dict(entries)
        self._lock = threading.RLock()
        self._scanned = False

    def names(self) -> list[str]:
        """All names, sorted, those of installed third parties included."""
        self._scan()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def check(self, name: str) -> None:
        """Nothing if there is an entry of that name; imports nothing.

        Raises:
            UnknownNameError: no such name; the message offers the nearest one.
        """
        if name not in self:
            raise unknown(self.kind, name, self._entries)

    def get(self, name: str) -> T:
        """The object called `name`.

        Raises:
            UnknownNameError: no such name; the message offers the nearest one.
        """
        self.check(name)
        with self._lock:
            entry = self._entries[name]
            if isinstance(entry, str):
                module, _, attribute = entry.partition(":")
                entry = self._entries[name] = attrgetter(attribute)(import_module(module))
            return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under `name`.

        Raises:
            ConfigError: the name is taken by something else.
        """

        def add(target: T) -> T:
            self._add(name, target)
            return target

        return add

    def _add(self, name: str, target: Any) -> None:
        with self._lock:
            if name in self._entries and self._entries[name] is not target:
                raise ConfigError(f"{self.kind} {name!r} is already registered as {self._entries[name]!r}, not {target!r}")
            self._entries[name] = target

    def _scan(self) -> None:
        with self._lock:
            if self._scanned:
                return
            self._scanned = True
            for point in entry_points(group=self.group):
                self._add(point.name, point.value)


METHODS: Registry[Any] = Registry(
    "method",
    {
        "atp": "vtok.methods.atp:ATP",
        "ats": "vtok.methods.ats:ATS",
        "cdpruner": "vtok.methods.features.cdpruner:CDPruner",
        "correlation": "vtok.methods.correlation:Correlation",
        "dart": "vtok.methods.in_llm.dart:DART",
        "divprune": "vtok.methods.features.divprune:DivPrune",
        "downsample": "vtok.methods.baselines.downsample:Downsample",
        "evs": "vtok.methods.video.evs:EVS",
        "fastervlm": "vtok.methods.features.fastervlm:FasterVLM",
        "fastv": "vtok.methods.in_llm.fastv:FastV",
        "fastvid": "vtok.methods.video.fastvid:FastVID",
        "hired": "vtok.methods.features.hired:HiRED",
        "holov": "vtok.methods.features.holov:HoloV",
        "pixel_dedup": "vtok.methods.pixel_dedup:PixelDedup",
        "pitome": "vtok.methods.pitome:PiToMe",
        "prumerge": "vtok.methods.features.prumerge:PruMerge",
        "pyramiddrop": "vtok.methods.in_llm.pyramiddrop:PyramidDrop",
        "random": "vtok.methods.baselines.random_drop:RandomDrop",
        "sparsevlm": "vtok.methods.in_llm.sparsevlm:SparseVLM",
        "todre": "vtok.methods.todre:ToDRE",
        "tome": "vtok.methods.tome:ToMe",
        "uniform": "vtok.methods.baselines.uniform_grid:UniformGrid",
        "vidcom2": "vtok.methods.video.vidcom2:VidCom2",
        "visionzip": "vtok.methods.features.visionzip:VisionZip",
        "vispruner": "vtok.methods.features.vispruner:VisPruner",
        "zero_tprune": "vtok.methods.zero_tprune:ZeroTPrune",
    },
    group="vtok.methods",
)


def encoder_methods(budget: bool = False) -> list[str]:
    """Names of the methods that act inside vision encoders; the others act on the prompts of vision-language models alone.

    Args:
        budget: only those that a FLOPs budget can set.
    """
    inside = [name for name in METHODS if METHODS.get(name).for_encoders()]
    return [name for name in inside if not budget or hasattr(METHODS.get(name), "budget_candidates")]


# The name of an adapter is the first part of the module names of the classes it patches: an adapter is imported only when
# a model holds such a class.
ADAPTERS: Registry[Any] = Registry(
    "adapter",
    {
        "open_clip": "vtok.patches.openclip_vit.adapter:OpenClipAdapter",
        "timm": "vtok.patches.timm_vit.adapter:TimmAdapter",
        "transformers": "vtok.patches.hf_vision.adapter:HfAdapter",
    },
    group="vtok.adapters",
)

# The same for vision-language models: what describes those of a backend.
VLM_ADAPTERS: Registry[Any] = Registry(
    "vision-language adapter",
    {"transformers": "vtok.patches.hf_vlm.families:HfVLMAdapter"},
    group="vtok.vlm_adapters",
)
