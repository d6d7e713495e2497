"""The checks as classes that pytest collects: what every method passes in vtok's own tests, for methods of other packages.

    from vtok.testing import EncoderMethodTests

    class TestLoudest(EncoderMethodTests):
        config = Loudest(keep=0.8)

`config` has parameters under which tiny models lose tokens in several blocks. Every test runs once for every tiny model of the
backends that are installed; where a model is refused with its reason (`UnsupportedModelError`), the config's `alternatives` are
tried, and the test is skipped if all are refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest import SkipTest

import torch

import vtok
from vtok.capabilities import HasBudget
from vtok.config import MethodConfig
from vtok.errors import UnsupportedModelError
from vtok.targets import find_targets
from vtok.testing import encoder_checks, prompt_checks, tiny


@functools.cache
def _encoder(name: str) -> Any:
    return tiny.build(tiny.examples()[0][name])


@functools.cache
def _vlm(name: str) -> Any:
    return tiny.build_vlm(tiny.vlm_examples()[name])


class _Suite:
    """What both suites share.

    Attributes:
        config: the method, with parameters under which tiny models lose tokens.
        models: names of the tiny models to run on; `None` = all.
    """

    config: ClassVar[MethodConfig]
    models: ClassVar[Sequence[str] | None] = None

    @classmethod
    def known(cls) -> Sequence[str]:
        """Names of all tiny models."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Every test once for every tiny model."""
        if "model_name" in metafunc.fixturenames:
            metafunc.parametrize("model_name", list(self.known() if self.models is None else self.models))

    def variant(self, model: Any, size: Any = None) -> MethodConfig:
        """The config, or the first of its alternatives, that a model takes.

        Raises:
            SkipTest: it takes none; says why.
        """
        why: list[str] = []
        info = find_targets(model, size)[0].info
        for extra in ({}, *self.config.alternatives(info)):
            config = self.config.replace(**extra)
            try:
                vtok.patch(model, config, input_size=size)
            except UnsupportedModelError as error:
                why.append(str(error))
                continue
            vtok.unpatch(model)
            return config
        raise SkipTest(why[0])

    def test_the_config_survives_json(self) -> None:
        encoder_checks.check_json(self.config)

    def test_some_model_is_not_refused(self) -> None:
        refused = []
        for name in self.known() if self.models is None else self.models:
            try:
                self.variant(*self.built(name))
            except SkipTest as reason:
                refused.append(f"{name}: {reason}")
            else:
                return
        raise AssertionError(f"{self.config.name} is refused by every tiny model: {'; '.join(refused)}")

    @classmethod
    def built(cls, name: str) -> tuple[Any, Any]:
        """(a fresh copy of a tiny model, the size of its images)."""
        raise NotImplementedError


class EncoderMethodTests(_Suite):
    """For a method that acts inside vision encoders (`vtok.capabilities.EncoderMethod`).

    Attributes:
        config: the method, with parameters under which a tiny model (64 patches, 4 blocks) loses tokens in several blocks.
        models: names of tiny models, such as "timm: ViT"; `None` = all of the backends that are installed.
    """

    @classmethod
    def known(cls) -> Sequence[str]:
        return list(tiny.examples()[0])

    @classmethod
    def built(cls, name: str) -> tuple[Any, Any]:
        return copy.deepcopy(_encoder(name)), tiny.examples()[0][name].input_size

    def _run(self, check: Callable[..., None], name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> None:
        model, size = self.built(name)
        model = model.to(dtype)
        check(model, tiny.images(tiny.examples()[0][name], batch, dtype), self.variant(model, size), size)

    def test_removing_equals_masking(self, model_name: str) -> None:
        self._run(encoder_checks.check_masking, model_name, batch=3)

    def test_the_mildest_setting_changes_nothing(self, model_name: str) -> None:
        if not isinstance(self.config, HasBudget):
            raise SkipTest(f"{self.config.name} has no budget candidates")
        self._run(encoder_checks.check_no_op, model_name, dtype=torch.float32)

    def test_a_batch_is_its_images(self, model_name: str) -> None:
        self._run(encoder_checks.check_batch, model_name, batch=4)

    def test_gradients(self, model_name: str) -> None:
        self._run(encoder_checks.check_gradients, model_name, dtype=torch.float32)

    def test_plan_counts_tokens(self, model_name: str) -> None:
        self._run(encoder_checks.check_counts, model_name, dtype=torch.float32)

    def test_unpatching_leaves_no_trace(self, model_name: str) -> None:
        self._run(encoder_checks.check_unpatching, model_name, dtype=torch.float32)


class PromptMethodTests(_Suite):
    """For a method that acts on the prompts of vision-language models (`vtok.capabilities.PromptMethod`).

    Attributes:
        config: the method, with parameters under which a tiny model (16 visual tokens an image, 4 decoder layers) loses tokens.
        models: names of tiny models, such as "LLaVA-1.5"; `None` = all.
    """

    @classmethod
    def known(cls) -> Sequence[str]:
        return list(tiny.vlm_examples())

    @classmethod
    def built(cls, name: str) -> tuple[Any, Any]:
        return copy.deepcopy(_vlm(name)), None

    def _run(self, check: Callable[..., None], name: str) -> None:
        model, _ = self.built(name)
        example, config = tiny.vlm_examples()[name], self.variant(model)
        try:
            check(model, example, config)
        except UnsupportedModelError as error:  # of a pass: the method takes none of the prompts, or no plan can be made
            raise SkipTest(str(error)) from error

    def test_removing_equals_masking(self, model_name: str) -> None:
        self._run(prompt_checks.check_masking, model_name)

    def test_the_mildest_setting_changes_nothing(self, model_name: str) -> None:
        if not isinstance(self.config, HasBudget):
            raise SkipTest(f"{self.config.name} has no budget candidates")
        self._run(prompt_checks.check_no_op, model_name)

    def test_a_batch_is_its_prompts(self, model_name: str) -> None:
        self._run(prompt_checks.check_batch, model_name)

    def test_order_and_text_stay(self, model_name: str) -> None:
        self._run(prompt_checks.check_order, model_name)

    def test_plan_counts_tokens(self, model_name: str) -> None:
        self._run(prompt_checks.check_counts, model_name)

    def test_unpatching_leaves_no_trace(self, model_name: str) -> None:
        self._run(prompt_checks.check_unpatching, model_name)
