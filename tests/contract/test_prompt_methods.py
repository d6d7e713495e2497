"""What every method for prompts passes (`vtok.testing.prompt_checks`): each on one family of models, on all of them if slow."""

import functools
import tempfile

import pytest

import vtok
from vtok.capabilities import HasBudget
from vtok.patches.hf_vlm.families import OLDEST, find, release
from vtok.registry import METHODS
from vtok.testing import prompt_checks, tiny
from vtok.testing.suites import PromptMethodTests
from vtok.testing.trials import trial

pytestmark = pytest.mark.skipif(release() < OLDEST, reason="vision-language models need a younger transformers")

EXAMPLES = tiny.vlm_examples()
METHODS_ON_PROMPTS = [name for name in METHODS if METHODS.get(name).for_vlms()]
CHECKS = {name.removeprefix("check_"): check for name, check in vars(prompt_checks).items() if name.startswith("check_")}
del CHECKS["any_prompts"], CHECKS["traces"]  # which the others use
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def config_on(method, name):
    """The method's setting on an example, `None` if it is refused there."""
    model, (tried, cls) = built(name), (trial(method), METHODS.get(method))
    info = find(model)[0].info
    requests = tried.requests(cls, info, FOLDER.name) if tried.requests else cls.alternatives(info)
    for extra in ({}, *requests):
        try:
            config = cls.create(**{**tried.prompt, **extra})
            prompt_checks.prompts(model, EXAMPLES[name], config)
        except (vtok.VtokError, AssertionError):
            continue
        return config
    return None


def built(name):
    return PromptMethodTests.built(name)[0]


def run(check, method, name):
    config = config_on(method, name)
    if config is None:
        pytest.skip(f"{method} is refused, or has nothing to do")
    if check == "no_op" and not isinstance(config, HasBudget):
        pytest.skip(f"{method} has no budget candidates")
    CHECKS[check](built(name), EXAMPLES[name], config)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", METHODS_ON_PROMPTS)
def test_on_one_family(method, check):
    first = METHODS_ON_PROMPTS.index(method) % len(EXAMPLES)
    names = list(EXAMPLES)[first:] + list(EXAMPLES)[:first]
    run(check, method, next(name for name in names if config_on(method, name) is not None))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("method", METHODS_ON_PROMPTS)
def test_on_every_family(method, name, check):
    run(check, method, name)


def test_all_checks_are_here():
    assert set(CHECKS) == {"masking", "no_op", "batch", "order", "counts", "unpatching"}
