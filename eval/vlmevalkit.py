"""VLMEvalKit with patched models, `NAME@METHOD`: its own program, models, prompts and scores (see assets/docs/evaluate.md)."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vtok.errors import ConfigError, unknown
from vtok.eval.common.settings import Setting
from vtok.eval.runs.loader import parse_setting
from vtok.targets import vlm_targets

BETWEEN = "@"  # a model's name and a method
UNPATCHED = "none"


def patched(build: Callable[..., Any], method: str) -> Callable[..., Any]:
    """What makes a model of the kit, as `build` does, and patches the one vision-language model in it (see `held_model`)."""
    setting = Setting() if method == UNPATCHED else Setting.of(parse_setting(method))

    def make(*args: Any, **kwargs: Any) -> Any:
        made = build(*args, **kwargs)
        setting.apply(held_model(made))
        return made

    return make


def held_model(model: Any) -> nn.Module:
    """The one vision-language model of transformers that a model of the kit holds. Raises `ConfigError`: there is none that
    vtok knows, or several."""
    held = [value for value in vars(model).values() if isinstance(value, nn.Module)]
    found = [value for value in ([model] if isinstance(model, nn.Module) else held) if vlm_targets(value)]
    if len(found) != 1:
        kinds = ", ".join(type(value).__name__ for value in held) or "none"
        raise ConfigError(
            f"{type(model).__name__} holds {len(found)} vision-language models that vtok knows among its modules ({kinds}); "
            "choose a model of VLMEvalKit that holds one of transformers"
        )
    return found[0]


def register(names: Sequence[str], known: MutableMapping[str, Callable[..., Any]]) -> None:
    """Adds every name with a method, `NAME@METHOD`, to the kit's dictionary `supported_VLM`; others are left alone.

    Raises:
        UnknownNameError: the kit has no such model, or vtok no such method.
        ConfigError: a method that cannot be read.
    """
    for name in names:
        base, between, method = name.partition(BETWEEN)
        if not between:
            continue
        if base not in known:
            raise unknown("model of VLMEvalKit", base, sorted(known))
        known[name] = patched(known[base], method)


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers the models that the arguments name, and runs the kit's program. Raises `ConfigError`: the first argument is no
    file, or the kit cannot be imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or not Path(given[0]).is_file():
        raise ConfigError(
            "name VLMEvalKit's program, then its arguments: python -m vtok.eval.vlmevalkit VLMEvalKit/run.py --data ... "
            f"--model NAME{BETWEEN}METHOD; {given[0] if given else 'nothing'} is no file"
        )
    program = Path(given[0]).resolve()
    sys.path.insert(0, str(program.parent))  # as for a program that is started by its name
    try:
        from vlmeval.config import supported_VLM
    except ImportError as error:
        raise ConfigError(f"{program.parent} holds no VLMEvalKit that can be imported, nor is it installed: {error}") from error
    register([word for word in given[1:] if not word.startswith("-")], supported_VLM)
    sys.argv = given
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
