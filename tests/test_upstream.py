"""transformers' own tests of its models, as the installed release brings them, with every model patched.

Nothing may fail at keep=1.0 that does not fail unpatched. With half of the visual tokens gone a test may meet a refusal, other
shapes of attentions and caches, or a recompilation: nothing else.
"""

import os

import pytest
from helpers_upstream import Failure, outcomes, release_tests

WAYS = ("none", "kept", "live", "half")
FAMILIES = (
    "LLaVA-1.5", "Qwen2.5-VL", "InternVL", "LLaVA-NeXT", "Qwen2-VL", "Qwen3-VL", "LLaVA-OneVision", "Gemma3", "PaliGemma",
    "Idefics3", "SmolVLM",
)  # fmt: skip


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
    found = outcomes(tests, name, WAYS, tmp_path)
    plain = found["none"]
    assert len(plain.ran) > 100
    assert len(plain.failed) < 10, _listed(plain.failed)
    for way in WAYS[1:]:
        assert found[way].skipped == plain.skipped, way
        assert found[way].ran == plain.ran, way
    assert not found["kept"].tokens and not found["live"].tokens
    assert found["live"].asked > 100
    assert any(after < before for before, after in found["half"].tokens)

    kept = list(found["kept"].beyond(plain))
    assert not kept, _listed(kept)
    live = [failure for failure in found["live"].beyond(plain) if failure.kind != "refusal"]
    assert not live, _listed(live)
    half = [failure for failure in found["half"].beyond(plain) if failure.kind == "fault"]
    assert not half, _listed(half)


@pytest.mark.parametrize(
    ("errors", "statement", "kind"),
    [
        (["vtok.errors.StateError", "vtok.errors.VtokError", "builtins.RuntimeError"], "model(**inputs)", "refusal"),
        (["builtins.AssertionError"], "self.assertListEqual(list(attentions[0].shape[-3:]), [4, 28, 28])", "shape"),
        (["builtins.AssertionError"], "self.assertEqual(cache.layers[0].keys.shape, shape)", "shape"),
        (["torch._dynamo.exc.RecompileError", "builtins.Exception"], "compiled(**inputs)", "recompilation"),
        (["builtins.AssertionError"], "torch.testing.assert_close(attentions, other.attentions)", "fault"),
        (["builtins.AssertionError"], "self.assertListEqual(list(hidden_states[0].shape[-2:]), [28, 64])", "fault"),
        (["builtins.RuntimeError"], "attentions = model(**inputs).attentions[0].shape", "fault"),
    ],
)
def test_kinds_of_failures(errors, statement, kind):
    assert Failure("test", "", tuple(errors), "", statement, "").kind == kind
