"""What a method decides for one served model: how many visual tokens of an image stay, and which. Knows no engine.

Shapes: B images that are laid out alike, n visual tokens of each, k of them that stay, D width of the LLM, V views.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok._version import __version__
from vtok.capabilities import prompt_reducer
from vtok.config import MethodConfig
from vtok.core.prompt import ImageFeatures, VLMInfo, VLMReducer
from vtok.core.reduction import Plan, apply_plan
from vtok.core.tokens import Place, TokenState
from vtok.core.tower import TowerBlock
from vtok.errors import ConfigError, StateError, UnsupportedModelError, shown
from vtok.ops.crops import view_map
from vtok.registry import METHODS
from vtok.serving.layouts import ImageLayout
from vtok.serving.tower import block_of

Connector = Callable[[Tensor], Tensor]


class Kept(NamedTuple):
    """What stays of B images.

    Attributes:
        rows: [B, k] int64, rising: which of the n tokens.
        tokens: [B, k, D], what became of them, in the same order.
        plan: the method's decision; `None` = all stay.
    """

    rows: Tensor
    tokens: Tensor
    plan: Plan | None

    def apply(self, x: Tensor) -> Tensor:
        """[B, n, C] -> [B, k, C]: the same for other features of the same tokens (of deeper tower layers)."""
        return x if self.plan is None else _applied(self.plan, x)


class TokenChoice:
    """One method, resolved for one model.

    Args:
        settings: {"method": name, parameters of the method}, as `vtok.patch` takes them.
        info: what the method may know of the model.

    Attributes:
        config: the method with its parameters, what acts inside the LLM left out.
        left_out: what of the method's defaults cannot be served and was left out, for a log; empty if nothing.
        digest: names the choice among all settings and releases of vtok, for keys of caches.

    Raises:
        UnknownNameError: no such method or parameter.
        ConfigError: settings that make no sense.
        UnsupportedModelError: the method acts elsewhere than before the LLM, reads the question, lets the image decide how many
            tokens stay, or needs what the model lacks.
    """

    def __init__(self, settings: Mapping[str, Any], info: VLMInfo):
        name, params = _parsed(settings)
        self.info = info
        self.config: MethodConfig = METHODS.get(name).create(**params)
        self.reducer: VLMReducer = prompt_reducer(self.config, info)
        self.left_out = ""
        extra = self.config.image_only
        if _inside_llm(self.reducer) and extra and not set(extra) & set(params):
            self.left_out = f"{name} acts before the LLM alone, its stage inside the LLM is left out ({_written(extra)})"
            self.config = self.config.replace(**extra)
            self.reducer = prompt_reducer(self.config, info)
        self._refuse()
        resolved = json.dumps([__version__, self.config.to_dict()], sort_keys=True, default=str)
        self.digest = hashlib.sha256(resolved.encode()).hexdigest()[:16]
        self._tried: dict[ImageLayout, int] = {}

    def _refuse(self) -> None:
        config, reducer, extra = self.config, self.reducer, self.config.image_only
        hint = f"pass {_written(extra)}" if extra else "choose a method that acts before the LLM, such as divprune"
        inside = _inside_llm(reducer)
        if inside:
            raise UnsupportedModelError(
                f"{config.name} drops visual tokens {' and '.join(inside)}, but the KV cache of a serving engine holds the "
                f"same tokens in all layers; {hint}"
            )
        if any(site.place is Place.PATCHES for site in reducer.sites):
            raise UnsupportedModelError(
                f"{config.name} drops patches in front of the vision tower, which an engine runs itself on whole images; {hint}"
            )
        if not reducer.sites:
            return
        if reducer.reads_text:
            raise UnsupportedModelError(
                f"{config.name} reads the question, but a serving engine keeps what it encoded for every prompt that shows the "
                f"same image; {hint}"
            )
        if not reducer.fixed_counts:
            keeps = "keep" in {f.name for f in fields(config)}
            instead = "pass keep or keep_tokens and no preset" if keeps else "choose another method, such as divprune"
            raise UnsupportedModelError(
                f"how many tokens {config.name} keeps with these settings depends on the image, but a serving engine lays out "
                f"the prompt before it has encoded one; {instead}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"method": self.config.name, **self.config.given()}.items())

    @property
    def idle(self) -> bool:
        """Whether every token of every image stays."""
        return not self.reducer.sites

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        """0-based blocks of the vision tower that `choose` must be shown."""
        return self.reducer.tower_blocks

    @property
    def fixed_rows(self) -> bool:
        """Whether `rows` is known before an image has been encoded."""
        return self.idle or self.reducer.fixed_rows

    def count(self, layout: ImageLayout) -> int:
        """k: tokens that stay of an image, from its layout alone."""
        if self.idle:
            return layout.length
        if self.reducer.exact or layout.modality == "video":
            return self.reducer.feature_count(layout.length, layout.views, layout.modality)
        if layout not in self._tried:  # joined crops: what padding left of each is part of the cut, not of the views
            plan = self._plan(*_stand_in(layout, self.tower_blocks), layout)
            self._tried[layout] = layout.length if plan is None else plan.keep.shape[1]
        return self._tried[layout]

    def rows(self, layout: ImageLayout) -> Tensor:
        """[k] int64, rising: which tokens stay, where `fixed_rows` says that no image is needed.

        Raises:
            StateError: the method looks at images.
        """
        if not self.fixed_rows:
            raise StateError(f"which tokens {self.config.name} keeps depends on the image: call choose")
        plan = None if self.idle else self._plan(*_stand_in(layout, ()), layout)
        return torch.arange(layout.length) if plan is None else plan.keep[0].sort().values

    def choose(
        self,
        tokens: Tensor,
        layout: ImageLayout,
        tower: Mapping[int, TowerBlock] | None = None,
        connector: Connector | None = None,
    ) -> Kept:
        """Which tokens of B images stay.

        Args:
            tokens: [B, n, D], as the LLM would read them.
            layout: of every one of these images.
            tower: block of the vision tower -> what it attended to, V views of an image one behind the other; all of
                `tower_blocks`.
            connector: makes [.., D] of what left the tower's feature block [.., C], token by token; `None` = there is none
                that works token by token.

        Raises:
            StateError: tokens, layout and tower do not belong together.
        """
        batch, n, _ = tokens.shape
        if n != layout.length:
            raise StateError(f"an image has {n} visual tokens, but its layout says {layout.length}")
        missing = sorted(set(self.tower_blocks) - set(tower or {}))
        if missing and not self.idle:
            raise StateError(f"{self.config.name} looks at block {missing[0]} of the vision tower, which was not passed")
        plan = None if self.idle else self._plan(tokens, tower or {}, layout, connector)
        if plan is not None and plan.valid is not None:
            raise StateError(f"{self.config.name} keeps different numbers of tokens of images that are laid out alike")
        k = n if plan is None else plan.keep.shape[1]
        if k != self.count(layout):
            raise StateError(f"{self.config.name} kept {k} of {n} tokens, but {self.count(layout)} were announced")
        if plan is None:
            return Kept(torch.arange(n, device=tokens.device).expand(batch, n), tokens, None)
        return Kept(plan.keep.sort(1).values, _applied(plan, tokens), plan)

    def _plan(
        self, tokens: Tensor, tower: Mapping[int, TowerBlock], layout: ImageLayout, connector: Connector | None = None
    ) -> Plan | None:
        looked = bool(self.tower_blocks)
        source = view_map([layout.cut] * len(tokens), tokens.device) if looked and layout.cut is not None else None
        views = layout.tower_views if looked else 0
        images = ImageFeatures(tokens.detach(), layout.views, layout.modality, dict(tower), views, source, connector=connector)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return self.reducer.features(images)


def choose_tokens(
    tokens: Tensor,
    layout: ImageLayout,
    settings: Mapping[str, Any],
    info: VLMInfo,
    tower: Mapping[int, TowerBlock] | None = None,
    connector: Connector | None = None,
) -> Kept:
    """Which tokens of B images stay: `TokenChoice(settings, info).choose(...)`, see there."""
    return TokenChoice(settings, info).choose(tokens, layout, tower, connector)


def _parsed(settings: Any) -> tuple[str, dict[str, Any]]:
    """(name of the method, its parameters)."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("method"), str):
        raise ConfigError(f'settings are {{"method": name, parameters of the method}}, got {shown(settings)}')
    return settings["method"], {str(name): value for name, value in settings.items() if name != "method"}


def _inside_llm(reducer: VLMReducer) -> list[str]:
    """The sites of a method that lie between layers of the LLM, as messages name them."""
    return [str(site) for site in reducer.sites if site.place is Place.DECODER_IN]


def _written(params: Mapping[str, Any]) -> str:
    """`"probe": null`, as in a JSON setting."""
    return ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in params.items())


def _applied(plan: Plan, x: Tensor) -> Tensor:
    """[B, n, C] -> [B, k, C]: what becomes of the kept rows, in the order of the prompt."""
    order = plan.keep.argsort(1)
    out, _ = apply_plan(x, TokenState(0, x.shape[1]), plan)
    return out.gather(1, order[..., None].expand_as(out))


def _stand_in(layout: ImageLayout, blocks: tuple[int, ...]) -> tuple[Tensor, dict[int, TowerBlock]]:
    """One image without content, and a tower that looked at it: counts are the same for every image of a layout."""
    cut = layout.cut
    patches = layout.length if cut is None else cut.packing.side**2 if cut.packing is not None else cut.tokens
    tokens = torch.zeros(1, layout.length, 1)
    shape = (layout.tower_views, patches, 1)
    qkv = torch.arange(3 * layout.tower_views * patches, dtype=torch.float32).remainder(7).view(*shape[:2], 3)
    block = functools.partial(block_of, qkv, 1, 1.0, 0)
    return tokens, {name: block() for name in blocks}
