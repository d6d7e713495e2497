"""preset="official": every method that has one, its positions, and what it changes on a model."""

from typing import Any

import pytest
import torch
from helpers_layers import info as layer_info
from vlm_zoo import assert_same, build, generate, inputs

import vtok
from vtok.core.prompt import POSITIONS
from vtok.methods.preset import Official
from vtok.patches.hf_vlm.families import examples
from vtok.registry import METHODS
from vtok.testing import tiny

OFFICIAL = [name for name in METHODS if issubclass(METHODS.get(name), Official)]
KEEPS = ("dart", "evs", "fastv")  # whose programs keep positions
# CDPruner looks at a text encoder: tests/test_cdpruner_clip.py
ON_IMAGES = [name for name in OFFICIAL if name not in ("evs", "vidcom2", "fastvid", "cdpruner")]
HALF = {"pyramiddrop": {}, "sparsevlm": {"keep": [0.6, 0.3], "layers": [0, 1]}}


def given(method: str) -> dict[str, Any]:
    return HALF.get(method, {"keep": 0.5})


def positions(model: Any) -> str:
    return vtok.info(model).prompts[0].positions


@pytest.mark.parametrize("pad", [3, 8, 13])
def test_padding_decides_nothing_for_darts_set(pad: int) -> None:
    """The order of a set hangs on its numbers: those of the prompt, not of the padded batch."""
    example = examples()["Qwen2.5-VL"]
    model = tiny.build_vlm(example)
    alone = tiny.alone(model, example.inputs(model, torch.Generator().manual_seed(0)))[0]
    vtok.patch(model, "dart", keep=0.5, preset="official")
    length = alone["input_ids"].shape
    padded = {k: torch.cat([t.new_zeros(1, pad), t], 1) if t.shape[:2] == length else t for k, t in alone.items()}
    with torch.no_grad():
        wanted, found = (model(**values).logits[:, -1] for values in (alone, padded))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_method_of_the_field_has_one() -> None:
    field = ["cdpruner", "dart", "divprune", "evs", "fastervlm", "fastv", "fastvid", "hired", "holov", "prumerge"]
    assert sorted([*field, "pyramiddrop", "sparsevlm", "vidcom2", "visionzip", "vispruner"]) == sorted(OFFICIAL)
    for name in OFFICIAL:
        plain, official = METHODS.get(name)(), METHODS.get(name)(preset="official")
        assert plain.preset_positions is None and official.preset_positions in POSITIONS
        assert (official.preset_positions == "original") == (name in KEEPS)
        assert 'preset: `"official"`' in METHODS.get(name).__doc__, name
        assert METHODS.get(name).from_dict(official.to_dict()) == official
        with pytest.raises(vtok.UnknownNameError, match="unknown preset 'papers'"):
            METHODS.get(name)(preset="papers")


@pytest.mark.parametrize("method", ON_IMAGES)
def test_positions_are_those_of_the_program_unless_given(method: str) -> None:
    wanted = METHODS.get(method)(preset="official").preset_positions
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    ours = generate(vtok.patch(model, method, preset="official", **given(method)), values)
    assert positions(model) == wanted
    assert_same(generate(vtok.patch(model, method, preset="official", positions=wanted, **given(method)), values), ours)
    other = next(one for one in POSITIONS if one != wanted)
    theirs = generate(vtok.patch(model, method, preset="official", positions=other, **given(method)), values)
    assert positions(model) == other and (theirs[1] - ours[1]).abs().max() > 1e-4
    vtok.patch(model, method, **given(method))
    assert positions(model) == "original", "no preset"


@pytest.mark.parametrize("method", [name for name in ON_IMAGES if name != "prumerge"])
def test_a_batch_gives_what_its_prompts_give_alone(method: str) -> None:
    """PruMerge alone shares its ratio over a batch, as its program does."""
    values = inputs("LLaVA-1.5")
    model = vtok.patch(build("LLaVA-1.5"), method, preset="official", **given(method))
    together = generate(model, values)[1]
    first = int(values["attention_mask"][1].argmax())
    alone = {
        "input_ids": values["input_ids"][1:, first:],
        "attention_mask": values["attention_mask"][1:, first:],
        "pixel_values": values["pixel_values"][-1:],
    }
    assert (generate(model, alone)[1] - together[1:]).abs().max() < 2e-5 * max(1.0, float(together.abs().max()))


def test_models_with_positions_in_three_directions_keep_them() -> None:
    model = vtok.patch(build("Qwen2.5-VL"), "divprune", keep=0.5, preset="official")
    assert positions(model) == "original"
    generate(model, inputs("Qwen2.5-VL"))


def test_presets_that_differ_and_saved_positions(tmp_path) -> None:
    model = build("LLaVA-1.5")
    both = [vtok.VisionZip(keep=0.5, preset="official"), vtok.FastV(keep=0.5, preset="official")]
    with pytest.raises(
        vtok.ConfigError, match=r"presets stand for different positions \(visionzip compact and fastv original\)"
    ):
        vtok.patch(model, both)
    vtok.patch(model, both, positions="compact")
    assert positions(model) == "compact"
    vtok.patch(model, [both[0], vtok.FastV(keep=0.5)])  # one of them says
    assert positions(model) == "compact"
    vtok.save_config(model, tmp_path / "vtok.json")
    assert positions(vtok.patch(build("LLaVA-1.5"), tmp_path / "vtok.json")) == "compact"


def test_fastvid_has_no_pooling_head_to_look_at() -> None:
    with pytest.raises(vtok.UnsupportedModelError, match=r"the pooling head of a SigLIP tower, which .* leave the preset"):
        vtok.patch(build("Qwen2.5-VL"), "fastvid", preset="official")


def test_averages_of_sparsevlm_stand_behind_what_stays() -> None:
    plain, official = (vtok.SparseVLM(preset=preset).build_vlm(layer_info()) for preset in (None, "official"))
    assert not plain.official and official.official
    assert [plain.layer_count(site, 576, 576) for site in plain.sites] == [
        official.layer_count(site, 576, 576) for site in official.sites
    ]


def test_numbers_of_numpy_become_pythons() -> None:
    np = pytest.importorskip("numpy")
    assert type(vtok.SparseVLM(keep=[0.5, 0.25, 0.1]).keep[0]) is float
    assert vtok.VisPruner(keep_tokens=np.int64(8), preset="official").keep_tokens == 8
    assert torch.equal(torch.tensor(vtok.PyramidDrop(preset="official").keep), torch.tensor([0.5, 0.25, 0.125]))
