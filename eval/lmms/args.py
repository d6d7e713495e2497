"""What `--model_args` of lmms-eval says about vtok: `method=todre,keep=0.1`, read and checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import vtok
from vtok import serialization as files
from vtok.capabilities import to_calibrate
from vtok.config import MethodConfig
from vtok.errors import ConfigError, shown, unknown
from vtok.eval.runs.methods import parse_method, parse_methods
from vtok.reading import is_path
from vtok.registry import METHODS
from vtok.targets.vlm.resolve import POSITIONS

NONE = "none"
OPTIONS = ("flops", "positions", "prompt")  # of vtok.patch, for all methods together
_EXAMPLE = f"write method=todre,keep=0.1, or method={NONE} for the unpatched model"


@dataclass(frozen=True)
class Wish:
    """What is to be patched into a model.

    Attributes:
        method: configs, or the path of a saved patch; `None` = nothing.
        options: other arguments of `vtok.patch`: `flops`, `positions`, `prompt`.
        calibration: questions on whose images methods find the numbers that they have no default for; 0 = none.
    """

    method: list[MethodConfig] | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 0

    def apply(self, model: nn.Module, calibration: Any = None) -> nn.Module:
        """Patches a model in place. Errors are those of `vtok.patch`."""
        if self.method is None:
            return model
        return vtok.patch(model, self.method, calibration=calibration, **self.options)


def read_args(args: Mapping[str, Any], known: Iterable[str]) -> tuple[Wish, dict[str, Any]]:
    """Takes vtok's part out of the arguments of a model class.

    Args:
        args: name -> value, as lmms-eval reads `--model_args`: numbers, flags and text.
        known: arguments that the class has of its own; a parameter of a method with the same name is written behind the
            method's:
            `method=foo:device=3`.

    Returns:
        (what to patch, arguments for the class).

    Raises:
        ConfigError: no method, a value that makes no sense, or a parameter that several methods share.
        UnknownNameError: no such method, parameter or argument; the message offers the nearest one.
    """
    own = set(known)
    rest = {key: value for key, value in args.items() if key in own}
    given = {key: _value(value) for key, value in args.items() if key not in own and key != "method"}
    text = str(args.get("method") or "").strip("\"'")
    if not text:
        raise ConfigError(f"--model_args has no method; {_EXAMPLE}")
    options = {key: given.pop(key) for key in OPTIONS if key in given}
    count = given.pop("calibration", 0)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"calibration is a number of questions, got {shown(count)}")
    _check_options(options)
    if text == NONE or (text not in METHODS and is_path(text)):
        if given or options or count:
            what = "the unpatched model" if text == NONE else f"the saved patch {text}, which holds all its numbers,"
            names = ", ".join([*given, *options, *(["calibration"] if count else [])])
            raise ConfigError(f"method={text}: {what} takes no parameters, got {names}; leave them out")
        if text != NONE:
            files.load(text)
        return Wish(None if text == NONE else text), rest
    configs = _configs(text, given, own)
    needy = [config.name for config in configs if to_calibrate(config)]
    if needy and not count:
        raise ConfigError(
            f"{' and '.join(needy)} lacks a number that it finds on images: add calibration=16, the questions to take them "
            "from, or the number itself"
        )
    if count and not needy:
        raise ConfigError(f"method={text} has no number to find on images; leave calibration out")
    return Wish(configs, options, count), rest


def _configs(text: str, given: Mapping[str, Any], own: set[str]) -> list[MethodConfig]:
    """The methods that `text` names, with their parameters behind colons and those that stand on their own."""
    pairs = parse_methods(text)
    fields = [[f.name for f in dataclasses.fields(METHODS.get(name))] for name, _ in pairs]
    for key, value in given.items():
        owners = [i for i, names in enumerate(fields) if key in names]
        if not owners:
            kinds = {name for names in fields for name in names}
            raise unknown(f"parameter of method={text} or argument", key, kinds | own | {*OPTIONS, "calibration"})
        if len(owners) > 1:
            names = [pairs[i][0] for i in owners]
            raise ConfigError(
                f"{' and '.join(names)} have a parameter {key}: write it behind the method, method="
                + "+".join(f"{name}:{key}=..." for name in names)
            )
        name, params = pairs[owners[0]]
        if key in params:
            raise ConfigError(f"{key} of {name} is given twice: {shown(params[key])} and {shown(value)}")
        params[key] = value
    return [METHODS.get(name).create(**params) for name, params in pairs]


def _check_options(options: Mapping[str, Any]) -> None:
    share, positions = options.get("flops"), options.get("positions")
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
        raise ConfigError(f"flops is the share of the model's FLOPs to leave, in (0, 1], got {shown(share)}")
    if positions is not None and positions not in POSITIONS:
        raise unknown("positions", str(positions), POSITIONS)
    vtok.Prompt.of(options.get("prompt"))


def _value(value: Any) -> Any:
    """Lists and mappings that lmms-eval leaves as text; it reads "-2" as -2.0."""
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    try:
        return parse_method(f"any:value={value}")[1]["value"]
    except (ConfigError, KeyError):
        return value
