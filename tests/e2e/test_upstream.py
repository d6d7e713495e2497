"""transformers' own tests of its models, as the installed release brings them, with every model patched.

Nothing may fail at keep=1.0 that does not fail unpatched. With half of the visual tokens gone a test may meet what
`Failure.kind` names, and nothing else.
"""

import os

import pytest
from helpers_upstream import Failure, outcomes, release_tests

# It wants transformers' own class of cache and skips itself else; that of a shortened prompt is a subclass.
OTHER_CACHE = {"test_bc_cache_name_forward"}
KEEPING, ALL = ("kept", "live"), ("kept", "live", "half", "layers", "merged")
FAMILIES = {
    "LLaVA-1.5": ALL,
    "Qwen2.5-VL": ALL,
    "InternVL": ALL,
    "LLaVA-NeXT": ALL,
    **dict.fromkeys(("Qwen2-VL", "Qwen3-VL", "LLaVA-OneVision", "Gemma3", "PaliGemma", "Idefics3", "SmolVLM"), ALL[:3]),
}


@pytest.fixture(scope="module")
def tests(request):
    if os.environ.get("PIP_NO_INDEX"):
        pytest.skip("transformers' tests come with its source distribution, which pip may not fetch under PIP_NO_INDEX")
    return release_tests(request.config.cache.mkdir("upstream"))


def _listed(failures):
    return "\n".join(map(str, failures))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_new_fails(name, tests, tmp_path):
    found = outcomes(tests, name, ("none", *FAMILIES[name]), tmp_path)
    plain = found.pop("none")
    assert len(plain.ran) > 120
    assert len(plain.failed) < 10, _listed(plain.failed)
    for way, outcome in found.items():
        skipped = set() if way in KEEPING else OTHER_CACHE
        assert outcome.ran | skipped == plain.ran | skipped, way
        assert outcome.skipped | skipped == plain.skipped | skipped, way
        assert bool(outcome.tokens) == (way not in KEEPING), way
        assert all(after < before for before, after in outcome.tokens), way
    assert found["live"].asked > 100

    new = {way: list(outcome.beyond(plain)) for way, outcome in found.items()}
    assert not new["kept"], _listed(new["kept"])
    live = [failure for failure in new["live"] if failure.kind != "refusal"]
    assert not live, _listed(live)
    for way in new.keys() - set(KEEPING):
        faults = [failure for failure in new[way] if failure.kind == "fault"]
        assert not faults, f"{way}:\n{_listed(faults)}"


@pytest.mark.parametrize(
    ("errors", "statement", "kind"),
    [
        (["vtok.errors.StateError", "vtok.errors.VtokError", "builtins.RuntimeError"], "model(**inputs)", "refusal"),
        (["builtins.AssertionError"], "self.assertListEqual(list(attentions[0].shape[-3:]), [4, 28, 28])", "shape"),
        (["builtins.AssertionError"], "self.assertEqual(cache.layers[0].keys.shape, shape)", "shape"),
        (["builtins.AssertionError"], "assert found.image_outputs.hidden_states[1].shape == expected", "shape"),
        (["builtins.AssertionError"], "self.assertIsNotNone(hidden_states.grad)", "gradient"),
        (["torch._dynamo.exc.RecompileError", "builtins.Exception"], "compiled(**inputs)", "recompilation"),
        (["builtins.AssertionError"], "torch.testing.assert_close(attentions, other.attentions)", "fault"),
        (["builtins.AssertionError"], "self.assertListEqual(list(hidden_states[0].shape[-2:]), [28, 64])", "fault"),
        (["builtins.RuntimeError"], "attentions = model(**inputs).attentions[0].shape", "fault"),
    ],
)
def test_kinds_of_failures(errors, statement, kind):
    assert Failure("test", "", tuple(errors), "", statement, "").kind == kind
