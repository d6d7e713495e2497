"""How vLLM finds vtok's classes: by the key "vtok" in a model's config, and only by it."""

from __future__ import annotations

import logging
from typing import Any

from vtok.errors import UnsupportedModelError
from vtok.serving.vllm_plugin.families import MODELS, choice_of, settings_of

RELEASES = ("0.31", "0.32")  # of vLLM, that vtok was run with
_PREFIX = "Vtok"  # vtok's classes are registered under vLLM's names with this in front

log = logging.getLogger("vllm.vtok")


def register() -> None:
    """Teaches vLLM's registry of models the key "vtok". May run again; without that key the registry answers as before."""
    try:
        from vllm import ModelRegistry, __version__
    except ImportError as error:  # a release that has moved its registry: it must serve other models as if vtok were not there
        log.warning("vtok: this release of vLLM has no model registry that vtok knows, nothing is pruned (%s)", error)
        return
    if getattr(ModelRegistry, "vtok_release", None) is not None:
        return
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(_PREFIX + architecture, model.place)
    ModelRegistry.__class__ = _registry(type(ModelRegistry))
    ModelRegistry.vtok_release = __version__


def _registry(base: Any) -> Any:
    """vLLM's registry of models, with vtok's class of a model whose config has the key."""

    class VtokRegistry(base):
        """vLLM's registry of models."""

        vtok_release: str | None = None

        def inspect_model_cls(self, architectures: Any, model_config: Any) -> Any:
            """(what a class can do, its architecture); asked when an engine is configured, before anything is loaded."""
            found, name = super().inspect_model_cls(architectures, model_config)
            config = model_config.hf_config
            if settings_of(config) is None:
                return found, name
            check_release(self.vtok_release or "")
            check_model(name, config)
            config.architectures = [_PREFIX + name]  # what all processes of the engine look their class up by
            return super().inspect_model_cls(config.architectures, model_config)[0], name

    return VtokRegistry


def check_release(version: str) -> None:
    """Raises unless vtok was run with this release of vLLM.

    Raises:
        UnsupportedModelError: it was not.
    """
    if ".".join(version.split(".")[:2]) not in RELEASES:
        raise UnsupportedModelError(
            f'the key "vtok" prunes visual tokens in vLLM {", ".join(RELEASES)}, found {version}: install such a release, or '
            "serve without the key"
        )


def check_model(architecture: str, config: Any) -> None:
    """Raises unless the settings in a model's config can be served, before anything is loaded.

    Args:
        architecture: as vLLM resolved it.
        config: of the model, as transformers reads it.

    Raises:
        VtokError: the model, or the method on it, cannot be served; the message says why.
    """
    if architecture not in MODELS:
        raise UnsupportedModelError(
            f'the key "vtok" is set, but vtok does not prune visual tokens of {architecture} in vLLM; it does of '
            f"{', '.join(sorted(MODELS))}"
        )
    choice_of(config, architecture)
