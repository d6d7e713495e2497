"""What a config can do follows from what it defines; what it lacks is said in a sentence; old names still work."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from helpers_golden import model_info

import vtok
from vtok.capabilities import (
    Calibrates,
    EncoderMethod,
    HasBudget,
    HasSearchSpace,
    PromptMethod,
    candidates,
    candidates_at,
    encoder_reducer,
    prompt_reducer,
    search_space,
    to_calibrate,
)
from vtok.config import MethodConfig
from vtok.core.prompt import VLMInfo
from vtok.registry import METHODS, encoder_methods

VLM = VLMInfo("Llava", 4, 64, 4)
BOTH = {"random", "uniform"}


@dataclass(frozen=True)
class Idle(MethodConfig):
    """A config that was forgotten to be finished."""

    name: ClassVar[str] = "idle"


def test_every_method_acts_somewhere():
    inside = {name for name in METHODS if issubclass(METHODS.get(name), EncoderMethod)}
    prompts = {name for name in METHODS if issubclass(METHODS.get(name), PromptMethod)}
    assert sorted(inside) == encoder_methods()
    assert inside | prompts == set(METHODS)
    assert inside & prompts >= BOTH
    assert {"tome", "pitome", "ats", "zero_tprune"} <= inside - prompts
    assert {"todre", "fastv", "divprune", "correlation", "evs"} <= prompts - inside


def test_what_else_methods_can_do():
    ours = set(vtok._CONFIGS.values())
    assert {name for name in ours if not isinstance(METHODS.get(name)(), HasBudget)} == {"atp", "correlation", "pixel_dedup"}
    without_space = {name for name in ours if not isinstance(METHODS.get(name)(), HasSearchSpace)}
    assert without_space == {"atp", "correlation", "divprune", "pixel_dedup"}
    assert [name for name in ours if isinstance(METHODS.get(name)(), Calibrates)] == ["correlation"]
    assert to_calibrate(vtok.Correlation()) is not None
    assert to_calibrate(vtok.Correlation(alpha=0.5)) is None
    assert to_calibrate(vtok.ToMe()) is None


@pytest.mark.parametrize(
    ("ask", "config", "info", "error", "words"),
    [
        (
            encoder_reducer,
            vtok.ToDRE(),
            model_info(),
            vtok.UnsupportedModelError,
            "todre drops visual tokens .* Vit is",
        ),
        (prompt_reducer, vtok.ToMe(), VLM, vtok.UnsupportedModelError, "tome reduces tokens inside .* such as Llava"),
        (encoder_reducer, Idle(), model_info(), vtok.UnsupportedModelError, "idle acts nowhere: Idle defines neither build"),
        (prompt_reducer, Idle(), VLM, vtok.UnsupportedModelError, "idle acts nowhere: Idle defines neither build"),
        (candidates, vtok.ToDRE(), model_info(), vtok.ConfigError, "todre has no single knob that a FLOPs budget could set"),
        (candidates, vtok.ATP(), VLM, vtok.ConfigError, "atp has no single knob that a FLOPs budget for a vision-language"),
        (search_space, vtok.ToDRE(), model_info(), vtok.ConfigError, "todre has no schedule inside vision encoders"),
        (search_space, vtok.ToMe(), VLM, vtok.ConfigError, "tome has no schedule on vision-language models"),
        (search_space, vtok.RandomDrop(), VLM, vtok.ConfigError, "random has no schedule on vision-language models"),
        (search_space, vtok.DivPrune(), VLM, vtok.ConfigError, "divprune has no schedule on vision-language models"),
        (search_space, vtok.Downsample(), VLM, vtok.ConfigError, "downsample has no schedule on vision-language models"),
    ],
)
def test_what_a_method_lacks_is_said(ask, config, info, error, words):
    with pytest.raises(error, match=words):
        ask(config, info)


def test_points_need_a_schedule():
    with pytest.raises(vtok.ConfigError, match="atp has no schedule on vision-language models that could be searched"):
        candidates_at(vtok.ATP(), VLM, {})
    (first, *_) = candidates_at(vtok.RandomDrop(), model_info(), {"layers": [1]})
    assert (first.layers, first.keep) == ((1,), 1)


def test_the_knob_is_what_a_budget_sets():
    facts = model_info(num_patches=64, grid=(8, 8))
    assert candidates(vtok.ToMe(), facts)[3].knob() == {"r": 3}
    assert candidates(vtok.ATS(), facts)[-1].knob() == {"num_tokens": 1}
    assert candidates(vtok.PiToMe(r=2), facts)[100].knob() == {"ratio": 0.9}
    assert candidates(vtok.VisionZip(), VLM)[500].knob() == {"keep": 0.5}
    assert candidates(vtok.PyramidDrop(), VLM)[500].knob() == {"keep": [0.5, 0.25, 0.125]}


def test_alternatives_are_for_the_model_at_hand():
    assert [extra for extra, _ in vtok.ATS.variants(model_info())] == [{}, {"query": "mean"}]
    assert [extra for extra, _ in vtok.FastV.variants(VLM)] == [{}]
    assert [extra for extra, _ in vtok.FastV.variants(model_info())] == [{}]
    late = VLMInfo("Late", 6, 64, 4, first_layer=4)
    assert [extra for extra, _ in vtok.FastV.variants(late, keep=0.5)] == [{}, {"layer": 4}]
    assert vtok.DART.alternatives(late) == vtok.FastV.alternatives(late)


def old_style():
    """As configs were written before capabilities had one name for both kinds of models."""

    @dataclass(frozen=True)
    class Old(MethodConfig):
        name: ClassVar[str] = "old"
        set_by_budget: ClassVar[tuple[str, ...]] = ("keep",)
        keep: float = 0.5

        def ladder(self, info):
            return [self.replace(keep=1.0), self]

        def ladder_vlm(self, info):
            return [self]

        def search_space_vlm(self, info):
            return {}

        def ladder_at_vlm(self, info, point):
            return self.budget_candidates(info)

        def build(self, info):
            raise NotImplementedError

        def build_vlm(self, info):
            raise NotImplementedError

    return Old()


def test_old_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Old\.\w+ is called \w+ now") as told:
        config = old_style()
    assert len(told) == 4
    assert [len(candidates(config, info)) for info in (model_info(), VLM)] == [2, 1]
    assert search_space(config, VLM) == {}
    assert candidates_at(config, VLM, {}) == [config]
    with pytest.warns(DeprecationWarning, match=r"ToMe\.ladder is called budget_candidates now"):
        assert vtok.ToMe().ladder(model_info()) == vtok.ToMe().budget_candidates(model_info())
    with pytest.raises(AttributeError, match="'ToMe' object has no attribute 'laddr'"):
        vtok.ToMe().laddr  # noqa: B018
