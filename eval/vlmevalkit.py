"""VLMEvalKit with patched models: its own program, models, prompts and scores, and a method behind the name of a model.

    python -m vtok.eval.vlmevalkit VLMEvalKit/run.py --data MMBench_DEV_EN --model Qwen2.5-VL-7B-Instruct@divprune:keep=0.1

Everything behind the first argument is passed to that program. A model `NAME@METHOD` is the kit's model NAME, with the
Hugging Face model that it holds patched by METHOD, written as for `vtok eval vqa --method` ("todre:keep=0.1",
"pitome:ratio=0.9+todre"; NAME@none is the unpatched one). The kit has no entry point for models of other packages, but asks
a dictionary for them, `supported_VLM`, to which these names are added before its program starts; nothing of it is contained
or changed. With its `--config` files, which name classes instead, that does not work: use `--model`.

Tried against the kit's interface as it is documented, not against a release: none is on the package index. Models of the
kit that hold no model of transformers (an API, vLLM, code of their own) are refused.
"""

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
    """Makes a model of the kit and patches the vision-language model in it.

    Args:
        build: makes the kit's model, as the values of its `supported_VLM` do.
        method: "todre:keep=0.1", several joined by "+"; "none".

    Returns:
        What takes the arguments of `build`; raises `ConfigError` if the model holds none that vtok knows, or several.
    """
    setting = Setting() if method == UNPATCHED else Setting.of(parse_setting(method))

    def make(*args: Any, **kwargs: Any) -> Any:
        made = build(*args, **kwargs)
        setting.apply(held_model(made))
        return made

    return make


def held_model(model: Any) -> nn.Module:
    """The one vision-language model of transformers that a model of the kit holds.

    Raises:
        ConfigError: there is none that vtok knows, or several.
    """
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
    """Adds every name with a method to the kit's dictionary; others are left alone.

    Args:
        names: of models, `NAME@METHOD` among them.
        known: the kit's `supported_VLM`.

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
    """Registers the models that the arguments name, and runs the kit's program.

    Raises:
        ConfigError: the first argument is no file, or the kit cannot be imported.
    """
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
