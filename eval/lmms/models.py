"""The classes behind `vtok.eval.lmms`: lmms-eval's own, with a patched model and a recorder of what it does."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.chat import llava_hf as llava_chat
from lmms_eval.models.chat import qwen2_5_vl as qwen25_chat
from lmms_eval.models.chat import qwen3_vl as qwen3_chat
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from lmms_eval.models.simple import llava_hf, qwen2_5_vl, qwen3_vl
from loguru import logger
from torch import Tensor
from transformers import ProcessorMixin

import vtok
from vtok.errors import ConfigError, VtokError
from vtok.eval.lmms.args import NONE, Wish, read_args
from vtok.eval.lmms.record import Recorder
from vtok.eval.models.vlm import BeginsOnce
from vtok.eval.tasks.vqa.job import configs_of


class Patched(lmms):
    """Takes vtok's arguments, patches the model that the class behind it loads, and notes what every prompt costs.

    Raises:
        ConfigError, UnknownNameError: an argument makes no sense; nothing was loaded then.
        UnsupportedModelError: vtok cannot patch the model, or not with this method.
    """

    def __init__(self, **args: Any):
        accepted = [p.name for p in inspect.signature(super().__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        self._wish, rest = read_args(args, accepted)
        super().__init__(**self._prepared(rest))
        for name, value in list(vars(self).items()):
            if isinstance(value, ProcessorMixin):  # lmms-eval's classes hand it what a chat template made
                setattr(self, name, BeginsOnce(value))
        self._ready = False
        if not self._wish.calibration:
            self._patch(self._wish)

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        if not self._ready:
            self._calibrate(requests[: self._wish.calibration])
        recorder, answers = self._recorded(super().generate_until, requests)
        return recorder.results(requests, answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        self._require_ready()
        return self._recorded(super().generate_until_multi_round, requests)[1]  # there is no place for counts of each round

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self._require_ready()
        return super().loglikelihood(requests)

    def _recorded(self, answer: Callable[..., list[Any]], requests: list[Instance]) -> tuple[Recorder, list[Any]]:
        already, recorder = len(get_logged_metrics_history()), Recorder(self.model)
        with recorder.watching(self):
            answers = answer(requests)
        recorder.log(already)
        return recorder, answers

    def _prepared(self, args: dict[str, Any]) -> dict[str, Any]:
        """What the class behind is given; raises what it would only say after loading."""
        return args

    def _patch(self, wish: Wish, calibration: list[dict[str, Tensor]] | None = None) -> None:
        wish.apply(self.model, calibration)
        self._ready = True
        what = f"method={NONE}, the model is not patched" if wish.method is None else str(vtok.info(self.model))
        logger.info(f"vtok: {what}")

    def _require_ready(self) -> None:
        if not self._ready:
            raise ConfigError(
                "calibration takes images from questions with one answer each (generate_until), and these are others; give the "
                "number itself instead"
            )

    def _calibrate(self, requests: Sequence[Instance]) -> None:
        """Every process has questions of its own: the first one finds the numbers for all, or what is wrong."""
        found: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                self._patch(self._wish, self._inputs_of(requests))
                found = [configs_of(self.model)]
            except VtokError as error:
                found = [error]
        [result] = broadcast_object_list(found)
        if isinstance(result, VtokError):
            raise result
        if not self._ready:
            self._patch(Wish(result, self._wish.options))

    def _inputs_of(self, requests: Sequence[Instance]) -> list[dict[str, Tensor]]:
        """What the processor makes of a few requests; the model is not asked."""
        found: list[dict[str, Tensor]] = []

        def collect(**given: Any) -> Tensor:
            found.append({name: value for name, value in given.items() if torch.is_tensor(value)})
            return given["input_ids"]

        model = self.model
        model.generate = collect
        try:
            super().generate_until([_copy(request) for request in requests])
        finally:
            del model.generate
        return found


def _copy(request: Instance) -> Instance:
    """A request whose settings may be changed; lmms-eval's classes do that."""
    made = copy.copy(request)
    made.arguments = tuple(copy.deepcopy(part) if isinstance(part, dict) else part for part in request.args)
    return made


class _Llava(Patched):
    def _prepared(self, args: dict[str, Any]) -> dict[str, Any]:
        if str(args.get("batch_size", 1)) != "1":
            raise ConfigError(
                f"lmms-eval asks LLaVA one question at a time: --batch_size is 1, got {args['batch_size']}; `vtok eval vqa` "
                "asks in batches"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return args
        # lmms-eval's default is "", which means the device, and which transformers 5 refuses.
        return {**args, "device_map": args.get("device_map") or args.get("device", "cuda")}


class LlavaHf(_Llava, llava_chat.LlavaHf):
    """LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, with the chat template of the processor."""


class LlavaHfSimple(_Llava, llava_hf.LlavaHf):
    """The same with prompts as text."""


class Qwen25VL(Patched, qwen25_chat.Qwen2_5_VL):
    """Qwen2.5-VL, with the chat template of the processor."""


class Qwen25VLSimple(Patched, qwen2_5_vl.Qwen2_5_VL):
    """The same with prompts as text."""


class Qwen3VL(Patched, qwen3_chat.Qwen3_VL):
    """Qwen3-VL, with the chat template of the processor."""


class Qwen3VLSimple(Patched, qwen3_vl.Qwen3_VL):
    """The same with prompts as text."""
